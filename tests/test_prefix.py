"""What all steps of a gated scan together do to the state before them, by every engine."""

from __future__ import annotations

import itertools
from types import ModuleType

import laws
import pytest
import torch
from laws import CELLS, mode, poisoned, relative_error, threads
from torch import Tensor

from minrnn.ops import CANDIDATES, GATES, reference
from minrnn.ops.gated import GATED_SCAN, Mode, linear_scan
from minrnn.ops.prefix import PREFIX_MODULES, prefix, prefix_backward
from minrnn.ops.registry import load

LOADED = {name: load(name) for name in PREFIX_MODULES}
ENGINES = {name: module for name, module in LOADED.items() if isinstance(module, ModuleType)}

FORGOTTEN = 2.0**-64
SHORT = 11
LENGTHS = (1, SHORT, 259, 700)
"""Less than a span, a span and a rest, a little more steps than are read first, and many more."""

cells = pytest.mark.parametrize(("gate", "candidate"), CELLS)
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def by_scans(
    pre: list[Tensor], reset: Tensor | None, dh: Tensor, mode: Mode
) -> tuple[Tensor, Tensor, Tensor]:
    """Return decay, end and the gradient of the state before, as three scans in float64 give them."""
    pre, last = [x.double() for x in pre], 0 if mode.reverse else -1
    zero = torch.zeros_like(pre[-1][:, 0]).requires_grad_()
    h = GATED_SCAN((*pre, zero, reset), mode)
    a, b = GATES[mode.gate].equations(CANDIDATES[mode.candidate], *pre, signed=mode.signed)
    kept = linear_scan(a, torch.zeros_like(b), torch.ones_like(zero), reset, reverse=mode.reverse)
    (before,) = torch.autograd.grad(h, zero, dh.double())
    return kept[:, last], h[:, last], before


@engines
@cells
@directions
def test_is_what_scans_give(engine: ModuleType, gate: str, candidate: str, reverse: bool) -> None:
    """The prefix is computed in float32 at least, whatever the inputs are."""
    given, forms = Mode(*mode(gate, candidate, reverse)), itertools.product(LENGTHS, laws.TOLERANCE)
    for T, dtype in forms:
        if T > SHORT and (engine is reference or candidate != "positive" or dtype.itemsize == 2):
            continue
        pre, _, reset, dh = laws.inputs(gate, 2, T, 5, dtype)
        reset[0], reset[1, T // 2] = False, True
        for forget in (reset, None):
            expected = by_scans(pre, forget, dh, given)
            with poisoned():
                decay, end = engine.prefix(pre, forget, *given)
                before = engine.prefix_backward(dh, pre, forget, *given)
            for found, exact in zip((decay, end, before), expected, strict=True):
                limit = 1e-13 if dtype == torch.float64 else 2e-6
                assert found.dtype == reference.state_dtype(dtype)
                assert (found - exact).abs().max() <= FORGOTTEN + limit * exact.abs().max()
            assert forget is None or not decay[1].any()


def slow(gate: str, T: int) -> tuple[list[Tensor], Tensor]:
    """Return pre-activations whose decays forget a millionth of the state at each step, and gradients."""
    pre, _, _, dh = laws.inputs(gate, 1, T, 20, torch.float32)
    if gate == "identity":
        pre[0] = 1 - 1e-6 * pre[0].sigmoid()
    else:
        which, sign = laws.GATES[gate].keeps
        pre[which] = 0.1 * pre[which] + sign * 13.8
        if "i" in laws.GATES[gate].pre:  # beside which a normalized f is small
            pre[1] = pre[1] - 13.8
    for x in pre:
        x[..., 0] = 0  # a channel that forgets within a few steps
    return pre, dh


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
@pytest.mark.parametrize("gate", laws.GATES)
@directions
def test_slow_decays_are_read_to_the_first_step(engine: str, gate: str, reverse: bool) -> None:
    pre, dh = slow(gate, 2600)
    given = Mode(*mode(gate, "positive", reverse))
    expected = by_scans(pre, None, dh, given)
    module = ENGINES[engine]
    found = *module.prefix(pre, None, *given), module.prefix_backward(dh, pre, None, *given)
    for ours, exact in zip(found, expected, strict=True):
        assert relative_error(ours, exact) < 1e-6


@engines
@directions
def test_layouts(engine: ModuleType, reverse: bool) -> None:
    """Packed, time-major and strided inputs, and a batch without rows."""
    pre, _, reset, dh = laws.inputs("minlstm", 3, 40, 5, torch.float32)
    given = mode("minlstm", reverse=reverse)
    expected = *engine.prefix(pre, reset, *given), engine.prefix_backward(dh, pre, reset, *given)
    for change in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], 1)[:, :40],
    ):
        changed = [change(x) for x in pre]
        for some in (changed, [torch.cat(changed, -1)]):
            found = (
                *engine.prefix(some, reset, *given),
                engine.prefix_backward(change(dh), some, reset, *given),
            )
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif("cpp" not in ENGINES, reason=f"no compiled engine: {LOADED['cpp']}")
@pytest.mark.parametrize("gate", ["mingru", "minlstm_signed"])
@directions
def test_threads_share_the_time_axis(gate: str, reverse: bool) -> None:
    pre, dh = slow(gate, 5000)
    reset = torch.zeros(1, 5000, dtype=torch.bool)
    reset[0, 1800] = True
    given = mode(gate, "positive", reverse)
    for forget in (None, reset):
        found = []
        for number in (1, 3):
            with threads(number):
                found.append(
                    (
                        *ENGINES["cpp"].prefix(pre, forget, *given),
                        ENGINES["cpp"].prefix_backward(dh, pre, forget, *given),
                    )
                )
        for one, three in zip(*found, strict=True):
            torch.testing.assert_close(one, three, rtol=1e-6, atol=0)


def test_the_operator_calls_the_engine_that_serves() -> None:
    pre, _, reset, dh = laws.inputs("mingru", 2, 9, 5, torch.float32)
    given, engine = Mode(*mode("mingru")), ENGINES[laws.SERVING]
    expected = engine.prefix(pre, reset, *given)
    assert all(torch.equal(x, y) for x, y in zip(prefix(pre, reset, given), expected, strict=True))
    assert torch.equal(prefix_backward(dh, pre, reset, given), engine.prefix_backward(dh, pre, reset, *given))
    for some in (pre, [torch.cat(pre, -1)]):
        empty = [x[:0] for x in some]
        assert [x.shape for x in prefix(empty, reset[:0], given)] == [(0, 5)] * 2
        assert prefix_backward(dh[:0], empty, reset[:0], given).shape == (0, 5)
