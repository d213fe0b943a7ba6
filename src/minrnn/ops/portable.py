"""The portable engine: the gated scan in torch's own operations, for any device and dtype (see spans.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES, Candidate
from minrnn.ops.reference import output_like, split, state_dtype
from minrnn.ops.spans import ThreePasses, back_over_steps, over_steps

__all__ = ["backward", "forward"]


def _positive(x: Tensor) -> Tensor:
    return x.clamp(max=0).sigmoid_().add_(x.clamp(min=0))


def _positive_slope(x: Tensor) -> Tensor:
    s = x.clamp(max=0).sigmoid_()
    at_least_zero = torch.ge(x, 0, out=torch.empty_like(x))
    return s.addcmul_(s, s, value=-1).add_(at_least_zero, alpha=0.75)  # s - s^2, and 0.25 + 0.75


# The reference's torch.where is slower.
_CANDIDATES = CANDIDATES | {"positive": Candidate(_positive, _positive_slope)}


def forward(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """Compute `reference.forward`."""
    record, parts, dtype = GATES[gate], split(gate, pre), state_dtype(pre[0].dtype)
    passes, steps = ThreePasses(parts[0], dtype, over_steps, h0, reset, reverse=reverse), []
    for block in passes.blocks:
        some = [x[:, block.times].to(dtype) for x in parts]
        shares = record.shares(*some)
        b = record.term(_CANDIDATES[candidate], shares.update, *some)
        a, loss = shares.decay(signed)
        passes.add(block, a, loss, b)
        steps.append((block, a, b))
    passes.join()
    h = output_like(pre[0], parts[0].shape[2])
    for block, a, b in steps:
        if dtype == h.dtype:  # and b may be an input
            passes.walk(block, a, b, out=h[:, block.times])
        else:
            h[:, block.times] = passes.walk(block, a, b, out=b)
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
    """Compute `reference.backward`."""
    record, parts, dtype = GATES[gate], split(gate, pre), state_dtype(h.dtype)
    gradients = [output_like(x, x.shape[2]) for x in pre]
    outputs = split(gate, gradients)
    passes = ThreePasses(h, dtype, back_over_steps, None, reset, reverse=not reverse)
    for block in passes.blocks:
        a, loss = record.shares(*(x[:, block.times].to(dtype) for x in parts)).decay(signed)
        passes.add(block, a, loss, dh[:, block.times].to(dtype))
    passes.join()
    for block in passes.blocks:
        # Shares are computed again: held for all blocks, they would take as much memory as the gradients.
        some = [x[:, block.times].to(dtype) for x in parts]
        shares, given = record.shares(*some), dh[:, block.times].to(dtype)
        g = passes.walk(block, shares.decay(signed)[0], given, out=torch.empty_like(given))
        da = g * _before(block.times, h, h0, reset, reverse)
        found = record.pullback(_CANDIDATES[candidate], some, da, g, signed=signed, shares=shares)
        for x, d in zip(outputs, found, strict=True):
            x[:, block.times] = d
    return [*gradients, passes.last]


def _before(times: slice, h: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """Return the states that steps read, in at least float32."""
    start, stop = (times.start + 1, times.stop + 1) if reverse else (times.start - 1, times.stop - 1)
    dtype = state_dtype(h.dtype)
    states = h[:, max(start, 0) : stop].to(dtype)
    if states.shape[1] < stop - start:
        first = h.new_zeros(h.shape[0], h.shape[2]) if h0 is None else h0
        first = first.to(dtype).unsqueeze(1)
        states = torch.cat([states, first] if reverse else [first, states], 1)
    return states if reset is None else states.masked_fill(reset[:, times].unsqueeze(-1), 0)
