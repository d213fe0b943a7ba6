"""The compiled engine of the selective scan: a wrapper around csrc/selective*.

float32 and float64 are read in place; 16-bit inputs are converted to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.cpu import compiled, new_output
from minrnn.ops.reference import contiguous, contiguous_channels, measured, state_dtype
from minrnn.ops.selective.reference import CHUNK, Inputs, empty_borders

__all__ = ["backward", "forward"]

_selective = compiled.selective


def forward(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.forward` in one pass: read each sequence once, write y and the borders once."""
    x = _readable(given)
    y = new_output(x.u, x.u.shape[2])
    last = x.u.new_empty(len(x.u), *x.A.shape)
    borders = empty_borders(x, save)
    _selective.forward(*_call(x), (y, last, borders if save else None))
    return y.to(given.u.dtype), last, borders


def backward(dy: Tensor, dlast: Tensor, borders: Tensor, given: Inputs) -> list[Tensor]:
    """Compute `reference.backward` in one pass, with a chunk's states and adjoints in the cache.

    The engine returns partial sums for each group of channels and each row of the batch, which are added up
    here in a fixed order.
    """
    x = _readable(given)
    (batch, T, channels), N = x.u.shape, x.A.shape[1]
    dy, dlast = contiguous_channels(_as(dy, x.u.dtype)), contiguous(dlast)
    du, ddelta_pre = new_output(x.u, x.u.shape[2]), new_output(x.u, x.u.shape[2])
    dz = x.u.new_empty(0) if x.z is None else new_output(x.u, x.u.shape[2])
    groups = _selective.num_groups(batch, channels)
    dB, dC = x.u.new_empty(groups, batch, T, N), x.u.new_empty(groups, batch, T, N)
    dA, dD = (x.u.new_empty(batch, n, channels, dtype=torch.float64) for n in (N, 1))
    dh0 = x.u.new_empty(batch, channels, N)
    _selective.backward(
        *_call(x),
        (dy, dlast, borders),
        (du, ddelta_pre, None if x.z is None else dz),
        (dB, dC, dA, dD, dh0),
    )
    narrow, wide = given.u.dtype, x.u.dtype
    return [
        du.to(narrow),
        ddelta_pre.to(narrow),
        dA.sum(0).mT.to(wide).contiguous(),
        _sum(dB).to(narrow),
        _sum(dC).to(narrow),
        x.u.new_empty(0) if x.D is None else dD.sum((0, 1)).to(wide),
        dz.to(narrow),
        x.u.new_empty(0) if x.delta_bias is None else _sum_of_steps(ddelta_pre),
        dh0,
    ]


def _readable(x: Inputs) -> Inputs:
    """Convert the inputs to the dtypes and layouts that the extension reads."""
    wide = state_dtype(x.u.dtype)
    if x.u.dtype != wide:
        x = Inputs(*(None if s is None else _as(s, wide) for s in x[:-1]), x.reset)  # type: ignore
    rows = [None if s is None else contiguous_channels(s) for s in (x.u, x.delta_pre, x.B, x.C, x.z)]
    whole = [None if s is None else contiguous(s) for s in (x.A, x.D, x.delta_bias, x.h0)]
    (u, delta_pre, B, C, z), (A, D, delta_bias, h0) = rows, whole
    return Inputs(u, delta_pre, A, B, C, D, z, delta_bias, h0, x.reset)  # type: ignore[arg-type]


def _sum_of_steps(x: Tensor) -> Tensor:
    """Sum over batch and time in float64, as the engine does: the sum may be small beside its terms."""
    return x.sum((0, 1), dtype=torch.float64).to(x.dtype)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else measured(x).to(dtype)


_Optional = Tensor | None
_Call = tuple[
    bool,
    int,
    tuple[int, int, int, int, int],
    tuple[Tensor, Tensor, _Optional, Tensor, Tensor, _Optional],
    tuple[Tensor, _Optional, _Optional, _Optional],
]


def _call(x: Inputs) -> _Call:
    batch, T, channels = x.u.shape
    return (
        x.u.dtype == torch.float64,
        torch.get_num_threads(),
        (batch, T, channels, x.A.shape[1], CHUNK),
        (x.u, x.delta_pre, x.z, x.B, x.C, x.reset),
        (x.A, x.D, x.delta_bias, x.h0),
    )


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)
