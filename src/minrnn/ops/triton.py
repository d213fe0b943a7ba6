"""The GPU engine, in Triton: one lane a channel, one pass over memory, the same equations as csrc/gates.h.

*Traffic.* A program holds, in registers, WARPS spans of STEPS steps of 32 channels of one batch row: a chunk.
It loads all of it at once, joins the steps to spans and the spans to one function of the state before them,
gets that state, and walks the steps to write each output. Forward moves every pre-activation and h once;
backward the pre-activations, h, dh and their gradients once. Gates are computed once in each direction,
resets and direction are part of the same kernel.

*Numbers.* Gates are computed in float32. A span is (1 - a, a, b), 1 - a as exact as a. What steps make of a
state of zero is at most a share 1 - a of what the state can be; so is the error of joining spans in a tree,
and it is forgotten at the rate 1 - a: it does not grow with T. Signed gates have 1 + a in its place where a
is negative; near -1 their b is no small share, and rounding it costs what rounding a step's b costs. Carries
between programs are pairs of floats, and where h is float32, so is the state between steps: only a step's
change is rounded, and what is lost where the change meets the state goes into the next change (Kahan's
compensation). No doubles: they run at half of float32's rate where they are fast, and at a 64th elsewhere.
Pairs cannot hold infinities: a state that overflows becomes NaN. Outputs of 16 bits need neither the pairs
between steps nor exponentials to the last bit.

*Carries.* Programs take chunks from a counter, in the order of time, so that whom a program waits for has
started already; what has started goes on while others wait (CUDA promises this from sm_70), so the first
chunk that is not done always gets done, and with it all of them, in whatever order and however few at a time
the device starts programs. Where B and D fill the device, a chunk waits for the one before it, which is
mostly long done. Elsewhere that would be a chain of as many messages as chunks; there, GROUP chunks publish
their spans as soon as they have read their input, each joins those of its group before it, and one carry goes
from group to group. What is joined with what depends on shape and device alone: equal calls give equal bits.

*Messages.* Each group has a word of bits. Data is written, a barrier gathers the program's writers, then one
lane sets the bit, with a release at the device's scope. A reader's lane polls the word, with acquires, until
it holds the bits; a barrier lets the program's other lanes read the data. Only that lane's value decides how
often the program polls, so all of its warps agree.

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
def _exp_minus(x, EXACT: tl.constexpr):  # exp(-x), x >= 0
    if x.dtype == tl.float64:
        return tl.exp(-x)
    elif EXACT:
        # What rounding x * log2(e) loses would cost x / 2 roundings of the result, so it is put back. The
        # upper limit is that of normal results; infinities have to stop there too.
        x = tl.minimum(x, 87.33654, propagate_nan=tl.PropagateNan.ALL)
        exponent = x * -1.4426950216293335  # log2(e) as float32 holds it
        lost = tl.fma(x, 1.4426950216293335, exponent)
        e = _exp2(exponent)
        return tl.fma(e, lost * -0.6931471805599453, e)
    else:
        return _exp2(x * -1.4426950216293335)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    # Numerators of sigmoid(x) and sigmoid(-x), and their denominator: 1 - sigmoid(x) loses the small one.
    e = _exp_minus(tl.abs(x), EXACT)
    return tl.where(x >= 0, 1.0, e), tl.where(x >= 0, e, 1.0), 1.0 + e


@triton.jit
def _positive(x, EXACT: tl.constexpr):
    e = _exp_minus(tl.abs(x), EXACT)
    inverse = _reciprocal(1.0 + e)
    return tl.where(x >= 0, x + 0.5, e * inverse), tl.where(x >= 0, 1.0, e * inverse * inverse)


@triton.jit
def _linear(x):
    return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    e = _exp_minus(2.0 * tl.abs(x), EXACT)
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
def _candidate(x, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    # The function that the candidate's pre-activation goes through, and its slope.
    if CANDIDATE == "positive":
        value, slope = _positive(x, EXACT)
    elif CANDIDATE == "linear":
        value, slope = _linear(x)
    else:
        tl.static_assert(CANDIDATE == "tanh", "no such candidate")
        value, slope = _tanh(x, EXACT)
    return value, slope


# ----------------------------------------------------------------------------------------------------------
# Gates. `_<gate>` maps pre-activations to a, 1 - a, each of full relative accuracy, and b;
# `_<gate>_partials` to a, 1 - a, and the numbers by which the adjoint of h is multiplied to give the
# pre-activations' gradients. Signed gates have in the place of 1 - a, here and in all that follows, the rest
# a - keep with keep = 1 or -1, of full relative accuracy; the rest's sign tells keep, so it is never zero:
# Triton has no literal of minus zero, and a sum of it and zeros would lose it.
_LEAST = tl.constexpr(1e-37)


@triton.constexpr_function
def _signed(gate):
    return gate == "mingru_signed" or gate == "minlstm_signed"


@triton.jit
def _mingru_values(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    z, complement, denominator = _sigmoid(pre[0], EXACT)
    inverse = _reciprocal(denominator)
    c, slope = _candidate(pre[1], CANDIDATE, EXACT)
    return z * inverse, complement * inverse, c, slope


@triton.jit
def _mingru(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):  # a = 1 - z, b = z * candidate
    z, complement, c, _ = _mingru_values(pre, CANDIDATE, EXACT)
    return complement, z, z * c


@triton.jit
def _mingru_partials(pre, h_prev, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    z, complement, c, slope = _mingru_values(pre, CANDIDATE, EXACT)
    return complement, z, ((c - h_prev) * (z * complement), z * slope)


@triton.jit
def _minlstm_values(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    # With f = F / P and i = I / Q the shares are F Q / (F Q + I P) and I P / (F Q + I P). Where both gates
    # underflow, F and I are scaled so that the larger is one.
    F, f_complement, P = _sigmoid(pre[0], EXACT)
    I, i_complement, Q = _sigmoid(pre[1], EXACT)  # noqa: E741  # the equation's own letter
    ratio = _exp_minus(tl.abs(pre[0] - pre[1]), EXACT)
    both_negative = (pre[0] < 0) & (pre[1] < 0)
    keeps = pre[0] >= pre[1]
    f = tl.where(both_negative, tl.where(keeps, 1.0, ratio), F) * Q
    i = tl.where(both_negative, tl.where(keeps, ratio, 1.0), I) * P
    inverse = _reciprocal(f + i)
    c, slope = _candidate(pre[2], CANDIDATE, EXACT)
    return f * inverse, f_complement * _reciprocal(P), i * inverse, i_complement * _reciprocal(Q), c, slope


@triton.jit
def _minlstm(
    pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr
):  # a = f / (f + i), b = i / (f + i) * candidate
    f, _, i, _, c, _ = _minlstm_values(pre, CANDIDATE, EXACT)
    return f, i, i * c


@triton.jit
def _minlstm_partials(pre, h_prev, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_values(pre, CANDIDATE, EXACT)
    of_share = (h_prev - c) * (f * i)
    return f, i, (of_share * f_complement, -of_share * i_complement, i * slope)


@triton.jit
def _minlstm_unnormalised_values(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    f, f_complement, P = _sigmoid(pre[0], EXACT)
    i, i_complement, Q = _sigmoid(pre[1], EXACT)
    of_forget = _reciprocal(P)
    of_input = _reciprocal(Q)
    c, slope = _candidate(pre[2], CANDIDATE, EXACT)
    return f * of_forget, f_complement * of_forget, i * of_input, i_complement * of_input, c, slope


@triton.jit
def _minlstm_unnormalised(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):  # a = f, b = i * candidate
    f, f_complement, i, _, c, _ = _minlstm_unnormalised_values(pre, CANDIDATE, EXACT)
    return f, f_complement, i * c


@triton.jit
def _minlstm_unnormalised_partials(pre, h_prev, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_unnormalised_values(pre, CANDIDATE, EXACT)
    return f, f_complement, (h_prev * (f * f_complement), c * (i * i_complement), i * slope)


@triton.jit
def _is_negative(x):
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True) < 0
    else:
        return x.to(tl.int32, bitcast=True) < 0


@triton.jit
def _flip(x, sign):
    # x, with its sign changed where the other number has one.
    if x.dtype == tl.float64:
        bits = sign.to(tl.int64, bitcast=True) & -9223372036854775808
        return (x.to(tl.int64, bitcast=True) ^ bits).to(tl.float64, bitcast=True)
    else:
        bits = sign.to(tl.int32, bitcast=True) & -2147483648
        return (x.to(tl.int32, bitcast=True) ^ bits).to(tl.float32, bitcast=True)


@triton.jit
def _kept(rest):
    # keep of a signed decay
    return tl.where(_is_negative(rest), 1.0, -1.0).to(rest.dtype)


@triton.jit
def _difference(kept, taken):
    # kept - taken, of two that sum to one, and its rest, which is never zero.
    change = tl.fma(tl.minimum(kept, taken, propagate_nan=tl.PropagateNan.ALL), 2.0, _LEAST)
    rest = tl.where(kept < taken, change, change * -1.0)
    return rest + _kept(rest), rest


@triton.jit
def _mingru_signed(pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):  # a = 1 - 2 z, b = z * candidate
    z, complement, c, _ = _mingru_values(pre, CANDIDATE, EXACT)
    a, rest = _difference(complement, z)
    return a, rest, z * c


@triton.jit
def _mingru_signed_partials(pre, h_prev, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    z, complement, c, slope = _mingru_values(pre, CANDIDATE, EXACT)
    a, rest = _difference(complement, z)
    return a, rest, ((c - 2.0 * h_prev) * (z * complement), z * slope)


@triton.jit
def _minlstm_signed(
    pre, CANDIDATE: tl.constexpr, EXACT: tl.constexpr
):  # a = (f - i) / (f + i), b = i / (f + i) * candidate
    f, _, i, _, c, _ = _minlstm_values(pre, CANDIDATE, EXACT)
    a, rest = _difference(f, i)
    return a, rest, i * c


@triton.jit
def _minlstm_signed_partials(pre, h_prev, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    f, f_complement, i, i_complement, c, slope = _minlstm_values(pre, CANDIDATE, EXACT)
    a, rest = _difference(f, i)
    of_share = (2.0 * h_prev - c) * (f * i)
    return a, rest, (of_share * f_complement, -of_share * i_complement, i * slope)


@triton.jit
def _recurrence(pre, GATE: tl.constexpr, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    if GATE == "identity":
        step = (pre[0], 1.0 - pre[0], pre[1])
    elif GATE == "mingru":
        step = _mingru(pre, CANDIDATE, EXACT)
    elif GATE == "minlstm":
        step = _minlstm(pre, CANDIDATE, EXACT)
    elif GATE == "mingru_signed":
        step = _mingru_signed(pre, CANDIDATE, EXACT)
    elif GATE == "minlstm_signed":
        step = _minlstm_signed(pre, CANDIDATE, EXACT)
    else:
        tl.static_assert(GATE == "minlstm_unnormalized", "no such gate")
        step = _minlstm_unnormalised(pre, CANDIDATE, EXACT)
    return step


@triton.jit
def _partials(pre, h_prev, GATE: tl.constexpr, CANDIDATE: tl.constexpr, EXACT: tl.constexpr):
    if GATE == "identity":
        step = (pre[0], 1.0 - pre[0], (h_prev, tl.full(h_prev.shape, 1.0, h_prev.dtype)))
    elif GATE == "mingru":
        step = _mingru_partials(pre, h_prev, CANDIDATE, EXACT)
    elif GATE == "minlstm":
        step = _minlstm_partials(pre, h_prev, CANDIDATE, EXACT)
    elif GATE == "mingru_signed":
        step = _mingru_signed_partials(pre, h_prev, CANDIDATE, EXACT)
    elif GATE == "minlstm_signed":
        step = _minlstm_signed_partials(pre, h_prev, CANDIDATE, EXACT)
    else:
        tl.static_assert(GATE == "minlstm_unnormalized", "no such gate")
        step = _minlstm_unnormalised_partials(pre, h_prev, CANDIDATE, EXACT)
    return step


# ----------------------------------------------------------------------------------------------------------
# Pairs of floats, (high, low): carries, and where h is float32 or wider, the state between steps.


@triton.jit
def _two_sum(a, b):  # a + b, and what its rounding loses
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def _code(a, complement, GATE: tl.constexpr, EXACT: tl.constexpr):
    # The decay as one number: a itself, or where 1 - a is the smaller, that, negative, minus zero included.
    # Of signed gates always the rest.
    if EXACT and _signed(GATE):
        return complement
    elif EXACT and GATE != "identity":
        return tl.where(complement < 0.5, complement * -1.0, a)
    else:
        return a


@triton.jit
def _advance(state, decay, b, GATE: tl.constexpr, EXACT: tl.constexpr):
    # a * state + b
    if EXACT:
        # a = keep + rest with keep in {-1, 0, 1}, so that only the change is rounded, and what the sum rounds
        # away goes into the state's low part. Without rest * low the change is off by less than its rounding.
        if GATE == "identity":
            keep = tl.where(decay >= 0.5, 1.0, tl.where(decay <= -0.5, -1.0, 0.0)).to(decay.dtype)
            rest = decay - keep  # exact for |a| <= 2
        elif _signed(GATE):
            keep = _kept(decay)
            rest = decay
        else:
            keep = tl.where(_is_negative(decay), 1.0, 0.0).to(decay.dtype)
            rest = decay
        return _two_sum(keep * state[0], tl.fma(rest, state[0], tl.fma(keep, state[1], b)))
    else:
        return tl.fma(decay, state[0], b), state[1]


@triton.jit
def _where(condition, a, b):
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


# ----------------------------------------------------------------------------------------------------------
# Spans (1 - a, a, b): what some steps make of the state before them, a * state + b. Where a reset forgets the
# state before, infinities and NaN included, 1 - a is written as infinity. The spans of signed gates hold
# the rest in its place, so that they are as exact near -1 as near 1, and do not use their a: SIGNED.


@triton.jit
def _join(complement, a, b, next_complement, next_a, next_b):
    # A span and the next one, as one.
    complement = tl.fma(next_complement, a, complement)
    return complement, tl.where(complement < 0.75, 1.0 - complement, a * next_a), tl.fma(next_a, b, next_b)


@triton.jit
def _unless_reset(joined, complement, next_complement, next_b):
    # Two spans joined, where a reset may stand in either of them.
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
    joined = _flip(_flip(forgets * -1.0, rest), next_rest)
    # Near -1, b is no small share of the state, and two of them may cancel: so keep first, then the rest.
    return joined, joined, tl.fma(next_rest, b, next_b - _flip(b, next_rest))


@triton.jit
def _join_signed_with_resets(rest, a, b, next_rest, next_a, next_b):
    joined = _join_signed(rest, a, b, next_rest, next_a, next_b)
    return _unless_reset(joined, rest, next_rest, next_b)


@triton.jit
def _forgetting(span, forgets):
    # A step of which a reset forgets the state before.
    return tl.where(forgets, float("inf"), span[0]), tl.where(forgets, 0.0, span[1]), span[2]


@triton.jit
def _apply(span, carry, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    # The pair after a span, given the pair before it: as `_advance`.
    if SIGNED:
        keep = _kept(span[0])
        rest = span[0]
    else:
        near = span[0] < 0.5
        keep = tl.where(near, 1.0, 0.0).to(span[0].dtype)
        rest = tl.where(near, -span[0], span[1])
    after = _two_sum(keep * carry[0], tl.fma(rest, carry[0], tl.fma(keep, carry[1], span[2])))
    if RESETS:
        after = _where(span[0] == float("inf"), (span[2], 0.0), after)
    return after


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def _halves(x, WARPS: tl.constexpr):
    # The even and the odd steps of each span: registers under other names.
    D: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[0] // 2
    even, odd = tl.split(tl.permute(tl.reshape(x, [N // WARPS, 2, WARPS, D]), [0, 2, 3, 1]))
    return tl.reshape(even, [N, D]), tl.reshape(odd, [N, D])


@triton.jit
def _whole(span, WARPS: tl.constexpr, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    # The steps of each span as one: neighbours are joined, then neighbouring pairs, and so on.
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
def _prefixes(span, RESETS: tl.constexpr, SIGNED: tl.constexpr):
    # Row i: the spans up to and including i, as one.
    if SIGNED and RESETS:
        return tl.associative_scan(span, 0, _join_signed_with_resets)
    elif SIGNED:
        return tl.associative_scan(span, 0, _join_signed)
    elif RESETS:
        return tl.associative_scan(span, 0, _join_with_resets)
    else:
        return tl.associative_scan(span, 0, _join)


@triton.jit
def _last_two(x, before, known, next_x, next_before, next_known):
    return next_x, tl.where(next_known != 0, next_before, x), next_known * 0 + 1


@triton.jit
def _shifted(x):
    # Row i: row i - 1 of x; of row 0, anything. A scan that remembers, because that crosses warps cheaply.
    return tl.associative_scan((x, x, tl.full(x.shape, 0, tl.int32)), 0, _last_two)[1]


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _last_row(x):
    row = tl.arange(0, x.shape[0])[:, None]
    return tl.reduce(tl.where(row == x.shape[0] - 1, x, 0.0), 0, _add)[None, :]


@triton.jit
def _unstack(x, WARPS: tl.constexpr):
    # The steps of all spans, one after another, by halves of halves: registers under other names.
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
def _stack(parts):
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


# ----------------------------------------------------------------------------------------------------------
# Memory. Steps count in the order of the recurrence in forward passes and in the opposite one in backward
# passes: step i is at time i, or where DESCENDING at T - 1 - i. A sequence is a tuple (pointer, batch
# stride, time stride), an absent one None. A tile is (T, b, first, r, rows, d, inside, full): its rows are
# step r of the spans that begin at step `first`, there where r < rows, and its columns channels d, inside
# where d < D; it is full where all of it is there.


@triton.jit
def _load(sequence, tile, ahead, other, DESCENDING: tl.constexpr):
    # The rows, or those `ahead` steps later.
    T, b, first, r, rows, d, inside, full = tile
    ptr = _at(sequence, T, b, first + ahead, r, d, DESCENDING)
    if full:  # noqa: SIM108  # Triton's conditional expressions evaluate both sides
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask=inside & (r + ahead < rows), other=other)
    return x


@triton.jit
def _store(sequence, tile, x, DESCENDING: tl.constexpr):
    T, b, first, r, rows, d, inside, full = tile
    ptr = _at(sequence, T, b, first, r, d, DESCENDING)
    x = x.to(sequence[0].dtype.element_ty)
    if full:
        tl.store(ptr, x)
    else:
        tl.store(ptr, x, mask=inside & (r < rows))


@triton.jit
def _at(sequence, T, b, first, r, d, DESCENDING: tl.constexpr):
    step = r.to(tl.int64) * sequence[2]  # apart from what is multiplied out once for each span
    if DESCENDING:
        return sequence[0] + (b * sequence[1] + (T - 1 - first) * sequence[2] + d) - step
    else:
        return sequence[0] + (b * sequence[1] + first * sequence[2] + d) + step


@triton.jit
def _neutral(GATE: tl.constexpr):
    # Pre-activations of a step that changes nothing: they stand where time has ended.
    if GATE == "identity":
        return 1.0, 0.0
    elif GATE == "mingru" or GATE == "mingru_signed":
        return float("-inf"), 0.0
    else:
        return float("inf"), float("-inf"), 0.0


@triton.jit
def _load_pre(pre, tile, GATE: tl.constexpr, DESCENDING: tl.constexpr):
    loaded = ()
    neutral = _neutral(GATE)
    for j in tl.static_range(len(pre)):
        loaded = loaded + (_load(pre[j], tile, 0, neutral[j], DESCENDING),)
    return loaded


@triton.jit
def _load_resets(reset, b, begin, T, DESCENDING: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr):
    # (WARPS, 1): a bit for each step of a span.
    r = tl.arange(0, STEPS)[None, :]
    step = begin + tl.arange(0, WARPS)[:, None] * STEPS + r
    t = T - 1 - step if DESCENDING else step
    flags = tl.load(reset[0] + b * reset[1] + t * reset[2], mask=step < T, other=0)
    return tl.reduce((flags != 0).to(tl.int32) << r, 1, _add)[:, None]


@triton.jit
def _of_rows(bits, r, WARPS: tl.constexpr):
    # A span's bits for each of its rows.
    STEPS: tl.constexpr = r.shape[0] // WARPS
    rows = tl.reshape(tl.broadcast_to(bits[None, :, :], [STEPS, WARPS, 1]), [STEPS * WARPS, 1])
    return _bit(rows, r)


@triton.jit
def _bit(bits, r):
    return ((bits >> r) & 1) != 0


@triton.jit
def _load_start(h0, b, d, inside, REAL: tl.constexpr):
    if h0 is None:
        return tl.full(d.shape, 0.0, REAL)
    else:
        return tl.load(h0[0] + b * h0[1] + d, mask=inside, other=0.0).to(REAL)


@triton.jit
def _to(tensors, REAL: tl.constexpr):
    converted = ()
    for j in tl.static_range(len(tensors)):
        converted = converted + (tensors[j].to(REAL),)
    return converted


# ----------------------------------------------------------------------------------------------------------
# Carries. `board` is None where one program holds all of time, else a tuple: words (how many programs have
# started; then one for each group and unit, a unit being a tile of channels of one batch row), the chunks'
# spans, and the groups' carries.


@triton.jit
def _place(board, B, T, D, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr):
    # The chunk is the slowest index, so that programs that run together read rows that lie together.
    if board is None:  # noqa: SIM108
        ticket = tl.program_id(0)
    else:
        ticket = tl.atomic_add(board[0], 1, sem="relaxed")
    tiles = (D + BLOCK_D - 1) // BLOCK_D
    units = tiles * B
    unit = ticket % units
    chunk = ticket // units
    # Plus a zero that the compiler does not see through: knowing how rows are aligned, it would give a lane
    # several channels and a warp steps of several spans, to be exchanged through shared memory.
    d = (unit % tiles) * BLOCK_D + tl.arange(0, BLOCK_D) + tl.minimum(B - 1, 0)
    begin = chunk.to(tl.int64) * (WARPS * STEPS)
    left = tl.where((unit % tiles + 1) * BLOCK_D <= D, T - begin, 0)
    return unit, units, chunk, (unit // tiles).to(tl.int64), d.to(tl.int64)[None, :], begin, left


@triton.jit
def _publish(ptr, x, mask):
    tl.store(tl.broadcast_to(ptr, x.shape), x, mask=mask)


@triton.jit
def _wait(word, seen, bits):
    while (seen & bits) != bits:
        seen = tl.atomic_or(word, 0, sem="acquire")
    return seen


@triton.jit
def _carry(
    board, span, start, unit, units, chunk, last, at, inside, size, WARPS: tl.constexpr, GROUP: tl.constexpr,
    RESETS: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    # The pair with which the chunk begins; leaves what later chunks need on the board.
    ends = (tl.arange(0, WARPS)[:, None] == WARPS - 1) & inside
    group = chunk // GROUP
    member = chunk % GROUP
    word = board[0] + 1 + group * units + unit
    CARRY: tl.constexpr = 1 << GROUP
    seen = member * 0
    before = span
    if GROUP > 1:
        mine = board[1] + chunk.to(tl.int64) * 3 * size + at
        for part in tl.static_range(3):
            _publish(mine + part * size, span[part], ends)
        tl.debug_barrier()
        bit = (member * 0 + 1) << member
        seen = tl.atomic_or(word, bit, sem="acq_rel")
        seen = _wait(word, seen, bit - 1)
        other = tl.arange(0, GROUP)[:, None]
        theirs = board[1] + (group.to(tl.int64) * GROUP + other) * 3 * size + at
        there = inside & (other < member)
        nothing: tl.constexpr = -_LEAST if SIGNED else 0.0
        complement = tl.load(theirs, mask=there, other=nothing, volatile=True)
        a = tl.load(theirs + size, mask=there, other=1.0, volatile=True)
        b = tl.load(theirs + 2 * size, mask=there, other=0.0, volatile=True)
        complement, a, b = _prefixes((complement, a, b), RESETS, SIGNED)
        before = (_last_row(complement), _last_row(a), _last_row(b))
    _wait(word, seen, tl.where(group > 0, CARRY, 0))
    theirs = board[2] + group.to(tl.int64) * 2 * size + at
    there = inside & (group > 0)
    high = tl.load(theirs, mask=there, other=start, volatile=True)
    low = tl.load(theirs + size, mask=there, other=0.0, volatile=True)
    carry = (high, low)
    if GROUP > 1:
        carry = _apply(before, carry, RESETS, SIGNED)
    if (member == GROUP - 1) & (chunk < last):
        end = _apply(span, carry, RESETS, SIGNED)
        next_ptr = board[2] + (group.to(tl.int64) + 1) * 2 * size + at
        _publish(next_ptr, end[0], ends)
        _publish(next_ptr + size, end[1], ends)
        tl.debug_barrier()
        tl.atomic_or(word + units, CARRY, sem="release")
    return carry


@triton.jit
def _starts(
    board, span, start, unit, units, chunk, last, at, inside, size, WARPS: tl.constexpr, GROUP: tl.constexpr,
    RESETS: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # The pairs with which the spans begin.
    if WARPS > 1:
        span = _prefixes(span, RESETS, SIGNED)
    carry = (start, tl.full(start.shape, 0.0, start.dtype))
    if board is not None:
        carry = _carry(
            board, span, start, unit, units, chunk, last, at, inside, size, WARPS, GROUP, RESETS, SIGNED,
        )  # fmt: skip
    if WARPS > 1:
        high, low = _apply(span, carry, RESETS, SIGNED)
        high = _shifted(high)
        if EXACT:
            low = _shifted(low)
        carry = _where(tl.arange(0, WARPS)[:, None] == 0, carry, (high, low))
    return carry


# ----------------------------------------------------------------------------------------------------------
# Kernels

# One compiled kernel serves every shape.
_SIZES = ["B", "T", "D", "last"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    h, pre, reset, h0, board, B, T, D, last,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr, REAL: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h[t] = a[t] h[t-1] + b[t]; chunk `last` is the last one."""
    unit, units, chunk, b, d, begin, left = _place(board, B, T, D, BLOCK_D, WARPS, STEPS)
    row = tl.arange(0, STEPS * WARPS)[:, None]
    r = row // WARPS
    inside = d < D
    first = begin + row % WARPS * STEPS
    rows = tl.minimum(T - first, STEPS).to(tl.int32)
    tile = (T, b, first, r, rows, d, inside, left >= WARPS * STEPS)
    x = _load_pre(pre, tile, GATE, DESCENDING)
    start = _load_start(h0, b, d, inside, REAL)
    if reset is not None:
        resets = _load_resets(reset, b, begin, T, DESCENDING, WARPS, STEPS)
    tl.debug_barrier()  # or the compiler would move loads down to their uses, and each would be waited for
    a, complement, drive = _recurrence(_to(x, REAL), GATE, CANDIDATE, EXACT)
    decays = _unstack(_code(a, complement, GATE, EXACT), WARPS)
    drives = _unstack(drive, WARPS)
    state = (tl.full([WARPS, BLOCK_D], 0.0, REAL) + start, tl.full([WARPS, BLOCK_D], 0.0, REAL))
    if WARPS > 1 or board is not None:
        span = (complement, a, drive)
        if reset is not None:
            span = _forgetting(span, _of_rows(resets, r, WARPS))
        state = _starts(
            board, _whole(span, WARPS, reset is not None, _signed(GATE)), start, unit, units, chunk, last,
            b * D + d, inside, tl.cast(B, tl.int64) * D, WARPS, GROUP, reset is not None, _signed(GATE),
            EXACT,
        )  # fmt: skip
    states = ()
    for i in tl.static_range(STEPS):
        if reset is not None:
            state = _where(_bit(resets, i), (0.0, 0.0), state)
        state = _advance(state, decays[i], drives[i], GATE, EXACT)
        states = states + (state[0],)
    _store(h, tile, _stack(states), DESCENDING)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dpre, dh0_ptr, dh, h, pre, reset, h0, board, B, T, D, last,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, DESCENDING: tl.constexpr, REAL: tl.constexpr,
    EXACT: tl.constexpr, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """g[t] = dh[t] + a[t+1] g[t+1], and the gradients that it gives; what is carried is a[t+1] g[t+1]."""
    unit, units, chunk, b, d, begin, left = _place(board, B, T, D, BLOCK_D, WARPS, STEPS)
    row = tl.arange(0, STEPS * WARPS)[:, None]
    r = row // WARPS
    inside = d < D
    first = begin + row % WARPS * STEPS
    rows = tl.minimum(T - first, STEPS + 1).to(tl.int32)
    tile = (T, b, first, r, rows, d, inside, left > WARPS * STEPS)  # the row after the last one is there too
    x = _load_pre(pre, tile, GATE, DESCENDING)
    incoming = _load(dh, tile, 0, 0.0, DESCENDING)
    # The state before a step is the next row in this direction; before the recurrence's first step it is h0.
    h_prev = _load(h, tile, 1, 0.0, DESCENDING)
    start = _load_start(h0, b, d, inside, REAL)
    if reset is not None:
        resets = _load_resets(reset, b, begin, T, DESCENDING, WARPS, STEPS)
    tl.debug_barrier()
    incoming, h_prev = _to((incoming, h_prev), REAL)
    if h0 is not None:
        h_prev = tl.where(r + 1 == rows, start, h_prev)
    if reset is not None:
        h_prev = tl.where(_of_rows(resets, r, WARPS), 0.0, h_prev)
    a, complement, partials = _partials(_to(x, REAL), h_prev, GATE, CANDIDATE, EXACT)
    decays = _unstack(_code(a, complement, GATE, EXACT), WARPS)
    incomings = _unstack(incoming, WARPS)
    adjoint = (tl.full([WARPS, BLOCK_D], 0.0, REAL), tl.full([WARPS, BLOCK_D], 0.0, REAL))
    if WARPS > 1 or board is not None:
        span = (complement, a, a * incoming)
        if reset is not None:
            forgets = _of_rows(resets, r, WARPS)
            span = _forgetting((complement, a, tl.where(forgets, 0.0, a * incoming)), forgets)
        adjoint = _starts(
            board, _whole(span, WARPS, reset is not None, _signed(GATE)), tl.full(d.shape, 0.0, REAL), unit,
            units, chunk, last, b * D + d, inside, tl.cast(B, tl.int64) * D, WARPS, GROUP, reset is not None,
            _signed(GATE), EXACT,
        )  # fmt: skip
    adjoint = _two_sum(adjoint[0], adjoint[1] + incomings[0])
    adjoints = (adjoint[0],)
    for i in tl.static_range(STEPS):
        dh_next = incomings[i + 1] if i + 1 < STEPS else tl.full([WARPS, BLOCK_D], 0.0, REAL)
        adjoint = _advance(adjoint, decays[i], dh_next, GATE, EXACT)
        if reset is not None:
            adjoint = _where(_bit(resets, i), (dh_next, 0.0), adjoint)
        if i + 1 < STEPS:
            adjoints = adjoints + (adjoint[0],)
    g = _stack(adjoints)
    for j in tl.static_range(len(dpre)):
        _store(dpre[j], tile, g * partials[j], DESCENDING)
    ends = tl.arange(0, WARPS)[:, None] == WARPS - 1
    _publish(dh0_ptr + b * D + d, adjoint[0], inside & ends & (chunk == last))


# ----------------------------------------------------------------------------------------------------------
# The engine

_REALS = {torch.float32: tl.float32, torch.float64: tl.float64}

_LANES = 32  # channels of a program: rows of 128 bytes, or of 64
_KEPT = 64  # registers of each thread for what a program keeps of its steps, ...
_REGISTERS = 128  # of so many, with which a processor holds 16 warps
_FEW_UNITS = 2  # units a processor below which programs that run at the same time wait for each other
_WARPS, _WARPS_OF_FEW = 4, 8  # warps of a program; more of them make fewer chunks
_GROUP = 16  # chunks of few units that share one carry

_Sequence = tuple[Tensor, int, int]
_Board = tuple[Tensor, Tensor, Tensor]


class _Cut(NamedTuple):
    """How B x T x D is cut: programs of WARPS spans of STEPS steps and BLOCK_D channels."""

    tiles: int
    chunks: int
    BLOCK_D: int
    WARPS: int
    STEPS: int
    GROUP: int
    """Chunks that share one message."""


def _cut(shape: torch.Size | tuple[int, int, int], rows: int, itemsize: int, processors: int) -> _Cut:
    """Cut so that programs keep `rows` values of each step."""
    B, T, D = shape
    tiles = -(-D // _LANES)
    few = B * tiles < _FEW_UNITS * processors
    STEPS = 1 if T == 1 else _floor_power(max(1, _KEPT // (rows * max(1, itemsize // 4))))
    spans = -(-T // STEPS)
    WARPS = min(_WARPS_OF_FEW if few else _WARPS, 2 * _floor_power(spans - 1) if spans > 1 else 1)
    chunks = -(-spans // WARPS)
    return _Cut(tiles, chunks, _LANES, WARPS, STEPS, _GROUP if few and chunks > 1 else 1)


def _floor_power(n: int) -> int:
    """The largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


def _processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def forward(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """As `reference.forward`, fused: reads each pre-activation once and writes h once."""
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    B, T, D = parts[0][0].shape
    h = output_like(pre[0], D)
    cut = _cut((B, T, D), max(2, len(parts)), h.element_size(), _processors(h.device))
    with torch.cuda.device_of(h):
        forward_kernel[(B * cut.tiles * cut.chunks,)](
            _strided(h), parts, _flags(reset), _start(h0, h.dtype), _board(h, cut), B, T, D, cut.chunks - 1,
            **_settings(h.dtype, cut, gate, candidate, signed, reverse),
        )  # fmt: skip
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
    """As `reference.backward`, fused: reads pre-activations, h and dh once, writes the gradients once."""
    parts = _parts(gate, [contiguous_channels(x) for x in pre])
    dh, h = contiguous_channels(dh), contiguous_channels(h)
    B, T, D = h.shape
    dpre = [output_like(x, x.shape[2]) for x in pre]
    dh0 = h.new_empty(B, D, dtype=state_dtype(h.dtype))
    cut = _cut((B, T, D), len(parts) + 2, h.element_size(), _processors(h.device))
    with torch.cuda.device_of(h):
        backward_kernel[(B * cut.tiles * cut.chunks,)](
            _parts(gate, dpre), dh0, _strided(dh), _strided(h), parts, _flags(reset), _start(h0, h.dtype),
            _board(h, cut), B, T, D, cut.chunks - 1,
            **_settings(h.dtype, cut, gate, candidate, signed, not reverse),
        )  # fmt: skip
    return [*dpre, dh0]


def _settings(
    dtype: torch.dtype, cut: _Cut, gate: str, candidate: str, signed: bool, descending: bool
) -> dict[str, Any]:
    return {
        "GATE": f"{gate}_signed" if signed else gate,
        "CANDIDATE": candidate,
        "DESCENDING": descending,
        "REAL": _REALS[state_dtype(dtype)],
        "EXACT": dtype.itemsize >= 4,
        "BLOCK_D": cut.BLOCK_D,
        "WARPS": cut.WARPS,
        "STEPS": cut.STEPS,
        "GROUP": cut.GROUP,
        "num_warps": cut.WARPS,
        "maxnreg": _REGISTERS if dtype.itemsize <= 4 else 2 * _REGISTERS - 1,
        "enable_fp_fusion": True,  # asked for aloud, because Triton's default is about to change
    }


def _board(h: Tensor, cut: _Cut) -> _Board | None:
    """Where programs leave what later ones need; None where one program holds all of time."""
    if cut.chunks == 1:
        return None
    B, _, D = h.shape
    groups = -(-cut.chunks // cut.GROUP)
    words = h.new_zeros(1 + groups * B * cut.tiles, dtype=torch.int32)
    real = state_dtype(h.dtype)
    spans = h.new_empty(cut.chunks if cut.GROUP > 1 else 0, 3, B, D, dtype=real)
    return words, spans, h.new_empty(groups, 2, B, D, dtype=real)


def _strided(x: Tensor) -> _Sequence:
    return x, x.stride(0), x.stride(1)


def _parts(gate: str, pre: list[Tensor]) -> tuple[_Sequence, ...]:
    """The gate's parts, whether they came packed or not: views of the same memory."""
    return tuple(_strided(x) for x in split(gate, pre))


def _flags(reset: Tensor | None) -> _Sequence | None:
    return None if reset is None else _strided(reset.view(torch.uint8))


def _start(h0: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, int] | None:
    h0 = initial_state(h0, dtype)
    return None if h0 is None else (h0, h0.stride(0))
