"""Accuracy against a float64 loop that does not grow with T: slow and fast forgetting, any initial state.

Longer sequences, to 2^20 steps, are in slow/test_long_sequences.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from laws import GATES, gated_scan
from torch import Tensor

from minrnn.ops import CANDIDATES

LIMIT_H, LIMIT_GRADIENT = 2e-6, 5e-6  # largest error relative to the largest value, float32

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


def loop(gate: str, pre: list[Tensor], h0: Tensor, dh: Tensor) -> tuple[Tensor, list[Tensor]]:
    """h and the gradients of (pre, h0) by a float64 loop in numpy, independent of every engine."""
    exact = [x.double() for x in pre]
    a, b = (x.transpose(0, 1).numpy() for x in GATES[gate].equations(CANDIDATES["positive"], *exact))
    h, g = np.empty_like(a), dh.double().transpose(0, 1).contiguous().numpy()
    carry = h0.double().numpy().copy()
    for t in range(len(a)):
        np.multiply(a[t], carry, out=carry)
        np.add(carry, b[t], out=carry)
        h[t] = carry
    carry = np.zeros_like(carry)
    for t in reversed(range(len(a))):
        np.add(g[t], carry, out=g[t])
        np.multiply(a[t], g[t], out=carry)
    h_prev = np.concatenate([h0.double().numpy()[None], h[:-1]])
    adjoint, previous = (torch.from_numpy(x).transpose(0, 1) for x in (g, h_prev))
    dpre = GATES[gate].pullback(CANDIDATES["positive"], exact, adjoint * previous, adjoint)
    return torch.from_numpy(h).transpose(0, 1), [*dpre, torch.from_numpy(carry)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [2**8, 2**12, 2**16])
def test_error_does_not_grow_with_length(gate: str, T: int) -> None:
    check_accuracy(gate, T)


def check_accuracy(gate: str, T: int) -> None:
    pre, h0, dh = inputs(gate, T)
    leaves = [x.requires_grad_() for x in (*pre, h0)]
    h = gated_scan(gate, *leaves[:-1], h0=leaves[-1])
    gradients = torch.autograd.grad(h, leaves, dh)
    exact, expected = loop(gate, [x.detach() for x in pre], h0.detach(), dh)
    for row, case in enumerate(CASES):
        assert error(h[row], exact[row]) <= LIMIT_H, case
        for name, x, y in zip((*GATES[gate].pre, "h0"), gradients, expected, strict=True):
            assert error(x[row], y[row]) <= LIMIT_GRADIENT, (case, name)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.double()).abs().max() / expected.abs().max())
