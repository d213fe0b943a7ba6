"""Infinities: every engine has its infinities and NaN where the reference has them."""

from __future__ import annotations

import copy
import itertools
from types import ModuleType
from typing import Any

import laws
import pytest
import torch
from laws import CELLS, GATES, INFINITIES, TOLERANCE, compiled_serves, gated_scan, inputs, same, spoiled
from selective_laws import NAMES, draw, gradients_like

from minrnn.models import Decoder, ModelConfig, SequenceModel
from minrnn.ops import reference
from minrnn.ops.registry import load
from minrnn.ops.selective import reference as selective_reference
from minrnn.ops.selective.operator import MODULES as SELECTIVE

every_engine = pytest.mark.parametrize("name", ["cpp", "portable"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def loaded(name: str) -> ModuleType:
    """Return an engine, or skip the test."""
    engine = load(name)
    if not isinstance(engine, ModuleType):
        pytest.skip(f"no compiled engine to compare: {engine}")
    return engine


@every_engine
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
def test_forward(name: str, gate: str, candidate: str, dtype: torch.dtype, reverse: bool) -> None:
    """In h0 and in drives, for a step and for many; resets forget them."""
    engine = loaded(name)
    for T in (1, 2, 13):
        pre, h0, reset, _ = spoiled(gate, dtype, T)
        for given in (reset, None):
            mode = laws.mode(gate, candidate, reverse)
            exact = reference.forward([x.double() for x in pre], h0.double(), given, *mode)
            same(engine.forward(pre, h0, given, *mode), exact.to(dtype), TOLERANCE[dtype])


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gate", GATES)
@directions
def test_backward(name: str, gate: str, dtype: torch.dtype, reverse: bool) -> None:
    """Of infinite states, gradients; of infinite gradients, those of h0 and of what is added to the state."""
    engine = loaded(name)
    mode = laws.mode(gate, "linear" if GATES[gate].has_candidate else "positive", reverse)
    for T, given in itertools.product((1, 2, 13), (True, False)):
        pre, h0, reset, dh = spoiled(gate, dtype, T)
        reset = reset if given else None
        h = reference.forward(pre, h0, reset, *mode)
        expected = reference.backward(dh, pre, h, h0, reset, *mode)
        for ours, theirs in zip(engine.backward(dh, pre, h, h0, reset, *mode), expected, strict=True):
            same(ours, theirs, 5 * TOLERANCE[dtype])
        pre, h0, reset, dh = inputs(gate, 2, T, 21, dtype)
        reset = reset if given else None
        for d, bad in enumerate(INFINITIES):
            dh[:, T // 2, d] = bad
            dh[0, ::3, 2 + d] = bad
            dh[:, -1, 4 + d], dh[:, 0, 4 + d] = bad, -bad
        h = reference.forward(pre, h0, reset, *mode)
        expected = reference.backward(dh, pre, h, h0, reset, *mode)
        actual = engine.backward(dh, pre, h, h0, reset, *mode)
        for ours, theirs in zip(actual[-2:], expected[-2:], strict=True):
            same(ours, theirs, 5 * TOLERANCE[dtype])
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("gate", GATES)
@directions
def test_a_reset_forgets_them_for_derivatives_of_every_order(gate: str, reverse: bool) -> None:
    """Those of the state before it, of the gradient after it, and of a tangent."""
    pre, h0, reset, dh = inputs(gate, 1, 7, 4, torch.float64)
    reset[:] = False
    reset[0, 3] = True
    h0[0, 0] = torch.inf
    dh[0, 0 if reverse else -1, 1] = torch.inf
    leaves = [x.requires_grad_() for x in (h0, *pre)]

    def f(h0: torch.Tensor, *pre: torch.Tensor) -> torch.Tensor:
        return gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse)

    h = f(*leaves)
    expected = torch.autograd.grad(h, leaves, dh, retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(h, leaves, dh, create_graph=True), expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert not all(x.isfinite().all() for x in expected)
    primals = tuple(x.detach() for x in leaves)
    start = torch.full_like(h0, torch.inf)
    _, tangent = torch.func.jvp(lambda h0: f(h0, *primals[1:]), (torch.zeros_like(start),), (start,))
    known = torch.arange(7) < 4 if reverse else torch.arange(7) >= 3
    assert tangent[:, known].isfinite().all()
    assert not tangent[:, ~known].isfinite().any()


@every_engine
@pytest.mark.parametrize("gate", ["identity", "mingru", "mingru_signed"])
@directions
def test_time_in_chunks(name: str, gate: str, reverse: bool) -> None:
    """They cross from chunk to chunk, whether or not a look back has met them."""
    engine = loaded(name)
    T, D, mode = 1600, 21, laws.mode(gate, "positive", reverse)
    pre, h0, reset, dh = (
        [x[:1] for x in part] if isinstance(part, list) else part[:1]
        for part in spoiled(gate, torch.float32, T)
    )
    reset[0, 900 if reverse else 700] = True
    for d, bad in enumerate(INFINITIES):
        pre[-1][0, [3, -3], 10 + d] = bad
        dh[0, [5, -5], 12 + d] = bad
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert T * D >= 32768  # or nothing would be cut
        for given in (reset, None):
            h = engine.forward(pre, h0, given, *mode)
            gradients = engine.backward(dh, pre, h, h0, given, *mode)
            same(h, reference.forward([x.double() for x in pre], h0.double(), given, *mode).float(), 2e-6)
            expected = reference.backward(dh, pre, h, h0, given, *mode)
            same(gradients[-1], expected[-1], 1e-5)
            for ours, theirs in zip(gradients, expected, strict=True):
                assert torch.equal(ours.isfinite(), theirs.isfinite())
    finally:
        torch.set_num_threads(before)


@every_engine
@pytest.mark.parametrize("gate", GATES)
def test_no_number_depends_on_a_later_infinity(name: str, gate: str) -> None:
    """Nor on one in another channel: the same bits."""
    engine = loaded(name)
    pre, h0, _, _ = inputs(gate, 1, 20, 21, torch.float32)
    before = engine.forward(pre, h0, None, *laws.mode(gate))
    pre[-1][0, 11, 4] = torch.inf
    after = engine.forward(pre, h0, None, *laws.mode(gate))
    others = torch.arange(21) != 4
    assert torch.equal(after[:, :11], before[:, :11])
    assert torch.equal(after[..., others], before[..., others])
    assert not after[0, 11:, 4].isfinite().any()


@compiled_serves
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
def test_a_models_step(mixer: str, signed: bool) -> None:
    """The fused step leaves them to torch's operations, and so to gated_scan."""
    options: dict[str, Any] = {"conv_width": 0, "mlp_ratio": 0, "norm": "none", "candidate": "linear"}
    config = ModelConfig(9, 7, num_layers=1, mixer=mixer, signed=signed, **options)
    model, tokens, h = SequenceModel(config), torch.arange(3), torch.randn(3, 7)
    decoder = Decoder(model)
    _, (((), (after,)),) = decoder.step(tokens, (((), (h,)),))
    with torch.no_grad():
        _, (((), (exact,)),) = copy.deepcopy(model).double()(tokens[:, None], (((), (h.double(),)),))
    torch.testing.assert_close(after.double(), exact, rtol=0, atol=2e-6)
    assert decoder._fused is not None
    for number in (torch.inf, -torch.inf, torch.nan):
        h[1, 3] = number
        assert decoder._fused.run(tokens, 3, (((), (h,)),), None) is None
        pool = (((), (h.clone(),)),)
        assert decoder._fused.run(tokens, 3, pool, [0, 1, 2]) is None
        assert torch.equal(pool[0][1][0].nan_to_num(), h.nan_to_num())


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 37, 70])
def test_selective_scan(name: str, dtype: torch.dtype, channels: int) -> None:
    """In the state, in the input and in incoming gradients."""
    engine = pytest.importorskip(SELECTIVE[name], reason=f"no engine {name}")
    for T, given in itertools.product((1, 11, 70), (True, False)):
        x = draw(2, T, channels, 3, dtype)._replace(D=None, z=None)
        x.reset[:] = False
        x.reset[1, T // 2] = given
        x.h0[:, 0], x.h0[1, 1, 0] = torch.inf, -torch.inf
        x.u[:, T // 3, 2] = torch.inf
        dy, dlast = gradients_like(x)
        y, last, borders = selective_reference.forward(x, True)
        ours, our_last, our_borders = engine.forward(x, True)
        for actual, expected in ((ours, y), (our_last, last), (our_borders, borders)):
            same(actual, expected, TOLERANCE[dtype])
        expected = selective_reference.backward(dy, dlast, borders, x)
        for field, one, other in zip(NAMES, engine.backward(dy, dlast, borders, x), expected, strict=True):
            assert torch.equal(one.isfinite(), other.isfinite()), (field, T, given)
        x = draw(2, T, channels, 3, dtype)._replace(D=None, z=None)
        dy[:, T // 2, 0], dlast[:, 1] = torch.inf, -torch.inf
        _, _, borders = selective_reference.forward(x, True)
        expected = selective_reference.backward(dy, dlast, borders, x)
        for field, one, other in zip(NAMES, engine.backward(dy, dlast, borders, x), expected, strict=True):
            assert torch.equal(one.isfinite(), other.isfinite()), (field, T, given)
        same(engine.backward(dy, dlast, borders, x)[-1], expected[-1], 5 * TOLERANCE[dtype])
