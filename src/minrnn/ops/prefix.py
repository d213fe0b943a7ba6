"""The operator `minrnn::gated_prefix`: what all steps of a gated scan together do to the state before them.

It has no derivatives of its own: sharded.py, which uses it, has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from minrnn.ops.gated import MODULES, Mode
from minrnn.ops.gates import GATES
from minrnn.ops.reference import state_dtype
from minrnn.ops.registry import Functions, implementations, register

__all__ = ["PREFIX_MODULES", "Mode", "prefix", "prefix_backward"]

PREFIX_MODULES = {name: module for name, module in MODULES.items() if name != "triton"}
"""The modules that implement the prefix, by engine name; on a GPU the portable engine computes it."""

_LIBRARY = torch.library.Library("minrnn", "FRAGMENT")
_MODE = "str gate, str candidate, bool signed, bool reverse"


def _functions(module: ModuleType) -> Functions:
    return module.prefix, module.prefix_backward


_FOUND = implementations(PREFIX_MODULES, _functions)
_LIBRARY.define(f"gated_prefix(Tensor[] pre, Tensor? reset, {_MODE}) -> (Tensor, Tensor)")
_LIBRARY.define(f"gated_prefix_backward(Tensor dh, Tensor[] pre, Tensor? reset, {_MODE}) -> Tensor")
register(_LIBRARY, "gated_prefix", _FOUND)


def prefix(pre: Sequence[Tensor], reset: Tensor | None, mode: Mode) -> tuple[Tensor, Tensor]:
    """Return the decay and the end of all steps, (B, D) in at least float32: h -> decay * h + end.

    Args:
        pre: the gate's pre-activations, or one packed tensor.
        reset: (B, T), bool, or None; after a reset the decay is zero.
        mode: the kind of recurrence.
    """
    if not pre[0].shape[0]:
        D = pre[0].shape[2] // (GATES[mode.gate].num_pre if len(pre) == 1 else 1)
        nothing = pre[0].new_empty(0, D, dtype=state_dtype(pre[0].dtype))
        return nothing, nothing.clone()
    found: tuple[Tensor, Tensor] = torch.ops.minrnn.gated_prefix(list(pre), reset, *mode)
    return found


def prefix_backward(dh: Tensor, pre: Sequence[Tensor], reset: Tensor | None, mode: Mode) -> Tensor:
    """Return the gradient of the state before all steps, (B, D), given those of the states, dh (B, T, D)."""
    if not dh.shape[0]:
        return dh.new_empty(0, dh.shape[2], dtype=state_dtype(dh.dtype))
    found: Tensor = torch.ops.minrnn.gated_prefix_backward(dh, list(pre), reset, *mode)
    return found
