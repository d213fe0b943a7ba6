"""The operator `minrnn::selective_scan`: its engines, its derivatives of every order, and its batching.

As in minrnn.ops.gated, eager calls go through an autograd.Function, all others call the operator, and both
share what stands below. Nothing is checked: recurrence.py has done that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.nn.functional import softplus

from minrnn.ops import gated
from minrnn.ops.reference import output_like, state_dtype
from minrnn.ops.registry import Functions, implementations, register
from minrnn.ops.selective.reference import Inputs, discretise, empty_borders
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

__all__ = ["MODULES", "apply"]

MODULES = {
    "cpp": "minrnn.ops.selective.cpu",
    "triton": "minrnn.ops.selective.triton.engine",
    "reference": "minrnn.ops.selective.reference",
}
"""The modules that compute the selective scan, by the engine's name in minrnn.ops.registry.ENGINES."""

Derivatives = tuple[Tensor | None, ...]
"""Gradients or tangents of the fields of Inputs, in their order."""


def apply(x: Inputs) -> tuple[Tensor, Tensor]:
    """y and the final state, differentiable: see `minrnn.ops.selective_scan`."""
    if is_traced() or is_transformed():
        return _forward_op(*x, False)[:2]  # whether to save is for whoever records to say
    if needs_gradients(*x[:-1]):
        return _Recorded.apply(*x)[:2]  # type: ignore[attr-defined]
    return _forward(*x, False)[:2]


def _forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with torch._C._AutoDispatchBelowAutograd():  # past its check whether gradients are wanted, as gated_scan
        return _forward_op(*arguments)


# ----------------------------------------------------------------------------------------------------------
# The operators, and who serves them

_OPTIONAL = ("D", "z", "delta_bias", "h0", "reset")
_INPUTS = ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in Inputs._fields)


def _functions(module: ModuleType) -> Functions:
    """An engine's functions as the operators call them: not at all for a batch without rows."""

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, save = arguments
        x = Inputs(*inputs)
        return module.forward(x, save) if x.u.shape[0] else _forward_fake(*arguments)

    def backward(dy: Tensor, dlast: Tensor, borders: Tensor, *inputs: Any) -> list[Tensor]:
        x = Inputs(*inputs)
        if x.u.shape[0]:
            return module.backward(dy, dlast, borders, x)
        # Empty are all but the sums over the batch.
        return [d.zero_() for d in _backward_fake(dy, dlast, borders, *inputs)]

    return forward, backward


_FOUND = implementations(MODULES, _functions)
_LIBRARY = torch.library.Library("minrnn", "FRAGMENT")
_LIBRARY.define(
    f"selective_scan({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"selective_scan_backward(Tensor dy, Tensor dlast, Tensor borders, {_INPUTS}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward_op = torch.ops.minrnn.selective_scan.default
_backward_op = torch.ops.minrnn.selective_scan_backward.default


register(_LIBRARY, "selective_scan", _FOUND)


@torch.library.register_fake("minrnn::selective_scan", lib=_LIBRARY)
def _forward_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, save = arguments
    x = Inputs(*inputs)
    last = x.u.new_empty(x.u.shape[0], *x.A.shape, dtype=state_dtype(x.u.dtype))
    return output_like(x.u, x.u.shape[2]), last, empty_borders(x, save)


@torch.library.register_fake("minrnn::selective_scan_backward", lib=_LIBRARY)
def _backward_fake(dy: Tensor, dlast: Tensor, borders: Tensor, *inputs: Any) -> list[Tensor]:
    x = Inputs(*inputs)
    channels = x.u.shape[2]
    wide = state_dtype(x.u.dtype)
    return [
        output_like(x.u, channels),
        output_like(x.u, channels),
        x.A.new_empty(x.A.shape, dtype=wide),
        x.B.new_empty(x.B.shape),
        x.C.new_empty(x.C.shape),
        x.A.new_empty(0 if x.D is None else channels, dtype=wide),
        x.u.new_empty(0) if x.z is None else output_like(x.u, channels),
        x.A.new_empty(0 if x.delta_bias is None else channels, dtype=wide),
        dlast.new_empty(dlast.shape, dtype=wide),
    ]


# ----------------------------------------------------------------------------------------------------------
# Derivatives. The recurrence is a scan of (a, b), and so are its derivatives.


def _backward(dy: Tensor, dlast: Tensor, borders: Tensor, x: Inputs) -> Derivatives:
    """Gradients: the engine's fused pass, or differentiable scans if they will be differentiated."""
    if torch.is_grad_enabled() or is_transformed():  # create_graph=True; or a transform, or forward mode
        gradients = _backward_op(dy, dlast, borders, *x)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            gradients = _backward_op(dy, dlast, borders, *x)
    pairs = zip(x[:-1], gradients, strict=True)
    return (*(None if given is None else d.to(given.dtype) for given, d in pairs), None)


def _differentiable_backward(dy: Tensor, dlast: Tensor, x: Inputs) -> list[Tensor]:
    """As `reference.backward`, for all steps at once."""
    has_bias = x.delta_bias is not None
    x = x.biased(torch.promote_types(x.u.dtype, torch.float32))
    dy, dlast = dy.to(x.u.dtype), dlast.to(x.u.dtype)
    a, h, h_prev = _linearise(x)
    dz = x.u.new_zeros(0)
    if x.z is not None:
        dz = dy * _ungated(x, h) * _silu_slope(x.z)
        dy = dy * torch.nn.functional.silu(x.z)
    drive = dy.unsqueeze(-1) * x.C.unsqueeze(2)  # (B, T, D, N)
    drive = torch.cat([drive[:, :-1], (drive[:, -1] + dlast).unsqueeze(1)], 1)
    a_next = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
    g = _linear(a_next, drive, None, reverse=True)
    delta = softplus(x.delta_pre)
    to_exponent = g * a * h_prev
    to_drive = torch.einsum("btdn,btn->btd", g, x.B)
    to_delta = torch.einsum("btdn,dn->btd", to_exponent, x.A) + to_drive * x.u
    ddelta_pre = to_delta * torch.sigmoid(x.delta_pre)
    return [
        to_drive * delta if x.D is None else to_drive * delta + dy * x.D,
        ddelta_pre,
        torch.einsum("btdn,btd->dn", to_exponent, delta),
        torch.einsum("btdn,btd->btn", g, delta * x.u),
        torch.einsum("btd,btdn->btn", dy, h),
        x.u.new_zeros(0) if x.D is None else (dy * x.u).sum((0, 1)),
        dz,
        ddelta_pre.sum((0, 1)) if has_bias else x.u.new_zeros(0),
        a[:, 0] * g[:, 0],
    ]


def _tangents(d: Derivatives, x: Inputs) -> tuple[Tensor, Tensor]:
    """Tangents of y and of the final state, given those of the inputs."""
    narrow, wide = x.u.dtype, torch.promote_types(x.u.dtype, torch.float32)
    pairs = zip(d[:-1], x[:-1], strict=True)
    filled = (None if v is None else torch.zeros_like(v) if t is None else t for t, v in pairs)
    dx = Inputs(*filled, None).biased(wide)  # type: ignore
    last = state_dtype(narrow)
    x = x.biased(wide)
    a, h, h_prev = _linearise(x)
    delta, ddelta = softplus(x.delta_pre), dx.delta_pre * torch.sigmoid(x.delta_pre)
    exponent = ddelta.unsqueeze(-1) * x.A + delta.unsqueeze(-1) * dx.A
    drive = (ddelta * x.u + delta * dx.u).unsqueeze(-1) * x.B.unsqueeze(2)
    drive = drive + (delta * x.u).unsqueeze(-1) * dx.B.unsqueeze(2)
    dh = _linear(a, a * h_prev * exponent + drive, dx.h0, reverse=False)
    dy = torch.einsum("btdn,btn->btd", dh, x.C) + torch.einsum("btdn,btn->btd", h, dx.C)
    if x.D is not None and dx.D is not None:
        dy = dy + dx.D * x.u + x.D * dx.u
    if x.z is not None and dx.z is not None:
        dy = dy * torch.nn.functional.silu(x.z) + _ungated(x, h) * _silu_slope(x.z) * dx.z
    return dy.to(narrow), dh[:, -1].to(last)


def _linearise(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Decays, states and states before each step, (B, T, D, N), resets applied."""
    a, b = discretise(x)
    h = _linear(a, b, x.h0, reverse=False)
    first = torch.zeros_like(h[:, 0]) if x.h0 is None else x.h0
    h_prev = torch.cat([first.unsqueeze(1), h[:, :-1]], 1)
    if x.reset is not None:
        h_prev = h_prev.masked_fill(x.reset[:, :, None, None], 0)
    return a, h, h_prev


def _linear(a: Tensor, b: Tensor, h0: Tensor | None, *, reverse: bool) -> Tensor:
    start = None if h0 is None else h0.flatten(1)
    mode = gated.Mode("identity", "positive", False, reverse)
    return gated.apply([a.flatten(2), b.flatten(2)], start, None, mode).unflatten(2, a.shape[2:])


def _ungated(x: Inputs, h: Tensor) -> Tensor:
    y = torch.einsum("btdn,btn->btd", h, x.C)
    return y if x.D is None else y + x.D * x.u


def _silu_slope(z: Tensor) -> Tensor:
    share = torch.sigmoid(z)
    return share + z * share * torch.sigmoid(-z)


# ----------------------------------------------------------------------------------------------------------
# Batching. torch.func.vmap's dimension is merged with the batch, except where A, D or delta_bias have it,
# or a sum over the batch would add up what it should keep apart: there, one call follows another.


def _each(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Any], function: Callable[..., Sequence[Tensor]]
) -> tuple[list[Tensor], list[int]]:
    """Call `function` for every index of the mapped dimension, and stack what it returns."""

    def at(index: int) -> list[Any]:
        return [x if dim is None else x.select(dim, index) for x, dim in zip(tensors, dims, strict=True)]

    results = [function(*at(index)) for index in range(info.batch_size)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)], [0] * len(results[0])


def _forward_each(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Any], function: Callable[..., Sequence[Tensor]]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """`function` of (*Inputs), whose last argument may be `save`, over a mapped dimension."""
    mapped = dict(zip(Inputs._fields, dims, strict=False))
    shared = ("A", "D", "delta_bias")  # by all rows of a batch
    if any(mapped[name] is not None for name in shared):
        outputs, out_dims = _each(info, dims, tensors, function)
        return tuple(outputs), tuple(out_dims)
    count = len(Inputs._fields)
    x = Inputs(*tensors[:count])
    folded = Inputs(*fold(info, x, dims[:count]))._replace(**{name: getattr(x, name) for name in shared})
    outputs = [unfold(info, out) for out in function(*folded, *tensors[count:])]
    return tuple(outputs), (0,) * len(outputs)


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _forward_each(info, in_dims, arguments, _forward_op)


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return _each(info, in_dims, arguments, _backward_op)


# ----------------------------------------------------------------------------------------------------------
# Autograd, as of the gated scan


class _Recorded(_SingleLevelFunction):
    """apply(*Inputs) -> y, the final state, borders."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, last, borders = _forward(*inputs, True)
        ctx.mark_non_differentiable(borders)
        ctx.save_for_backward(borders, *inputs)
        return y, last, borders

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor, _dborders: Any) -> Derivatives:
        borders, *inputs = ctx.saved_tensors
        return _backward(dy, dlast, borders, Inputs(*inputs))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor, None]:
        _, *inputs = ctx.saved_tensors
        return (*_tangents(tangents, Inputs(*inputs)), None)


_RecordedAtLevel = at_level(_Recorded)


def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator for the dispatch key Autograd."""
    *inputs, save = arguments
    *tensors, reset = inputs
    if needs_gradients(*tensors):
        y, last, borders = _RecordedAtLevel.apply(*inputs)
        return y, last, borders if save else empty_borders(Inputs(*inputs), False)
    if have_tangents(*tensors):
        primals, tangents = separate(tensors)
        y, last, borders = _forward_op(*primals, reset, save)
        dy, dlast = _tangents((*tangents, None), Inputs(*[*primals, reset]))
        return join(y, dy), join(last, dlast), borders
    return _forward(*arguments)


def _twice_differentiable(dy: Tensor, dlast: Tensor, borders: Tensor, *inputs: Any) -> list[Tensor]:
    """The backward operator for the dispatch key Autograd."""
    tensors = (dy, dlast, *inputs[:-1])
    if needs_gradients(*tensors) or have_tangents(*tensors):
        return _differentiable_backward(dy, dlast, Inputs(*inputs))
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(dy, dlast, borders, *inputs)


_LIBRARY.impl("selective_scan", _differentiable, "Autograd")
_LIBRARY.impl("selective_scan_backward", _twice_differentiable, "Autograd")
register_vmap(_LIBRARY, "selective_scan", _forward_vmap)
register_vmap(_LIBRARY, "selective_scan_backward", _backward_vmap)
