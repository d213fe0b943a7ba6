"""Accuracy against a float64 loop that does not grow with T: slow and fast forgetting, any initial state.

A million steps are in slow/test_long_sequences.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws import GATES, SERVING, gated_scan
from torch import Tensor

from minrnn.ops import CANDIDATES

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

LIMIT_H, LIMIT_GRADIENT = 2e-6, 5e-6  # largest error relative to the largest value, float32
INEXACT = 10
"""How much larger the portable engine's errors may be for signed gates: near -1 it knows 1 - a, not 1 + a."""

# Added to the pre-activation that decides how fast the cell forgets: half-lives from under one step to 800.
# Signed cells forget fastest in the middle: "fast" and "very fast" are decays near -1.
FORGETTING = {"very fast": 10.0, "fast": 6.0, "medium": 0.0, "slow": -3.0, "very slow": -7.0}
INITIAL = {"zero": 0.0, "negative": -1.0, "large": 1e4}
CASES = [(f, i) for f in FORGETTING for i in INITIAL]  # one batch row each


def inputs(gate: str, T: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T)
    B, D = len(CASES), 2
    bias = torch.tensor([FORGETTING[f] for f, _ in CASES])[:, None, None]
    pre = [torch.randn(B, T, D, generator=generator) for _ in GATES[gate].pre]
    if gate == "identity":
        pre[0] = torch.sigmoid(pre[0] - bias)
    elif GATES[gate].pre[:2] == ("f", "i"):  # one against the other
        pre[0] = pre[0] - bias
        pre[1] = pre[1] + bias
    else:
        index, sign = GATES[gate].keeps
        pre[index] = pre[index] - sign * bias
    h0 = torch.randn(B, D, generator=generator).abs() * torch.tensor([INITIAL[i] for _, i in CASES])[:, None]
    dh = torch.randn(B, T, D, generator=generator)
    return pre, h0, dh


def recurrence(a: Array, b: Array, start: Array, pieces: int) -> Array:
    """h[t] = a[t] h[t-1] + b[t] along the first axis, in float64, by a loop through all pieces at once.

    In each piece the first loop finds what its own inputs make of h, and the product of its decays; the
    second hands on, from piece to piece, what came before. So 2^20 steps are 2^10 and 2^10.
    """
    shape = (pieces, len(a) // pieces, *a.shape[1:])
    kept, h = a.reshape(shape).copy(), b.reshape(shape).copy()
    for t in range(1, shape[1]):
        h[:, t] += kept[:, t] * h[:, t - 1]
        kept[:, t] *= kept[:, t - 1]
    carry = start
    for piece in range(pieces):
        h[piece] += kept[piece] * carry
        carry = h[piece, -1]
    return h.reshape(a.shape)


def loop(gate: str, pre: list[Tensor], h0: Tensor, dh: Tensor) -> tuple[Tensor, list[Tensor]]:
    """h and the gradients of (pre, h0), independent of every engine."""
    exact = [x.double() for x in pre]
    pieces = 2 ** (pre[0].shape[1].bit_length() // 2)
    a, b = (x.transpose(0, 1).numpy() for x in GATES[gate].equations(CANDIDATES["positive"], *exact))
    first, dh_ = h0.double().numpy(), dh.double().transpose(0, 1).numpy()
    h = recurrence(a, b, first, pieces)
    later = np.concatenate([a[1:], np.zeros_like(a[:1])])[::-1]  # what an adjoint is kept by, from the end
    g = recurrence(later, dh_[::-1], np.zeros_like(first), pieces)[::-1].copy()
    h_prev = np.concatenate([first[None], h[:-1]])
    adjoint, previous = (torch.from_numpy(x).transpose(0, 1) for x in (g, h_prev))
    dpre = GATES[gate].pullback(CANDIDATES["positive"], exact, adjoint * previous, adjoint)
    return torch.from_numpy(h).transpose(0, 1), [*dpre, torch.from_numpy(a[0] * g[0])]


def test_the_loop_in_pieces_is_the_loop() -> None:
    """One piece, which is the plain loop, and others; decays near one, near minus one and zero."""
    random = np.random.default_rng(0)
    a = random.uniform(-1, 1, (64, 4)) * [1, 1e-3, 0, 0] + [0, 0.999, -0.999, 0]
    b, start = random.normal(size=(64, 4)), random.normal(size=4) * 1e4
    h, expected = start, []
    for t in range(64):
        h = a[t] * h + b[t]
        expected.append(h)
    for pieces in (1, 2, 8, 64):
        np.testing.assert_allclose(recurrence(a, b, start, pieces), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [2**8, 2**12, 2**16])
def test_error_does_not_grow_with_length(gate: str, T: int) -> None:
    check_accuracy(gate, T)


def check_accuracy(gate: str, T: int) -> None:
    """As many rows at a time as have a million steps: in float64 each of their arrays is 16 MB."""
    pre, h0, dh = inputs(gate, T)
    times = INEXACT if SERVING == "portable" and GATES[gate].signed else 1
    for rows in torch.arange(len(CASES)).split(max(1, 2**20 // T)):
        leaves = [x[rows].requires_grad_() for x in (*pre, h0)]
        h = gated_scan(gate, *leaves[:-1], h0=leaves[-1])
        gradients = torch.autograd.grad(h, leaves, dh[rows])
        exact, expected = loop(gate, [x.detach() for x in leaves[:-1]], h0[rows], dh[rows])
        for row, case in enumerate(CASES[i] for i in rows):
            assert error(h[row], exact[row]) <= times * LIMIT_H, case
            for name, x, y in zip((*GATES[gate].pre, "h0"), gradients, expected, strict=True):
                assert error(x[row], y[row]) <= times * LIMIT_GRADIENT, (case, name)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.double()).abs().max() / expected.abs().max())
