"""Whether a model can be built again from its config, and the tensors that it then needs."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHOWN = 4
"""Names that an error lists of each fault."""

NOT_RUN_AT_ONCE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""Marks of functions whose calls return an object, whatever they end with."""


def unwrap(model: nn.Module) -> nn.Module:
    """Take off what has been put around a whole model: a module that holds nothing but it.

    torch.compile, DataParallel and DistributedDataParallel do so, and other libraries.
    """
    while list(model._modules) in (["_orig_mod"], ["module"]) and not model._parameters:
        (inner,) = model._modules.values()
        assert inner is not None
        model = inner
    return model


def tensors_to_keep(model: nn.Module, rebuilt: nn.Module) -> dict[str, Tensor]:
    """Find all tensors of a model, by the names that they have in one that is built anew from its config.

    Args:
        model: any.
        rebuilt: what its config builds, on the meta device.

    Returns:
        Parameters and buffers.

    Raises:
        ValueError: the model has become another one than its config builds, or a tensor is none that a file
            keeps.
    """
    ours, theirs = dict(_parts(model, "")), dict(_parts(rebuilt, ""))
    found, expected = _tensors(ours), _tensors(theirs)
    shared = sorted(ours.keys() & theirs.keys())
    alike = [name for name in shared if type(ours[name]) is type(theirs[name])]
    faults = {
        **misfits(expected, found),
        "of another class": [
            f"{name or 'the whole'} ({type(ours[name]).__name__} for {type(theirs[name]).__name__})"
            for name in shared
            if name not in alike
        ],
        "of other settings": [
            f"{name}.{setting}"
            for name in alike
            for setting, value in _settings(theirs[name])
            if getattr(ours[name], setting, None) != value
        ],
        "methods replaced": [
            f"{name or 'the whole'}.{method}" for name in alike for method in _methods_replaced(ours[name])
        ],
        "forward hooks that may return something": [
            name or "the whole" for name in alike if any(map(_may_return, _forward_hooks(ours[name])))
        ],
        "no plain numbers": [name for name, x in found.items() if not _is_plain(x)],
        "one memory": _in_one_memory(found),
        "added or left out": _parts_alone(ours, theirs, found) + _parts_alone(theirs, ours, expected),
    }
    if text := describe(faults):
        raise ValueError(
            f"save_checkpoint: the model is not what its config builds, and could not be loaded; {text}; "
            "undo what has changed it (merge adapters, remove parametrizations, pruning and hooks, gather "
            "what is sharded), or keep its state_dict with torch.save"
        )
    return found


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Compare the names and shapes of two sets of tensors."""
    return {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{name} ({tuple(expected[name].shape)} expected, got {tuple(found[name].shape)})"
            for name in sorted(expected.keys() & found.keys())
            if expected[name].shape != found[name].shape
        ],
    }


def describe(faults: Mapping[str, Collection[str]]) -> str:
    """Join what is wrong to one line; empty where nothing is."""
    return "; ".join(f"{what}: {_some(list(names))}" for what, names in faults.items() if names)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _parts(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its name, without those that torch has put around one."""
    while "_orig_mod" in module._modules or isinstance(
        module, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    ):
        (inner,) = module._modules.values()
        assert inner is not None
        module = inner
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _parts(child, f"{name}.{child_name}" if name else child_name)


def _tensors(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{place}.{name}" if place else name: x
        for place, part in parts.items()
        for name, x in (*part._parameters.items(), *part._buffers.items())
        if x is not None
    }


def _parts_alone(
    ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> list[str]:
    """Names of our parts that they do not have, of those whose tensors do not tell so."""
    names = sorted(ours.keys() - theirs.keys())
    return [name for name in names if not any(tensor.startswith(f"{name}.") for tensor in tensors)]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers, names and switches that say what a module computes; its mode is none of them."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str)):
            yield name, value


def _methods_replaced(module: nn.Module) -> list[str]:
    """Names of its class's methods in whose place the module itself has something else."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None))]


def _forward_hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _may_return(hook: Any) -> bool:
    """Whether a hook may return something, which then takes the place of inputs or outputs.

    Those that are seen to end without a value only watch: they note shapes, times and activations.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    code = getattr(hook, "__code__", None) or getattr(type(hook).__call__, "__code__", None)
    if code is None or code.co_flags & NOT_RUN_AT_ONCE:
        return True
    steps = list(dis.get_instructions(code))
    return any(
        last.argval is not None
        if last.opname == "RETURN_CONST"
        else last.is_jump_target or before.opname != "LOAD_CONST" or before.argval is not None
        for before, last in itertools.pairwise(steps)
        if last.opname.startswith("RETURN_") and last.opname != "RETURN_GENERATOR"
    )


def _is_plain(x: Tensor) -> bool:
    """Whether a file can keep it, and an assignment give it back."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.layout is torch.strided
        and not x.is_meta
        and x.is_floating_point()
    )


def _in_one_memory(tensors: Mapping[str, Tensor]) -> list[str]:
    """Pairs of names of one tensor, which would be two when they are loaded."""
    names: dict[tuple[Any, ...], str] = {}
    pairs = []
    for name, x in tensors.items():
        if _is_plain(x) and x.numel():
            first = names.setdefault((x.device, x.data_ptr()), name)
            pairs += [f"{first} and {name}"] if first != name else []
    return pairs
