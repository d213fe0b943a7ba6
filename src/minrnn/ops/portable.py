"""The portable engine: the gated scan in torch's own operations, for any device and dtype (see spans.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES, Candidate
from minrnn.ops.reference import output_like, split, state_dtype
from minrnn.ops.spans import Rule, ThreePasses, back_over_steps, over_steps

__all__ = ["backward", "forward", "prefix", "prefix_backward"]

LOOKBACK = 256
"""Steps at a sequence's end from which its prefix is first computed."""

FORGOTTEN = 2.0**-64
"""A product of decays below which a state has no effect."""

Recurrence = tuple[Tensor, Tensor, Tensor]
"""Decays, 1 minus these, and inputs, of some steps."""


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
    parts, dtype = split(gate, pre), state_dtype(pre[0].dtype)
    passes, steps = ThreePasses(parts[0], dtype, over_steps, h0, reset, reverse=reverse), []
    for block in passes.blocks:
        a, loss, b = _recurrence(parts, block.times, dtype, gate, candidate, signed)
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


def _recurrence(
    parts: Sequence[Tensor], times: slice, dtype: torch.dtype, gate: str, candidate: str, signed: bool
) -> Recurrence:
    """Compute the recurrence of some steps from their pre-activations."""
    some = [x[:, times].to(dtype) for x in parts]
    shares = GATES[gate].shares(*some)
    b = GATES[gate].term(_CANDIDATES[candidate], shares.update, *some)
    return *shares.decay(signed), b


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


def prefix(
    pre: list[Tensor], reset: Tensor | None, gate: str, candidate: str, signed: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute `reference.prefix` from as many of the last steps as determine it, as the compiled engine."""
    parts, dtype = split(gate, pre), state_dtype(pre[0].dtype)

    def recurrence(times: slice) -> Recurrence:
        return _recurrence(parts, times, dtype, gate, candidate, signed)

    return _prefix(recurrence, over_steps, parts[0], dtype, reset, reverse=reverse)


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
    record, parts, dtype = GATES[gate], split(gate, pre), state_dtype(dh.dtype)

    def recurrence(times: slice) -> Recurrence:
        return *record.shares(*(x[:, times].to(dtype) for x in parts)).decay(signed), dh[:, times].to(dtype)

    return _prefix(recurrence, back_over_steps, dh, dtype, reset, reverse=not reverse)[1]


def _prefix(
    recurrence: Callable[[slice], Recurrence],
    rule: Rule,
    like: Tensor,
    dtype: torch.dtype,
    reset: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the product of decays and the last state from zero of the steps that `recurrence` gives."""
    T, steps = like.shape[1], LOOKBACK
    while True:
        last = slice(0, min(steps, T)) if reverse else slice(max(T - steps, 0), T)
        decay, end = _prefix_of(last, recurrence, rule, like, dtype, reset, reverse=reverse)
        if steps >= T or bool((decay.abs() < FORGOTTEN).all()):
            return decay, end
        steps *= 8


def _prefix_of(
    times: slice,
    recurrence: Callable[[slice], Recurrence],
    rule: Rule,
    like: Tensor,
    dtype: torch.dtype,
    reset: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the decay and the end of some steps as the last states, from 1 without input and from 0."""
    B, _, D = like.shape
    both = like.new_empty(1, dtype=dtype).expand(B, times.stop - times.start, 2 * D)
    start = torch.cat([like.new_ones(B, D, dtype=dtype), like.new_zeros(B, D, dtype=dtype)], -1)
    passes = ThreePasses(
        both, dtype, rule, start, None if reset is None else reset[:, times], reverse=reverse
    )
    for block in passes.blocks:
        place = slice(times.start + block.times.start, times.start + block.times.stop)
        a, loss, b = recurrence(place)
        a, loss, b = (
            torch.cat([a, a], -1),
            torch.cat([loss, loss], -1),
            torch.cat([torch.zeros_like(b), b], -1),
        )
        passes.add(block, a, loss, b)
    passes.join()
    if block.spans is None:  # the last steps, which fill no span
        passes.walk(block, a, b, out=torch.empty_like(b))
    decay, end = passes.last.chunk(2, -1)
    return decay, end


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
