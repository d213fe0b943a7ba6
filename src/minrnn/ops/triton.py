"""The GPU engine, in Triton: one lane a channel, a plain loop over time, the same equations as csrc/gates.h.

*Traffic.* A program walks one tile of channels of one batch row through time, loads each step's row ahead of
its use (`num_stages`), and writes each output once: forward moves every pre-activation and h once; backward
the pre-activations, h, dh and their gradients once. Gates are recomputed, resets and direction are part of
the same loop.

*State.* Gates are computed in float32, and the state between steps is a pair of floats, not a double: a
double needs conversions, which run at a quarter to an eighth of float32's rate where doubles are fast, and on
most cards doubles are not fast. The decay is the pair keep + rest, keep in {-1, 0, 1}, so that keep * h is
exact and only the change rest * h + b is rounded; what their sum rounds away goes into the state's low part,
and from there into the next step's change (Kahan's compensation). Where a = 1 - w, a step's rounding is a
fraction of w |h|, and is forgotten at the rate w: the error does not grow with T. Whether products and sums
are fused makes no difference to that. Pairs cannot hold infinities: a state that overflows becomes NaN.

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

from minrnn.ops.reference import contiguous_channels, initial_state, output_like, split, state_dtype

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed; install it with: pip install 'minrnn[gpu]'") from error

__all__ = ["VERSION", "backward", "forward"]

VERSION: str = triton.__version__
"""Triton's version."""


# ----------------------------------------------------------------------------------------------------------
# Elementary functions, for float32 and float64. NaN passes through all of them.


# The instructions themselves, good to two units in the last place: the compiler guards them against ranges
# that do not occur here, which would be a sixth of all instructions of minGRU's forward.
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
def _reciprocal(x):
    if x.dtype == tl.float32 and _PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _exp_nonpositive(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # What rounding x * log2(e) loses would cost |x| / 2 roundings of the result, so it is put back. The
        # lower limit is that of normal results; infinities have to stop there too.
        x = tl.maximum(x, -87.33654, propagate_nan=tl.PropagateNan.ALL)
        exponent = x * 1.4426950216293335  # log2(e) as float32 holds it
        lost = tl.fma(x, 1.4426950216293335, -exponent)
        e = _exp2(exponent)
        return tl.fma(e, lost * 0.6931471805599453, e)


@triton.jit
def _sigmoid(x):
    # Numerators of sigmoid(x) and sigmoid(-x), and their denominator: 1 - sigmoid(x) loses the small one.
    e = _exp_nonpositive(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e), tl.where(x >= 0, e, 1.0), 1.0 + e


@triton.jit
def _positive(x):
    e = _exp_nonpositive(-tl.abs(x))
    inverse = _reciprocal(1.0 + e)
    return tl.where(x >= 0, x + 0.5, e * inverse), tl.where(x >= 0, 1.0, e * inverse * inverse)


@triton.jit
def _linear(x):
    return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _tanh(x):
    e = _exp_nonpositive(-2.0 * tl.abs(x))
    inverse = _reciprocal(1.0 + e)
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
def _identity(pre):
    keep = tl.where(pre[0] >= 0.5, 1.0, tl.where(pre[0] <= -0.5, -1.0, 0.0)).to(pre[0].dtype)
    return keep, pre[0] - keep, pre[1]  # exact for |a| <= 2


@triton.jit
def _identity_pullback(h_prev, g):
    return g * h_prev, g


@triton.jit
def _mingru_values(pre, CANDIDATE: tl.constexpr):
    z, complement, denominator = _sigmoid(pre[0])
    inverse = _reciprocal(denominator)
    c, slope = _candidate(pre[1], CANDIDATE)
    return z * inverse, complement * inverse, c, slope


@triton.jit
def _mingru(pre, CANDIDATE: tl.constexpr):  # a = 1 - z, b = z * candidate
    z, complement, c, _ = _mingru_values(pre, CANDIDATE)
    keep, rest = _decay(complement, z)
    return keep, rest, z * c


@triton.jit
def _mingru_pullback(pre, h_prev, g, CANDIDATE: tl.constexpr):
    z, complement, c, slope = _mingru_values(pre, CANDIDATE)
    return g * (c - h_prev) * (z * complement), g * (z * slope)


@triton.jit
def _minlstm_values(pre, CANDIDATE: tl.constexpr):
    # With f = F / P and i = I / Q the shares are F Q / (F Q + I P) and I P / (F Q + I P). Where both gates
    # underflow, F and I are scaled so that the larger is one.
    F, f_complement, P = _sigmoid(pre[0])
    I, i_complement, Q = _sigmoid(pre[1])  # noqa: E741  # the equation's own letter
    ratio = _exp_nonpositive(-tl.abs(pre[0] - pre[1]))
    both_negative = (pre[0] < 0) & (pre[1] < 0)
    keeps = pre[0] >= pre[1]
    f = tl.where(both_negative, tl.where(keeps, 1.0, ratio), F) * Q
    i = tl.where(both_negative, tl.where(keeps, ratio, 1.0), I) * P
    inverse = _reciprocal(f + i)
    c, slope = _candidate(pre[2], CANDIDATE)
    return f * inverse, f_complement * _reciprocal(P), i * inverse, i_complement * _reciprocal(Q), c, slope


@triton.jit
def _minlstm(pre, CANDIDATE: tl.constexpr):  # a = f / (f + i), b = i / (f + i) * candidate
    f, _, i, _, c, _ = _minlstm_values(pre, CANDIDATE)
    keep, rest = _decay(f, i)
    return keep, rest, i * c


@triton.jit
def _minlstm_pullback(pre, h_prev, g, CANDIDATE: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_values(pre, CANDIDATE)
    d = g * (h_prev - c) * (f * i)
    return d * f_complement, -d * i_complement, g * (i * slope)


@triton.jit
def _minlstm_unnormalised_values(pre, CANDIDATE: tl.constexpr):
    f, f_complement, P = _sigmoid(pre[0])
    i, i_complement, Q = _sigmoid(pre[1])
    of_forget = _reciprocal(P)
    of_input = _reciprocal(Q)
    c, slope = _candidate(pre[2], CANDIDATE)
    return f * of_forget, f_complement * of_forget, i * of_input, i_complement * of_input, c, slope


@triton.jit
def _minlstm_unnormalised(pre, CANDIDATE: tl.constexpr):  # a = f, b = i * candidate
    f, f_complement, i, _, c, _ = _minlstm_unnormalised_values(pre, CANDIDATE)
    keep, rest = _decay(f, f_complement)
    return keep, rest, i * c


@triton.jit
def _minlstm_unnormalised_pullback(pre, h_prev, g, CANDIDATE: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_unnormalised_values(pre, CANDIDATE)
    return g * h_prev * (f * f_complement), g * c * (i * i_complement), g * (i * slope)


@triton.jit
def _recurrence(pre, GATE: tl.constexpr, CANDIDATE: tl.constexpr):
    if GATE == "identity":
        keep, rest, b = _identity(pre)
    elif GATE == "mingru":
        keep, rest, b = _mingru(pre, CANDIDATE)
    elif GATE == "minlstm":
        keep, rest, b = _minlstm(pre, CANDIDATE)
    else:
        tl.static_assert(GATE == "minlstm_unnormalised", "no such gate")
        keep, rest, b = _minlstm_unnormalised(pre, CANDIDATE)
    return keep, rest, b


@triton.jit
def _pullback(pre, h_prev, g, GATE: tl.constexpr, CANDIDATE: tl.constexpr):
    if GATE == "identity":
        dpre = _identity_pullback(h_prev, g)
    elif GATE == "mingru":
        dpre = _mingru_pullback(pre, h_prev, g, CANDIDATE)
    elif GATE == "minlstm":
        dpre = _minlstm_pullback(pre, h_prev, g, CANDIDATE)
    else:
        tl.static_assert(GATE == "minlstm_unnormalised", "no such gate")
        dpre = _minlstm_unnormalised_pullback(pre, h_prev, g, CANDIDATE)
    return dpre


# ----------------------------------------------------------------------------------------------------------
# Pairs of floats, (high, low): the state, the adjoint, and products of decays.


@triton.jit
def _pair(high, BLOCK_D: tl.constexpr, REAL: tl.constexpr):
    return tl.full([BLOCK_D], high, REAL), tl.full([BLOCK_D], 0.0, REAL)


@triton.jit
def _advance(pair, keep, rest, b):
    # (keep + rest) * pair + b; the sum of base and change loses nothing (Knuth's two-sum). Without rest * low
    # the change is off by less than it is rounded.
    base = keep * pair[0]
    change = tl.fma(rest, pair[0], tl.fma(keep, pair[1], b))
    total = base + change
    part = total - base
    return total, (base - (total - part)) + (change - part)


@triton.jit
def _forget(reset, pair):
    return tl.where(reset, 0.0, pair[0]), tl.where(reset, 0.0, pair[1])


@triton.jit
def _load_pair(ptr, inside, REAL: tl.constexpr):
    x = tl.load(ptr, mask=inside, other=0.0)
    high = x.to(REAL)
    return high, (x - high.to(tl.float64)).to(REAL)


@triton.jit
def _store_pair(ptr, pair, inside):
    tl.store(ptr, pair[0].to(tl.float64) + pair[1].to(tl.float64), mask=inside)


# ----------------------------------------------------------------------------------------------------------
# Kernels. A program is one chunk of time of one tile of channels of one batch row; `step` counts in the order
# in which the loop runs, which is that of the recurrence in forward passes and the opposite in backward ones.
# A sequence is a tuple (pointer, batch stride, time stride), an absent one None.


@triton.jit
def _place(B, T, D, length, BLOCK_D: tl.constexpr):
    # The chunk is the slowest index, so that programs that run together read rows that lie together.
    program = tl.program_id(0).to(tl.int64)
    tiles = (D + BLOCK_D - 1) // BLOCK_D
    d = (program % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // tiles % B
    chunk = program // tiles // B
    begin = chunk * length
    return b, d, chunk, begin, tl.minimum(begin + length, T)


@triton.jit
def _time(step, T, DESCENDING: tl.constexpr):
    return T - 1 - step if DESCENDING else step


@triton.jit
def _load(sequence, b, t, d, D, REAL: tl.constexpr):
    x = tl.load(sequence[0] + b * sequence[1] + t * sequence[2] + d, mask=d < D, other=0.0)
    return x.to(REAL)


@triton.jit
def _store(sequence, b, t, d, D, x):
    ptr = sequence[0] + b * sequence[1] + t * sequence[2] + d
    tl.store(ptr, x.to(sequence[0].dtype.element_ty), mask=d < D)


@triton.jit
def _load_rows(sequences, b, t, d, D, REAL: tl.constexpr):
    rows = ()
    for j in tl.static_range(len(sequences)):
        rows = rows + (_load(sequences[j], b, t, d, D, REAL),)
    return rows


@triton.jit
def _load_reset(reset, b, t, d):
    # Every lane loads the same flag: a tensor's load is fetched ahead, a scalar's would be waited for.
    return tl.load(reset[0] + b * reset[1] + t * reset[2] + d * 0) != 0


@triton.jit
def _forward_block(
    state, decay, step, h, pre, reset, b, d, T, D,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    rows = ()  # all loads come first, so that one wait serves them and the steps' gates overlap
    resets = ()
    for r in tl.static_range(STEPS):
        t = _time(step + r, T, DESCENDING)
        rows = rows + (_load_rows(pre, b, t, d, D, REAL),)
        if reset is not None:
            resets = resets + (_load_reset(reset, b, t, d),)
    for r in tl.static_range(STEPS):
        keep, rest, drive = _recurrence(rows[r], GATE, CANDIDATE)
        if reset is not None:
            state = _forget(resets[r], state)
        state = _advance(state, keep, rest, drive)
        if h is None:
            if reset is not None:
                decay = _forget(resets[r], decay)
            decay = _advance(decay, keep, rest, 0.0)
        else:
            _store(h, b, _time(step + r, T, DESCENDING), d, D, state[0])
    return state, decay


@triton.jit(do_not_specialize=["B", "T", "length"])
def forward_kernel(
    h, pre, reset, h0, decay_ptr, carry_ptr, B, T, D, length,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """h[t] = a[t] h[t-1] + b[t]; without h, each chunk's product of decays and end state from zero."""
    b, d, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    border = (chunk * B + b) * D + d
    state = _pair(0.0, BLOCK_D, REAL)
    decay = _pair(1.0, BLOCK_D, REAL)
    if h is not None:
        if carry_ptr is not None:
            state = _load_pair(carry_ptr + border, d < D, REAL)
        elif h0 is not None:
            state = (tl.load(h0[0] + b * h0[1] + d, mask=d < D, other=0.0).to(REAL), state[1])
    whole = end - (end - begin) % STEPS
    for step in tl.range(begin, whole, STEPS, num_stages=STAGES):
        state, decay = _forward_block(
            state, decay, step, h, pre, reset, b, d, T, D, GATE, CANDIDATE, DESCENDING, REAL, STEPS
        )
    for step in tl.range(whole, end):
        state, decay = _forward_block(
            state, decay, step, h, pre, reset, b, d, T, D, GATE, CANDIDATE, DESCENDING, REAL, 1
        )
    if h is None:
        _store_pair(carry_ptr + border, state, d < D)
        _store_pair(decay_ptr + border, decay, d < D)


@triton.jit
def _backward_block(
    adjoint, factor, decay, step, dpre, dh, h, pre, reset, h0, b, d, T, D,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    rows = ()
    incoming = ()
    previous = ()
    resets = ()
    for r in tl.static_range(STEPS):
        t = _time(step + r, T, DESCENDING)
        rows = rows + (_load_rows(pre, b, t, d, D, REAL),)
        incoming = incoming + (_load(dh, b, t, d, D, REAL),)
        if dpre is not None:
            first = step + r == T - 1  # of the recurrence: h0 came before it; some row is loaded all the same
            t_prev = tl.where(first, t, t - 1 if DESCENDING else t + 1)
            previous = previous + (tl.where(first, h0, _load(h, b, t_prev, d, D, REAL)),)
        if reset is not None:
            resets = resets + (_load_reset(reset, b, t, d),)
    for r in tl.static_range(STEPS):
        adjoint = _advance(adjoint, factor[0], factor[1], incoming[r])
        keep, rest, _ = _recurrence(rows[r], GATE, CANDIDATE)
        factor = (keep, rest)
        if dpre is None:
            decay = _advance(decay, keep, rest, 0.0)
        else:
            h_prev = previous[r]
            if reset is not None:
                h_prev = tl.where(resets[r], 0.0, h_prev)
            gradients = _pullback(rows[r], h_prev, adjoint[0], GATE, CANDIDATE)
            for j in tl.static_range(len(dpre)):
                _store(dpre[j], b, _time(step + r, T, DESCENDING), d, D, gradients[j])
        if reset is not None:
            adjoint = _forget(resets[r], adjoint)
            factor = _forget(resets[r], factor)
            decay = _forget(resets[r], decay)
    return adjoint, factor, decay


@triton.jit(do_not_specialize=["B", "T", "length"])
def backward_kernel(
    dpre, dh0_ptr, dh, h, pre, reset, h0, decay_ptr, carry_ptr, B, T, D, length,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr,
    REAL: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """g[t] = dh[t] + a[t+1] g[t+1] and the gradients it gives; without dpre, each chunk's prefix."""
    b, d, chunk, begin, end = _place(B, T, D, length, BLOCK_D)
    border = (chunk * B + b) * D + d
    adjoint = _pair(0.0, BLOCK_D, REAL)
    factor = _pair(1.0, BLOCK_D, REAL)  # keep and rest of the step before: carries come multiplied already
    decay = _pair(1.0, BLOCK_D, REAL)
    initial = tl.full([BLOCK_D], 0.0, REAL)
    if dpre is not None:
        if carry_ptr is not None:
            adjoint = _load_pair(carry_ptr + border, d < D, REAL)
        if h0 is not None:
            initial = tl.load(h0[0] + b * h0[1] + d, mask=d < D, other=0.0).to(REAL)
    whole = end - (end - begin) % STEPS
    for step in tl.range(begin, whole, STEPS, num_stages=STAGES):
        adjoint, factor, decay = _backward_block(
            adjoint, factor, decay, step, dpre, dh, h, pre, reset, initial, b, d, T, D,
            GATE, CANDIDATE, DESCENDING, REAL, STEPS,
        )  # fmt: skip
    for step in tl.range(whole, end):
        adjoint, factor, decay = _backward_block(
            adjoint, factor, decay, step, dpre, dh, h, pre, reset, initial, b, d, T, D,
            GATE, CANDIDATE, DESCENDING, REAL, 1,
        )  # fmt: skip
    adjoint = _advance(adjoint, factor[0], factor[1], 0.0)
    if dpre is None:
        _store_pair(carry_ptr + border, adjoint, d < D)
        _store_pair(decay_ptr + border, decay, d < D)
    elif end == T:
        tl.store(dh0_ptr + b * D + d, adjoint[0], mask=d < D)


@triton.jit(do_not_specialize=["B", "chunks"])
def join_kernel(h0, decay_ptr, carry_ptr, B, D, chunks, BLOCK_D: tl.constexpr, STAGES: tl.constexpr):
    """End states from zero become the carries with which the chunks begin."""
    b, d, _, begin, end = _place(B, chunks, D, chunks, BLOCK_D)
    carry = tl.full([BLOCK_D], 0.0, tl.float64)
    if h0 is not None:
        carry = tl.load(h0[0] + b * h0[1] + d, mask=d < D, other=0.0).to(tl.float64)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        border = (chunk * B + b) * D + d
        decay = tl.load(decay_ptr + border, mask=d < D, other=0.0)
        state = tl.load(carry_ptr + border, mask=d < D, other=0.0)
        tl.store(carry_ptr + border, carry, mask=d < D)
        # A reset inside the chunk forgets everything before it, infinities and NaN included.
        carry = tl.where(decay == 0.0, state, decay * carry + state)


# ----------------------------------------------------------------------------------------------------------
# The engine

# Fusion of products and sums is asked for aloud, because Triton's default is about to change.
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
_REALS = {torch.float32: tl.float32, torch.float64: tl.float64}

# Estimates from latencies and instruction counts, to be measured: a warp alone keeps 16 rows in flight and
# needs some 100 cycles a step, so that four on each processor come near the memory's limit.
_WARPS_UNCUT = 2  # warps a processor below which a second reading costs less than idle lanes
_WARPS_CUT = 8  # warps a processor that chunks make up for them
_MIN_CHUNK = 64  # steps: a chunk must outweigh writing, joining and reading its prefix
_FEW_WARPS = 8  # warps a processor below which each must keep more rows in flight
_DEEP, _SHALLOW = 16, 8  # rows in flight for each warp

_Sequence = tuple[Tensor, int, int]


class _Cut(NamedTuple):
    """How B x T x D is cut: tiles of BLOCK_D channels, one warp each, and chunks of `length` steps."""

    tiles: int
    chunks: int
    length: int
    BLOCK_D: int
    STEPS: int
    """Steps whose gates overlap, and that share one wait."""
    STAGES: int
    """Blocks of steps in flight, the one in use included."""


def _cut(B: int, T: int, D: int, itemsize: int, processors: int) -> _Cut:
    # Asynchronous copies move at least four bytes a lane, so 16-bit channels go in pairs. Four values a lane
    # at once, or two of float64, are what registers hold.
    BLOCK_D, STEPS = 32 * max(1, 4 // itemsize), 4 if itemsize == 4 else 2
    tiles = -(-D // BLOCK_D)
    units, chunks = B * tiles, 1
    if units < _WARPS_UNCUT * processors:
        chunks = max(1, min(-(-_WARPS_CUT * processors // units), T // _MIN_CHUNK))
    length = -(-T // chunks)
    chunks = -(-T // length)
    few = units * chunks <= _FEW_WARPS * processors
    return _Cut(tiles, chunks, length, BLOCK_D, STEPS, (_DEEP if few else _SHALLOW) // STEPS + 1)


def _processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward(
    pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, gate: str, candidate: str, reverse: bool
) -> Tensor:
    """As `reference.forward`, fused: reads each pre-activation once and writes h once."""
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    B, T, D = parts[0][0].shape
    h = output_like(pre[0], D)
    start = _start(h0, h.dtype)
    flags = _flags(reset)
    cut = _cut(B, T, D, h.element_size(), _processors(h.device))
    units, settings = cut.tiles * B, _settings(h.dtype, cut, gate, candidate, reverse)
    with torch.cuda.device_of(h):
        decay = carry = None
        if cut.chunks > 1:
            decay, carry = _prefixes(h, cut)
            forward_kernel[(units * (cut.chunks - 1),)](  # nobody needs the last chunk's prefix
                None, parts, flags, None, decay, carry, B, T, D, cut.length, **settings
            )
            _join(start, decay, carry, cut)
        forward_kernel[(units * cut.chunks,)](
            _strided(h), parts, flags, start, None, carry, B, T, D, cut.length, **settings
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
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    dh, h = contiguous_channels(dh), contiguous_channels(h)
    B, T, D = h.shape
    dpre = [output_like(x, x.shape[2]) for x in pre]
    dh0 = h.new_empty(B, D, dtype=state_dtype(h.dtype))
    incoming, flags = _strided(dh), _flags(reset)
    cut = _cut(B, T, D, h.element_size(), _processors(h.device))
    units, settings = cut.tiles * B, _settings(h.dtype, cut, gate, candidate, not reverse)
    with torch.cuda.device_of(h):
        decay = carry = None
        if cut.chunks > 1:
            decay, carry = _prefixes(h, cut)
            backward_kernel[(units * (cut.chunks - 1),)](
                None, None, incoming, None, parts, flags, None, decay, carry, B, T, D, cut.length, **settings
            )
            _join(None, decay, carry, cut)
        backward_kernel[(units * cut.chunks,)](
            _parts(gate, dpre), dh0, incoming, _strided(h), parts, flags, _start(h0, h.dtype), None, carry,
            B, T, D, cut.length, **settings,
        )  # fmt: skip
    return [*dpre, dh0]


def _settings(dtype: torch.dtype, cut: _Cut, gate: str, candidate: str, descending: bool) -> dict[str, Any]:
    return {
        "GATE": gate,
        "CANDIDATE": candidate,
        "DESCENDING": descending,
        "REAL": _REALS[state_dtype(dtype)],
        "BLOCK_D": cut.BLOCK_D,
        "STEPS": cut.STEPS,
        "STAGES": cut.STAGES,
        **_OPTIONS,
    }


def _prefixes(h: Tensor, cut: _Cut) -> tuple[Tensor, Tensor]:
    """Room for each chunk's product of decays and end state, (chunks, B, D) each."""
    B, _, D = h.shape
    decay, carry = h.new_empty(2, cut.chunks, B, D, dtype=torch.float64)
    return decay, carry


def _join(start: tuple[Tensor, int] | None, decay: Tensor, carry: Tensor, cut: _Cut) -> None:
    chunks, B, D = carry.shape
    join_kernel[(cut.tiles * B,)](
        start, decay, carry, B, D, chunks, BLOCK_D=cut.BLOCK_D, STAGES=_SHALLOW, **_OPTIONS
    )


def _strided(x: Tensor) -> _Sequence:
    return x, x.stride(0), x.stride(1)


def _parts(gate: str, pre: list[Tensor]) -> tuple[_Sequence, ...]:
    """The gate's parts, whether they came packed or not: views of the same memory."""
    return tuple(_strided(x) for x in split(gate, pre))


def _flags(reset: Tensor | None) -> _Sequence | None:
    # Four bytes a flag, so that it can be copied ahead; B x T flags are next to nothing beside B x T x D.
    return None if reset is None else _strided(reset.to(torch.int32))


def _start(h0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, int] | None:
    h0 = initial_state(h0, dtype)
    return None if h0 is None else (h0, h0.stride(0))
