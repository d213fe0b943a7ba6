"""Queries for torch's active modes and transforms, and operations on dual tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from minrnn.ops.torch_private import (
    forward_mode_is_active,
    functorch_is_active,
    has_dispatch_modes,
    jit_tracing_state,
)

__all__ = [
    "have_tangents",
    "in_autocast",
    "is_jit_traced",
    "is_observed",
    "is_plain",
    "is_traced",
    "is_transformed",
    "join",
    "separate",
    "without_autocast",
]


def _has_autocast(x: Tensor) -> bool:
    """Whether the device of x has autocast: all have that compute.

    With torch 2.11, torch.amp.is_autocast_available breaks the graph of torch.compile.
    """
    return x.device.type != "meta"


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; False on meta, which has no autocast."""
    return _has_autocast(x) and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast is off for the device of x."""
    return torch.autocast(x.device.type, enabled=False) if _has_autocast(x) else nullcontext()


def is_jit_traced() -> bool:
    """Whether torch.jit.trace is active."""
    return jit_tracing_state() is not None


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is active."""
    return torch.compiler.is_compiling() or is_jit_traced()


def is_transformed() -> bool:
    """Whether one of torch.func's transforms, or forward-mode differentiation, is active."""
    return functorch_is_active() or forward_mode_is_active()


def is_observed() -> bool:
    """Whether a compiler, a tracer, a transform, autocast or a dispatch mode is active.

    Each of them intercepts torch's operations, and would not see inside a call of the compiled engine.
    """
    return is_traced() or is_transformed() or has_dispatch_modes() or torch.is_autocast_enabled("cpu")


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether no transform is active and all are plain tensors, not of a subclass.

    Results computed from them may then be written in place.
    """
    return not is_transformed() and all(x is None or type(x) in (Tensor, Parameter) for x in tensors)


LEVEL = 0
"""The level of forward mode, of which torch has one. torch.autograd.forward_ad's own counter misses compiled
graphs."""


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether a tensor has a forward-mode tangent; forward mode stays on under no_grad."""
    return any(x is not None and forward_ad.unpack_dual(x, level=LEVEL).tangent is not None for x in tensors)


def separate(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Tensor | None]]:
    """Split dual tensors into their primals and their tangents, None where there is none."""
    pairs = [(None, None) if x is None else forward_ad.unpack_dual(x, level=LEVEL) for x in tensors]
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs]


def join(primal: Tensor, tangent: Tensor) -> Tensor:
    """Make a dual tensor of a primal and its tangent."""
    return forward_ad.make_dual(primal, tangent, level=LEVEL)
