"""The GPU engine, in Triton: one lane a channel, a plain loop over time, the same equations as csrc/gates.h.

*Traffic.* A program walks one tile of channels of one batch row through time, loads each step's row ahead of
its use (`num_stages`), and writes each output once: forward moves every pre-activation and h once; backward
the pre-activations, h, dh and their gradients once. Gates are recomputed, resets and direction are part of
the same loop.

*State.* Gates are computed in float32, and the state between steps is a pair of floats, not a double: a
double needs conversions, which run at an eighth of float32's rate where doubles are fast and at a sixty-fourth
where they are not. The decay is the pair keep + rest, keep in {-1, 0, 1}, so that keep * h is exact and only
the change rest * h + b is rounded; what the sum rounds away goes into the pair's low part, and from there into
the next step's change (Kahan's compensation). Where a = 1 - w, the rounding of a step is a fraction of
w |h|, and is forgotten at the rate w: the error does not grow with T. It needs no fused multiply-add, and
survives one. Pairs cannot hold infinities: a state that overflows becomes NaN.

*Time.* Where batch and channels are too few to fill the device, time is cut into chunks as in csrc/scan.h: a
first kernel finds each chunk's prefix (the product of its decays, its end state from zero), a second joins
the prefixes in float64, and a third starts each chunk from its carry. That reads the input twice (20 bytes
instead of 12 an element for minGRU's forward in float32, 32 instead of 24 backward, which needs the decay
alone). A single pass with decoupled look-back would not, but chunks that wait for each other's flags lean on
which blocks run together, their sums depend on who was ready, so that equal calls give unequal bits, and a
chunk must stay on the chip until its turn, so the chain of chunks is long. Kernel borders need none of that.

Offsets are 64-bit, and T is not limited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.reference import contiguous_channels, initial_state, output_like, split, state_dtype

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed; install it with: pip install 'minrnn[gpu]'") from error

__all__ = ["backward", "forward"]


# ----------------------------------------------------------------------------------------------------------
# Elementary functions, for float32 and float64. NaN passes through all of them.


@triton.jit
def _exp_nonpositive(x):
    # The hardware's exp2 is good to two roundings, but rounding x * log2(e) before it would cost |x| more.
    if x.dtype == tl.float64:
        e = tl.exp(x)
    else:
        x = tl.maximum(x, -87.33654, propagate_nan=tl.PropagateNan.ALL)  # exp of this is the least normal
        high = x * 1.4426950216293335  # log2(e) rounded to float32
        low = tl.fma(x, 1.4426950216293335, -high) + x * 1.9259629911266175e-8
        e = tl.exp2(high)
        e = tl.fma(e, low * 0.6931471805599453, e)
    return e


@triton.jit
def _sigmoid(x):
    # Numerators of sigmoid(x) and sigmoid(-x), and their denominator: 1 - sigmoid(x) would lose the small one.
    e = _exp_nonpositive(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e), tl.where(x >= 0, e, 1.0), 1.0 + e


@triton.jit
def _positive(x):
    _, small, denominator = _sigmoid(tl.abs(x))
    inverse = 1.0 / denominator
    return tl.where(x >= 0, x + 0.5, small * inverse), tl.where(x >= 0, 1.0, small * inverse * inverse)


@triton.jit
def _linear(x):
    return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _tanh(x):
    _, e, denominator = _sigmoid(2.0 * tl.abs(x))
    inverse = 1.0 / denominator
    far = (1.0 - e) * inverse  # cancels near zero, where the series of (tanh(x) / x - 1) / x^2 takes over
    x2 = x * x
    p = 6404582.0 / 10854718875.0 * x2 - 929569.0 / 638512875.0
    p = p * x2 + 21844.0 / 6081075.0
    p = p * x2 - 1382.0 / 155925.0
    p = p * x2 + 62.0 / 2835.0
    p = p * x2 - 17.0 / 315.0
    p = p * x2 + 2.0 / 15.0
    p = p * x2 - 1.0 / 3.0
    near = x * (1.0 + x2 * p)
    value = tl.where(tl.abs(x) < 0.125, near, tl.where(x < 0, -far, far))
    return value, 4.0 * e * inverse * inverse


@triton.jit
def _candidate(x, CANDIDATE: tl.constexpr):
    # The function that the candidate's pre-activation goes through, and its slope.
    if CANDIDATE == "positive":
        value, slope = _positive(x)
    elif CANDIDATE == "linear":
        value, slope = _linear(x)
    else:
        tl.static_assert(CANDIDATE == "tanh", "no such candidate")
        value, slope = _tanh(x)
    return value, slope


# ----------------------------------------------------------------------------------------------------------
# Gates. `_<gate>` maps pre-activations to (keep, rest, b) with a = keep + rest; `_<gate>_pullback` maps the
# adjoint of h to the gradients of the pre-activations. What both compute, the compiler computes once, and
# what a kernel does not use, it does not load.


@triton.jit
def _decay(a, complement):
    # From a and 1 - a, each of full relative accuracy: rest is the smaller one.
    slow = complement < 0.5
    return tl.where(slow, 1.0, 0.0).to(a.dtype), tl.where(slow, -complement, a)


@triton.jit
def _identity(a, b):
    keep = tl.where(a >= 0.5, 1.0, tl.where(a <= -0.5, -1.0, 0.0)).to(a.dtype)
    return keep, a - keep, b  # exact for |a| <= 2


@triton.jit
def _identity_pullback(h_prev, g):
    return g * h_prev, g, g


@triton.jit
def _mingru_values(z_pre, c_pre, CANDIDATE: tl.constexpr):
    z, complement, denominator = _sigmoid(z_pre)
    inverse = 1.0 / denominator
    c, slope = _candidate(c_pre, CANDIDATE)
    return z * inverse, complement * inverse, c, slope


@triton.jit
def _mingru(z_pre, c_pre, CANDIDATE: tl.constexpr):  # a = 1 - z, b = z * candidate
    z, complement, c, _ = _mingru_values(z_pre, c_pre, CANDIDATE)
    keep, rest = _decay(complement, z)
    return keep, rest, z * c


@triton.jit
def _mingru_pullback(z_pre, c_pre, h_prev, g, CANDIDATE: tl.constexpr):
    z, complement, c, slope = _mingru_values(z_pre, c_pre, CANDIDATE)
    dc_pre = g * (z * slope)
    return g * (c - h_prev) * (z * complement), dc_pre, dc_pre


@triton.jit
def _minlstm_values(f_pre, i_pre, c_pre, CANDIDATE: tl.constexpr):
    # With f = F / P and i = I / Q the shares are F Q / (F Q + I P) and I P / (F Q + I P). Where both gates
    # underflow, F and I are scaled so that the larger is one.
    F, f_complement, P = _sigmoid(f_pre)
    I, i_complement, Q = _sigmoid(i_pre)  # noqa: E741  # the equation's own letter
    ratio = _exp_nonpositive(-tl.abs(f_pre - i_pre))
    both_negative = (f_pre < 0) & (i_pre < 0)
    keeps = f_pre >= i_pre
    f = tl.where(both_negative, tl.where(keeps, 1.0, ratio), F) * Q
    i = tl.where(both_negative, tl.where(keeps, ratio, 1.0), I) * P
    inverse = 1.0 / (f + i)
    c, slope = _candidate(c_pre, CANDIDATE)
    return f * inverse, f_complement / P, i * inverse, i_complement / Q, c, slope


@triton.jit
def _minlstm(f_pre, i_pre, c_pre, CANDIDATE: tl.constexpr):  # a = f / (f + i), b = i / (f + i) * candidate
    f, _, i, _, c, _ = _minlstm_values(f_pre, i_pre, c_pre, CANDIDATE)
    keep, rest = _decay(f, i)
    return keep, rest, i * c


@triton.jit
def _minlstm_pullback(f_pre, i_pre, c_pre, h_prev, g, CANDIDATE: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_values(f_pre, i_pre, c_pre, CANDIDATE)
    d = g * (h_prev - c) * (f * i)
    return d * f_complement, -d * i_complement, g * (i * slope)


@triton.jit
def _minlstm_unnormalised_values(f_pre, i_pre, c_pre, CANDIDATE: tl.constexpr):
    f, f_complement, P = _sigmoid(f_pre)
    i, i_complement, Q = _sigmoid(i_pre)
    of_forget = 1.0 / P
    of_input = 1.0 / Q
    c, slope = _candidate(c_pre, CANDIDATE)
    return f * of_forget, f_complement * of_forget, i * of_input, i_complement * of_input, c, slope


@triton.jit
def _minlstm_unnormalised(f_pre, i_pre, c_pre, CANDIDATE: tl.constexpr):  # a = f, b = i * candidate
    f, f_complement, i, _, c, _ = _minlstm_unnormalised_values(f_pre, i_pre, c_pre, CANDIDATE)
    keep, rest = _decay(f, f_complement)
    return keep, rest, i * c


@triton.jit
def _minlstm_unnormalised_pullback(f_pre, i_pre, c_pre, h_prev, g, CANDIDATE: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_unnormalised_values(f_pre, i_pre, c_pre, CANDIDATE)
    return g * h_prev * (f * f_complement), g * c * (i * i_complement), g * (i * slope)


@triton.jit
def _recurrence(x, y, z, GATE: tl.constexpr, CANDIDATE: tl.constexpr):
    if GATE == "identity":
        keep, rest, b = _identity(x, y)
    elif GATE == "mingru":
        keep, rest, b = _mingru(x, y, CANDIDATE)
    elif GATE == "minlstm":
        keep, rest, b = _minlstm(x, y, z, CANDIDATE)
    else:
        tl.static_assert(GATE == "minlstm_unnormalised", "no such gate")
        keep, rest, b = _minlstm_unnormalised(x, y, z, CANDIDATE)
    return keep, rest, b


@triton.jit
def _pullback(x, y, z, h_prev, g, GATE: tl.constexpr, CANDIDATE: tl.constexpr):
    if GATE == "identity":
        dx, dy, dz = _identity_pullback(h_prev, g)
    elif GATE == "mingru":
        dx, dy, dz = _mingru_pullback(x, y, h_prev, g, CANDIDATE)
    elif GATE == "minlstm":
        dx, dy, dz = _minlstm_pullback(x, y, z, h_prev, g, CANDIDATE)
    else:
        tl.static_assert(GATE == "minlstm_unnormalised", "no such gate")
        dx, dy, dz = _minlstm_unnormalised_pullback(x, y, z, h_prev, g, CANDIDATE)
    return dx, dy, dz


# ----------------------------------------------------------------------------------------------------------
# The state: a pair of floats, high + low.


@triton.jit
def _advance(high, low, keep, rest, b):
    # high + low = (keep + rest) * (high + low) + b; the sum of base and change loses nothing (Knuth's two-sum).
    base = keep * high
    change = tl.fma(rest, high, tl.fma(keep + rest, low, b))
    total = base + change
    part = total - base
    lost = (base - (total - part)) + (change - part)
    return total, tl.where(lost == lost, lost, 0.0)


@triton.jit
def _to_double(high, low):
    return high.to(tl.float64) + low.to(tl.float64)


@triton.jit
def _from_double(x, REAL: tl.constexpr):
    high = x.to(REAL)
    return high, (x - high.to(tl.float64)).to(REAL)


# ----------------------------------------------------------------------------------------------------------
# Kernels. A program is one chunk of time of one tile of channels of one batch row. `step` counts in the order
# in which the loop runs, which is that of the recurrence in forward passes and the opposite in backward ones.


@triton.jit
def _place(B, T, D, length, BLOCK_D: tl.constexpr):
    # The chunk is the slowest index, so that programs that run together read rows that lie together.
    program = tl.program_id(0).to(tl.int64)
    tiles = (D + BLOCK_D - 1) // BLOCK_D
    d = (program % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // tiles % B
    chunk = program // tiles // B
    begin = chunk * length
    return b, d, d < D, chunk, begin, tl.minimum(begin + length, T)


@triton.jit
def _load(ptr, stride_b, stride_t, b, t, d, inside, REAL: tl.constexpr):
    return tl.load(ptr + b * stride_b + t * stride_t + d, mask=inside, other=0.0).to(REAL)


@triton.jit
def _store(ptr, stride_b, stride_t, b, t, d, inside, value):
    tl.store(ptr + b * stride_b + t * stride_t + d, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_reset(ptr, stride_b, stride_t, b, t, d):
    # Every lane loads the same flag: a tensor's load is fetched ahead, a scalar's is waited for.
    return tl.load(ptr + b * stride_b + t * stride_t + d * 0) != 0


@triton.jit(do_not_specialize=["B", "T", "length", "chunks"])
def forward_prefix_kernel(
    x_ptr, x_stride_b, x_stride_t,
    y_ptr, y_stride_b, y_stride_t,
    z_ptr, z_stride_b, z_stride_t,
    reset_ptr, reset_stride_b, reset_stride_t,
    decay_ptr, carry_ptr,
    B, T, D, length, chunks,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Product of decays and end state from zero of each chunk, float64 (chunks, B, D)."""
    b, d, inside, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    high = tl.full([BLOCK_D], 0.0, REAL)
    low = tl.full([BLOCK_D], 0.0, REAL)
    decay_high = tl.full([BLOCK_D], 1.0, REAL)
    decay_low = tl.full([BLOCK_D], 0.0, REAL)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = T - 1 - step if DESCENDING else step
        x = _load(x_ptr, x_stride_b, x_stride_t, b, t, d, inside, REAL)
        y = _load(y_ptr, y_stride_b, y_stride_t, b, t, d, inside, REAL)
        z = y
        if z_ptr is not None:
            z = _load(z_ptr, z_stride_b, z_stride_t, b, t, d, inside, REAL)
        if reset_ptr is not None:
            reset = _load_reset(reset_ptr, reset_stride_b, reset_stride_t, b, t, d)
            high = tl.where(reset, 0.0, high)
            low = tl.where(reset, 0.0, low)
            decay_high = tl.where(reset, 0.0, decay_high)
            decay_low = tl.where(reset, 0.0, decay_low)
        keep, rest, drive = _recurrence(x, y, z, GATE, CANDIDATE)
        high, low = _advance(high, low, keep, rest, drive)
        decay_high, decay_low = _advance(decay_high, decay_low, keep, rest, 0.0)
    offset = (chunk * B + b) * D + d
    tl.store(carry_ptr + offset, _to_double(high, low), mask=inside)
    tl.store(decay_ptr + offset, _to_double(decay_high, decay_low), mask=inside)


@triton.jit(do_not_specialize=["B", "T", "length", "chunks"])
def backward_prefix_kernel(
    dh_ptr, dh_stride_b, dh_stride_t,
    x_ptr, x_stride_b, x_stride_t,
    y_ptr, y_stride_b, y_stride_t,
    z_ptr, z_stride_b, z_stride_t,
    reset_ptr, reset_stride_b, reset_stride_t,
    decay_ptr, carry_ptr,
    B, T, D, length, chunks,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same for the adjoint: its end is a[t] * g[t] of the chunk's last step."""
    b, d, inside, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    high = tl.full([BLOCK_D], 0.0, REAL)
    low = tl.full([BLOCK_D], 0.0, REAL)
    keep = tl.full([BLOCK_D], 0.0, REAL)
    rest = tl.full([BLOCK_D], 0.0, REAL)
    decay_high = tl.full([BLOCK_D], 1.0, REAL)
    decay_low = tl.full([BLOCK_D], 0.0, REAL)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = T - 1 - step if DESCENDING else step
        dh = _load(dh_ptr, dh_stride_b, dh_stride_t, b, t, d, inside, REAL)
        x = _load(x_ptr, x_stride_b, x_stride_t, b, t, d, inside, REAL)
        y = _load(y_ptr, y_stride_b, y_stride_t, b, t, d, inside, REAL)
        z = y
        if z_ptr is not None:
            z = _load(z_ptr, z_stride_b, z_stride_t, b, t, d, inside, REAL)
        high, low = _advance(high, low, keep, rest, dh)
        keep, rest, _ = _recurrence(x, y, z, GATE, CANDIDATE)
        decay_high, decay_low = _advance(decay_high, decay_low, keep, rest, 0.0)
        if reset_ptr is not None:
            reset = _load_reset(reset_ptr, reset_stride_b, reset_stride_t, b, t, d)
            high = tl.where(reset, 0.0, high)
            low = tl.where(reset, 0.0, low)
            keep = tl.where(reset, 0.0, keep)
            rest = tl.where(reset, 0.0, rest)
            decay_high = tl.where(reset, 0.0, decay_high)
            decay_low = tl.where(reset, 0.0, decay_low)
    high, low = _advance(high, low, keep, rest, 0.0)
    offset = (chunk * B + b) * D + d
    tl.store(carry_ptr + offset, _to_double(high, low), mask=inside)
    tl.store(decay_ptr + offset, _to_double(decay_high, decay_low), mask=inside)


@triton.jit(do_not_specialize=["B", "chunks"])
def join_kernel(
    decay_ptr, carry_ptr, h0_ptr, h0_stride_b, B, D, chunks, BLOCK_D: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    """End states from zero become the carries with which the chunks begin."""
    b, d, inside, _, _, _ = _place(B, 1, D, 1, BLOCK_D)
    carry = tl.full([BLOCK_D], 0.0, tl.float64)
    if h0_ptr is not None:
        carry = tl.load(h0_ptr + b * h0_stride_b + d, mask=inside, other=0.0).to(tl.float64)
    for chunk in tl.range(0, chunks, num_stages=STAGES):
        offset = (chunk.to(tl.int64) * B + b) * D + d
        decay = tl.load(decay_ptr + offset, mask=inside, other=0.0)
        end = tl.load(carry_ptr + offset, mask=inside, other=0.0)
        tl.store(carry_ptr + offset, carry, mask=inside)
        # A reset inside the chunk forgets everything before it, infinities and NaN included.
        carry = tl.where(decay == 0.0, end, decay * carry + end)


@triton.jit(do_not_specialize=["B", "T", "length"])
def forward_kernel(
    h_ptr, h_stride_b, h_stride_t,
    x_ptr, x_stride_b, x_stride_t,
    y_ptr, y_stride_b, y_stride_t,
    z_ptr, z_stride_b, z_stride_t,
    reset_ptr, reset_stride_b, reset_stride_t,
    h0_ptr, h0_stride_b, carry_ptr,
    B, T, D, length,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[t] = a[t] h[t-1] + b[t]."""
    b, d, inside, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    high = tl.full([BLOCK_D], 0.0, REAL)
    low = tl.full([BLOCK_D], 0.0, REAL)
    if carry_ptr is not None:
        high, low = _from_double(tl.load(carry_ptr + (chunk * B + b) * D + d, mask=inside, other=0.0), REAL)
    elif h0_ptr is not None:
        high = tl.load(h0_ptr + b * h0_stride_b + d, mask=inside, other=0.0).to(REAL)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = T - 1 - step if DESCENDING else step
        x = _load(x_ptr, x_stride_b, x_stride_t, b, t, d, inside, REAL)
        y = _load(y_ptr, y_stride_b, y_stride_t, b, t, d, inside, REAL)
        z = y
        if z_ptr is not None:
            z = _load(z_ptr, z_stride_b, z_stride_t, b, t, d, inside, REAL)
        if reset_ptr is not None:
            reset = _load_reset(reset_ptr, reset_stride_b, reset_stride_t, b, t, d)
            high = tl.where(reset, 0.0, high)
            low = tl.where(reset, 0.0, low)
        keep, rest, drive = _recurrence(x, y, z, GATE, CANDIDATE)
        high, low = _advance(high, low, keep, rest, drive)
        _store(h_ptr, h_stride_b, h_stride_t, b, t, d, inside, high)


@triton.jit(do_not_specialize=["B", "T", "length"])
def backward_kernel(
    dx_ptr, dx_stride_b, dx_stride_t,
    dy_ptr, dy_stride_b, dy_stride_t,
    dz_ptr, dz_stride_b, dz_stride_t,
    dh0_ptr,
    dh_ptr, dh_stride_b, dh_stride_t,
    h_ptr, h_stride_b, h_stride_t,
    x_ptr, x_stride_b, x_stride_t,
    y_ptr, y_stride_b, y_stride_t,
    z_ptr, z_stride_b, z_stride_t,
    reset_ptr, reset_stride_b, reset_stride_t,
    h0_ptr, h0_stride_b, carry_ptr,
    B, T, D, length,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """g[t] = dh[t] + a[t+1] g[t+1], and from it and h[t-1] the gradients of the pre-activations."""
    b, d, inside, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    high = tl.full([BLOCK_D], 0.0, REAL)
    low = tl.full([BLOCK_D], 0.0, REAL)
    if carry_ptr is not None:
        high, low = _from_double(tl.load(carry_ptr + (chunk * B + b) * D + d, mask=inside, other=0.0), REAL)
    h0 = tl.full([BLOCK_D], 0.0, REAL)
    if h0_ptr is not None:
        h0 = tl.load(h0_ptr + b * h0_stride_b + d, mask=inside, other=0.0).to(REAL)
    keep = tl.full([BLOCK_D], 1.0, REAL)  # the carry has been multiplied by its decay already
    rest = tl.full([BLOCK_D], 0.0, REAL)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = T - 1 - step if DESCENDING else step
        dh = _load(dh_ptr, dh_stride_b, dh_stride_t, b, t, d, inside, REAL)
        x = _load(x_ptr, x_stride_b, x_stride_t, b, t, d, inside, REAL)
        y = _load(y_ptr, y_stride_b, y_stride_t, b, t, d, inside, REAL)
        z = y
        if z_ptr is not None:
            z = _load(z_ptr, z_stride_b, z_stride_t, b, t, d, inside, REAL)
        first = step == T - 1  # of the recurrence: h0 came before it, and any row that exists may be loaded
        t_prev = tl.where(first, t, t - 1 if DESCENDING else t + 1)
        h_prev = tl.where(first, h0, _load(h_ptr, h_stride_b, h_stride_t, b, t_prev, d, inside, REAL))
        if reset_ptr is not None:
            reset = _load_reset(reset_ptr, reset_stride_b, reset_stride_t, b, t, d)
            h_prev = tl.where(reset, 0.0, h_prev)
        high, low = _advance(high, low, keep, rest, dh)
        dx, dy, dz = _pullback(x, y, z, h_prev, high, GATE, CANDIDATE)
        _store(dx_ptr, dx_stride_b, dx_stride_t, b, t, d, inside, dx)
        _store(dy_ptr, dy_stride_b, dy_stride_t, b, t, d, inside, dy)
        if dz_ptr is not None:
            _store(dz_ptr, dz_stride_b, dz_stride_t, b, t, d, inside, dz)
        keep, rest, _ = _recurrence(x, y, z, GATE, CANDIDATE)
        if reset_ptr is not None:
            high = tl.where(reset, 0.0, high)
            low = tl.where(reset, 0.0, low)
            keep = tl.where(reset, 0.0, keep)
            rest = tl.where(reset, 0.0, rest)
    if end == T:
        high, low = _advance(high, low, keep, rest, 0.0)
        tl.store(dh0_ptr + b * D + d, high, mask=inside)


# ----------------------------------------------------------------------------------------------------------
# The engine

_REALS = {torch.float32: tl.float32, torch.float64: tl.float64}

_WARPS_UNCUT = 2  # warps a processor below which a second reading costs less than idle lanes
_WARPS_CUT = 8  # warps a processor that chunks make up for them
_MIN_CHUNK = 64  # steps: a chunk must outweigh writing, joining and reading its prefix
_FEW_WARPS, _DEEP, _SHALLOW = 8, 16, 8  # steps fetched ahead: more where few warps share a processor


class _Cut(NamedTuple):
    """How B x T x D is cut: tiles of BLOCK_D channels, one warp each, and chunks of `length` steps."""

    tiles: int
    chunks: int
    length: int
    BLOCK_D: int
    STAGES: int


def _cut(B: int, T: int, D: int, itemsize: int, processors: int) -> _Cut:
    # Asynchronous copies move at least four bytes a lane, so 16-bit channels go in pairs.
    BLOCK_D = 32 * max(1, 4 // itemsize)
    tiles = -(-D // BLOCK_D)
    units, chunks = B * tiles, 1
    if units < _WARPS_UNCUT * processors:
        chunks = max(1, min(-(-_WARPS_CUT * processors // units), T // _MIN_CHUNK))
    length = -(-T // chunks)
    chunks = -(-T // length)
    few = units * chunks <= _FEW_WARPS * processors
    return _Cut(tiles, chunks, length, BLOCK_D, _DEEP if few else _SHALLOW)


def _processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward(
    pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, gate: str, candidate: str, reverse: bool
) -> Tensor:
    """As `reference.forward`, fused: reads each pre-activation once and writes h once."""
    parts = [contiguous_channels(x) for x in split(gate, pre)]
    B, T, D = parts[0].shape
    h = output_like(pre[0], D)
    h0 = initial_state(h0, h.dtype)
    cut = _cut(B, T, D, h.element_size(), _processors(h.device))
    sources = (*_parts(parts), *_resets(reset))
    settings = _settings(h.dtype, cut, gate, candidate, descending=reverse)
    with torch.cuda.device_of(h):
        carry = None
        if cut.chunks > 1:
            decay, carry = _prefixes(h, cut)
            forward_prefix_kernel[_grid(B, cut)](
                *sources, decay, carry, B, T, D, cut.length, cut.chunks, **settings
            )
            _join(decay, carry, h0, cut)
        forward_kernel[_grid(B, cut)](
            *_strided(h), *sources, *_initial(h0), carry, B, T, D, cut.length, **settings
        )
    return h


def backward(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> list[Tensor]:
    """As `reference.backward`, fused: reads pre-activations, h and dh once, writes the gradients once."""
    parts = [contiguous_channels(x) for x in split(gate, pre)]
    dh, h = contiguous_channels(dh), contiguous_channels(h)
    B, T, D = h.shape
    dpre = [output_like(x, x.shape[2]) for x in pre]
    dh0 = h.new_empty(B, D, dtype=state_dtype(h.dtype))
    h0 = initial_state(h0, h.dtype)
    cut = _cut(B, T, D, h.element_size(), _processors(h.device))
    sources = (*_parts(parts), *_resets(reset))
    settings = _settings(h.dtype, cut, gate, candidate, descending=not reverse)
    with torch.cuda.device_of(h):
        carry = None
        if cut.chunks > 1:
            decay, carry = _prefixes(h, cut)
            backward_prefix_kernel[_grid(B, cut)](
                *_strided(dh), *sources, decay, carry, B, T, D, cut.length, cut.chunks, **settings
            )
            _join(decay, carry, None, cut)
        backward_kernel[_grid(B, cut)](
            *_parts(split(gate, dpre)),
            dh0,
            *_strided(dh),
            *_strided(h),
            *sources,
            *_initial(h0),
            carry,
            B,
            T,
            D,
            cut.length,
            **settings,
        )
    return [*dpre, dh0]


def _settings(
    dtype: torch.dtype, cut: _Cut, gate: str, candidate: str, *, descending: bool
) -> dict[str, Any]:
    return {
        "GATE": gate,
        "CANDIDATE": candidate,
        "DESCENDING": descending,
        "REAL": _REALS[state_dtype(dtype)],
        "BLOCK_D": cut.BLOCK_D,
        "STAGES": cut.STAGES,
        "num_warps": 1,
    }


def _grid(B: int, cut: _Cut) -> tuple[int]:
    return (cut.tiles * B * cut.chunks,)


def _prefixes(h: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Room for each chunk's product of decays and end state, (chunks, B, D) each."""
    B, _, D = h.shape
    decay, carry = h.new_empty(2, cut.chunks, B, D, dtype=torch.float64)
    return decay, carry


def _join(decay: Tensor, carry: Tensor, h0: Tensor | None, cut: _Cut) -> None:
    chunks, B, D = carry.shape
    join_kernel[(cut.tiles * B,)](
        decay, carry, *_initial(h0), B, D, chunks, BLOCK_D=cut.BLOCK_D, STAGES=_SHALLOW, num_warps=1
    )


def _strided(x: Tensor) -> tuple[Tensor, int, int]:
    return x, x.stride(0), x.stride(1)


def _parts(parts: list[Tensor]) -> tuple[Any, ...]:
    """Three parts with their strides, the third absent where a gate has two."""
    flat = [value for x in parts for value in _strided(x)]
    return (*flat, *((None, 0, 0) if len(parts) == 2 else ()))


def _resets(reset: Tensor | None) -> tuple[Any, ...]:
    # Four bytes a flag, so that it can be copied ahead; B x T flags are next to nothing beside B x T x D.
    return (None, 0, 0) if reset is None else _strided(reset.to(torch.int32))


def _initial(h0: Tensor | None) -> tuple[Any, ...]:
    return (None, 0) if h0 is None else (h0, h0.stride(0))
