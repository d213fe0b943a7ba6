"""The state of a step: decays as one number each, and states as pairs of floats (high, low).

DECAY is the kind of decay: "any" number (the gate "identity"), a "share" in [0, 1], or "signed", which is
2 * share - 1. For signed decays, here and in spans.py, 1 - a is replaced by the rest a - keep with keep = 1
or -1, of full relative accuracy. The rest's sign encodes keep, so the rest is never zero: Triton has no
literal for minus zero, and a sum with zeros would lose its sign.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minrnn.ops.triton.elementary import is_negative

__all__ = ["LEAST", "advance", "decay", "encode", "kept", "select", "two_sum"]

LEAST = tl.constexpr(1e-37)


@triton.jit
def decay(a, complement, SIGNED: tl.constexpr):
    """Return a gate's (a, 1 - a) unchanged, or with SIGNED 2 a - 1 and its rest, which is never zero."""
    if SIGNED:
        change = tl.fma(tl.minimum(a, complement, propagate_nan=tl.PropagateNan.ALL), 2.0, LEAST)
        rest = tl.where(a < complement, change, change * -1.0)
        return rest + kept(rest), rest
    else:
        return a, complement


@triton.jit
def kept(rest):
    """Return keep of a signed decay."""
    return tl.where(is_negative(rest), 1.0, -1.0).to(rest.dtype)


@triton.jit
def encode(a, complement, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """Encode the decay as one number, for `advance`.

    A share is encoded as a, or where 1 - a is smaller, as -(1 - a), minus zero included; a signed decay as
    its rest.
    """
    if EXACT and DECAY == "signed":
        return complement
    elif EXACT and DECAY == "share":
        return tl.where(complement < 0.5, complement * -1.0, a)
    else:
        return a


@triton.jit
def two_sum(a, b):
    """Return a + b and its rounding error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def advance(state, code, b, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """Compute a * state + b from the encoded decay."""
    if EXACT:
        # a = keep + rest with keep in {-1, 0, 1}, so that only the change is rounded, and the sum's rounding
        # error goes into the state's low part. Omitting rest * low changes the result by less than its
        # rounding.
        if DECAY == "signed":
            keep = kept(code)
            rest = code
        elif DECAY == "share":
            keep = tl.where(is_negative(code), 1.0, 0.0).to(code.dtype)
            rest = code
        else:
            tl.static_assert(DECAY == "any")
            keep = tl.where(code >= 0.5, 1.0, tl.where(code <= -0.5, -1.0, 0.0)).to(code.dtype)
            rest = code - keep  # exact for |a| <= 2
        return two_sum(keep * state[0], tl.fma(rest, state[0], tl.fma(keep, state[1], b)))
    else:
        return tl.fma(code, state[0], b), state[1]


@triton.jit
def select(condition, a, b):
    """tl.where of pairs."""
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])
