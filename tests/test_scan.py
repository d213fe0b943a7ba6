"""The laws of the recurrence (docs/recurrence.md), swept over gates, candidates, engines and layouts."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import laws
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CELLS, GATES, TOLERANCE, gated_scan, mode, poisoned, relative_error, threads
from torch import Tensor

import minrnn.ops
from minrnn.ops import CANDIDATES, scan
from minrnn.ops.registry import ENGINES, load

HERE = Path(__file__).parent

# tests/test_triton.py holds the GPU's engine to the same laws.
LOADED = {name: load(name) for name, (_, device, _) in ENGINES.items() if device != "cuda"}
MODULES = {name: module for name, module in LOADED.items() if isinstance(module, ModuleType)}

INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "avx512_bf16"]  # as in csrc/isa.h

cells = pytest.mark.parametrize(("gate", "candidate"), CELLS)
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
compiled = pytest.mark.skipif("cpp" not in MODULES, reason=f"no compiled engine to compare: {LOADED['cpp']}")


def inputs(
    gate: str, B: int, T: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Pre-activations, an initial state of both signs, and sparse resets."""
    return laws.inputs(gate, B, T, D, dtype, seed)[:3]


# ----------------------------------------------------------------------------------------------------------
# The laws


@cells
@directions
def test_step(gate: str, candidate: str, reverse: bool) -> None:
    """One pass is the same as one call per step."""
    pre, h, reset = inputs(gate, 2, 17, 5)
    whole = gated_scan(gate, *pre, h0=h, reset=reset, reverse=reverse, candidate=candidate)
    for t in reversed(range(17)) if reverse else range(17):
        step = [x[:, t : t + 1] for x in pre]
        h = gated_scan(gate, *step, h0=h, reset=reset[:, t : t + 1], reverse=reverse, candidate=candidate)[
            :, 0
        ]
        torch.testing.assert_close(h, whole[:, t], rtol=1e-12, atol=1e-12)


@cells
@given(data=st.data())
@settings(max_examples=20)
def test_carry(gate: str, candidate: str, data: st.DataObject) -> None:
    """Two parts with the state carried are one pass: values and gradients."""
    T = data.draw(st.integers(2, 80))
    cut = data.draw(st.integers(1, T - 1))
    pre, h0, reset = inputs(gate, 2, T, 3, seed=data.draw(st.integers(0, 99)))
    leaves = [x.requires_grad_() for x in (*pre, h0)]
    weight = torch.linspace(-1, 1, T, dtype=torch.float64)[:, None]
    whole = gated_scan(gate, *pre, h0=h0, reset=reset, candidate=candidate)
    first = gated_scan(gate, *[x[:, :cut] for x in pre], h0=h0, reset=reset[:, :cut], candidate=candidate)
    second = gated_scan(
        gate, *[x[:, cut:] for x in pre], h0=first[:, -1], reset=reset[:, cut:], candidate=candidate
    )
    joined = torch.cat([first, second], 1)
    torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((whole * weight).sum(), leaves)
    actual = torch.autograd.grad((joined * weight).sum(), leaves)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@compiled
@cells
@directions
@pytest.mark.parametrize(
    ("dtype", "T"),
    [*itertools.product(TOLERANCE, [1, 2, 63, 64, 500]), (torch.float32, 4099), (torch.bfloat16, 1000)],
    ids=str,
)
def test_engine(gate: str, candidate: str, reverse: bool, dtype: torch.dtype, T: int) -> None:
    """Every engine equals the reference: h and every gradient, with poisoned output buffers."""
    D = 37 if T < 500 else 5
    pre, h0, reset = inputs(gate, 3, T, D, dtype)
    dh = torch.randn(3, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    arguments = (h0, reset, *mode(gate, candidate, reverse))
    exact = MODULES["reference"].forward([x.double() for x in pre], h0.double(), *arguments[1:])
    h = exact.to(dtype)
    gradients = MODULES["reference"].backward(
        dh.double(), [x.double() for x in pre], h.double(), h0.double(), *arguments[1:]
    )
    for name, module in MODULES.items():
        with poisoned():
            assert relative_error(module.forward(pre, *arguments), exact) < TOLERANCE[dtype], name
            actual = module.backward(dh, pre, h, *arguments)
        wide = torch.promote_types(dtype, torch.float32)
        assert [x.dtype for x in actual] == [*(x.dtype for x in pre), wide], name
        for x, y in zip(actual, gradients, strict=True):
            assert relative_error(x, y) < 2.5 * TOLERANCE[dtype], name


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_candidates_are_exact(name: str, candidate: str, dtype: torch.dtype) -> None:
    """Near zero too, where an error looks small beside the largest number."""
    laws.compare_candidate(MODULES[name], candidate, dtype)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decays_are_exact(name: str, gate: str, dtype: torch.dtype) -> None:
    """Near zero and near one, and so are their derivatives."""
    laws.compare_decays(MODULES[name], gate, dtype)


KEEPS = {"mingru": ("z", -1), "minlstm": ("f", 1), "minlstm_unnormalized": ("f", 1), "minema": ("delta", -1)}


@pytest.mark.parametrize("gate", minrnn.ops.GATES)
def test_a_gates_record_is_true_of_its_equations(gate: str) -> None:
    record, curves = minrnn.ops.GATES[gate], CANDIDATES.values()
    neutral = [torch.tensor(x) for x in record.neutral]
    for candidate in curves:
        assert [float(x) for x in record.equations(candidate, *neutral)] == [1, 0]
    pre = {name: torch.tensor(0.3 + 0.1 * j) for j, name in enumerate(record.pre)}
    a, _ = record.equations(CANDIDATES["tanh"], *pre.values())
    terms = {float(record.equations(candidate, *pre.values())[1]) for candidate in curves}
    assert record.has_candidate == (len(terms) > 1) == (gate != "identity")
    assert record.keeps == KEEPS.get(gate)
    if record.keeps is not None:
        name, sign = record.keeps
        assert record.equations(CANDIDATES["tanh"], *{**pre, name: pre[name] + sign}.values())[0] > a
    one = [torch.tensor(1.0) if name == "candidate" else x for name, x in pre.items()]
    if record.unnormalized is not None:
        other = minrnn.ops.GATES[record.unnormalized]
        assert other.pre == record.pre
        assert sum(record.equations(CANDIDATES["linear"], *one)) == pytest.approx(1)
        assert sum(other.equations(CANDIDATES["linear"], *one)) != pytest.approx(1)
    assert record.unnormalized == {"minlstm": "minlstm_unnormalized"}.get(gate)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "identity"])
def test_decays_are_as_exact_as_their_log_odds(gate: str) -> None:
    """a = sigmoid(u), or tanh(u / 2), each number with as many digits as its dtype has."""
    values = torch.tensor([-9.0, -2.5, -0.4, -1e-4, 1e-7, 0.01, 0.7, 3.0, 8.0])
    pre = torch.cartesian_prod(*[values] * GATES[gate].num_pre).unbind(-1)
    candidate, record = CANDIDATES["linear"], minrnn.ops.GATES[GATES[gate].gate]
    u = -record.log_odds(*pre).double()
    expected = torch.tanh(u / 2) if GATES[gate].signed else torch.sigmoid(u)
    a, _ = GATES[gate].equations(candidate, *pre)
    torch.testing.assert_close(a.double(), expected, rtol=4 * 2.0**-23, atol=0)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_have_their_inputs_dtypes(name: str, gate: str, dtype: torch.dtype) -> None:
    """That of h0 is of the state's, at least float32."""
    pre, h0, reset = inputs(gate, 2, 5, 3, dtype)
    h = MODULES[name].forward(pre, h0, reset, *mode(gate))
    *dpre, dh0 = MODULES[name].backward(h, pre, h, h0, reset, *mode(gate))
    assert [h.dtype, *(x.dtype for x in dpre)] == [dtype] * (1 + len(pre))
    assert dh0.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@compiled
def test_the_engine_is_given_torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu: Any = MODULES["cpp"]
    given: list[int] = []
    whole = cpu._scan
    spy = SimpleNamespace(
        forward=lambda *call: (given.append(call[5]), whole.forward(*call)),
        backward=lambda *call: (given.append(call[5]), whole.backward(*call)),
    )
    monkeypatch.setattr(cpu, "_scan", spy)
    pre, h0, reset = inputs("mingru", 2, 5, 3)
    with threads(3):
        h = cpu.forward(pre, h0, reset, *mode("mingru"))
        cpu.backward(h, pre, h, h0, reset, *mode("mingru"))
    assert given == [3, 3]


@compiled
@pytest.mark.parametrize("gate", GATES)
@directions
@pytest.mark.parametrize(
    "shape", [(1, 5000, 3), (1, 3000, 70), (2, 1500, 33), (5, 64, 700), (64, 40, 20)], ids=str
)
def test_engine_partitions(gate: str, reverse: bool, shape: tuple[int, int, int]) -> None:
    """Cutting batch, channels and time over threads changes nothing but the last bits."""
    pre, h0, reset = inputs(gate, *shape)
    dh = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (h0, reset, *mode(gate, "positive", reverse))
    expected = MODULES["reference"].forward(pre, *arguments)
    gradients = MODULES["reference"].backward(dh, pre, expected, *arguments)
    for num_threads in (1, 3):
        with threads(num_threads), poisoned():
            h = MODULES["cpp"].forward(pre, *arguments)
            again = MODULES["cpp"].forward(pre, *arguments)
            actual = MODULES["cpp"].backward(dh, pre, h, *arguments)
        assert torch.equal(h, again), f"{num_threads} threads: the same call gave other bits"
        for x, y in zip((h, *actual), (expected, *gradients), strict=True):
            assert relative_error(x, y) < 1e-13, num_threads


# Logits of the first gate: forgets all in a few steps, in a few thousand, never.
@compiled
@pytest.mark.parametrize("shift", [0.0, 5.0, 12.0], ids=["fast", "slow", "hardly"])
@pytest.mark.parametrize("gate", ["mingru", "minlstm", "mingru_signed", "minlstm_signed"])
@pytest.mark.parametrize("turned", [False, True], ids=["near 1", "near -1 or 0"])
@directions
def test_chunks_of_time(gate: str, shift: float, turned: bool, reverse: bool) -> None:
    """Chunks of one sequence that run at once know the state they start from, however slowly it fades."""
    pre, h0, _ = inputs(gate, 1, 9000, 40, torch.float32)
    pre[0] += -shift if (GATES[gate].pre[0] == "z") != turned else shift
    check_chunks(gate, pre, 50 * h0, reverse)


@compiled
@pytest.mark.parametrize("gate", ["mingru_signed", "minlstm_signed"])
@directions
def test_chunks_whose_decays_multiply_to_less_than_zero(gate: str, reverse: bool) -> None:
    """Near -1, but for one step near 1 at each end of a chunk: what is negative is not forgotten."""
    pre, h0, _ = inputs(gate, 1, 9000, 40, torch.float32)
    keeps = -12 if GATES[gate].pre[0] == "z" else 12
    pre[0] -= keeps
    pre[0][:, [2990, 3009, 5990, 6009]] += 2 * keeps
    check_chunks(gate, pre, 50 * h0, reverse)


def check_chunks(gate: str, pre: list[Tensor], h0: Tensor, reverse: bool) -> None:
    """Compare three chunks of 3000 steps, and their gradients, with one step after another in float64."""
    dh = torch.randn(1, 9000, 40, generator=torch.Generator().manual_seed(1))
    arguments = (None, *mode(gate, "positive", reverse))
    exact = [x.double() for x in pre]
    expected = MODULES["reference"].forward(exact, h0.double(), *arguments)
    gradients = MODULES["reference"].backward(dh.double(), exact, expected, h0.double(), *arguments)
    with threads(3):
        h = MODULES["cpp"].forward(pre, h0, *arguments)
        actual = MODULES["cpp"].backward(dh, pre, h, h0, *arguments)
    assert relative_error(h, expected) < 2e-6
    for x, y in zip(actual, gradients, strict=True):
        assert relative_error(x, y) < 5e-6


@compiled
@pytest.mark.parametrize("step", [10, 2900, 3100, 8999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_chunks_never_forget_what_is_not_finite(step: int, value: float) -> None:
    """A NaN or an infinity stays in its channel for good, in whichever chunk of time it arises."""
    pre, _, _ = inputs("mingru", 1, 9000, 40, torch.float32)
    pre[1][0, step, 7] = value
    with threads(3):
        h = MODULES["cpp"].forward(pre, None, None, *mode("mingru"))
    expected = torch.zeros(1, 9000, 40, dtype=torch.bool)
    expected[0, step:, 7] = True
    assert torch.equal(~h.isfinite(), expected)


@compiled
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_every_instruction_set(isa: str) -> None:
    """Each copy of the loops that this processor can run obeys the reference, for every gate and dtype."""
    widest = MODULES["cpp"].ISA
    if INSTRUCTION_SETS.index(isa) > INSTRUCTION_SETS.index(widest):
        pytest.skip(f"this processor has {widest} at most")
    program = "import test_scan; test_scan.check_instruction_set()"
    environment = {**os.environ, "MINRNN_ISA": isa, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def check_instruction_set() -> None:
    for (gate, candidate), dtype, D in itertools.product(CELLS, TOLERANCE, (3, 37)):
        pre, h0, reset = inputs(gate, 2, 7, D, dtype)
        dh = torch.randn(2, 7, D, generator=torch.Generator().manual_seed(1)).to(dtype)
        arguments = (h0.float() if dtype.itemsize == 2 else h0, reset, *mode(gate, candidate, False))
        h = MODULES["reference"].forward(pre, *arguments)
        gradients = MODULES["reference"].backward(dh, pre, h, *arguments)
        actual = MODULES["cpp"].forward(pre, *arguments), *MODULES["cpp"].backward(dh, pre, h, *arguments)
        for x, y in zip(actual, (h, *gradients), strict=True):
            assert relative_error(x, y) < TOLERANCE[dtype], (gate, candidate, dtype, D)
    print(MODULES["cpp"].ISA)


def test_an_unknown_instruction_set_is_refused() -> None:
    environment = {**os.environ, "MINRNN_ISA": "avx1024", "MINRNN_ENGINE": "cpp"}
    program = "import minrnn.ops"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "MINRNN_ISA must name an instruction set" in done.stderr


@pytest.mark.parametrize("gate", GATES)
def test_layouts(gate: str) -> None:
    """Packed, time-major, sliced, expanded and channel-strided inputs need not be copied by the caller."""
    pre, h0, reset = inputs(gate, 3, 12, 4)
    k = GATES[gate].num_pre
    expected = gated_scan(gate, *pre, h0=h0, reset=reset)
    packed = torch.cat(pre, -1)
    time_major = packed.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.randn(6, 15, k * 4 + 2, dtype=torch.float64)[::2, 1:13, 1:-1].copy_(packed)
    strided = [torch.empty(3, 4, 12, dtype=torch.float64).transpose(1, 2).copy_(x) for x in pre]
    for variant in ([packed], [time_major], [sliced], strided, list(packed.chunk(k, -1))):
        leaves = [x.detach().requires_grad_() for x in variant]
        h = gated_scan(gate, *leaves, h0=h0, reset=reset)
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)
        gradient = torch.cat(torch.autograd.grad(h.sum(), leaves), -1)
        source = [x.detach().requires_grad_() for x in pre]
        exact = torch.cat(
            torch.autograd.grad(gated_scan(gate, *source, h0=h0, reset=reset).sum(), source), -1
        )
        torch.testing.assert_close(gradient, exact, rtol=1e-11, atol=1e-12)
    assert gated_scan(gate, time_major).stride(0) == 4, "time-major in must give time-major out"
    expanded = [x[:1].expand(3, -1, -1) for x in pre]
    torch.testing.assert_close(
        gated_scan(gate, *expanded), gated_scan(gate, *[x.contiguous() for x in expanded]), rtol=1e-12, atol=0
    )


@cells
@directions
def test_restart(gate: str, candidate: str, reverse: bool) -> None:
    """Reset forgets, even a state that is not a number; no gradient crosses it."""
    pre, h0, _ = inputs(gate, 2, 20, 3)
    pre = [x.requires_grad_() for x in pre]
    cut = 8
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 19 - cut if reverse else cut] = True
    after = slice(None, 20 - cut) if reverse else slice(cut, None)
    before = slice(20 - cut, None) if reverse else slice(None, cut)
    h = gated_scan(
        gate, *pre, h0=torch.full_like(h0, torch.nan), reset=reset, reverse=reverse, candidate=candidate
    )
    fresh = gated_scan(gate, *[x[:, after] for x in pre], reverse=reverse, candidate=candidate)
    torch.testing.assert_close(h[:, after], fresh, rtol=1e-12, atol=1e-12)
    clean = gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse, candidate=candidate)
    for d in torch.autograd.grad(clean[:, after].sum(), pre):
        assert torch.equal(d[:, before], torch.zeros_like(d[:, before]))


@directions
def test_identity(reverse: bool) -> None:
    """a = 1, b = 0 keeps the state, exactly."""
    h0 = torch.randn(3, 5)
    h = scan(torch.ones(3, 40, 5), torch.zeros(3, 40, 5), h0, reverse=reverse)
    assert torch.equal(h, h0[:, None].expand(3, 40, 5))


@cells
@given(T=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_reverse(gate: str, candidate: str, T: int, seed: int) -> None:
    """Reverse = flip . scan . flip."""
    pre, h0, reset = inputs(gate, 2, T, 3, seed=seed)
    flipped = gated_scan(gate, *[x.flip(1) for x in pre], h0=h0, reset=reset.flip(1), candidate=candidate)
    h = gated_scan(gate, *pre, h0=h0, reset=reset, reverse=True, candidate=candidate)
    torch.testing.assert_close(h, flipped.flip(1), rtol=1e-13, atol=1e-13)


@cells
@directions
def test_causality(gate: str, candidate: str, reverse: bool) -> None:
    """No output depends on later input: changing it leaves the same bits."""
    pre, h0, reset = inputs(gate, 2, 30, 3, torch.float32)
    h = gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse, candidate=candidate)
    later, earlier = (slice(None, 15), slice(15, None)) if reverse else (slice(15, None), slice(None, 15))
    for x in pre:
        x[:, later] += 1
    changed = gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse, candidate=candidate)
    assert torch.equal(h[:, earlier], changed[:, earlier])


@given(seed=st.integers(0, 999), scale=st.floats(-3, 3), reverse=st.booleans())
@settings(max_examples=25)
def test_linearity(seed: int, scale: float, reverse: bool) -> None:
    """The scan is linear in (b, h0)."""
    generator = torch.Generator().manual_seed(seed)
    a, b1, b2 = (torch.randn(2, 25, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    h1, h2 = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    a = a.tanh()
    combined = scan(a, b1 + scale * b2, h1 + scale * h2, reverse=reverse)
    separate = scan(a, b1, h1, reverse=reverse) + scale * scan(a, b2, h2, reverse=reverse)
    torch.testing.assert_close(combined, separate, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_normalised_minlstm_is_a_mingru(candidate: str) -> None:
    """f / (f + i) = sigmoid(log f - log i): minLSTM is a minGRU with one effective gate."""
    (f, i, c), h0, _ = inputs("minlstm", 2, 30, 4)
    z = torch.nn.functional.logsigmoid(i) - torch.nn.functional.logsigmoid(f)
    torch.testing.assert_close(
        gated_scan("minlstm", f, i, c, h0=h0, candidate=candidate),
        gated_scan("mingru", z, c, h0=h0, candidate=candidate),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_signed_minlstm_is_a_signed_mingru(candidate: str) -> None:
    (f, i, c), h0, _ = inputs("minlstm_signed", 2, 30, 4)
    z = torch.nn.functional.logsigmoid(i) - torch.nn.functional.logsigmoid(f)
    torch.testing.assert_close(
        gated_scan("minlstm_signed", f, i, c, h0=h0, candidate=candidate),
        gated_scan("mingru_signed", z, c, h0=h0, candidate=candidate),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("engine", MODULES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", ["mingru_signed", "minlstm_signed"])
def test_signed_gates_count_modulo_two(gate: str, dtype: torch.dtype, engine: str) -> None:
    """h becomes 1 - h at each one and stays at each zero, of any number of bits."""
    bits = torch.randint(2, (2, 1000, 5), generator=torch.Generator().manual_seed(0))
    z = (40.0 * (2 * bits - 1)).to(dtype)
    pre = [z] if gate == "mingru_signed" else [-z, z]
    h = MODULES[engine].forward([*pre, torch.ones_like(z)], None, None, *mode(gate, "linear"))
    assert torch.equal(h.round().long(), bits.cumsum(1) % 2)
    assert (h.double() - h.round()).abs().max() < 1e-12


def test_log_space_cross_check() -> None:
    """The paper's log-space form (appendix B; Heinsen, arXiv 2311.06281) agrees where it is accurate."""
    (z, c), _, _ = inputs("mingru", 2, 40, 4)
    log_a = -torch.nn.functional.softplus(z)
    log_b = -torch.nn.functional.softplus(-z) + CANDIDATES["positive"].value(c).log()
    A = log_a.cumsum(1)
    h = (A + (log_b - A).logcumsumexp(1)).exp()
    torch.testing.assert_close(gated_scan("mingru", z, c), h, rtol=1e-11, atol=0)


# ----------------------------------------------------------------------------------------------------------
# Extreme pre-activations


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes(gate: str, candidate: str, dtype: torch.dtype) -> None:
    """Gates saturate without overflow: all pairs of huge, tiny, zero and opposite pre-activations."""
    values = torch.tensor([-1e4, -200.0, -90.0, -20.0, -1e-3, 0.0, 1e-20, 3.0, 30.0, 120.0, 1e4], dtype=dtype)
    grid = torch.cartesian_prod(*[values] * GATES[gate].num_pre)  # (N, k)
    pre = [grid[:, j].reshape(1, 1, -1).contiguous() for j in range(grid.shape[1])]
    h0 = torch.linspace(-2, 2, grid.shape[0], dtype=dtype)[None]
    arguments = (None, *mode(gate, candidate, False))
    exact = MODULES["reference"].forward([x.double() for x in pre], h0.double(), *arguments)
    dh = torch.ones_like(exact)
    gradients = MODULES["reference"].backward(dh, [x.double() for x in pre], exact, h0.double(), *arguments)
    # Near zero, a signed a is as exact as a number near one, and so is minema's h where a h0 and b cancel.
    smallest = 5e-7 if gate.endswith("_signed") or gate == "minema" else 1e-30
    for module in MODULES.values():
        h = module.forward(pre, h0, *arguments)
        torch.testing.assert_close(h.double(), exact, rtol=3e-6, atol=smallest)
        actual = module.backward(dh.to(dtype), pre, h, h0, *arguments)
        for x, y in zip(actual, gradients, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_propagates_from_its_step_on(gate: str, dtype: torch.dtype) -> None:
    """A NaN is never swallowed, and never reaches other rows, channels or earlier steps."""
    for j in range(GATES[gate].num_pre):
        pre, _, _ = inputs(gate, 2, 9, 18, dtype)
        pre[j][0, 4, 2] = torch.nan
        h = gated_scan(gate, *pre)
        expected = torch.zeros(2, 9, 18, dtype=torch.bool)
        expected[0, 4:, 2] = True
        assert torch.equal(h.isnan(), expected)


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_conversions_are_torchs(dtype: torch.dtype) -> None:
    """Every 16-bit pattern survives a = 0, b = x; a = 1, b = 0 rounds a float32 state as torch does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)[None, None]
    h = MODULES["cpp"].forward([torch.zeros_like(x), x], None, None, *mode("identity"))
    assert torch.equal(h.isnan(), x.isnan())
    normal = x.isnan() | (
        x.abs() >= torch.finfo(dtype).tiny
    )  # instructions for bfloat16 drop smaller numbers
    assert torch.equal(h.nan_to_num(1.0)[normal].abs(), x.nan_to_num(1.0)[normal].abs())
    assert (h[~normal] - x[~normal]).abs().max() < torch.finfo(dtype).tiny
    h0 = torch.randn(2**16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 5, 2**16)
    keep = [torch.ones_like(x), torch.zeros_like(x)]
    h = MODULES["cpp"].forward(keep, h0[None], None, *mode("identity"))
    assert torch.equal(h.flatten().nan_to_num(1.0), h0.to(dtype).nan_to_num(1.0))


# ----------------------------------------------------------------------------------------------------------
# Derivatives of every order, and torch's own checks


def function(gate: str, candidate: str, reset: Tensor | None, reverse: bool) -> Callable[..., Tensor]:
    return lambda h0, *pre: gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse, candidate=candidate)


@cells
@directions
def test_gradcheck(gate: str, candidate: str, reverse: bool) -> None:
    """First derivatives, backward and forward mode, against finite differences, packed and not."""
    pre, h0, reset = inputs(gate, 2, 6, 2)
    for tensors in (pre, [torch.cat(pre, -1)]):
        leaves = [x.requires_grad_() for x in (h0, *tensors)]
        assert torch.autograd.gradcheck(
            function(gate, candidate, reset, reverse), leaves, check_forward_ad=True
        )


@cells
@directions
def test_gradgradcheck(gate: str, candidate: str, reverse: bool) -> None:
    """Second derivatives, reverse over reverse and forward over reverse."""
    pre, h0, reset = inputs(gate, 2, 4, 2)
    leaves = [x.requires_grad_() for x in (h0, *pre)]
    assert torch.autograd.gradgradcheck(
        function(gate, candidate, reset, reverse), leaves, check_fwd_over_rev=True
    )


@pytest.mark.parametrize("gate", GATES)
@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_that_are_differentiated_are_the_engines(
    gate: str, reverse: bool, dtype: torch.dtype
) -> None:
    pre, h0, reset = inputs(gate, 2, 9, 3, dtype)
    reset[0, -1 if reverse else 0] = True
    for tensors in (pre, [torch.cat(pre, -1)]):
        leaves = [x.requires_grad_() for x in (h0, *tensors)]
        h = function(gate, "positive", reset, reverse)(*leaves)
        expected = torch.autograd.grad(h, leaves, torch.ones_like(h), retain_graph=True)
        actual = torch.autograd.grad(h, leaves, torch.ones_like(h), create_graph=True)
        for x, y in zip(actual, expected, strict=True):
            assert x.dtype == y.dtype
            # Both are computed in at least float32, and rounded once.
            assert relative_error(x, y) <= (1e-12 if dtype == torch.float64 else 2.0**-8)


@pytest.mark.parametrize("gate", GATES)
def test_vmap_and_jacobians(gate: str) -> None:
    """torch.func transforms compose with the scan."""
    pre, h0, reset = inputs(gate, 2, 5, 3)
    batched = [torch.stack([x, x.flip(1), 2 * x], 1) for x in pre]
    f = function(gate, "positive", reset, False)
    mapped = torch.func.vmap(f, in_dims=(None, *[1] * len(pre)))(h0, *batched)
    for n in range(3):
        torch.testing.assert_close(mapped[n], f(h0, *[x[:, n] for x in batched]), rtol=1e-12, atol=1e-12)
    forward = torch.func.jacfwd(f, argnums=1)(h0, *pre)
    backward = torch.func.jacrev(f, argnums=1)(h0, *pre)
    torch.testing.assert_close(forward, backward, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_forward_mode_without_gradients(gate: str) -> None:
    """torch.no_grad turns backward mode off, and leaves forward mode on."""
    pre, h0, reset = inputs(gate, 2, 5, 3)
    f = function(gate, "positive", reset, False)
    tangents = tuple(torch.ones_like(x) for x in (h0, *pre))
    _, expected = torch.func.jvp(f, (h0, *pre), tangents)
    with torch.no_grad():
        _, actual = torch.func.jvp(f, (h0, *pre), tangents)
        torch.testing.assert_close(actual, expected)
        batched = torch.func.vmap(f)(h0[None], *[x[None] for x in pre])
    torch.testing.assert_close(batched[0], f(h0, *pre))


@pytest.mark.parametrize("gate", GATES)
def test_batched_gradients(gate: str) -> None:
    """Many output gradients at once, by vmap over torch.autograd.grad: the engine's backward, batched."""
    pre, h0, reset = inputs(gate, 2, 5, 3)
    leaves = [x.requires_grad_() for x in (h0, *pre)]
    h = function(gate, "positive", reset, False)(*leaves)
    directions = torch.randn(4, *h.shape, generator=torch.Generator().manual_seed(1), dtype=h.dtype)
    batched = torch.func.vmap(lambda v: torch.autograd.grad(h, leaves, v, retain_graph=True))(directions)
    for n, direction in enumerate(directions):
        expected = torch.autograd.grad(h, leaves, direction, retain_graph=True)
        for x, y in zip(batched, expected, strict=True):
            torch.testing.assert_close(x[n], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(gate: str, packed: bool) -> None:
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch with dynamic shapes."""
    pre, h0, reset = inputs(gate, 2, 5, 3, torch.float32)
    pre = [torch.cat(pre, -1)] if packed else pre
    leaves = [x.requires_grad_() for x in pre]
    h0.requires_grad_()
    for arguments in ((leaves, h0, reset), (leaves, None, None)):
        torch.library.opcheck(torch.ops.minrnn.gated_scan.default, (*arguments, *mode(gate)))
    plain = [x.detach() for x in pre]
    h = gated_scan(gate, *plain, h0=h0.detach(), reset=reset)
    torch.library.opcheck(
        torch.ops.minrnn.gated_scan_backward.default,
        (torch.ones_like(h), plain, h, h0.detach(), reset, *mode(gate)),
    )


@pytest.mark.parametrize("gate", GATES)
def test_compile(gate: str) -> None:
    """torch.compile(fullgraph=True): same values and gradients, and no recompilation for another T."""
    torch._dynamo.reset()
    f = function(gate, "positive", None, False)
    fast = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 12, 31):
            pre, h0, _ = inputs(gate, 2, T, 3, torch.float32)
            results = []
            for g in (f, fast):
                leaves = [x.detach().clone().requires_grad_() for x in (h0, *pre)]
                h = g(*leaves)
                results.append([h, *torch.autograd.grad(h.square().sum(), leaves)])
            for x, y in zip(*results, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("gate", GATES)
def test_export(gate: str) -> None:
    """torch.export holds the operator, for any T."""

    class Model(torch.nn.Module):
        def forward(self, *pre: Tensor) -> Tensor:
            return gated_scan(gate, *pre)

    pre, _, _ = inputs(gate, 2, 6, 3, torch.float32)
    T = torch.export.Dim("T", min=2, max=4096)
    shapes = {"pre": tuple({1: T} for _ in pre)}
    program = torch.export.export(Model(), tuple(pre), dynamic_shapes=shapes)
    longer, _, _ = inputs(gate, 2, 11, 3, torch.float32)
    torch.testing.assert_close(program.module()(*longer), gated_scan(gate, *longer))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_meta(gate: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and layouts of states and gradients are known without data."""
    pre, h0, reset = inputs(gate, 2, 5, 3, dtype)
    packed = torch.cat(pre, -1)
    for tensors in (pre, [packed], [packed.transpose(0, 1).contiguous().transpose(0, 1)]):
        known = []
        for device in ("cpu", "meta"):
            some, start, resets = [x.to(device) for x in tensors], h0.to(device), reset.to(device)
            h = torch.ops.minrnn.gated_scan(some, start, resets, *mode(gate))
            gradients = torch.ops.minrnn.gated_scan_backward(h, some, h, start, resets, *mode(gate))
            known.append([(x.shape, x.dtype, x.stride()) for x in (h, *gradients)])
        assert known[0] == known[1]
        assert known[1][0][:2] == ((2, 5, 3), dtype)


# ----------------------------------------------------------------------------------------------------------
# Half precision keeps its gates and its state


def test_bfloat16_forgets() -> None:
    """A decay of 0.999 rounds to 1 in bfloat16; computed in float32 inside, the cell still forgets."""
    z = torch.full((1, 4000, 1), -6.9).to(torch.bfloat16)
    h = gated_scan("mingru", z, torch.zeros_like(z), h0=torch.full((1, 1), 100.0))
    assert h[0, -1, 0] < 3


def test_float32_state_with_half_inputs() -> None:
    """h0 may be float32 beside half inputs, and its gradient is float32."""
    pre, h0, _ = inputs("mingru", 2, 8, 4, torch.bfloat16)
    exact = h0.float().requires_grad_()
    h = gated_scan("mingru", *pre, h0=exact)
    assert h.dtype == torch.bfloat16
    (dh0,) = torch.autograd.grad(h.sum(), exact)
    assert dh0.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------
# Bad input

X = torch.zeros(2, 5, 3)
BAD_SCANS = {
    "a is a list": ((X.tolist(), X), TypeError, "a must be a tensor, got list"),
    "integers": ((X.long(), X.long()), TypeError, "a must be float32"),
    "two axes": ((X[0], X[0]), ValueError, r"\(B, T, D\)"),
    "no steps": ((X[:, :0], X[:, :0]), ValueError, "at least 1"),
    "shapes differ": ((X, X[:, :4]), ValueError, r"b must be of shape \(2, 5, 3\)"),
    "dtypes differ": ((X, X.double()), TypeError, "b must be torch.float32"),
    "devices differ": ((X, X.to("meta")), ValueError, "b must be on cpu"),
    "h0 too wide": ((X, X, torch.zeros(2, 4)), ValueError, r"h0 must be of shape \(2, 3\)"),
    "h0 has layers": ((X, X, torch.zeros(1, 2, 3)), ValueError, "h0 must be of shape"),
    "h0 is double": ((X, X, torch.zeros(2, 3).double()), TypeError, "h0 must be torch.float32"),
}
BAD_GATES = {
    "unknown gate": (("mingrew", X, X), {}, ValueError, "did you mean 'mingru'"),
    "unknown candidate": (("mingru", X, X), {"candidate": "positiv"}, ValueError, "did you mean 'positive'"),
    "unknown form": (("mingru_signed", X, X), {}, ValueError, "did you mean 'mingru' with signed=True"),
    "no signed form": (("identity", X, X), {"signed": True}, ValueError, "'identity' has no signed form"),
    "signed is no flag": (("mingru", X, X), {"signed": 1}, TypeError, "signed must be a bool, got int"),
    "candidate of identity": (("identity", X, X), {"candidate": "tanh"}, ValueError, "no candidate"),
    "too few": (("minlstm", X, X), {}, ValueError, "takes 3 pre-activations"),
    "odd packed": (("mingru", X), {}, ValueError, "multiple of 2"),
    "reset is float": (("mingru", X, X), {"reset": torch.zeros(2, 5)}, TypeError, "reset must be torch.bool"),
    "reset transposed": (
        ("mingru", X, X),
        {"reset": torch.zeros(5, 2, dtype=torch.bool)},
        ValueError,
        r"reset must be of shape \(2, 5\)",
    ),
}


@pytest.mark.parametrize("case", BAD_SCANS)
def test_scan_refuses(case: str) -> None:
    arguments, error, message = BAD_SCANS[case]
    with pytest.raises(error, match=message):
        scan(*arguments)


@pytest.mark.parametrize("case", BAD_GATES)
def test_gated_scan_refuses(case: str) -> None:
    arguments, keywords, error, message = BAD_GATES[case]
    with pytest.raises(error, match=message):
        minrnn.ops.gated_scan(*arguments, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_argument_of_scan_goes_with_the_first(dtype: torch.dtype) -> None:
    (a, b), h0, _ = inputs("identity", 2, 5, 3, dtype)
    laws.refuses_wrong_tensors(scan, "scan", {"a": a, "b": b, "h0": h0})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_h0_may_be_of_any_dtype_that_the_state_holds(dtype: torch.dtype) -> None:
    """That is float64 beside float64, and float32 beside all others."""
    (a, b), h0, _ = inputs("identity", 2, 5, 3, dtype)
    for start in TOLERANCE:
        if start == torch.float64 and dtype != torch.float64:
            continue
        leaf = h0.to(start).requires_grad_()
        h = scan(a, b, leaf)
        assert h.dtype == dtype
        assert torch.autograd.grad(h.sum(), leaf)[0].dtype == start
        assert relative_error(h, scan(a.double(), b.double(), leaf.double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("gate", minrnn.ops.GATES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_argument_of_gated_scan_goes_with_the_first(gate: str, packed: bool) -> None:
    pre, h0, reset = inputs(gate, 2, 5, 3, torch.float32)
    given = {"pre": torch.cat(pre, -1)} if packed else dict(zip(GATES[gate].pre, pre, strict=True))

    def call(h0: Tensor, reset: Tensor, **tensors: Tensor) -> Tensor:
        return minrnn.ops.gated_scan(gate, *tensors.values(), h0=h0, reset=reset)

    laws.refuses_wrong_tensors(call, "gated_scan", {**given, "h0": h0, "reset": reset})


@pytest.mark.parametrize("gate", minrnn.ops.GATES)
@pytest.mark.parametrize("flag", ["signed", "reverse"])
def test_flags_are_bools(gate: str, flag: str) -> None:
    """Python's or NumPy's, and no number, whatever it counts as."""
    pre, _, _ = inputs(gate, 1, 3, 2)
    expected = minrnn.ops.gated_scan(gate, *pre)
    assert torch.equal(minrnn.ops.gated_scan(gate, *pre, **{flag: np.False_}), expected)
    for bad in (0, 0.0, None, "no", np.zeros(1, bool)):
        with pytest.raises(TypeError, match=f"gated_scan: {flag} must be a bool, got {type(bad).__name__}"):
            minrnn.ops.gated_scan(gate, *pre, **{flag: bad})


@pytest.mark.parametrize("gate", [gate for gate, x in minrnn.ops.GATES.items() if not x.can_be_signed])
def test_a_gate_without_a_signed_form_says_so(gate: str) -> None:
    pre, _, _ = inputs(gate, 1, 3, 2)
    with pytest.raises(ValueError, match=f"^gated_scan: gate '{gate}' has no signed form, got signed=True"):
        minrnn.ops.gated_scan(gate, *pre, signed=True)


def test_no_gate_is_meant_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"got 'other_signed'$"):
        minrnn.ops.gated_scan("other_signed", X, X)
