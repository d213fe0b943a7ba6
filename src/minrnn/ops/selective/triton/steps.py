"""Steps of the selective scan, forward and backward.

The arithmetic is that of csrc/selective_rows.cpp: decays are 2^n (1 + e) with e of full relative accuracy,
states and adjoints are pairs of floats (high, low), and the error does not grow with T.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from minrnn.ops.triton.states import select

__all__ = ["Walk", "adjoin", "silu", "walk"]

# ----------------------------------------------------------------------------------------------------------
# Elementary functions


@triton.jit
def _decay(x):
    # 2^x = scale (1 + e) for x <= 0: as `Split` and `power_less_one` in csrc/selective_rows.cpp.
    if x.dtype == tl.float64:
        return x * 0.0, tl.exp2(x)
    else:
        x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
        shifted = x + 12582912.0
        r = x - (shifted - 12582912.0)
        q = 0.0013333539 * r + 0.0096662454
        q = q * r + 0.055505003
        q = q * r + 0.24022351
        q = q * r + 0.69314714
        scale = (shifted.to(tl.int32, bitcast=True) + 127) << 23
        return q * r, scale.to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    # log(1 + exp(x)), of full relative accuracy, and its slope.
    e = tl.exp(-tl.abs(x))
    slope = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s)
    s2 = s * s
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    p = s2 * 0.0 + 2.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1):
        p = p * s2 + 2.0 / (2 * (TERMS - 2 - i) + 1)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + s * p, slope


@triton.jit
def silu(x):
    """Return x sigmoid(x), and its slope."""
    e = tl.exp(-tl.abs(x))
    share = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    complement = tl.where(x >= 0, e, 1.0) / (1.0 + e)
    return x * share, share + x * share * complement


# ----------------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _discretize(x, rows, tile, first, STEPS: tl.constexpr):
    # Step sizes, their slopes, and input terms without B. They are zero after the last step, which keeps the
    # state.
    deltas, slopes, terms = (), (), ()
    for i in tl.static_range(STEPS):
        pre = rows.delta_pre[i]
        if x.delta_bias is not None:
            pre += tile.bias
        delta, slope = _softplus(pre)
        delta = tl.where(first + i < tile.T, delta, 0.0)
        deltas = deltas + (delta,)
        slopes = slopes + (slope,)
        terms = terms + (delta * rows.u[i],)
    return deltas, slopes, terms


@triton.jit
def _advance(state, e, scale, term):
    kept = scale * state[0]
    change = (e * kept + term) + scale * state[1]
    h = kept + change
    finite = tl.abs(h) < float("inf")  # for an infinite state, these terms may cancel
    plain = (e * scale + scale) * state[0] + term
    return tl.where(finite, h, plain), tl.where(finite, change - (h - kept), 0.0)


class Walk(NamedTuple):
    """The results of STEPS steps: the last state, and tuples of each step's results."""

    state: tl.tensor
    before: tl.tensor
    """The states before the steps."""
    after: tl.tensor
    """The states after them."""
    e: tl.tensor
    scale: tl.tensor
    """Decays are scale (1 + e)."""
    delta: tl.tensor
    """The step sizes."""
    slope: tl.tensor
    """Their derivatives by delta_pre."""
    term: tl.tensor
    """The input terms, without B."""


@triton.jit
def walk(state, x, rows, tile, first, STEPS: tl.constexpr):
    """Advance the state by STEPS steps."""
    deltas, slopes, terms = _discretize(x, rows, tile, first, STEPS)
    before, after, es, scales = (), (), (), ()
    for i in tl.static_range(STEPS):
        if len(rows.resets) > 0:
            state = select(rows.resets[i], (0.0, 0.0), state)
        e, scale = _decay(deltas[i][:, None] * tile.rate)
        before = before + (state[0],)
        state = _advance(state, e, scale, terms[i][:, None] * rows.B[i][None, :])
        after = after + (state[0],)
        es = es + (e,)
        scales = scales + (scale,)
    return Walk(state, before, after, es, scales, deltas, slopes, terms)


# ----------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def adjoin(g, incoming, e, scale):
    """Go one step back: return the adjoint of the state after the step, a times it, and the latter as a pair.

    `g` is the pair from the later steps, `incoming` the gradient from the step's own output.
    """
    change = incoming + g[1]
    adjoint = g[0] + change
    rounded = change - (adjoint - g[0])
    kept = scale * adjoint
    next_g = e * kept + kept
    finite = tl.abs(adjoint) < float("inf")
    next_g = tl.where(finite, next_g, (e * scale + scale) * adjoint)
    return (
        adjoint,
        next_g,
        (tl.where(finite, kept, next_g), tl.where(finite, e * kept + scale * rounded, 0.0)),
    )
