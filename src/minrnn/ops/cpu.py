"""The compiled engine for the CPU: a wrapper around csrc/, which reads tensors in place.

This module guarantees the extension's preconditions: dtype, device and shape (checked by recurrence.py),
contiguous channels, no lazily negated views, and outputs that live until the call returns. The extension
itself checks that each tensor's storage is large enough (csrc/tensor.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.memory import take
from minrnn.ops.reference import contiguous_channels, initial_state, output_like, output_strides, state_dtype

try:
    import minrnn.ops._cpu as compiled
except ModuleNotFoundError as error:
    raise ImportError(
        "it was not compiled when minrnn was installed, as no C++ compiler worked; install one and "
        "reinstall minrnn (pip install --verbose shows what fails)"
    ) from error

__all__ = [
    "CANDIDATE_CODES",
    "GATE_CODES",
    "ISA",
    "backward",
    "compiled",
    "forward",
    "new_output",
    "prefix",
    "prefix_backward",
]

ISA: str = compiled.isa
"""The instruction set chosen for this processor: avx512_bf16, avx512, avx2 or baseline."""

_scan = compiled.scan
GATE_CODES = {name: code for code, name in enumerate(_scan.gates)}
CANDIDATE_CODES = {name: code for code, name in enumerate(_scan.candidates)}
_DTYPE_CODES = {getattr(torch, name): code for code, name in enumerate(_scan.dtypes)}
assert _scan.gates == {name: (gate.num_pre, gate.can_be_signed) for name, gate in GATES.items()}, (
    f"csrc/gates.h and gates.py must hold the same gates, got {_scan.gates} and {list(GATES)}: rebuild minrnn"
)
assert {*_scan.candidates} == CANDIDATES.keys(), (
    f"csrc/rows.h and gates.py must hold the same candidates, got {_scan.candidates} and {list(CANDIDATES)}: "
    "rebuild minrnn"
)

_Start = tuple[Tensor | None, Tensor | None]
_Call = tuple[int, int, int, bool, bool, int, tuple[int, int, int], list[Tensor], _Start]

_LARGE = 4 << 20  # bytes; the system's allocator reuses smaller blocks itself


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
    pre = [contiguous_channels(x) for x in pre]
    D = _channels(pre, gate)
    h = new_output(pre[0], D)
    h0 = initial_state(h0, h.dtype)
    _scan.forward(*_call(pre, h0, reset, gate, candidate, signed, reverse, D), h)
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
    pre, dh, h = [contiguous_channels(x) for x in pre], contiguous_channels(dh), contiguous_channels(h)
    B, _, D = h.shape
    dpre = [new_output(x, x.shape[2]) for x in pre]
    h0 = initial_state(h0, h.dtype)
    dh0 = h.new_empty(B, D, dtype=state_dtype(h.dtype))
    _scan.backward(
        *_call(pre, h0, reset, gate, candidate, signed, reverse, D),
        dh,
        h,
        dpre,
        dh0,
    )
    return [*dpre, dh0]


def prefix(
    pre: list[Tensor], reset: Tensor | None, gate: str, candidate: str, signed: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `reference.prefix` from as many of the last steps as determine it.

    Where these forget all but 2^-64 of what was before, the others are not read. The decay is then what is
    below 2^-64 after some of its factors; an infinity or a NaN before these steps is missed.
    """
    pre = [contiguous_channels(x) for x in pre]
    decay, end = _new_prefix(pre[0], D := _channels(pre, gate))
    _scan.prefix(*_call(pre, None, reset, gate, candidate, signed, reverse, D), end, decay)
    return decay, end


def prefix_backward(
    dh: Tensor,
    pre: list[Tensor],
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """Compute `reference.prefix_backward` from as many of the first steps as determine it."""
    pre, dh = [contiguous_channels(x) for x in pre], contiguous_channels(dh)
    decay, end = _new_prefix(dh, D := _channels(pre, gate))
    _scan.backward_prefix(*_call(pre, None, reset, gate, candidate, signed, reverse, D), dh, end, decay)
    return end


def _new_prefix(like: Tensor, D: int) -> tuple[Tensor, Tensor]:
    wide = state_dtype(like.dtype)
    return like.new_empty(like.shape[0], D, dtype=wide), like.new_empty(like.shape[0], D, dtype=wide)


def _call(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
    D: int,
) -> _Call:
    B, T = pre[0].shape[:2]
    return (
        _DTYPE_CODES[pre[0].dtype],
        GATE_CODES[gate],
        CANDIDATE_CODES[candidate],
        signed,
        reverse,
        torch.get_num_threads(),
        (B, T, D),
        pre,
        (h0, reset),
    )


def new_output(like: Tensor, D: int) -> Tensor:
    """Allocate as `reference.output_like`; large outputs reuse the memory of former ones (memory.py)."""
    B, T = like.shape[:2]
    nbytes = B * T * D * like.element_size()
    storage = take(nbytes, compiled.prefer_huge_pages) if nbytes >= _LARGE else None
    if storage is None:
        return output_like(like, D)
    return like.new_empty(0).set_(storage, 0, (B, T, D), output_strides(like, D))


def _channels(pre: list[Tensor], gate: str) -> int:
    return pre[0].shape[2] // GATES[gate].num_pre if len(pre) == 1 else pre[0].shape[2]
