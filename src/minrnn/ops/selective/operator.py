"""The operator `minrnn::selective_scan` and its derivatives of every order.

Its tensors are the fields of `Inputs`; its mode tells whether it returns the states before each chunk, which
backward needs. Arguments are not checked here: recurrence.py does that.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from minrnn.ops.gated import following, linear_scan
from minrnn.ops.operators import Operator, Tensors
from minrnn.ops.reference import output_like, state_dtype
from minrnn.ops.registry import Functions
from minrnn.ops.selective.reference import Inputs, discretize, empty_borders, silu_slope

__all__ = ["MODULES", "SELECTIVE_SCAN"]

MODULES = {
    "cpp": "minrnn.ops.selective.cpu",
    "triton": "minrnn.ops.selective.triton.engine",
    "portable": "minrnn.ops.selective.portable",
    "reference": "minrnn.ops.selective.reference",
}
"""The modules that implement the selective scan, by engine name in minrnn.ops.registry.ENGINES."""

_OPTIONAL = ("D", "z", "delta_bias", "h0", "reset")
_INPUTS = ", ".join(f"Tensor{'?' * (name in _OPTIONAL)} {name}" for name in Inputs._fields)


class SelectiveScan(Operator):
    """The operator behind `minrnn.ops.selective_scan`; it also returns the states before each chunk."""

    name = "selective_scan"
    schema = f"({_INPUTS}, bool save) -> (Tensor, Tensor, Tensor)"
    backward_schema = f"(Tensor dy, Tensor dlast, Tensor borders, {_INPUTS}) -> Tensor[]"
    modules = MODULES
    shared = frozenset(Inputs._fields.index(name) for name in ("A", "D", "delta_bias"))

    def pack(self, tensors: Tensors, mode: bool, record: bool) -> tuple[Any, ...]:
        return *tensors, record or mode

    def unpack(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], bool]:
        *tensors, save = arguments
        return tuple(tensors), save

    def pack_backward(
        self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: bool
    ) -> tuple[Any, ...]:
        return *gradients[:2], kept, *tensors

    def unpack_backward(self, arguments: Sequence[Any]) -> tuple[Tensors, Any, tuple[Any, ...], bool]:
        dy, dlast, borders, *tensors = arguments
        return (dy, dlast), borders, tuple(tensors), False

    def engine_functions(self, module: ModuleType) -> Functions:
        def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            return module.forward(Inputs(*arguments[:-1]), arguments[-1])

        def backward(dy: Tensor, dlast: Tensor, borders: Tensor, *tensors: Any) -> list[Tensor]:
            return module.backward(dy, dlast, borders, Inputs(*tensors))

        return forward, backward

    def trim(self, outputs: Any, mode: bool) -> Any:
        y, last, borders = outputs
        return outputs if mode else (y, last, borders.new_empty(borders.shape[0], 0, borders.shape[2]))

    def fake(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, save = self.unpack(arguments)
        x = Inputs(*tensors)
        last = x.u.new_empty(x.u.shape[0], *x.A.shape, dtype=state_dtype(x.u.dtype))
        return output_like(x.u, x.u.shape[2]), last, empty_borders(x, save)

    def fake_backward(self, *arguments: Any) -> list[Tensor]:
        (_, dlast), _, tensors, _ = self.unpack_backward(arguments)
        x = Inputs(*tensors)
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

    def differentiable_gradients(
        self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: bool
    ) -> list[Tensor]:
        """Compute `reference.backward` for all steps at once."""
        x, (dy, dlast) = Inputs(*tensors), gradients
        has_bias = x.delta_bias is not None
        x = x.biased(torch.promote_types(x.u.dtype, torch.float32))
        dy, dlast = dy.to(x.u.dtype), dlast.to(x.u.dtype)
        a, h, h_prev = _linearize(x)
        dz = x.u.new_zeros(0)
        if x.z is not None:
            dz = dy * _ungated(x, h) * silu_slope(x.z)
            dy = dy * silu(x.z)
        inflow = dy.unsqueeze(-1) * x.C.unsqueeze(2)  # (B, T, D, N)
        inflow = torch.cat([inflow[:, :-1], (inflow[:, -1] + dlast).unsqueeze(1)], 1)
        reset_next = None if x.reset is None else following(x.reset)
        g = _linear(following(a), inflow, None, reset_next, reverse=True)
        delta = softplus(x.delta_pre)
        to_exponent = g * a * h_prev
        to_inflow = torch.einsum("btdn,btn->btd", g, x.B)
        to_delta = torch.einsum("btdn,dn->btd", to_exponent, x.A) + to_inflow * x.u
        ddelta_pre = to_delta * torch.sigmoid(x.delta_pre)
        dh0 = a[:, 0] * g[:, 0]
        return [
            to_inflow * delta if x.D is None else to_inflow * delta + dy * x.D,
            ddelta_pre,
            torch.einsum("btdn,btd->dn", to_exponent, delta),
            torch.einsum("btdn,btd->btn", g, delta * x.u),
            torch.einsum("btd,btdn->btn", dy, h),
            x.u.new_zeros(0) if x.D is None else (dy * x.u).sum((0, 1)),
            dz,
            ddelta_pre.sum((0, 1)) if has_bias else x.u.new_zeros(0),
            dh0 if x.reset is None else dh0.masked_fill(x.reset[:, 0, None, None], 0),
        ]

    def tangents(
        self, tangents: Tensors, kept: Tensor, tensors: Tensors, mode: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the tangents of y and of the final state from those of the inputs."""
        x = Inputs(*tensors)
        narrow, wide = x.u.dtype, torch.promote_types(x.u.dtype, torch.float32)
        pairs = zip(tangents, x[:-1], strict=False)
        filled = (None if v is None else torch.zeros_like(v) if t is None else t for t, v in pairs)
        dx = Inputs(*filled, None).biased(wide)  # type: ignore
        last = state_dtype(narrow)
        x = x.biased(wide)
        a, h, h_prev = _linearize(x)
        delta, ddelta = softplus(x.delta_pre), dx.delta_pre * torch.sigmoid(x.delta_pre)
        exponent = ddelta.unsqueeze(-1) * x.A + delta.unsqueeze(-1) * dx.A
        inflow = (ddelta * x.u + delta * dx.u).unsqueeze(-1) * x.B.unsqueeze(2)
        inflow = inflow + (delta * x.u).unsqueeze(-1) * dx.B.unsqueeze(2)
        dh = _linear(a, a * h_prev * exponent + inflow, dx.h0, x.reset, reverse=False)
        dy = torch.einsum("btdn,btn->btd", dh, x.C) + torch.einsum("btdn,btn->btd", h, dx.C)
        if x.D is not None and dx.D is not None:
            dy = dy + dx.D * x.u + x.D * dx.u
        if x.z is not None and dx.z is not None:
            dy = dy * silu(x.z) + _ungated(x, h) * silu_slope(x.z) * dx.z
        return dy.to(narrow), dh[:, -1].to(last)


SELECTIVE_SCAN = SelectiveScan()


def _linearize(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return decays, states, and states before each step, (B, T, D, N); the last two with resets applied."""
    a, b = discretize(x)
    h = _linear(a, b, x.h0, x.reset, reverse=False)
    first = torch.zeros_like(h[:, 0]) if x.h0 is None else x.h0
    h_prev = torch.cat([first.unsqueeze(1), h[:, :-1]], 1)
    if x.reset is not None:
        h_prev = h_prev.masked_fill(x.reset[:, :, None, None], 0)
    return a, h, h_prev


def _linear(a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None, *, reverse: bool) -> Tensor:
    start = None if h0 is None else h0.flatten(1)
    return linear_scan(a.flatten(2), b.flatten(2), start, reset, reverse=reverse).unflatten(2, a.shape[2:])


def _ungated(x: Inputs, h: Tensor) -> Tensor:
    y = torch.einsum("btdn,btn->btd", h, x.C)
    return y if x.D is None else y + x.D * x.u
