"""The GPU engine of the selective scan: one lane for each number of the state.

A program holds BLOCK_D channels of one batch row, all N numbers of each, in registers, and computes all steps
in sequence. It loads STEPS steps at once, so that it waits once for all of them, and computes their decays
before the state is needed. Time is not divided: the N numbers of each channel give enough lanes. Forward
writes the state before every chunk of CHUNK steps. Backward processes the chunks from the last to the first.
In a chunk it first recomputes the state before every STEPS steps, and then, from the last of these to the
first, recomputes their states in registers and propagates the gradients through them. So the states of all
steps are never in memory.

Sums over channels, for the gradients of B and C, are accumulated by each program over the tiles of channels
that it computes one after another, and then over programs in a fixed order: equal calls give equal bits.
Offsets are 64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from minrnn.ops.reference import contiguous, contiguous_channels, output_like, state_dtype
from minrnn.ops.selective.reference import CHUNK, Inputs, empty_borders
from minrnn.ops.selective.triton.kernels import backward_kernel, forward_kernel
from minrnn.ops.triton.launch import REALS, flags, strided
from minrnn.ops.triton.launch import processors as _processors

__all__ = ["backward", "forward"]

_LANES = 128  # lanes of a program, one for each number of the state
_FORWARD_STEPS, _BACKWARD_STEPS = 8, 4  # steps loaded at once; more would not fit into registers
_PROGRAMS = 4  # backward programs per multiprocessor; more would mean more partial sums of dB and dC


def forward(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.forward` in one pass: read each sequence once, write y and the borders once."""
    x = _readable(given)
    (batch, T, channels), N = x.u.shape, x.A.shape[1]
    y = output_like(x.u, channels)
    last = x.u.new_empty(batch, channels, N, dtype=state_dtype(x.u.dtype))
    borders = empty_borders(x, save)
    settings, tiles = _settings(x, _FORWARD_STEPS)
    with torch.cuda.device_of(y):
        forward_kernel[(batch * tiles,)](
            strided(y), last, borders if save else None, _pointers(x), flags(x.reset), T, channels, N, tiles,
            SAVE=save, **settings,
        )  # fmt: skip
    return y, last, borders


def backward(dy: Tensor, dlast: Tensor, borders: Tensor, given: Inputs) -> list[Tensor]:
    """Compute `reference.backward` in one pass, with a chunk's states and adjoints in registers."""
    x = _readable(given)
    (batch, T, channels), N = x.u.shape, x.A.shape[1]
    settings, tiles = _settings(x, _BACKWARD_STEPS)
    groups = min(tiles, max(1, -(-_PROGRAMS * _processors(x.u.device) // batch)))
    tiles_each = -(-tiles // groups)
    groups = -(-tiles // tiles_each)
    wide = state_dtype(x.u.dtype)
    du, ddelta_pre = output_like(x.u, channels), output_like(x.u, channels)
    dz = None if x.z is None else output_like(x.u, channels)
    dB, dC = (x.u.new_empty(groups, batch, T, N, dtype=wide) for _ in range(2))
    dA = x.u.new_zeros(batch, channels, N, dtype=torch.float64)
    dD, dbias = (x.u.new_zeros(batch, channels, dtype=torch.float64) for _ in range(2))
    dx = Inputs(du, ddelta_pre, dA, dB, dC, dD, dz, dbias, None, None)
    carry = torch.stack([dlast, torch.zeros_like(dlast)])
    blocks = batch * groups * (CHUNK // _BACKWARD_STEPS)
    scratch = x.u.new_empty(blocks, settings["BLOCK_D"], settings["BLOCK_N"], dtype=wide)
    with torch.cuda.device_of(du):
        backward_kernel[(batch * groups,)](
            _pointers(dx)._replace(B=dB, C=dC), carry, scratch, strided(contiguous_channels(dy)), borders,
            _pointers(x)._replace(h0=None), flags(x.reset), T, channels, N, tiles, tiles_each, **settings,
        )  # fmt: skip
    narrow = x.u.dtype
    return [
        du,
        ddelta_pre,
        dA.sum(0).to(wide),
        dB.sum(0).to(narrow),
        dC.sum(0).to(narrow),
        x.u.new_empty(0, dtype=wide) if x.D is None else dD.sum(0).to(wide),
        x.u.new_empty(0) if dz is None else dz,
        x.u.new_empty(0, dtype=wide) if x.delta_bias is None else dbias.sum(0).to(wide),
        carry[0] + carry[1],
    ]


def _readable(x: Inputs) -> Inputs:
    """Convert the inputs to the dtypes and layouts that the kernels read."""
    rows = [None if s is None else contiguous_channels(s) for s in (x.u, x.delta_pre, x.B, x.C, x.z)]
    whole = [None if s is None else contiguous(s) for s in (x.A, x.D, x.delta_bias, x.h0)]
    (u, delta_pre, B, C, z), (A, D, delta_bias, h0) = rows, whole
    return Inputs(u, delta_pre, A, B, C, D, z, delta_bias, h0, x.reset)  # type: ignore[arg-type]


def _pointers(x: Inputs) -> Inputs:
    """Return the inputs as kernel arguments: sequences with their strides, without the resets."""
    arguments: list[Any] = [
        strided(x.u), strided(x.delta_pre), x.A, strided(x.B), strided(x.C), x.D,
        None if x.z is None else strided(x.z), x.delta_bias, x.h0, None,
    ]  # fmt: skip
    return Inputs(*arguments)


def _settings(x: Inputs, STEPS: int) -> tuple[dict[str, Any], int]:
    """Return a kernel's constants, and the number of tiles of channels."""
    N = x.A.shape[1]
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_D = max(1, _LANES // BLOCK_N)
    settings = {
        "REAL": REALS[state_dtype(x.u.dtype)],
        "CHUNK": CHUNK,
        "STEPS": STEPS,
        "BLOCK_D": BLOCK_D,
        "BLOCK_N": BLOCK_N,
        "num_warps": min(8, BLOCK_D * BLOCK_N // 32),
    }
    return settings, -(-x.u.shape[2] // BLOCK_D)
