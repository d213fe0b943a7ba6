"""The state of a step: decays as one number each, and states as pairs of floats (high, low).

DECAY says what decays are: "any" number (the gate "identity"), a "share" in [0, 1], or "signed", which is
twice a share less one. Signed decays have in the place of 1 - a, here and in spans.py, the rest a - keep with
keep = 1 or -1, of full relative accuracy. The rest's sign gives keep, so it is never zero: Triton has no
literal of minus zero, and a sum with zeros would lose its sign.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minrnn.ops.triton.elementary import is_negative

__all__ = ["LEAST", "advance", "decay", "encode", "kept", "select", "two_sum"]

LEAST = tl.constexpr(1e-37)


@triton.jit
def decay(a, complement, SIGNED: tl.constexpr):
    """(a, 1 - a) of a gate as they are, or of the signed mode: 2 a - 1 and its rest, which is never zero."""
    if SIGNED:
        change = tl.fma(tl.minimum(a, complement, propagate_nan=tl.PropagateNan.ALL), 2.0, LEAST)
        rest = tl.where(a < complement, change, change * -1.0)
        return rest + kept(rest), rest
    else:
        return a, complement


@triton.jit
def kept(rest):
    """keep of a signed decay."""
    return tl.where(is_negative(rest), 1.0, -1.0).to(rest.dtype)


@triton.jit
def encode(a, complement, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """The decay as one number, for `advance`.

    A share is a itself, or where 1 - a is the smaller, that, negated, minus zero included. A signed decay is
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
    """a + b, and what its rounding loses."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def advance(state, code, b, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """a * state + b, given the decay as `encode` has it."""
    if EXACT:
        # a = keep + rest with keep in {-1, 0, 1}, so that only the change is rounded, and what the sum rounds
        # away goes into the state's low part. Without rest * low the change is off by less than its rounding.
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
