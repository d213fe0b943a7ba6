"""The gates: pre-activations -> (a, b), as pure functions, with their partial derivatives.

A gate turns a step's pre-activations into the decay `a` and the input term `b` of h[t] = a[t] h[t-1] + b[t].
Everything here is element-wise torch code: any shape, device and floating dtype, differentiable to any order.
The compiled engines hold the same equations (csrc/gates.h, ops/triton); the tests prove them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

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
    """A gate: its pre-activations, its equations, their partial derivatives, and what a layer has to know.

    a = sigmoid(u(pre)),  or with signed  a = 2 sigmoid(u(pre)) - 1 = tanh(u(pre) / 2);    b = b(pre)
    """

    pre: tuple[str, ...]
    """The names of the pre-activations, in the order in which they are passed."""
    terms: Callable[..., tuple[Tensor, Tensor]]
    """`terms(candidate, *pre)` is (u, b): the decay's log-odds and the input term."""
    derivatives: Callable[..., Partials]
    """`derivatives(candidate, *pre)`: of sigmoid(u), then of b, the derivative with respect to each
    pre-activation, None where it is zero."""
    neutral: tuple[float, ...]
    """Pre-activations of a step that keeps the state: a = 1, b = 0."""
    keeps: tuple[str, int] | None = None
    """The pre-activation whose bias sets how long a state is kept, and the sign of its effect on a."""
    can_be_signed: bool = False
    """Whether there is a signed form, with decays in (-1, 1)."""
    unnormalized: str | None = None
    """The name of the gate that differs in that its gates need not sum to one, if there is one."""
    gives_decay: bool = False
    """Whether u is a itself, and not its log-odds."""

    @property
    def num_pre(self) -> int:
        """How many pre-activations the gate takes."""
        return len(self.pre)

    @property
    def has_candidate(self) -> bool:
        """Whether the last pre-activation goes through a candidate function."""
        return self.pre[-1] == "candidate"

    def equations(self, candidate: Candidate, *pre: Tensor, signed: bool = False) -> tuple[Tensor, Tensor]:
        """Compute a and b."""
        u, b = self.terms(candidate, *pre)
        if self.gives_decay:
            return u, b
        return torch.tanh(u / 2) if signed else torch.sigmoid(u), b  # 2 sigmoid(u) - 1 would cancel near 0

    def partials(self, candidate: Candidate, *pre: Tensor, signed: bool = False) -> Partials:
        """Compute the derivatives of a, and of b, with respect to each pre-activation, None where zero."""
        of_a, of_b = self.derivatives(candidate, *pre)
        return [None if d is None else 2 * d for d in of_a] if signed else of_a, of_b

    def pullback(
        self,
        candidate: Candidate,
        pre: Sequence[Tensor],
        da: Tensor,
        db: Tensor,
        *,
        signed: bool = False,
    ) -> list[Tensor]:
        """Compute the gradients of the pre-activations, given those of a and b."""
        of_a, of_b = self.partials(candidate, *pre, signed=signed)
        return [_dot((da, db), partial) for partial in zip(of_a, of_b, strict=True)]

    def pushforward(
        self, candidate: Candidate, pre: Sequence[Tensor], tangents: Sequence[Tensor], *, signed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Compute the tangents of a and b, given those of the pre-activations."""
        of_a, of_b = self.partials(candidate, *pre, signed=signed)
        return _dot(tangents, of_a), _dot(tangents, of_b)


def _dot(vectors: Sequence[Tensor], partials: Sequence[Tensor | None]) -> Tensor:
    """Sum of products, without the terms that are zero."""
    terms = [v * p for v, p in zip(vectors, partials, strict=True) if p is not None]
    return sum(terms[1:], terms[0]) if terms else torch.zeros_like(vectors[0])


def _identity_derivatives(candidate: Candidate, a: Tensor, b: Tensor) -> Partials:
    one = torch.ones_like(a)
    return (one, None), (None, one)


def _mingru(candidate: Candidate, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return -z, torch.sigmoid(z) * candidate.value(c)


def _mingru_derivatives(candidate: Candidate, z: Tensor, c: Tensor) -> Partials:
    update = torch.sigmoid(z)
    slope = update * torch.sigmoid(-z)
    return (-slope, None), (slope * candidate.value(c), update * candidate.slope(c))


def _minlstm(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # f / (f + i) = sigmoid(log f - log i): exact where both gates underflow.
    u = logsigmoid(f) - logsigmoid(i)
    return u, torch.sigmoid(-u) * candidate.value(c)


def _minlstm_derivatives(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> Partials:
    u = logsigmoid(f) - logsigmoid(i)
    slope = torch.sigmoid(u) * torch.sigmoid(-u)
    of_f, of_i = slope * torch.sigmoid(-f), -slope * torch.sigmoid(-i)
    value = candidate.value(c)
    return (of_f, of_i, None), (-of_f * value, -of_i * value, torch.sigmoid(-u) * candidate.slope(c))


def _unnormalized(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    return f, torch.sigmoid(i) * candidate.value(c)


def _unnormalized_derivatives(candidate: Candidate, f: Tensor, i: Tensor, c: Tensor) -> Partials:
    of_f = torch.sigmoid(f) * torch.sigmoid(-f)
    of_i = torch.sigmoid(i) * torch.sigmoid(-i)
    return (of_f, None, None), (None, of_i * candidate.value(c), torch.sigmoid(i) * candidate.slope(c))


def _minema(candidate: Candidate, alpha: Tensor, delta: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # 1 - alpha delta = (1 - alpha) + alpha (1 - delta), of which nothing cancels.
    kept = torch.logaddexp(logsigmoid(-alpha), logsigmoid(alpha) + logsigmoid(-delta))
    return kept - logsigmoid(alpha) - logsigmoid(delta), torch.sigmoid(alpha) * candidate.value(c)


def _minema_derivatives(candidate: Candidate, alpha: Tensor, delta: Tensor, c: Tensor) -> Partials:
    update, damping = torch.sigmoid(alpha), torch.sigmoid(delta)
    slope = update * torch.sigmoid(-alpha)
    of_a = -slope * damping, -update * damping * torch.sigmoid(-delta), None
    return of_a, (slope * candidate.value(c), None, update * candidate.slope(c))


GATES: dict[str, Gate] = {
    # a and b themselves: the plain scan.
    "identity": Gate(
        pre=("a", "b"),
        terms=lambda candidate, a, b: (a, b),
        derivatives=_identity_derivatives,
        neutral=(1.0, 0.0),
        gives_decay=True,
    ),
    # a = 1 - z, b = z candidate, z = sigmoid(z_pre): minGRU (arXiv 2410.01201, section 3.1).
    # Signed, a = 1 - 2 z, it can track parity (arXiv 2411.12537).
    "mingru": Gate(
        pre=("z", "candidate"),
        terms=_mingru,
        derivatives=_mingru_derivatives,
        neutral=(-inf, 0.0),
        keeps=("z", -1),
        can_be_signed=True,
    ),
    # a = f / (f + i), b = i / (f + i) candidate: minLSTM with length independence scaling (section 3.2).
    # Signed, a = (f - i) / (f + i).
    "minlstm": Gate(
        pre=("f", "i", "candidate"),
        terms=_minlstm,
        derivatives=_minlstm_derivatives,
        neutral=(inf, -inf, 0.0),
        keeps=("f", +1),
        can_be_signed=True,
        unnormalized="minlstm_unnormalized",
    ),
    # a = f, b = i candidate.
    "minlstm_unnormalized": Gate(
        pre=("f", "i", "candidate"),
        terms=_unnormalized,
        derivatives=_unnormalized_derivatives,
        neutral=(inf, -inf, 0.0),
        keeps=("f", +1),
    ),
    # a = 1 - alpha delta, b = alpha candidate: the damped moving average of Mega (arXiv 2209.10655, section
    # 3.1), with an update rate and a damping that depend on the input. At delta = 1 it is minGRU.
    "minema": Gate(
        pre=("alpha", "delta", "candidate"),
        terms=_minema,
        derivatives=_minema_derivatives,
        neutral=(-inf, 0.0, 0.0),
        keeps=("delta", -1),
    ),
}
