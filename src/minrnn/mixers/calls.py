"""What a call of a module runs: its class's own `forward`, or what others have put around it or in its place.

Where a call would do nothing but what a class says, a mixer or a model may do the same in another way, which
is faster. Everywhere else it has to call.
"""

import operator
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from minrnn.ops.torch_private import has_any_global_hook

_calling: Callable[[type[nn.Module]], tuple[Any, ...]] = operator.attrgetter("__call__", "forward")


@lru_cache  # of a class, which mypy does not take for hashable
def passed(kind: Any) -> tuple[str, ...]:
    """Name what a call of a class's instances goes through: a mixer's forward leaves the work to its `mix`.

    All but `__call__` an instance may have of its own.
    """
    return ("__call__", "forward", "mix") if hasattr(kind, "mix") else ("__call__", "forward")


@lru_cache
def callers(kind: Any) -> Callable[[type[nn.Module]], tuple[Any, ...]]:
    """Make what finds the functions of `passed` in the class."""
    return operator.attrgetter(*passed(kind))


def is_own(kind: Any) -> bool:
    """Whether a class's calls are those that the file of the class defines: nobody has patched it."""
    return _is_own(kind, *callers(kind)(kind))


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what `kind` computes; what hooks do is not asked.

    So it does if its class inherits `kind`'s forward, as that of a parametrized module does.
    """
    if not isinstance(module, kind) or "forward" in module.__dict__:
        return False
    if torch.compiler.is_compiling():  # which traces no more than this
        return type(module).forward is kind.forward
    return _calling(type(module)) == _calling(kind) and is_own(kind)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what `kind` computes, and nobody is there who could tell."""
    if torch.compiler.is_compiling() or not runs(module, kind):
        return False
    watched = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or has_any_global_hook()
    )
    return not watched


@lru_cache
def _is_own(kind: Any, *functions: Any) -> bool:
    """Whether these, of the names in `passed`, are the functions that the class is defined with."""
    for name, function in zip(passed(kind), functions, strict=True):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if getattr(function, "__globals__", None) is not vars(sys.modules[owner.__module__]):
            return False
    return True
