"""The operators in torch's own operations compute what the operators compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import CELLS, GATES, inputs, mode, relative_error
from selective_laws import cast, draw
from torch import Tensor

from minrnn.ops import decompositions
from minrnn.ops.decompositions import MOST_UNROLLED
from minrnn.ops.selective.reference import Inputs

TABLE = decompositions()
GATED, SELECTIVE = torch.ops.minrnn.gated_scan.default, torch.ops.minrnn.selective_scan.default
CUMMAX = torch.ops.aten.cummax.default

LENGTHS = (1, 2, MOST_UNROLLED)
"""Lengths whose steps stand by themselves; a longer one is a loop, which torch compiles for every call."""


@pytest.fixture(autouse=True, scope="module")
def forget_loops() -> Any:
    """Leave torch's compiler as it was."""
    yield
    torch.compiler.reset()


def compare(gate: str, candidate: str, T: int, *, reverse: bool, packed: bool, dtype: torch.dtype) -> None:
    pre, h0, reset, _ = inputs(gate, 3, T, 5, dtype)
    reset[0, T // 2] = True
    given = [torch.cat(pre, -1)] if packed else pre
    for start, starts in ((None, None), (h0, reset), (None, reset), (h0, None)):
        arguments = (given, start, starts, *mode(gate, candidate, reverse))
        ours, theirs = TABLE[GATED](*arguments), GATED(*arguments)
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1e-2)


@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_gated_scan_is_its_equations(gate: str, candidate: str, reverse: bool) -> None:
    for T in LENGTHS:
        for packed in (False, True):
            compare(gate, candidate, T, reverse=reverse, packed=packed, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_numbers_are_computed_in_float32(dtype: torch.dtype) -> None:
    for gate in GATES:
        compare(gate, "positive", MOST_UNROLLED, reverse=False, packed=False, dtype=dtype)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_long_gated_scan_is_a_loop(reverse: bool) -> None:
    compare("mingru", "tanh", 9, reverse=reverse, packed=True, dtype=torch.float64)


def without(x: Inputs, *names: str) -> Inputs:
    return x._replace(**dict.fromkeys(names))


def compare_selective(x: Inputs) -> None:
    tolerance = 1e-13 if x.u.dtype == torch.float64 else 2e-2
    for ours, theirs in zip(TABLE[SELECTIVE](*x, False), SELECTIVE(*x, False), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < tolerance


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize(
    "absent", [(), ("reset",), ("D", "z"), ("delta_bias", "h0"), ("D", "z", "delta_bias", "h0", "reset")]
)
def test_a_selective_scan_is_its_equations(T: int, absent: tuple[str, ...]) -> None:
    x = draw(3, T, 5, 4)
    assert x.reset is not None
    x.reset[1, T - 1] = True
    compare_selective(without(x, *absent))
    compare_selective(cast(without(x, *absent), torch.bfloat16))


def test_a_long_selective_scan_is_a_loop() -> None:
    compare_selective(draw(3, 9, 5, 4))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_running_maximum_is_torchs(dim: int) -> None:
    ties = torch.tensor([[[1.0, 0.0], [1.0, torch.nan], [3.0, 2.0]], [[2.0, 4.0], [2.0, 4.0], [-1.0, 9.0]]])
    for x in (ties, ties.nan_to_num().long()):
        ours: tuple[Tensor, Tensor] = TABLE[CUMMAX](x, dim)
        theirs = x.cummax(dim)
        torch.testing.assert_close(ours[0], theirs.values, equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(ours[1], theirs.indices, rtol=0, atol=0)
