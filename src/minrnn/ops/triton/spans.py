"""Spans: (1 - a, a, b) of some steps together, which map the state before them to a * state + b.

A reset, which discards the state before it, infinities and NaN included, is encoded as 1 - a = infinity. For
signed decays (SIGNED), spans hold the rest instead of 1 - a, so that they are as exact near -1 as near 1, and
their a is not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minrnn.ops.triton.elementary import flip, total
from minrnn.ops.triton.states import kept, select, two_sum

__all__ = ["apply", "forgetting", "last_row", "prefixes", "shifted", "stack", "unstack", "whole"]


# ----------------------------------------------------------------------------------------------------------
# Joining a span and the next one


@triton.jit
def _join(complement, a, b, next_complement, next_a, next_b):
    complement = tl.fma(next_complement, a, complement)
    return complement, tl.where(complement < 0.75, 1.0 - complement, a * next_a), tl.fma(next_a, b, next_b)


@triton.jit
def _unless_reset(joined, complement, next_complement, next_b):
    # Join two spans, either of which may hold a reset.
    forgets = next_complement == float("inf")
    either = forgets | (complement == float("inf"))
    return (
        tl.where(either, float("inf"), joined[0]),
        tl.where(either, 0.0, joined[1]),
        tl.where(forgets, next_b, joined[2]),
    )


@triton.jit
def _join_with_resets(complement, a, b, next_complement, next_a, next_b):
    joined = _join(complement, a, b, next_complement, next_a, next_b)
    return _unless_reset(joined, complement, next_complement, next_b)


@triton.jit
def _join_signed(rest, a, b, next_rest, next_a, next_b):
    forgets = tl.fma(tl.abs(next_rest), 1.0 - tl.abs(rest), tl.abs(rest))  # 1 - |a|
    joined = flip(flip(forgets * -1.0, rest), next_rest)
    # Near -1, b is not small compared with the state, and two of them may cancel: so keep first, then the
    # rest.
    return joined, joined, tl.fma(next_rest, b, next_b - flip(b, next_rest))


@triton.jit
def _join_signed_with_resets(rest, a, b, next_rest, next_a, next_b):
    joined = _join_signed(rest, a, b, next_rest, next_a, next_b)
    return _unless_reset(joined, rest, next_rest, next_b)


@triton.jit
def whole(span, WARPS: tl.constexpr, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    """Join the steps of each span in a tree: neighbors, then neighboring pairs, and so on."""
    complement, a, b = span
    for _ in tl.static_range(_log2(a.shape[0] // WARPS)):
        complement, next_complement = _halves(complement, WARPS)
        a, next_a = _halves(a, WARPS)
        b, next_b = _halves(b, WARPS)
        if SIGNED and RESETS:
            complement, a, b = _join_signed_with_resets(complement, a, b, next_complement, next_a, next_b)
        elif SIGNED:
            complement, a, b = _join_signed(complement, a, b, next_complement, next_a, next_b)
        elif RESETS:
            complement, a, b = _join_with_resets(complement, a, b, next_complement, next_a, next_b)
        else:
            complement, a, b = _join(complement, a, b, next_complement, next_a, next_b)
    return complement, a, b


@triton.jit
def prefixes(span, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    """Return in row i the spans up to and including i, joined."""
    if SIGNED and RESETS:
        return tl.associative_scan(span, 0, _join_signed_with_resets)
    elif SIGNED:
        return tl.associative_scan(span, 0, _join_signed)
    elif RESETS:
        return tl.associative_scan(span, 0, _join_with_resets)
    else:
        return tl.associative_scan(span, 0, _join)


@triton.jit
def forgetting(span, forgets):
    """Return a step's span with its reset applied."""
    return tl.where(forgets, float("inf"), span[0]), tl.where(forgets, 0.0, span[1]), span[2]


@triton.jit
def apply(span, carry, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    """Compute the pair after a span from the pair before it, as `states.advance`."""
    if SIGNED:
        keep = kept(span[0])
        rest = span[0]
    else:
        near = span[0] < 0.5
        keep = tl.where(near, 1.0, 0.0).to(span[0].dtype)
        rest = tl.where(near, -span[0], span[1])
    after = two_sum(keep * carry[0], tl.fma(rest, carry[0], tl.fma(keep, carry[1], span[2])))
    if RESETS:
        after = select(span[0] == float("inf"), (span[2], 0.0), after)
    return after


# ----------------------------------------------------------------------------------------------------------
# Rows: of STEPS * WARPS rows, row i is step i // WARPS of span i % WARPS. Which register holds which row is
# known at compile time, so splitting and joining rows moves no data.


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _halves(x, WARPS: tl.constexpr):
    # The even and the odd steps of each span.
    D: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[0] // 2
    even, odd = tl.split(tl.permute(tl.reshape(x, [N // WARPS, 2, WARPS, D]), [0, 2, 3, 1]))
    return tl.reshape(even, [N, D]), tl.reshape(odd, [N, D])


@triton.jit
def unstack(x, WARPS: tl.constexpr):
    """Split the steps of all spans into a tuple, by repeated halving."""
    D: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[0]
    parts = (x,)
    for level in tl.static_range(_log2(N // WARPS)):
        halves = ()
        for i in tl.static_range(1 << level):
            halves = halves + tl.split(tl.permute(tl.reshape(parts[i], [2, N >> (level + 1), D]), [1, 2, 0]))
        parts = halves
    return parts


@triton.jit
def stack(parts):
    """Join a tuple of steps: the inverse of `unstack`."""
    S: tl.constexpr = parts[0].shape[0]
    D: tl.constexpr = parts[0].shape[1]
    N: tl.constexpr = len(parts)
    for level in tl.static_range(_log2(N)):
        pairs = ()
        for i in tl.static_range(N >> (level + 1)):
            pair = tl.permute(tl.join(parts[2 * i], parts[2 * i + 1]), [2, 0, 1])
            pairs = pairs + (tl.reshape(pair, [S << (level + 1), D]),)
        parts = pairs
    return parts[0]


@triton.jit
def _last_two(x, before, known, next_x, next_before, next_known):
    return next_x, tl.where(next_known != 0, next_before, x), next_known * 0 + 1


@triton.jit
def shifted(x):
    """Return row i - 1 of x in row i; row 0 is arbitrary. A scan, because that crosses warps cheaply."""
    return tl.associative_scan((x, x, tl.full(x.shape, 0, tl.int32)), 0, _last_two)[1]


@triton.jit
def last_row(x):
    """Return the last row."""
    row = tl.arange(0, x.shape[0])[:, None]
    return total(tl.where(row == x.shape[0] - 1, x, 0.0), 0)[None, :]
