"""What the tests of the recurrence share: gates in all their forms, inputs, and the reference's results."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import minrnn.ops
from minrnn.ops import CANDIDATES, reference
from minrnn.ops.gates import Candidate

__all__ = [
    "CELLS",
    "GATES",
    "INFINITIES",
    "SERVING",
    "TOLERANCE",
    "compare",
    "compare_candidate",
    "compare_decays",
    "compiled_serves",
    "gated_scan",
    "inputs",
    "mode",
    "poisoned",
    "refuses_wrong_tensors",
    "relative_error",
    "same",
    "spoiled",
    "threads",
]


SERVING = next(e.name for e in minrnn.ops.engines() if e.serves and e.device in ("cpu", "any"))
"""The engine to which calls on the CPU are dispatched."""

compiled_serves = pytest.mark.skipif(
    SERVING != "cpp", reason=f"holds for the compiled engine, and {SERVING} serves the CPU"
)


@dataclass(frozen=True)
class Form:
    """A gate, with decays in (0, 1) or signed."""

    gate: str
    signed: bool

    @property
    def pre(self) -> tuple[str, ...]:
        return minrnn.ops.GATES[self.gate].pre

    @property
    def num_pre(self) -> int:
        return len(self.pre)

    @property
    def keeps(self) -> tuple[int, int]:
        """The index of the pre-activation that sets how long the state is kept, and its sign."""
        keeps = minrnn.ops.GATES[self.gate].keeps
        assert keeps is not None
        return self.pre.index(keeps[0]), keeps[1]

    @property
    def has_candidate(self) -> bool:
        return minrnn.ops.GATES[self.gate].has_candidate

    def equations(self, candidate: Candidate, *pre: Tensor) -> tuple[Tensor, Tensor]:
        return minrnn.ops.GATES[self.gate].equations(candidate, *pre, signed=self.signed)

    def pullback(self, candidate: Candidate, pre: list[Tensor], da: Tensor, db: Tensor) -> list[Tensor]:
        return minrnn.ops.GATES[self.gate].pullback(candidate, pre, da, db, signed=self.signed)


GATES = {
    gate + "_signed" * signed: Form(gate, signed)
    for signed in (False, True)
    for gate in minrnn.ops.GATES
    if not signed or minrnn.ops.GATES[gate].can_be_signed
}
"""Every gate in every form that it has."""

CELLS = [
    (gate, candidate)
    for gate, candidate in itertools.product(GATES, CANDIDATES)
    if GATES[gate].has_candidate or candidate == "positive"
]


def gated_scan(gate: str, *pre: Tensor, **options: Any) -> Tensor:
    """Call minrnn.ops.gated_scan; `gate` is a name in GATES above."""
    return minrnn.ops.gated_scan(GATES[gate].gate, *pre, signed=GATES[gate].signed, **options)


def mode(gate: str, candidate: str = "positive", reverse: bool = False) -> tuple[str, str, bool, bool]:
    """Return the last arguments of the operators and of engines; `gate` is a name in GATES above."""
    return GATES[gate].gate, candidate, GATES[gate].signed, reverse


@contextmanager
def poisoned() -> Iterator[None]:
    """Have torch fill uninitialized memory with NaN, so that an unwritten output shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Give engines a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


INFINITIES = (torch.inf, -torch.inf)
# Largest error relative to the largest value: about one rounding of the output.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def inputs(
    gate: str, B: int, T: int, D: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return pre-activations, an initial state, sparse resets, and a gradient of h."""
    generator = torch.Generator().manual_seed(seed)
    pre = [torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in GATES[gate].pre]
    if gate == "identity":
        pre[0] = pre[0].tanh()
    h0 = torch.randn(B, D, generator=generator, dtype=torch.float64)
    reset = torch.rand(B, T, generator=generator) < 0.15
    dh = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in pre], h0.to(dtype), reset, dh.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest value expected."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), "the engine left or produced a value that is not finite"
    if not actual.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare(
    engine: ModuleType,
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    dh: Tensor,
    *mode: Any,
) -> None:
    """Hold h and every gradient to the reference's in float64, with poisoned output buffers; inputs stay."""
    dtype, before = dh.dtype, [x.clone() for x in (*pre, dh)]
    exact = [x.double() for x in pre]
    start = None if h0 is None else h0.double()
    expected = reference.forward(exact, start, reset, *mode)
    h = expected.to(dtype)
    gradients = reference.backward(dh.double(), exact, h.double(), start, reset, *mode)
    with poisoned():
        assert relative_error(engine.forward(pre, h0, reset, *mode), expected) < TOLERANCE[dtype]
        actual = engine.backward(dh, pre, h, h0, reset, *mode)
    assert all(torch.equal(x, y) for x, y in zip((*pre, dh), before, strict=True))
    assert [x.dtype for x in actual] == [*(x.dtype for x in pre), reference.state_dtype(dtype)]
    for x, y in zip(actual, gradients, strict=True):
        assert relative_error(x, y) < 2.5 * TOLERANCE[dtype]


CURVES = {
    "positive": (
        lambda x: torch.where(x >= 0, x + 0.5, x.sigmoid()),
        lambda x: torch.where(x >= 0, 1.0, x.sigmoid() * (-x).sigmoid()),
    ),
    "linear": (lambda x: x, torch.ones_like),
    "tanh": (torch.tanh, lambda x: x.cosh() ** -2),
}
"""Candidates and their slopes, as in the paper."""


def compare_candidate(engine: ModuleType, candidate: str, dtype: torch.dtype) -> None:
    """Hold a candidate to its curve, number by number, and its slope; the gate lets it pass as it is."""
    x = torch.logspace(-6, 1.3, 60, dtype=torch.float64)
    x = torch.cat([-x, torch.tensor([0, 0.12, 0.124, 0.126, 0.13], dtype=torch.float64), x]).to(dtype)
    pre, one = (
        [torch.full((1, 1, len(x)), 200, dtype=dtype), x[None, None]],
        torch.ones(1, 1, len(x)).to(dtype),
    )
    h = engine.forward(pre, None, None, "mingru", candidate, False, False)
    slope = engine.backward(one, pre, h, None, None, "mingru", candidate, False, False)[1]
    value, derivative = (curve(x.double()).to(dtype) for curve in CURVES[candidate])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(h[0, 0], value, rtol=4 * eps, atol=1e-37)
    torch.testing.assert_close(slope[0, 0], derivative, rtol=4 * eps, atol=4 * eps)


def compare_decays(engine: ModuleType, gate: str, dtype: torch.dtype) -> None:
    """Hold the decay and its derivatives to the reference's, number by number: from a state of 1, h is a."""
    form, values = GATES[gate], torch.tensor([-30.0, -9.0, -0.7, -1e-4, 0.0, 0.02, 1.3, 8.0, 30.0])
    gates = torch.cartesian_prod(*[values] * (form.num_pre - 1)).view(-1, form.num_pre - 1).unbind(-1)
    pre = [x[None, None].to(dtype) for x in (*gates, torch.zeros_like(gates[0]))]
    one, options = torch.ones_like(pre[0]), mode(gate, "linear")
    exact = [x.double() for x in pre]
    a = reference.forward(exact, one[0].double(), None, *options)
    expected = [a, *reference.backward(one.double(), exact, a, one[0].double(), None, *options)]
    h = engine.forward(pre, one[0], None, *options)
    eps = torch.finfo(dtype).eps
    # A signed decay is as exact as a number near one.
    least = 8 * eps if form.signed else 1e-37
    for x, y in zip((h, *engine.backward(one, pre, h, one[0], None, *options)), expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=32 * eps, atol=least)


def refuses_wrong_tensors(call: Callable[..., Any], function: str, given: dict[str, Tensor]) -> None:
    """Hold a function to say of each argument but the first what it must be and what came instead."""
    first, *others = given
    for name in others:
        x = given[name]
        other = torch.float32 if x.dtype == torch.float64 else torch.float64
        like = f"to go with {first}, got "
        for bad, error, message in (
            (x.tolist(), TypeError, "a tensor, got list"),
            (x.to(other), TypeError, f"{x.dtype} {like}{other}"),
            (torch.cat([x, x]), ValueError, f"of shape {tuple(x.shape)} {like}{(2 * len(x), *x.shape[1:])}"),
            (x[None], ValueError, "of shape "),
            (x.to("meta"), ValueError, f"on cpu like {first}, got meta"),
        ):
            with pytest.raises(error, match=f"^{re.escape(f'{function}: {name} must be {message}')}"):
                call(**{**given, name: bad})


def kinds(x: Tensor) -> Tensor:
    """0 where a number is finite, 1 and -1 for infinities, 2 for NaN."""
    return torch.where(x.isnan(), 2, torch.where(x.isinf(), x.sign(), 0)).to(torch.int8)


def same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Hold what is not finite to stand in the same places, and the rest to be the same numbers."""
    assert torch.equal(kinds(actual), kinds(expected))
    finite = expected.isfinite()
    error = (actual.double() - expected.double())[finite].abs()
    largest = expected[finite].double().abs().max() if finite.any() else torch.ones(())
    assert not finite.any() or error.max() <= tolerance * largest.clamp(min=1)


def spoiled(gate: str, dtype: torch.dtype, T: int) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Inputs whose channels meet infinities in h0, in the drive, in both, in many steps; some meet none."""
    pre, h0, reset, dh = inputs(gate, 2, T, 21, dtype)
    reset[:] = False
    reset[1, T // 2] = True
    if gate == "identity":
        pre[0][:, ::3, 16:18] = 1  # the state is kept
        pre[0][:, :, 18] = 0.5
    for d, bad in enumerate(INFINITIES):
        h0[:, d] = bad
        pre[-1][:, T // 3, 2 + d] = bad
        pre[-1][0, T - 1, 4 + d] = bad
        h0[:, 6 + d] = bad
        pre[-1][:, T // 3, 6 + d] = -bad  # which may cancel
        pre[-1][:, ::4, 8 + d] = bad
        h0[1, 16 + d] = bad
    h0[0, 18] = torch.nan
    return pre, h0, reset, dh
