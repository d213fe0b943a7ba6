"""Engine registry: which engine implements each device, and why one is unavailable.

An engine is a module with the functions `forward` and `backward`, with the signatures of reference.py. It is
registered with torch's dispatcher for its device, which selects it at call time; the portable engine serves
every device that has no other. Setting MINRNN_ENGINE to a name in ENGINES before minrnn is imported forces
that engine; an engine that cannot load then raises.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from minrnn.files import nearest

__all__ = [
    "ENGINES",
    "Engine",
    "Functions",
    "engines",
    "fallback",
    "forced",
    "implementations",
    "load",
    "register",
    "serving",
]


@dataclass(frozen=True)
class Engine:
    """The status of an engine, one line of `minrnn engines`."""

    name: str
    """Key in ENGINES."""
    device: str
    """The device type that it implements; "any" for those in torch's own operations."""
    serves: bool
    """Whether calls on that device are dispatched to it."""
    detail: str
    """Its version or instruction set, or why it is unavailable."""


_ANY = "CompositeExplicitAutograd"

# name: (module, device type, key of torch's dispatcher)
ENGINES: dict[str, tuple[str, str, str]] = {
    "cpp": ("minrnn.ops.cpu", "cpu", "CPU"),
    "triton": ("minrnn.ops.triton.engine", "cuda", "CUDA"),
    "portable": ("minrnn.ops.portable", "any", _ANY),
    "reference": ("minrnn.ops.reference", "any", _ANY),
}


def forced() -> str | None:
    """Return the engine named by MINRNN_ENGINE; None when the variable is unset or empty.

    Raises:
        ValueError: the name is not in ENGINES.
    """
    name = os.environ.get("MINRNN_ENGINE", "")
    if name and name not in ENGINES:
        raise ValueError(
            f"MINRNN_ENGINE must be one of {', '.join(ENGINES)}, got {name!r}{nearest(name, ENGINES)}"
        )
    return name or None


def load(name: str) -> ModuleType | ImportError:
    """Return the engine's module, or the error that says why it cannot load or lacks its device."""
    module, device, _ = ENGINES[name]
    if device == "cuda" and not torch.cuda.is_available():
        return ImportError("torch finds no CUDA device")
    if device == "cuda" and torch.version.hip and forced() != name:
        return ImportError(f"it has not been run on ROCm; MINRNN_ENGINE={name} uses it there")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return error


Functions = tuple[Callable[..., Any], Callable[..., Any]]
"""An engine's implementations of an operator and of its backward, with the operators' arguments."""


def implementations(
    modules: Mapping[str, str], functions: Callable[[ModuleType], Functions]
) -> dict[str, Functions]:
    """Find the implementations of an operator and its backward, by dispatch key.

    Call it before the operator is defined: if it raises, a second import then raises the same error.

    Args:
        modules: the modules that implement the operator, by engine name.
        functions: returns the two implementations in such a module.

    Raises:
        ValueError: MINRNN_ENGINE names no engine.
        RuntimeError: MINRNN_ENGINE names an engine that cannot load.
    """
    chosen, found = forced(), {}
    for name, (_, device, key) in ENGINES.items():
        if name not in modules or not _is_registered(name):
            continue
        if device == "cuda" and chosen is None:
            found[key] = _when_used(name, modules, functions)
        elif isinstance(module := _find(name, modules), ModuleType):
            found[key] = functions(module)
        elif chosen == name:
            raise RuntimeError(f"MINRNN_ENGINE={name}, but that engine cannot load: {module}") from module
    return found


def register(library: torch.library.Library, operator: str, found: Mapping[str, Functions]) -> None:
    """Register the result of `implementations` for an operator and its backward, defined in `library`."""
    for key, (forward, backward) in found.items():
        library.impl(operator, forward, key)
        library.impl(f"{operator}_backward", backward, key)


def serving(name: str, modules: Mapping[str, str]) -> ModuleType:
    """Return the engine's module among `modules`, or that of `fallback()` if the engine cannot load."""
    module = _find(name, modules)
    return module if isinstance(module, ModuleType) else importlib.import_module(modules[fallback()])


def fallback() -> str:
    """Return the engine that serves every device without an engine of its own: "portable" unless forced."""
    return "reference" if forced() == "reference" else "portable"


def _is_registered(name: str) -> bool:
    """Whether an engine that can load serves its device."""
    return name == fallback() if ENGINES[name][2] == _ANY else forced() in (None, name)


def _find(name: str, modules: Mapping[str, str]) -> ModuleType | ImportError:
    engine = load(name)
    if isinstance(engine, ImportError):
        return engine
    try:
        return importlib.import_module(modules[name])
    except ImportError as error:
        return error


def _when_used(
    name: str, modules: Mapping[str, str], functions: Callable[[ModuleType], Functions]
) -> Functions:
    """Return functions that load the engine on their first call.

    A search for a GPU at import would initialize CUDA, which breaks in processes that are forked later, and
    importing Triton takes as long as importing everything else.
    """

    @cache
    def found() -> Functions:
        return functions(serving(name, modules))

    return lambda *arguments: found()[0](*arguments), lambda *arguments: found()[1](*arguments)


def engines() -> list[Engine]:
    """List every engine: whether its device's calls reach it, and if not, why.

    >>> [engine.name for engine in engines()]
    ['cpp', 'triton', 'portable', 'reference']
    """
    return [_describe(name) for name in ENGINES]


def _describe(name: str) -> Engine:
    _, device, _ = ENGINES[name]
    module = load(name)
    if isinstance(module, ImportError):
        return Engine(name, device, False, f"not available: {module}")
    if _is_registered(name):
        return Engine(name, device, True, _detail(name, module))
    if forced() is None:
        return Engine(name, device, False, f"{_detail(name, module)}; MINRNN_ENGINE={name} uses it")
    return Engine(name, device, False, f"disabled by MINRNN_ENGINE={forced()}")


def _detail(name: str, module: ModuleType) -> str:
    if name == "reference":
        return "loop over time in float64, which defines the results"
    if name == "portable":
        return "parallel over time in PyTorch; serves every device without an engine of its own"
    if name == "triton":
        return f"Triton {module.VERSION}, compiled when first used"
    alone = "" if module.compiled.threads_by else ", one thread: torch's OpenMP was not found"
    return f"compiled C++, {module.ISA} instructions{alone}"
