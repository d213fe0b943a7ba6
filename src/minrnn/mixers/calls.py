"""Whether a call of a module runs its class's own `forward`, without patches and hooks.

Where it does, a mixer or a model may compute the same in a faster way. Everywhere else it has to call.
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
def _passed(kind: Any) -> tuple[str, ...]:
    """Return the names of the methods that a call of an instance runs; a mixer's forward calls its `mix`.

    An instance may override all but `__call__`.
    """
    return ("__call__", "forward", "mix") if hasattr(kind, "mix") else ("__call__", "forward")


@lru_cache
def _callers(kind: Any) -> Callable[[type[nn.Module]], tuple[Any, ...]]:
    """Return a getter of the methods named by `_passed`."""
    return operator.attrgetter(*_passed(kind))


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what `kind` computes, hooks aside.

    It does if its class inherits `kind`'s forward, as the class of a parametrized module does.
    """
    if not isinstance(module, kind) or "forward" in module.__dict__:
        return False
    if torch.compiler.is_compiling():  # dynamo cannot trace more than this
        return type(module).forward is kind.forward
    return _calling(type(module)) == _calling(kind) and _is_own(kind)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what `kind` computes and runs no hooks."""
    if torch.compiler.is_compiling() or not runs(module, kind):
        return False
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or has_any_global_hook()
    )
    return not hooked


def _is_own(kind: Any) -> bool:
    """Whether a call of the class's instances runs the methods that the class was defined with."""
    return _are_own(kind, *_callers(kind)(kind))


@lru_cache
def _are_own(kind: Any, *functions: Any) -> bool:
    """Whether these methods, named by `_passed`, come from their classes' own modules: none is patched."""
    for name, function in zip(_passed(kind), functions, strict=True):
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if getattr(function, "__globals__", None) is not vars(sys.modules[owner.__module__]):
            return False
    return True
