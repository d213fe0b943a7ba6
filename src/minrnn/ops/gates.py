"""The gate equations: pre-activations -> (a, b), as pure functions, with their partial derivatives.

A gate turns one step's pre-activations into the decay `a` and the drive `b` of h[t] = a[t] h[t-1] + b[t].
Everything here is element-wise torch code: any shape, device and floating dtype, differentiable to any order.
The compiled engines hold the same equations as functors (csrc/gates.h); the tests prove them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["CANDIDATES", "GATES", "Candidate", "Gate"]


@dataclass(frozen=True)
class Candidate:
    """A function that the candidate's pre-activation passes through, with its derivative."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _positive_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return torch.where(x >= 0, torch.ones_like(x), s * (1 - s))


CANDIDATES: dict[str, Candidate] = {
    # x + 0.5 for x >= 0, sigmoid(x) below: the form that the paper trains (its appendix B).
    "positive": Candidate(_positive, _positive_slope),
    # x: the paper's plain form (section 3).
    "linear": Candidate(lambda x: x, torch.ones_like),
    "tanh": Candidate(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2),
}

Partials = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Gate:
    """A gate: the names of its pre-activations, its equations, and their partial derivatives.

    `equations(candidate, *pre)` gives (a, b). `partials(candidate, *pre)` gives, for a and then for b, the
    derivative by each pre-activation, None where it is zero.
    """

    pre: tuple[str, ...]
    equations: Callable[..., tuple[Tensor, Tensor]]
    partials: Callable[..., Partials]

    @property
    def num_pre(self) -> int:
        """How many pre-activations the gate takes."""
        return len(self.pre)

    @property
    def has_candidate(self) -> bool:
        """Whether the last pre-activation goes through a candidate function."""
        return self.pre[-1] == "candidate"

    def pullback(self, candidate: Candidate, pre: Sequence[Tensor], da: Tensor, db: Tensor) -> list[Tensor]:
        """Gradients of the pre-activations, given those of a and b."""
        of_a, of_b = self.partials(candidate, *pre)
        return [_dot((da, db), partial) for partial in zip(of_a, of_b, strict=True)]

    def pushforward(
        self, candidate: Candidate, pre: Sequence[Tensor], tangents: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Tangents of a and b, given those of the pre-activations."""
        of_a, of_b = self.partials(candidate, *pre)
        return _dot(tangents, of_a), _dot(tangents, of_b)


def _dot(vectors: Sequence[Tensor], partials: Sequence[Tensor | None]) -> Tensor:
    """Sum of products, without the terms that are zero."""
    terms = [v * p for v, p in zip(vectors, partials, strict=True) if p is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(vectors[0])


def _identity(candidate: Candidate, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a, b


def _identity_partials(candidate: Candidate, a: Tensor, b: Tensor) -> Partials:
    one = torch.ones_like(a)
    return (one, None), (None, one)


def _mingru(candidate: Candidate, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-z), torch.sigmoid(z) * candidate.value(c)


def _mingru_partials(candidate: Candidate, z: Tensor, c: Tensor) -> Partials:
    update = torch.sigmoid(z)
    slope = update * torch.sigmoid(-z)
    return (-slope, None), (slope * candidate.value(c), update * candidate.slope(c))


def _minlstm(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # f / (f + i) = sigmoid(log f - log i): exact where both gates underflow.
    u = logsigmoid(f) - logsigmoid(i)
    return torch.sigmoid(u), torch.sigmoid(-u) * candidate.value(c)


def _minlstm_partials(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> Partials:
    u = logsigmoid(f) - logsigmoid(i)
    slope = torch.sigmoid(u) * torch.sigmoid(-u)
    of_f, of_i = slope * torch.sigmoid(-f), -slope * torch.sigmoid(-i)
    value = candidate.value(c)
    return (of_f, of_i, None), (-of_f * value, -of_i * value, torch.sigmoid(-u) * candidate.slope(c))


def _minlstm_unnormalised(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(f), torch.sigmoid(i) * candidate.value(c)


def _minlstm_unnormalised_partials(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> Partials:
    of_f = torch.sigmoid(f) * torch.sigmoid(-f)
    of_i = torch.sigmoid(i) * torch.sigmoid(-i)
    return (of_f, None, None), (None, of_i * candidate.value(c), torch.sigmoid(i) * candidate.slope(c))


def _mingru_signed(candidate: Candidate, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # 1 - 2 sigmoid(z) = -tanh(z / 2), which does not cancel where the decay changes its sign.
    return -torch.tanh(z / 2), torch.sigmoid(z) * candidate.value(c)


def _mingru_signed_partials(candidate: Candidate, z: Tensor, c: Tensor) -> Partials:
    (of_a, _), of_b = _mingru_partials(candidate, z, c)
    assert of_a is not None
    return (2 * of_a, None), of_b


def _minlstm_signed(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # With u as in _minlstm, f / (f + i) - i / (f + i) = sigmoid(u) - sigmoid(-u) = tanh(u / 2).
    u = logsigmoid(f) - logsigmoid(i)
    return torch.tanh(u / 2), torch.sigmoid(-u) * candidate.value(c)


def _minlstm_signed_partials(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> Partials:
    (of_f, of_i, _), of_b = _minlstm_partials(candidate, f, i, c)
    assert of_f is not None
    assert of_i is not None
    return (2 * of_f, 2 * of_i, None), of_b


GATES: dict[str, Gate] = {
    # a and b themselves: the plain scan.
    "identity": Gate(("a", "b"), _identity, _identity_partials),
    # a = 1 - z, b = z candidate, z = sigmoid(z_pre): minGRU (arXiv 2410.01201, section 3.1).
    "mingru": Gate(("z", "candidate"), _mingru, _mingru_partials),
    # a = f / (f + i), b = i / (f + i) candidate: minLSTM with length independence scaling (section 3.2).
    "minlstm": Gate(("f", "i", "candidate"), _minlstm, _minlstm_partials),
    # a = f, b = i candidate.
    "minlstm_unnormalised": Gate(
        ("f", "i", "candidate"), _minlstm_unnormalised, _minlstm_unnormalised_partials
    ),
    # a = 1 - 2 z, b = z candidate: minGRU with a decay in (-1, 1), which can track parity (arXiv 2411.12537).
    "mingru_signed": Gate(("z", "candidate"), _mingru_signed, _mingru_signed_partials),
    # a = (f - i) / (f + i) = 1 - 2 i / (f + i), b = i / (f + i) candidate: the same of minLSTM.
    "minlstm_signed": Gate(("f", "i", "candidate"), _minlstm_signed, _minlstm_signed_partials),
}
