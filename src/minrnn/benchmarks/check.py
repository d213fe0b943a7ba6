"""Comparison of values and gradients with a float64 loop, before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from minrnn.ops import reference

__all__ = ["TOLERANCE", "differentiate", "errors", "layer_reference", "scan_reference", "some_rows"]

Named = dict[str, Tensor]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Tolerance by dtype, relative to the largest value: a few rounding errors of the result and, in layers, of
the sums in matrix products."""

MOST_ELEMENTS = 1 << 25  # elements (B, T, D) that are compared: ten float64 tensors of them take 2.7 GB


def some_rows(B: int, T: int, D: int) -> int:
    """Return the number of batch rows to compare (rows are independent), as many as memory allows."""
    return max(1, min(B, MOST_ELEMENTS // (T * D)))


def errors(actual: Named, expected: Named) -> dict[str, float]:
    """Return the largest error of h and of the gradients, each relative to the largest expected value.

    Values that are not finite and wrong shapes are infinite errors.
    """
    found = {name: _error(value, expected[name]) for name, value in actual.items()}
    gradients = [error for name, error in found.items() if name != "h"]
    return {"h": found["h"]} | ({"gradients": max(gradients)} if gradients else {})


def differentiate(call: Callable[[], Tensor], leaves: Sequence[Tensor], dh: Tensor) -> Named:
    """Return h = call(), and the gradients of the leaves as d0, d1, ..., given the gradient of h."""
    h = call()
    return {"h": h.detach()} | _numbered(torch.autograd.grad(h, leaves, dh))


def scan_reference(gate: str, pre: list[Tensor], dh: Tensor) -> Named:
    """Return h and the gradients of the pre-activations, in float64."""
    h, dpre = _exact(gate, pre, dh)
    return {"h": h} | _numbered(dpre)


def layer_reference(gate: str, x: Tensor, weight: Tensor, dh: Tensor) -> Named:
    """Return the states of a layer without biases, and the gradients of its input and weight, in float64.

    Only the pre-activations are computed in the layer's own dtype: the positive candidate's slope jumps at
    zero, and some of millions of pre-activations are so near to zero that their sign depends on rounding.

    Args:
        gate: a name in GATES.
        x: (B, T, input_size).
        weight: (k * hidden_size, input_size).
        dh: gradient of the states, (B, T, hidden_size).
    """
    x, weight = x.detach(), weight.detach()
    h, (dpre,) = _exact(gate, [functional.linear(x, weight)], dh)
    x, weight = x.double(), weight.double()
    return {"h": h, "dx": dpre @ weight, "dweight": dpre.flatten(0, 1).mT @ x.flatten(0, 1)}


def _exact(gate: str, pre: list[Tensor], dh: Tensor) -> tuple[Tensor, list[Tensor]]:
    pre = [x.detach().double() for x in pre]
    h = reference.forward(pre, None, None, gate, "positive", False, False)
    *dpre, _ = reference.backward(dh.double(), pre, h, None, None, gate, "positive", False, False)
    return h, dpre


def _numbered(gradients: Sequence[Tensor]) -> Named:
    return {f"d{index}": gradient for index, gradient in enumerate(gradients)}


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or not actual.isfinite().all():
        return math.inf
    largest = float(expected.abs().max())
    return float((actual.detach().double() - expected).abs().max()) / max(largest, 1e-30)
