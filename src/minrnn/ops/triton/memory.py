"""Loads and stores of sequences by tiles.

Steps are numbered in the order of the recurrence in forward passes and in the opposite order in backward
passes: step i is at time i, or with DESCENDING at T - 1 - i. A sequence is a tuple (pointer, batch stride,
time stride), an absent one None.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from minrnn.ops.triton.elementary import total

__all__ = ["Tile", "bit", "load", "load_pre", "load_resets", "load_start", "of_rows", "store", "to"]


class Tile(NamedTuple):
    """The steps and channels of a program. Row i is step r[i] of the span that begins at step first[i]."""

    T: tl.tensor
    b: tl.tensor
    """The batch row."""
    first: tl.tensor
    r: tl.tensor
    rows: tl.tensor
    """The number of steps that exist in each span: row i exists if r < rows."""
    d: tl.tensor
    """The channels."""
    inside: tl.tensor
    """Which channels exist."""
    full: tl.tensor
    """Whether all rows and channels exist, so that no mask is needed."""


@triton.jit
def load(sequence, tile, ahead, other, DESCENDING: tl.constexpr):
    """Load the tile's rows, or those `ahead` steps later."""
    ptr = _at(sequence, tile, tile.first + ahead, DESCENDING)
    if tile.full:  # a conditional expression would evaluate both sides
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=tile.inside & (tile.r + ahead < tile.rows), other=other)
    return x


@triton.jit
def store(sequence, tile, x, DESCENDING: tl.constexpr):
    """Write the tile's rows."""
    ptr = _at(sequence, tile, tile.first, DESCENDING)
    x = x.to(sequence[0].dtype.element_ty)
    if tile.full:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, mask=tile.inside & (tile.r < tile.rows))


@triton.jit
def _at(sequence, tile, first, DESCENDING: tl.constexpr):
    step = tile.r.to(tl.int64) * sequence[2]  # apart from what is computed once for each span
    if DESCENDING:
        return sequence[0] + (tile.b * sequence[1] + (tile.T - 1 - first) * sequence[2] + tile.d) - step
    else:
        return sequence[0] + (tile.b * sequence[1] + first * sequence[2] + tile.d) + step


@triton.jit
def load_pre(pre, tile, NEUTRAL: tl.constexpr, DESCENDING: tl.constexpr):
    """Load the pre-activations; neutral ones after the last step."""
    loaded = ()
    for j in tl.static_range(len(pre)):
        loaded = loaded + (load(pre[j], tile, 0, NEUTRAL[j], DESCENDING),)
    return loaded


@triton.jit
def load_resets(reset, b, begin, T, DESCENDING: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr):
    """Load the resets as (WARPS, 1) words with a bit for each step of a span."""
    r = tl.arange(0, STEPS)[None, :]
    step = begin + tl.arange(0, WARPS)[:, None] * STEPS + r
    t = T - 1 - step if DESCENDING else step
    flags = tl.load(reset[0] + b * reset[1] + t * reset[2], mask=step < T, other=0)
    return total((flags != 0).to(tl.int32) << r, 1)[:, None]


@triton.jit
def of_rows(bits, r, WARPS: tl.constexpr):
    """Return the spans' bits for each row."""
    STEPS: tl.constexpr = r.shape[0] // WARPS
    rows = tl.reshape(tl.broadcast_to(bits[None, :, :], [STEPS, WARPS, 1]), [STEPS * WARPS, 1])
    return bit(rows, r)


@triton.jit
def bit(bits, r):
    """Whether bit r is set."""
    return ((bits >> r) & 1) != 0


@triton.jit
def load_start(h0, b, d, inside, REAL: tl.constexpr):
    """Load the initial state, or zeros."""
    if h0 is None:
        return tl.full(d.shape, 0.0, REAL)
    else:
        return tl.load(h0[0] + b * h0[1] + d, mask=inside, other=0.0).to(REAL)


@triton.jit
def to(tensors, REAL: tl.constexpr):
    """Convert every tensor of a tuple."""
    converted = ()
    for j in tl.static_range(len(tensors)):
        converted = converted + (tensors[j].to(REAL),)
    return converted
