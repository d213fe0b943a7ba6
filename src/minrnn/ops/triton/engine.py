"""The GPU engine of the gated scan: the same equations as csrc/gates.h, in one pass over memory.

*Memory traffic.* A program holds a chunk in registers: WARPS spans of STEPS steps of 32 channels of one batch
row, with a lane for each channel. It loads the whole chunk at once, joins the steps to spans and the spans to
one function of the state before them, gets that state, and computes and writes the output of each step.
Forward reads every pre-activation and writes h once; backward reads the pre-activations, h and dh and writes
the gradients once. Gates are computed once in each direction; resets and direction are part of the same
kernel.

*Numerics.* Gates are computed in float32. A span is (1 - a, a, b), with 1 - a as exact as a. From a zero
state, the steps of a span produce at most 1 - a times the largest state. The error of joining spans in a tree
is proportional to that, and decays at the rate 1 - a: it does not grow with T. Signed decays use 1 + a
instead where a is negative; near -1 their b is not small, and rounding it costs as much as rounding a step's
b. Carries between programs are pairs of floats, and where h is float32, so is the state between steps: only a
step's change is rounded, and the rounding error of adding it to the state goes into the next change (Kahan's
compensation). Doubles are not used: they run at half of float32's rate at best, and at a 64th on most
devices. Pairs cannot hold infinities: a state that overflows becomes NaN. 16-bit outputs need neither the
pairs between steps nor fully accurate exponentials.

carries.py describes how programs pass the state to each other. Offsets are 64-bit, and T is not limited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.gates import GATES
from minrnn.ops.reference import contiguous_channels, initial_state, output_like, split, state_dtype
from minrnn.ops.triton.gates import CANDIDATE_FUNCTIONS, GATE_FUNCTIONS
from minrnn.ops.triton.installed import VERSION
from minrnn.ops.triton.kernels import backward_kernel, forward_kernel
from minrnn.ops.triton.launch import REALS, Sequence, flags, strided
from minrnn.ops.triton.launch import processors as _processors

__all__ = ["VERSION", "backward", "forward"]

_LANES = 32  # channels of a program: rows of 128 bytes, or of 64
_KEPT = 64  # registers of a thread for the values that a program keeps of its steps
_REGISTERS = 128  # registers of a thread in all; a multiprocessor then holds 16 warps
_FEW_UNITS = 2  # units per multiprocessor below which concurrent programs wait for each other
_WARPS, _WARPS_OF_FEW = 4, 8  # warps of a program; more of them make fewer chunks
_GROUP = 16  # chunks of few units that share one carry


class _Cut(NamedTuple):
    """The division of B x T x D into programs of WARPS spans of STEPS steps and BLOCK_D channels."""

    tiles: int
    chunks: int
    BLOCK_D: int
    WARPS: int
    STEPS: int
    GROUP: int
    """Chunks that share one carry."""


def _cut(shape: torch.Size | tuple[int, int, int], rows: int, itemsize: int, processors: int) -> _Cut:
    """Choose the division for programs that keep `rows` values of each step."""
    B, T, D = shape
    tiles = -(-D // _LANES)
    few = B * tiles < _FEW_UNITS * processors
    STEPS = 1 if T == 1 else _floor_power(max(1, _KEPT // (rows * max(1, itemsize // 4))))
    spans = -(-T // STEPS)
    WARPS = min(_WARPS_OF_FEW if few else _WARPS, 2 * _floor_power(spans - 1) if spans > 1 else 1)
    chunks = -(-spans // WARPS)
    return _Cut(tiles, chunks, _LANES, WARPS, STEPS, _GROUP if few and chunks > 1 else 1)


def _floor_power(n: int) -> int:
    """Return the largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


def forward(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """Compute `reference.forward` in one pass: read each pre-activation once, write h once."""
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    B, T, D = parts[0][0].shape
    h = output_like(pre[0], D)
    cut = _cut((B, T, D), max(2, len(parts)), h.element_size(), _processors(h.device))
    with torch.cuda.device_of(h):
        forward_kernel[(B * cut.tiles * cut.chunks,)](
            strided(h), parts, flags(reset), _start(h0, h.dtype), _workspace(h, cut), B, T, D, cut.chunks - 1,
            DESCENDING=reverse, **_settings(h.dtype, cut, gate, candidate, signed),
        )  # fmt: skip
    return h


def backward(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> list[Tensor]:
    """Compute `reference.backward` in one pass: read pre-activations, h and dh once, write gradients once."""
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    dh, h = contiguous_channels(dh), contiguous_channels(h)
    B, T, D = h.shape
    dpre = [output_like(x, x.shape[2]) for x in pre]
    dh0 = h.new_empty(B, D, dtype=state_dtype(h.dtype))
    cut = _cut((B, T, D), len(parts) + 2, h.element_size(), _processors(h.device))
    with torch.cuda.device_of(h):
        backward_kernel[(B * cut.tiles * cut.chunks,)](
            _parts(gate, dpre), dh0, strided(dh), strided(h), parts, flags(reset), _start(h0, h.dtype),
            _workspace(h, cut), B, T, D, cut.chunks - 1, DESCENDING=not reverse,
            **_settings(h.dtype, cut, gate, candidate, signed),
        )  # fmt: skip
    return [*dpre, dh0]


def _settings(dtype: torch.dtype, cut: _Cut, gate: str, candidate: str, signed: bool) -> dict[str, Any]:
    """Return the constants of a kernel; an unknown gate or candidate raises KeyError here."""
    record = GATES[gate]
    if signed and not record.can_be_signed:
        raise ValueError(f"signed: expected a gate with a signed form, got {gate!r}")
    return {
        "GATE": GATE_FUNCTIONS[gate],
        "CANDIDATE": CANDIDATE_FUNCTIONS[candidate],
        "NEUTRAL": record.neutral,
        "DECAY": "signed" if signed else "any" if record.gives_decay else "share",
        "REAL": REALS[state_dtype(dtype)],
        "EXACT": dtype.itemsize >= 4,
        "BLOCK_D": cut.BLOCK_D,
        "WARPS": cut.WARPS,
        "STEPS": cut.STEPS,
        "GROUP": cut.GROUP,
        "num_warps": cut.WARPS,
        "maxnreg": _REGISTERS if dtype.itemsize <= 4 else 2 * _REGISTERS - 1,
        "enable_fp_fusion": True,  # explicitly, because Triton's default is about to change
    }


def _workspace(h: Tensor, cut: _Cut) -> tuple[Tensor, Tensor, Tensor] | None:
    """Allocate the memory that programs share; None where one program holds all of time."""
    if cut.chunks == 1:
        return None
    B, _, D = h.shape
    groups = -(-cut.chunks // cut.GROUP)
    words = h.new_zeros(1 + groups * B * cut.tiles, dtype=torch.int32)
    real = state_dtype(h.dtype)
    spans = h.new_empty(cut.chunks if cut.GROUP > 1 else 0, 3, B, D, dtype=real)
    return words, spans, h.new_empty(groups, 2, B, D, dtype=real)


def _parts(gate: str, pre: list[Tensor]) -> tuple[Sequence, ...]:
    """Return the gate's pre-activations, packed or not, as views of the same memory."""
    return tuple(strided(x) for x in split(gate, pre))


def _start(h0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, int] | None:
    h0 = initial_state(h0, dtype)
    return None if h0 is None else (h0, h0.stride(0))
