"""Loads and stores of the selective scan's kernels.

The inputs are `reference.Inputs` whose sequences are tuples (pointer, batch stride, time stride) and whose
other fields are pointers; absent ones are None. They are loaded as an empty tuple or 0, because before Triton
3.7 device functions could not return None.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

__all__ = ["Rows", "Tile", "load_steps", "load_tile", "put"]

_LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """The channels of one batch row that a program computes, and their values that do not depend on time."""

    b: tl.tensor
    """The batch row."""
    T: tl.tensor
    d: tl.tensor
    """The channels."""
    n: tl.tensor
    """The indices of a channel's N numbers."""
    in_d: tl.tensor
    """Which channels exist."""
    in_n: tl.tensor
    inside: tl.tensor
    """Which of the BLOCK_D x BLOCK_N numbers exist."""
    number: tl.tensor
    """Their offsets in a (D, N) array."""
    rate: tl.tensor
    """A in powers of two: the decay is 2^(delta rate)."""
    skip: tl.tensor
    """D, or 0."""
    bias: tl.tensor
    """The bias of delta_pre, or 0."""


class Rows(NamedTuple):
    """The inputs of STEPS steps: of each sequence a tuple of as many rows, or an empty one."""

    u: tl.tensor
    delta_pre: tl.tensor
    B: tl.tensor
    C: tl.tensor
    dy: tl.tensor
    z: tl.tensor
    resets: tl.tensor


@triton.jit
def load_tile(x, b, index, T, D, N, REAL: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Load the tile of channels with this index."""
    d = index * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    in_n = n < N
    inside = in_d[:, None] & in_n[None, :]
    number = d.to(tl.int64)[:, None] * N + n[None, :]
    rate = tl.load(x.A + number, mask=inside, other=0.0).to(REAL) * _LOG2_E
    skip = _load_vector(x.D, d, in_d, REAL)
    bias = _load_vector(x.delta_bias, d, in_d, REAL)
    return Tile(b, T, d, n, in_d, in_n, inside, number, rate, skip, bias)


@triton.jit
def _load_vector(ptr, d, in_d, REAL: tl.constexpr):
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + d, mask=in_d, other=0.0).to(REAL)


@triton.jit
def put(sequence, tile, t, x):
    """Write the tile's channels of one step, if the step exists."""
    ptr = sequence[0] + tile.b * sequence[1] + t * sequence[2] + tile.d
    tl.store(ptr, x.to(sequence[0].dtype.element_ty), mask=tile.in_d & (t < tile.T))


@triton.jit
def _load_rows(sequence, tile, first, column, inside, REAL: tl.constexpr, STEPS: tl.constexpr):
    # Zeros after the last step.
    if sequence is None:
        return ()
    else:
        rows = ()
        for i in tl.static_range(STEPS):
            ptr = sequence[0] + tile.b * sequence[1] + (first + i) * sequence[2] + column
            rows = rows + (tl.load(ptr, mask=inside & (first + i < tile.T), other=0.0).to(REAL),)
        return rows


@triton.jit
def _load_resets(reset, tile, first, STEPS: tl.constexpr):
    # Whether each step is a reset. Not a field of x: Triton 3.6 loses a stride of 1 there.
    if reset is None:
        return ()
    else:
        flags = ()
        for i in tl.static_range(STEPS):
            t = tl.minimum(first + i, tile.T - 1)
            flag = tl.load(reset[0] + tile.b * reset[1] + t * reset[2])
            flags = flags + ((flag != 0) & (first + i < tile.T),)
        return flags


@triton.jit
def load_steps(x, reset, dy, tile, first, OUTPUTS: tl.constexpr, REAL: tl.constexpr, STEPS: tl.constexpr):
    """Load the inputs of STEPS steps: those that advance the state, and with OUTPUTS those of the outputs."""
    d, in_d, n, in_n = tile.d, tile.in_d, tile.n, tile.in_n
    u = _load_rows(x.u, tile, first, d, in_d, REAL, STEPS)
    delta_pre = _load_rows(x.delta_pre, tile, first, d, in_d, REAL, STEPS)
    B = _load_rows(x.B, tile, first, n, in_n, REAL, STEPS)
    C = _load_rows(x.C if OUTPUTS else None, tile, first, n, in_n, REAL, STEPS)
    dy = _load_rows(dy, tile, first, d, in_d, REAL, STEPS)
    z = _load_rows(x.z if OUTPUTS else None, tile, first, d, in_d, REAL, STEPS)
    return Rows(u, delta_pre, B, C, dy, z, _load_resets(reset, tile, first, STEPS))
