"""The gates and candidates as Triton functions, in two tables from which the engine picks those of a kernel.

A gate's function maps a step's pre-activations and the state before it to (a, rest, b, factors). The rest is
1 - a; a gate that can be signed gets a and the rest from `decay`, and multiplies h_prev by 1 + SIGNED, the
derivative of 2 a - 1. The factors are the numbers that the adjoint of h is multiplied by to give the
pre-activations' gradients; forward passes do not use them, and the compiler drops them. A candidate's
function gives its value and its slope. To add a gate, write its function and its row in GATE_FUNCTIONS.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from minrnn.ops.triton.elementary import exp_minus, reciprocal, sigmoid
from minrnn.ops.triton.states import decay

__all__ = ["CANDIDATE_FUNCTIONS", "GATE_FUNCTIONS"]

# ----------------------------------------------------------------------------------------------------------
# Candidates


@triton.jit
def _positive(x, EXACT: tl.constexpr):
    e = exp_minus(tl.abs(x), EXACT)
    inverse = reciprocal(1.0 + e)
    return tl.where(x >= 0, x + 0.5, e * inverse), tl.where(x >= 0, 1.0, e * inverse * inverse)


@triton.jit
def _linear(x, EXACT: tl.constexpr):
    return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    e = exp_minus(2.0 * tl.abs(x), EXACT)
    inverse = reciprocal(1.0 + e)
    far = (1.0 - e) * inverse  # cancels near zero, where the series of (tanh(x) / x - 1) / x^2 is used
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


CANDIDATE_FUNCTIONS: dict[str, Any] = {"positive": _positive, "linear": _linear, "tanh": _tanh}
"""By name in minrnn.ops.gates.CANDIDATES."""


# ----------------------------------------------------------------------------------------------------------
# Gates


@triton.jit
def _identity(pre, h_prev, CANDIDATE: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr):
    return pre[0], 1.0 - pre[0], pre[1], (h_prev, tl.full(pre[0].shape, 1.0, pre[0].dtype))


@triton.jit
def _mingru(pre, h_prev, CANDIDATE: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr):
    # a = 1 - z, b = z * candidate
    z, complement, denominator = sigmoid(pre[0], EXACT)
    inverse = reciprocal(denominator)
    c, slope = CANDIDATE(pre[1], EXACT)
    z, complement = z * inverse, complement * inverse
    a, rest = decay(complement, z, SIGNED)
    return a, rest, z * c, ((c - (1 + SIGNED) * h_prev) * (z * complement), z * slope)


@triton.jit
def _minlstm(pre, h_prev, CANDIDATE: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr):
    # a = f / (f + i), b = i / (f + i) * candidate. With f = F / P and i = I / Q the shares are
    # F Q / (F Q + I P) and I P / (F Q + I P). Where both gates underflow, F and I are scaled so that the
    # larger is one.
    F, f_complement, P = sigmoid(pre[0], EXACT)
    I, i_complement, Q = sigmoid(pre[1], EXACT)  # noqa: E741  # the equation's own letter
    ratio = exp_minus(tl.abs(pre[0] - pre[1]), EXACT)
    both_negative = (pre[0] < 0) & (pre[1] < 0)
    keeps = pre[0] >= pre[1]
    f = tl.where(both_negative, tl.where(keeps, 1.0, ratio), F) * Q
    i = tl.where(both_negative, tl.where(keeps, ratio, 1.0), I) * P
    inverse = reciprocal(f + i)
    c, slope = CANDIDATE(pre[2], EXACT)
    f, f_complement = f * inverse, f_complement * reciprocal(P)
    i, i_complement = i * inverse, i_complement * reciprocal(Q)
    a, rest = decay(f, i, SIGNED)
    of_share = ((1 + SIGNED) * h_prev - c) * (f * i)
    return a, rest, i * c, (of_share * f_complement, -of_share * i_complement, i * slope)


@triton.jit
def _minlstm_unnormalized(pre, h_prev, CANDIDATE: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr):
    # a = f, b = i * candidate
    f, f_complement, P = sigmoid(pre[0], EXACT)
    i, i_complement, Q = sigmoid(pre[1], EXACT)
    of_forget = reciprocal(P)
    of_input = reciprocal(Q)
    c, slope = CANDIDATE(pre[2], EXACT)
    f, f_complement = f * of_forget, f_complement * of_forget
    i, i_complement = i * of_input, i_complement * of_input
    return f, f_complement, i * c, (h_prev * (f * f_complement), c * (i * i_complement), i * slope)


@triton.jit
def _minema(pre, h_prev, CANDIDATE: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr):
    # a = 1 - alpha delta, b = alpha * candidate
    alpha, alpha_complement, P = sigmoid(pre[0], EXACT)
    delta, delta_complement, Q = sigmoid(pre[1], EXACT)
    of_alpha, of_delta = reciprocal(P), reciprocal(Q)
    c, slope = CANDIDATE(pre[2], EXACT)
    alpha, alpha_complement = alpha * of_alpha, alpha_complement * of_alpha
    delta, delta_complement = delta * of_delta, delta_complement * of_delta
    rest = alpha * delta
    of_update = (c - delta * h_prev) * (alpha * alpha_complement)
    factors = (of_update, -h_prev * (rest * delta_complement), alpha * slope)
    return alpha_complement + alpha * delta_complement, rest, alpha * c, factors


GATE_FUNCTIONS: dict[str, Any] = {
    "identity": _identity,
    "mingru": _mingru,
    "minlstm": _minlstm,
    "minlstm_unnormalized": _minlstm_unnormalized,
    "minema": _minema,
}
"""By name in minrnn.ops.gates.GATES."""
