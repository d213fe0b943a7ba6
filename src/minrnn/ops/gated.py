"""The operator `minrnn::gated_scan`: its engines, its derivatives of every order, and its batching.

Eager calls go through an autograd.Function at once, whose overhead is a quarter of a registered operator's
autograd; torch.func's transforms, forward mode, and what compilers and tracers write down call the operator
itself. Both doors share what stands below, so there is one law. Everywhere here `pre` holds the gate's k
tensors, or one packed tensor, and nothing is checked: recurrence.py has done that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction

from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.reference import output_like, split, state_dtype
from minrnn.ops.registry import ENGINES, Functions, implementations, register, serving
from minrnn.ops.transforms import (
    at_level,
    fold,
    have_tangents,
    is_traced,
    is_transformed,
    join,
    needs_gradients,
    register_vmap,
    separate,
    unfold,
)

__all__ = ["MODULES", "Mode", "apply", "new_output"]


class Mode(NamedTuple):
    """Which recurrence: the trailing arguments of the operators."""

    gate: str
    """A name in GATES."""
    candidate: str
    """A name in CANDIDATES."""
    signed: bool
    """Whether decays lie in (-1, 1)."""
    reverse: bool
    """From the last step to the first."""


def apply(pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, mode: Mode) -> Tensor:
    """h of the recurrence, differentiable: see `minrnn.ops.gated_scan`."""
    if is_traced() or is_transformed():
        return _forward_op(pre, h0, reset, *mode)
    if needs_gradients(h0, *pre):
        return _Recorded.apply(mode, h0, reset, *pre)  # type: ignore[attr-defined]
    return _forward(pre, h0, reset, mode)


def _forward(pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, mode: Mode) -> Tensor:
    """Call the operator past its check whether gradients are wanted, a quarter of what a step takes."""
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(pre, h0, reset, *mode)


def new_output(like: Tensor, D: int) -> Tensor:
    """Room for (B, T, D), uninitialised, laid out as `like`, from where the CPU's engine has its outputs."""
    return _new_output()(like, D)


@cache
def _new_output() -> Callable[[Tensor, int], Tensor]:
    return getattr(serving("cpp", MODULES), "new_output", output_like)


# ----------------------------------------------------------------------------------------------------------
# The operators, and who serves them

MODULES = {name: module for name, (module, _, _) in ENGINES.items()}
"""The modules that compute the gated scan, by the engine's name."""


def _functions(module: ModuleType) -> Functions:
    """An engine's functions as the operators call them: not at all for a batch without rows."""

    def forward(pre: list[Tensor], *arguments: Any) -> Tensor:
        return (module.forward if pre[0].shape[0] else _forward_fake)(pre, *arguments)

    def backward(dh: Tensor, *arguments: Any) -> list[Tensor]:
        return (module.backward if dh.shape[0] else _backward_fake)(dh, *arguments)

    return forward, backward


_FOUND = implementations(MODULES, _functions)
_LIBRARY = torch.library.Library("minrnn", "DEF")
_LIBRARY.define(
    "gated_scan(Tensor[] pre, Tensor? h0, Tensor? reset, "
    "str gate, str candidate, bool signed, bool reverse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "gated_scan_backward(Tensor dh, Tensor[] pre, Tensor h, Tensor? h0, Tensor? reset, "
    "str gate, str candidate, bool signed, bool reverse) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward_op = torch.ops.minrnn.gated_scan.default
_backward_op = torch.ops.minrnn.gated_scan_backward.default

register(_LIBRARY, "gated_scan", _FOUND)


@torch.library.register_fake("minrnn::gated_scan", lib=_LIBRARY)
def _forward_fake(pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, *mode: Any) -> Tensor:
    return output_like(pre[0], split(Mode(*mode).gate, pre)[0].shape[2])


@torch.library.register_fake("minrnn::gated_scan_backward", lib=_LIBRARY)
def _backward_fake(
    dh: Tensor, pre: list[Tensor], h: Tensor, h0: Tensor | None, reset: Tensor | None, *mode: Any
) -> list[Tensor]:
    dh0 = h.new_empty(h.shape[0], h.shape[2], dtype=state_dtype(h.dtype))
    return [*(output_like(x, x.shape[2]) for x in pre), dh0]


# ----------------------------------------------------------------------------------------------------------
# Derivatives. A scan's backward and forward derivatives are scans, so all orders close over this file.


def _backward(
    dh: Tensor, pre: list[Tensor], h: Tensor, h0: Tensor | None, reset: Tensor | None, mode: Mode
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of (pre, h0): the engine's fused pass, or differentiable scans if they are differentiated."""
    if torch.is_grad_enabled() or is_transformed():  # create_graph=True; or a transform, or forward mode
        *dpre, dh0 = _backward_op(dh, pre, h, h0, reset, *mode)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            *dpre, dh0 = _backward_op(dh, pre, h, h0, reset, *mode)
    return dpre, None if h0 is None else dh0.to(h0.dtype)


def _differentiable_backward(
    dh: Tensor, pre: list[Tensor], h: Tensor, h0: Tensor | None, reset: Tensor | None, mode: Mode
) -> tuple[list[Tensor], Tensor]:
    """g[t] = dh[t] + a[t+1] g[t+1];  da[t] = g[t] h[t-1];  db[t] = g[t];  dh0 = a[0] g[0]."""
    parts, a, h_prev = _linearise(pre, h, h0, reset, mode)
    zero = torch.zeros_like(a[:, :1])
    a_next = torch.cat([zero, a[:, :-1]] if mode.reverse else [a[:, 1:], zero], 1)
    g = _linear(a_next, dh.to(a.dtype), None, reverse=not mode.reverse)
    dparts = GATES[mode.gate].pullback(CANDIDATES[mode.candidate], parts, g * h_prev, g, signed=mode.signed)
    dpre = [torch.cat(dparts, -1)] if len(pre) == 1 else dparts
    start = -1 if mode.reverse else 0
    return [d.to(x.dtype) for d, x in zip(dpre, pre, strict=True)], a[:, start] * g[:, start]


def _tangent(
    tangents: Sequence[Tensor | None],
    dh0: Tensor | None,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    mode: Mode,
) -> Tensor:
    """The forward-mode derivative: dh[t] = a[t] dh[t-1] + (da[t] h[t-1] + db[t])."""
    parts, a, h_prev = _linearise(pre, h, h0, reset, mode)
    filled = [torch.zeros_like(x) if d is None else d for d, x in zip(tangents, pre, strict=True)]
    dparts = [d.to(a.dtype) for d in split(mode.gate, filled)]
    da, db = GATES[mode.gate].pushforward(CANDIDATES[mode.candidate], parts, dparts, signed=mode.signed)
    dh0 = None if dh0 is None else dh0.to(a.dtype)
    return _linear(a, da * h_prev + db, dh0, reverse=mode.reverse).to(h.dtype)


def _linear(a: Tensor, b: Tensor, h0: Tensor | None, *, reverse: bool) -> Tensor:
    return apply([a, b], h0, None, Mode("identity", "positive", False, reverse))


def _linearise(
    pre: list[Tensor], h: Tensor, h0: Tensor | None, reset: Tensor | None, mode: Mode
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Separate pre-activations, decays and previous states, resets applied, in float32 or wider."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    parts = [x.to(dtype) for x in split(mode.gate, pre)]
    a, _ = GATES[mode.gate].equations(CANDIDATES[mode.candidate], *parts, signed=mode.signed)
    h = h.to(dtype)
    first = torch.zeros_like(h[:, :1]) if h0 is None else h0.to(dtype).unsqueeze(1)
    h_prev = torch.cat([h[:, 1:], first] if mode.reverse else [first, h[:, :-1]], 1)
    if reset is not None:
        a, h_prev = (x.masked_fill(reset.unsqueeze(-1), 0) for x in (a, h_prev))
    return parts, a, h_prev


# ----------------------------------------------------------------------------------------------------------
# Autograd: one function for backward mode, and the operator's own kernel, which is where the transforms of
# torch.func, compilers and tracers find both modes. Called at every level of nested transforms with that
# level's tensors, it loses none; torch.autograd.Function.jvp would lose all but the innermost.


class _Recorded(_SingleLevelFunction):
    """apply(mode, h0, reset, *pre) -> h."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, h0: Tensor | None, reset: Tensor | None, *pre: Tensor) -> Tensor:
        h = _forward(list(pre), h0, reset, mode)
        ctx.mode = mode
        ctx.save_for_backward(h0, reset, h, *pre)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        h0, reset, h, *pre = ctx.saved_tensors
        dpre, dh0 = _backward(dh, pre, h, h0, reset, ctx.mode)
        return None, dh0, None, *dpre

    @staticmethod
    def jvp(ctx: Any, _mode: None, dh0: Any, _reset: None, *dpre: Any) -> Tensor:
        h0, reset, h, *pre = ctx.saved_tensors
        return _tangent(dpre, dh0, pre, h, h0, reset, ctx.mode)


_RecordedAtLevel = at_level(_Recorded)


def _differentiable(pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, *mode: Any) -> Tensor:
    """The operator for the dispatch key Autograd."""
    if needs_gradients(h0, *pre):
        return _RecordedAtLevel.apply(Mode(*mode), h0, reset, *pre)
    if have_tangents(h0, *pre):
        (h0, *pre), (dh0, *dpre) = separate((h0, *pre))
        h = _forward_op(pre, h0, reset, *mode)
        return join(h, _tangent(dpre, dh0, pre, h, h0, reset, Mode(*mode)))
    return _forward(pre, h0, reset, Mode(*mode))


def _twice_differentiable(
    dh: Tensor, pre: list[Tensor], h: Tensor, h0: Tensor | None, reset: Tensor | None, *mode: Any
) -> list[Tensor]:
    """The backward operator for the dispatch key Autograd."""
    tensors = (dh, *pre, h, h0)
    if needs_gradients(*tensors) or have_tangents(*tensors):
        dpre, dh0 = _differentiable_backward(dh, pre, h, h0, reset, Mode(*mode))
        return [*dpre, dh0]
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(dh, pre, h, h0, reset, *mode)


_LIBRARY.impl("gated_scan", _differentiable, "Autograd")
_LIBRARY.impl("gated_scan_backward", _twice_differentiable, "Autograd")


# ----------------------------------------------------------------------------------------------------------
# Batching


def _forward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    *mode: Any,
) -> tuple[Tensor, int]:
    h0, reset, *pre = fold(info, (h0, reset, *pre), (in_dims[1], in_dims[2], *in_dims[0]))
    return unfold(info, _forward_op(pre, h0, reset, *mode)), 0


def _backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    *mode: Any,
) -> tuple[list[Tensor], list[int]]:
    """Many gradients at once, of a scan that was not batched itself."""
    dims = (in_dims[0], *in_dims[2:5], *in_dims[1])
    dh, h, h0, reset, *pre = fold(info, (dh, h, h0, reset, *pre), dims)
    gradients = _backward_op(dh, pre, h, h0, reset, *mode)
    return [unfold(info, d) for d in gradients], [0] * len(gradients)


register_vmap(_LIBRARY, "gated_scan", _forward_vmap)
register_vmap(_LIBRARY, "gated_scan_backward", _backward_vmap)
