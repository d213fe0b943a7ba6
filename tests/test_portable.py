"""The portable engine: the reference's results, in float32, in few operations and little memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import laws
import pytest
import selective_laws
import torch
from laws import CELLS, GATES, TOLERANCE, inputs, mode, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minrnn import Decoder, ModelConfig, SequenceModel, generate
from minrnn.mixers import MIXERS
from minrnn.ops import devices, portable, spans
from minrnn.ops.selective import portable as selective
from minrnn.ops.selective.reference import CHUNK, Inputs
from minrnn.ops.spans import RADIX

LENGTHS = (1, RADIX - 1, RADIX, 2 * RADIX + 3, 3 * RADIX * RADIX + RADIX + 5)
"""Less than a span, a span, some and a rest, and more spans than are joined one by one."""

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setitem(spans.BLOCK, "cpu", 100)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
def test_is_the_reference(gate: str, candidate: str, dtype: torch.dtype, reverse: bool) -> None:
    for T in LENGTHS:
        pre, h0, reset, dh = inputs(gate, 2, T, 5, dtype)
        fewer = [(None, None), (h0, None), (None, reset)] if dtype == torch.float32 else []
        for start, forget in [(h0, reset), *fewer]:
            laws.compare(portable, pre, start, forget, dh, *mode(gate, candidate, reverse))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
def test_half_precision_is_rounded_once(gate: str, candidate: str, dtype: torch.dtype, reverse: bool) -> None:
    pre, h0, reset, _ = inputs(gate, 2, 300, 5, dtype)
    given = mode(gate, candidate, reverse)
    wide = portable.forward([x.float() for x in pre], h0.float(), reset, *given)
    assert torch.equal(portable.forward(pre, h0, reset, *given), wide.to(dtype))


@directions
def test_layouts(reverse: bool) -> None:
    """Packed, time-major and strided inputs; outputs are laid out as `pre` is.

    Equal to rounding: torch computes exp and log1p by other instructions where numbers are not neighbors.
    """
    pre, h0, reset, dh = inputs("minlstm", 3, 40, 5, torch.float32)
    given = mode("minlstm", reverse=reverse)
    expected = portable.forward(pre, h0, reset, *given)
    gradients = portable.backward(dh, pre, expected, h0, reset, *given)

    def time_major(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    for change in (time_major, lambda x: x.mT.contiguous().mT, lambda x: torch.cat([x, x], 1)[:, :40]):
        changed = [change(x) for x in pre]
        h = portable.forward(changed, h0, reset, *given)
        torch.testing.assert_close(h, expected)
        for x, y in zip(portable.backward(dh, changed, h, h0, reset, *given), gradients, strict=True):
            torch.testing.assert_close(x, y)
    assert portable.forward([time_major(x) for x in pre], h0, reset, *given).transpose(0, 1).is_contiguous()
    packed = [torch.cat(pre, -1)]
    torch.testing.assert_close(portable.forward(packed, h0, reset, *given), expected)
    dpacked, dh0 = portable.backward(dh, packed, expected, h0, reset, *given)
    torch.testing.assert_close(dpacked, torch.cat(gradients[:-1], -1))
    torch.testing.assert_close(dh0, gradients[-1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("absent", ["", "D", "z", "delta_bias", "h0", "reset"])
def test_the_selective_scan_is_the_reference(dtype: torch.dtype, absent: str) -> None:
    for T in (1, 31, 32, 33, 100):
        x = selective_laws.draw(2, T, 5, 3, dtype)
        selective_laws.compare(selective, x._replace(**{absent: None}) if absent else x)


@pytest.mark.parametrize("steps", [1, 2 * CHUNK + 1])
def test_blocks_of_the_selective_scan_are_whole_chunks(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps fit into a cache: a block's chunks have their own saved states."""
    monkeypatch.setattr(selective, "steps_at_once", lambda *_: steps)
    selective_laws.compare(selective, selective_laws.draw(2, 5 * CHUNK + 3, 5, 3, torch.float32))


@pytest.mark.parametrize("slow", [4.0, 8.0])
@pytest.mark.parametrize(("T", "block", "limit"), [(2**14, 2**18, 2e-6), (2**13, 32, 1e-5)])
def test_the_selective_scans_error_in_equal_steps(
    T: int, block: int, limit: float, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All errors have one sign. Where blocks have 32 steps, a state is rounded in every span of 8."""
    monkeypatch.setitem(spans.BLOCK, "cpu", block)
    x = selective_laws.draw(1, T, 4, 8, torch.float32)._replace(reset=None, z=None)
    steady = {name: getattr(x, name)[:, :1].expand(-1, T, -1) for name in ("u", "delta_pre", "B", "C")}
    x = x._replace(**steady)._replace(delta_pre=steady["delta_pre"] - slow)
    dy, dlast = selective_laws.gradients_like(x)
    dy = dy[:, :1].expand(-1, T, -1)
    exact = selective_laws.cast(x, torch.float64)
    y, last, borders = selective.forward(exact, True)
    expected = selective.backward(dy.double(), dlast.double(), borders, exact)
    found, found_last, found_borders = selective.forward(x, True)
    assert max(relative_error(found, y), relative_error(found_last, last)) < limit
    actual = selective.backward(dy, dlast, found_borders, x)
    for name, ours, theirs in zip(selective_laws.NAMES, actual, expected, strict=True):
        assert relative_error(ours, theirs) < 2.5 * limit, name


FORGETTING = {"fast": 0.0, "slow": -6.0, "a millionth a step": -13.8}
"""Log-odds of what a step forgets."""


@pytest.mark.parametrize("forgetting", FORGETTING)
@pytest.mark.parametrize("gate", [gate for gate, form in GATES.items() if not form.signed])
@pytest.mark.parametrize("steady", [False, True], ids=["random", "steady"])
def test_the_error_does_not_grow_with_length(gate: str, forgetting: str, steady: bool) -> None:
    """At most 1e-6 of the largest state after 2^16 steps, where every step may err in the same direction."""
    form, T = GATES[gate], 2**16
    pre, h0, _, dh = inputs(gate, 1, T, 3, torch.float32)
    if gate == "identity":
        pre[0] = 1 - torch.sigmoid(0.1 * pre[0] + FORGETTING[forgetting])
    else:
        which, sign = form.keeps
        pre[which] = 0.1 * pre[which] - sign * FORGETTING[forgetting]
    if steady:
        pre = [x[:, :1].expand(-1, T, -1).contiguous() for x in pre]
    exact = [x.double().requires_grad_() for x in (*pre, h0)]
    h = laws.gated_scan(gate, *exact[:-1], h0=exact[-1])  # by the fastest engine
    assert relative_error(portable.forward(pre, h0, None, *mode(gate)), h) < 1e-6
    gradients = torch.autograd.grad(h, exact, dh.double())
    found = portable.backward(dh, pre, h.detach().float(), h0, None, *mode(gate))
    for x, y in zip(found, gradients, strict=True):
        assert relative_error(x, y) < 2e-6


class _Operations(TorchDispatchMode):
    """Counts operations that compute or copy."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def peak_allocated(work: Callable[[], Any]) -> int:
    """Return the most bytes that torch had allocated at once while `work` ran."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_few_operations() -> None:
    """At 4,096 steps at most 300, each of which a device waits for; time in steps would take thousands."""
    pre, h0, _, _ = inputs("mingru", 1, 4096, 64, torch.float32)
    with _Operations() as operations:
        portable.forward(pre, h0, None, *mode("mingru"))
    assert 50 < operations.count <= 300


@pytest.mark.parametrize("device", ["cpu", "another"])
def test_little_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most four times the output beyond the inputs."""
    if device == "another":
        monkeypatch.setitem(spans.BLOCK, "cpu", spans.LARGE_BLOCK)
    pre, h0, _, dh = inputs("mingru", 8, 2048, 512, torch.float32)
    nbytes = dh.nbytes
    h = portable.forward(pre, h0, None, *mode("mingru"))
    assert nbytes <= peak_allocated(lambda: portable.forward(pre, h0, None, *mode("mingru"))) <= 4 * nbytes
    used = peak_allocated(lambda: portable.backward(dh, pre, h, h0, None, *mode("mingru")))
    assert 2 * nbytes <= used <= 8 * nbytes


class _WithoutFloat64(TorchDispatchMode):
    """Refuses float64, as a device without it does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, list | tuple) else [result]
        for x in outputs:
            assert not isinstance(x, Tensor) or x.dtype not in (torch.float64, torch.complex128), func
        return result


@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@pytest.mark.parametrize("given", ["resets and a state", "neither"])
@directions
def test_no_float64_is_made(gate: str, candidate: str, given: str, reverse: bool) -> None:
    pre, h0, reset, dh = inputs(gate, 2, 3 * RADIX * RADIX + 3, 3, torch.float32)
    start, forget = (None, None) if given == "neither" else (h0, reset)
    options = mode(gate, candidate, reverse)
    with _WithoutFloat64():
        h = portable.forward(pre, start, forget, *options)
        gradients = portable.backward(dh, pre, h, start, forget, *options)
    assert {x.dtype for x in (h, *gradients)} == {torch.float32}


@pytest.mark.parametrize("absent", ["", *Inputs._fields[5:]])
def test_no_float64_is_made_by_the_selective_scan(absent: str) -> None:
    x = selective_laws.draw(2, 2 * CHUNK + 5, 3, 2, torch.float32)
    x = x._replace(**{absent: None}) if absent else x
    dy, dlast = selective_laws.gradients_like(x)
    with _WithoutFloat64():
        y, last, borders = selective.forward(x, True)
        gradients = selective.backward(dy, dlast, borders, x)
    assert {t.dtype for t in (y, last, borders, *gradients)} == {torch.float32}


@pytest.mark.parametrize("mixer", MIXERS)
def test_devices_without_float64(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixer trains, carries its state and generates on them, with the same results."""
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(vocab_size=11, d_model=16, mixer=mixer, num_layers=2))
    tokens = torch.randint(11, (2, 40))
    expected, _ = model(tokens)
    monkeypatch.setattr(devices, "WITHOUT_FLOAT64", ("cpu",))
    with _WithoutFloat64():
        logits = _use_without_float64(model, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def _use_without_float64(model: SequenceModel, tokens: Tensor) -> Tensor:
    logits, _ = model(tokens)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        parts, state = [], None
        for some in tokens.split(13, 1):
            part, state = model(some, state)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=1e-4, atol=1e-4)
    assert len(list(generate(model, tokens[:1, :3], 4, temperature=1e-3))) == 4
    assert Decoder(model).step(tokens[:, 0])[0].shape == (2, 11)
    return logits


def test_which_devices_have_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, mps, xpu = (torch.device(name) for name in ("cpu", "mps", "xpu"))
    assert devices.widest_float(cpu) == torch.float64
    assert devices.widest_float(mps) == torch.float32
    assert devices.widest_float(mps, torch.bfloat16) == torch.bfloat16
    for has in (False, True):
        monkeypatch.setattr(devices, "_xpu_has_float64", lambda device, has=has: has)
        assert devices.widest_float(xpu) == (torch.float64 if has else torch.float32)
