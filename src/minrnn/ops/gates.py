"""The gates: pre-activations -> (a, b), as pure functions, with their partial derivatives.

A gate turns a step's pre-activations into the decay `a` and the input term `b` of h[t] = a[t] h[t-1] + b[t].
Everything here is element-wise torch code: any shape, device and floating dtype, differentiable to any order.
The compiled engines hold the same equations (csrc/gates.h, ops/triton); the tests prove them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

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
"""The functions of the candidate, by the name that `gated_scan` takes."""


class Shares(NamedTuple):
    """A step's shares of the old state and of the new, computed apart, so that neither loses digits."""

    odds: Tensor
    """u, with update = sigmoid(u)."""
    keep: Tensor
    """1 - update."""
    update: Tensor

    def decay(self, signed: bool) -> tuple[Tensor, Tensor]:
        """Return a, and 1 - a."""
        if not signed:
            return self.keep, self.update
        return torch.tanh(self.odds / -2), 2 * self.update  # 2 keep - 1 would cancel near 0


Partials = tuple[Sequence[Tensor | None], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Gate:
    """A gate: its pre-activations, its equations, their partial derivatives, and what a layer has to know.

    a = 1 - sigmoid(u(pre)),  or with signed  a = 1 - 2 sigmoid(u(pre)) = -tanh(u(pre) / 2);    b = b(pre)
    """

    pre: tuple[str, ...]
    """The names of the pre-activations, in the order in which they are passed."""
    log_odds: Callable[..., Tensor]
    """`log_odds(*pre)` is u, the update's log-odds."""
    term: Callable[..., Tensor]
    """`term(candidate, update, *pre)` is b, the input term."""
    derivatives: Callable[..., Partials]
    """`derivatives(candidate, keep, update, *pre)`: of keep, then of b, the derivative with respect to each
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
    """Whether the first pre-activation is a itself; there are no log-odds then."""

    @property
    def num_pre(self) -> int:
        """How many pre-activations the gate takes."""
        return len(self.pre)

    @property
    def has_candidate(self) -> bool:
        """Whether the last pre-activation goes through a candidate function."""
        return self.pre[-1] == "candidate"

    def shares(self, *pre: Tensor) -> Shares:
        """Compute update = sigmoid(u) and keep = sigmoid(-u)."""
        u = self.log_odds(*pre)
        return Shares(u, u, 1 - u) if self.gives_decay else Shares(u, torch.sigmoid(-u), torch.sigmoid(u))

    def equations(self, candidate: Candidate, *pre: Tensor, signed: bool = False) -> tuple[Tensor, Tensor]:
        """Compute a and b."""
        shares = self.shares(*pre)
        return shares.decay(signed)[0], self.term(candidate, shares.update, *pre)

    def partials(
        self,
        candidate: Candidate,
        *pre: Tensor,
        signed: bool = False,
        shares: Shares | None = None,
    ) -> Partials:
        """Compute the derivatives of a, and of b, with respect to each pre-activation, None where zero."""
        _, keep, update = shares or self.shares(*pre)
        of_a, of_b = self.derivatives(candidate, keep, update, *pre)
        return [None if d is None else 2 * d for d in of_a] if signed else of_a, of_b

    def pullback(
        self,
        candidate: Candidate,
        pre: Sequence[Tensor],
        da: Tensor,
        db: Tensor,
        *,
        signed: bool = False,
        shares: Shares | None = None,
    ) -> list[Tensor]:
        """Compute the gradients of the pre-activations, given those of a and b, and the shares if known."""
        of_a, of_b = self.partials(candidate, *pre, signed=signed, shares=shares)
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


def _identity_derivatives(
    candidate: Candidate, keep: Tensor, update: Tensor, a: Tensor, b: Tensor
) -> Partials:
    one = torch.ones_like(a)
    return (one, None), (None, one)


def _normalized_term(candidate: Candidate, update: Tensor, *pre: Tensor) -> Tensor:
    return update * candidate.value(pre[-1])


def _mingru_derivatives(candidate: Candidate, keep: Tensor, update: Tensor, z: Tensor, c: Tensor) -> Partials:
    slope = update * keep
    return (-slope, None), (slope * candidate.value(c), update * candidate.slope(c))


def _minlstm_log_odds(f: Tensor, i: Tensor, c: Tensor) -> Tensor:
    # i / (f + i) = sigmoid(log i - log f): exact where both gates underflow.
    return logsigmoid(i) - logsigmoid(f)


def _minlstm_derivatives(
    candidate: Candidate, keep: Tensor, update: Tensor, f: Tensor, i: Tensor, c: Tensor
) -> Partials:
    slope = keep * update
    of_f, of_i = slope * torch.sigmoid(-f), -slope * torch.sigmoid(-i)
    value = candidate.value(c)
    return (of_f, of_i, None), (-of_f * value, -of_i * value, update * candidate.slope(c))


def _unnormalized_term(candidate: Candidate, update: Tensor, f: Tensor, i: Tensor, c: Tensor) -> Tensor:
    return torch.sigmoid(i) * candidate.value(c)


def _unnormalized_derivatives(
    candidate: Candidate, keep: Tensor, update: Tensor, f: Tensor, i: Tensor, c: Tensor
) -> Partials:
    of_i = torch.sigmoid(i) * torch.sigmoid(-i)
    of_b = None, of_i * candidate.value(c), torch.sigmoid(i) * candidate.slope(c)
    return (keep * update, None, None), of_b


def _minema_log_odds(alpha: Tensor, delta: Tensor, c: Tensor) -> Tensor:
    # 1 - alpha delta = (1 - alpha) + alpha (1 - delta), of which nothing cancels.
    kept = torch.logaddexp(logsigmoid(-alpha), logsigmoid(alpha) + logsigmoid(-delta))
    return logsigmoid(alpha) + logsigmoid(delta) - kept


def _minema_term(candidate: Candidate, update: Tensor, alpha: Tensor, delta: Tensor, c: Tensor) -> Tensor:
    return torch.sigmoid(alpha) * candidate.value(c)


def _minema_derivatives(
    candidate: Candidate, keep: Tensor, update: Tensor, alpha: Tensor, delta: Tensor, c: Tensor
) -> Partials:
    rate, damping = torch.sigmoid(alpha), torch.sigmoid(delta)
    slope = rate * torch.sigmoid(-alpha)
    of_a = -slope * damping, -rate * damping * torch.sigmoid(-delta), None
    return of_a, (slope * candidate.value(c), None, rate * candidate.slope(c))


GATES: dict[str, Gate] = {
    # a and b themselves: the plain scan.
    "identity": Gate(
        pre=("a", "b"),
        log_odds=lambda a, b: a,
        term=lambda candidate, update, a, b: b,
        derivatives=_identity_derivatives,
        neutral=(1.0, 0.0),
        gives_decay=True,
    ),
    # a = 1 - z, b = z candidate, z = sigmoid(z_pre): minGRU (arXiv 2410.01201, section 3.1).
    # Signed, a = 1 - 2 z, it can track parity (arXiv 2411.12537).
    "mingru": Gate(
        pre=("z", "candidate"),
        log_odds=lambda z, c: z,
        term=_normalized_term,
        derivatives=_mingru_derivatives,
        neutral=(-inf, 0.0),
        keeps=("z", -1),
        can_be_signed=True,
    ),
    # a = f / (f + i), b = i / (f + i) candidate: minLSTM with length independence scaling (section 3.2).
    # Signed, a = (f - i) / (f + i).
    "minlstm": Gate(
        pre=("f", "i", "candidate"),
        log_odds=_minlstm_log_odds,
        term=_normalized_term,
        derivatives=_minlstm_derivatives,
        neutral=(inf, -inf, 0.0),
        keeps=("f", +1),
        can_be_signed=True,
        unnormalized="minlstm_unnormalized",
    ),
    # a = f, b = i candidate.
    "minlstm_unnormalized": Gate(
        pre=("f", "i", "candidate"),
        log_odds=lambda f, i, c: -f,
        term=_unnormalized_term,
        derivatives=_unnormalized_derivatives,
        neutral=(inf, -inf, 0.0),
        keeps=("f", +1),
    ),
    # a = 1 - alpha delta, b = alpha candidate: the damped moving average of Mega (arXiv 2209.10655, section
    # 3.1), with an update rate and a damping that depend on the input. At delta = 1 it is minGRU.
    "minema": Gate(
        pre=("alpha", "delta", "candidate"),
        log_odds=_minema_log_odds,
        term=_minema_term,
        derivatives=_minema_derivatives,
        neutral=(-inf, 0.0, 0.0),
        keeps=("delta", -1),
    ),
}
"""The gates, by the name that `gated_scan` takes."""
