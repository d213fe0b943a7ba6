"""Elementary functions for float32 and float64. All of them propagate NaN."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["exp_minus", "flip", "is_negative", "reciprocal", "sigmoid", "total"]

# The hardware's instructions, accurate to two units in the last place. Triton's own functions also handle
# ranges that do not occur here, which takes a sixth of all instructions of minGRU's forward.
_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)


@triton.jit
def _exp2(x):
    if _PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """Compute 1 / x."""
    if x.dtype == tl.float32 and _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def exp_minus(x, EXACT: tl.constexpr):
    """Compute exp(-x) for x >= 0; without EXACT, with a relative error that grows with x."""
    if x.dtype == tl.float64:
        return tl.exp(-x)
    elif EXACT:
        # The rounding of x * log2(e) would cost x / 2 roundings of the result, so it is added back. The
        # upper limit keeps results normal; it applies to infinities too.
        x = tl.minimum(x, 87.33654, propagate_nan=tl.PropagateNan.ALL)
        exponent = x * -1.4426950216293335  # log2(e) in float32
        lost = tl.fma(x, 1.4426950216293335, exponent)
        e = _exp2(exponent)
        return tl.fma(e, lost * -0.6931471805599453, e)
    else:
        return _exp2(x * -1.4426950216293335)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    """Return the numerators of sigmoid(x) and of sigmoid(-x), and their denominator.

    Computing 1 - sigmoid(x) instead would cancel where it is small.
    """
    e = exp_minus(tl.abs(x), EXACT)
    return tl.where(x >= 0, 1.0, e), tl.where(x >= 0, e, 1.0), 1.0 + e


@triton.jit
def is_negative(x):
    """Whether the sign bit is set."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) < 0
    else:
        return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def flip(x, sign):
    """Return x, negated where the sign bit of `sign` is set."""
    if x.dtype == tl.float64:
        bits = sign.to(tl.int64, bitcast=True) & -9223372036854775808
        return (x.to(tl.int64, bitcast=True) ^ bits).to(tl.float64, bitcast=True)
    else:
        bits = sign.to(tl.int32, bitcast=True) & -2147483648
        return (x.to(tl.int32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def total(x, axis: tl.constexpr):
    """Sum over an axis. Unlike tl.sum, it can be interpreted while the rest of Triton is compiled."""
    return tl.reduce(x, axis, _add)
