"""The GPU engine, interpreted on the CPU against the reference; how it cuts work; whom it serves."""

from __future__ import annotations

import importlib
import inspect
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import laws
import pytest
import torch
from interpreting import checked_addresses, interpreted_copy
from laws import CELLS, GATES, TOLERANCE, compare, inputs, relative_error

import minrnn.ops
from minrnn.ops import engines, reference
from minrnn.ops.registry import ENGINES, serving

pytest.importorskip("triton", reason="Triton is not installed: the extra gpu")
import minrnn.ops.triton.engine as compiled  # needs Triton
from minrnn.ops.triton.gates import CANDIDATE_FUNCTIONS, GATE_FUNCTIONS
from minrnn.ops.triton.launch import flags

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
# NumPy warns where infinity marks a forgotten state; what it computes from that is not used.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """Yield a second copy of the engine, whose programs run on the CPU, one after another, and are small."""
    with interpreted_copy(compiled.__name__) as module, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LANES", 4)
        patch.setattr(module, "_KEPT", 16)
        yield module


@pytest.fixture(params=["chain", "groups"])
def in_chunks(
    request: pytest.FixtureRequest, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """Return the engine with chunks of a few steps: each waits for the one before it, or groups of two do."""
    monkeypatch.setattr(interpreted, "_LANES", 2)
    monkeypatch.setattr(interpreted, "_KEPT", 4)
    monkeypatch.setattr(interpreted, "_WARPS", 2)
    monkeypatch.setattr(interpreted, "_WARPS_OF_FEW", 2)
    monkeypatch.setattr(interpreted, "_GROUP", 2)
    monkeypatch.setattr(interpreted, "_processors", lambda _: 1 if request.param == "chain" else 8)
    return interpreted


@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
def test_every_cell(interpreted: ModuleType, gate: str, candidate: str, reverse: bool) -> None:
    """The engine equals the reference, in spans that time does not fill."""
    pre, h0, reset, dh = inputs(gate, 1, 6, 3, torch.float32)
    compare(interpreted, pre, h0, reset, dh, *laws.mode(gate, candidate, reverse))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_dtype(interpreted: ModuleType, gate: str, dtype: torch.dtype) -> None:
    """The engine equals the reference without an initial state and resets, in several spans."""
    pre, _, _, dh = inputs(gate, 1, 11, 3, dtype)
    compare(interpreted, pre, None, None, dh, *laws.mode(gate))


@pytest.mark.parametrize("candidate", minrnn.ops.CANDIDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_candidates_are_exact(
    interpreted: ModuleType, candidate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near zero too, where an error looks small beside the largest number."""
    monkeypatch.setattr(interpreted, "_LANES", 128)
    laws.compare_candidate(interpreted, candidate, dtype)


@pytest.mark.parametrize("gate", [gate for gate in GATES if gate != "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_decays_are_exact(
    interpreted: ModuleType, gate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near zero and near one, and so are their derivatives."""
    monkeypatch.setattr(interpreted, "_LANES", 128)
    laws.compare_decays(interpreted, gate, dtype)


@pytest.mark.parametrize(("T", "D"), [(8, 2), (5, 3)], ids=["full", "ragged"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_no_address_is_outside_the_tensors(in_chunks: ModuleType, T: int, D: int, reverse: bool) -> None:
    """Of any that is read or written, the counters of programs included."""
    mode = laws.mode("mingru", reverse=reverse)
    pre, h0, reset, dh = inputs("mingru", 2 if T == 5 else 1, T, D, torch.float32)
    with checked_addresses():
        h = in_chunks.forward(pre, h0, reset, *mode)
        in_chunks.backward(dh, pre, h, h0, reset, *mode)


@pytest.mark.parametrize("gate", GATES)
@directions
def test_chunks(in_chunks: ModuleType, gate: str, reverse: bool) -> None:
    """Resets and the initial state cross chunks and groups of chunks rightly; ragged ends do no harm."""
    B, T, D = 1, 9, 2 if reverse else 3
    assert in_chunks._cut((B, T, D), GATES[gate].num_pre, 4, 1).chunks > 2
    pre, h0, reset, dh = inputs(gate, B, T, D, torch.float32)
    if reverse:
        compare(in_chunks, pre, h0, None, dh, *laws.mode(gate, reverse=reverse))
    else:
        reset[:] = False
        reset[0, 5] = True
        compare(in_chunks, pre, h0, reset, dh, *laws.mode(gate, reverse=reverse))


@pytest.mark.parametrize("T", [1, 8])
def test_whole_chunks(in_chunks: ModuleType, T: int) -> None:
    """A step, and chunks and tiles that are full, which are read and written without comparisons."""
    pre, h0, reset, dh = inputs("mingru", 1, T, 2, torch.float32)
    compare(in_chunks, pre, h0, reset, dh, "mingru", "positive", False, False)


def test_layouts(interpreted: ModuleType) -> None:
    """Packed, time-major, sliced, expanded and channel-strided inputs."""
    pre, h0, reset, dh = inputs("mingru", 2, 5, 4, torch.float32)
    reset[:, 0] = False  # h0 is read in every row
    turned = reset.t().contiguous().t()
    assert flags(turned)[0].data_ptr() == turned.data_ptr(), "resets are read where they lie"
    packed = torch.cat(pre, -1)
    time_major = packed.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.randn(4, 8, 10)[::2, 1:6, 1:-1].copy_(packed)
    strided = [torch.empty(2, 4, 5).transpose(1, 2).copy_(x) for x in pre]
    late = dh.transpose(0, 1).contiguous().transpose(0, 1)
    rows = torch.randn(2, 7)[:, 1:5].copy_(h0)
    for variant in ([packed], [time_major], [sliced], strided, [x[:1].expand(2, -1, -1) for x in pre]):
        given = dh.mT.contiguous().mT if variant is strided else late
        compare(interpreted, variant, rows, turned, given, "mingru", "positive", False, False)
    assert interpreted.forward([time_major], None, None, "mingru", "positive", False, False).stride(0) == 4


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes(
    interpreted: ModuleType, gate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates saturate without overflow."""
    monkeypatch.setattr(interpreted, "_LANES", 512)
    values = torch.tensor([-torch.inf, -1e4, -90.0, -20.0, -1e-3, 0.0, 3.0, 30.0, 1e4], dtype=dtype)
    values = values[1:] if gate == "identity" else values
    grid = torch.cartesian_prod(*[values[:-1]] * (GATES[gate].num_pre - 1), values[1:])
    pre = [grid[:, j].reshape(1, 1, -1).contiguous() for j in range(grid.shape[1])]
    h0 = torch.linspace(-2, 2, grid.shape[0])[None]
    mode = (None, *laws.mode(gate))
    exact = reference.forward([x.double() for x in pre], h0.double(), *mode)
    known = exact.isfinite()  # the reference's log f - log i has no value where both are -inf
    h = interpreted.forward(pre, h0, *mode)
    rounding = 3e-6 if dtype == torch.float32 else 1e-2
    # Near zero, a signed a is as exact as a number near one, and so is minema's h where a h0 and b cancel.
    smallest = 5e-7 if gate.endswith("_signed") or gate == "minema" else 1e-30
    torch.testing.assert_close(h.double()[known], exact[known], rtol=rounding, atol=smallest)


def test_small_shares_are_exact(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """sigmoid(x) is exact for its size for all x down to -87, and NaN stays NaN."""
    monkeypatch.setattr(interpreted, "_LANES", 512)
    gate = torch.linspace(-87.0, 0.0, 300)
    gate[7] = torch.nan
    h = interpreted.forward(
        [gate[None, None], torch.ones(1, 1, 300)], None, None, "mingru", "linear", False, False
    )
    exact = gate.double().sigmoid()[None, None]
    torch.testing.assert_close(h.double(), exact, rtol=2e-6, atol=0, equal_nan=True)


def test_what_is_left_of_a_state_is_exact(in_chunks: ModuleType) -> None:
    """Where nothing is added, h is a product of decays, and as exact for its size, however small."""
    T, D = 24, 2
    generator = torch.Generator().manual_seed(0)
    pre = [torch.randn(1, T, D, generator=generator) + 1, torch.zeros(1, T, D)]
    h0, mode = torch.ones(1, D), (None, *laws.mode("mingru", "linear"))
    exact = reference.forward([x.double() for x in pre], h0.double(), *mode)
    assert exact[0, -1].max() < 1e-12
    torch.testing.assert_close(in_chunks.forward(pre, h0, *mode).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_forgotten(in_chunks: ModuleType, bad: float) -> None:
    """It reaches every later step, chunks included, until a reset forgets it, and nothing else."""
    pre, h0, reset, _ = inputs("mingru", 1, 15, 4, torch.float32)
    reset[:] = False
    reset[0, 9] = True
    pre[1][0, 2, 1] = bad
    h0[0, 2] = bad
    expected = torch.ones(1, 15, 4, dtype=torch.bool)
    expected[0, 2:9, 1] = False
    expected[0, :9, 2] = False
    h = in_chunks.forward(pre, h0, reset, "mingru", "positive", False, False)
    assert torch.equal(h.isfinite(), expected)


@pytest.mark.parametrize(
    ("gate", "bias", "roundings"),
    [
        ("mingru", -12.0, 0.8),
        ("mingru", -3.0, 2.0),
        ("mingru_signed", -12.0, 0.8),
        ("mingru_signed", 3.0, 2.0),
        ("mingru_signed", 12.0, 2.0),
    ],
)
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
def test_errors_do_not_add_up(
    in_chunks: ModuleType, gate: str, bias: float, roundings: float, constant: bool
) -> None:
    """The state is as good as one carried in float64, however slow forgetting is, and at a fixed point."""
    T, D = 70, 2
    generator = torch.Generator().manual_seed(0)
    pre = [torch.randn(1, 1 if constant else T, D, generator=generator).expand(1, T, D) for _ in range(2)]
    pre[0] = pre[0] + bias
    h0 = torch.randn(1, D, generator=generator)
    mode = (None, *laws.mode(gate))
    exact = reference.forward([x.double() for x in pre], h0.double(), *mode)
    h = in_chunks.forward(pre, h0, *mode)
    assert relative_error(h, exact) < roundings * 2.0**-24


@pytest.mark.parametrize("gate", ["mingru", "mingru_signed"])
def test_errors_of_gradients_do_not_add_up(in_chunks: ModuleType, gate: str) -> None:
    """The adjoint, too, is as good as one carried in float64."""
    T, D = 40, 2
    generator = torch.Generator().manual_seed(0)
    pre = [torch.randn(1, T, D, generator=generator) for _ in range(2)]
    pre[0] = pre[0] - 12
    h, dh = torch.zeros(1, T, D), torch.rand(1, T, D, generator=generator)
    mode = (None, *laws.mode(gate))
    exact = reference.backward(dh.double(), [x.double() for x in pre], h.double(), None, *mode)
    actual = in_chunks.backward(dh, pre, h, None, *mode)
    assert relative_error(actual[-1], exact[-1]) < 2 * 2.0**-24, "the adjoint itself, of h0"
    for x, y in zip(actual, exact, strict=True):
        assert relative_error(x, y) < 16 * 2.0**-24  # with the roundings of the gate's slope


@pytest.mark.parametrize(("sign", "T"), [(1.0, 200), (-1.0, 8)])
def test_a_state_in_one_float_would_drift(interpreted: ModuleType, sign: float, T: int) -> None:
    """Where forgetting is slow, pairs of floats carry what one float rounds away."""
    D = 4
    generator = torch.Generator().manual_seed(0)
    a = sign * (1 - 1e-5 * torch.rand(1, T, D, generator=generator))
    b = 1e-3 * torch.rand(1, T, D, generator=generator) * sign ** torch.arange(1, T + 1)[:, None]
    h0 = torch.ones(1, D)
    exact = reference.forward(
        [a.double(), b.double()], h0.double(), None, "identity", "positive", False, False
    )
    plain = h0
    for t in range(T):
        plain = a[:, t] * plain + b[:, t]
    h = interpreted.forward([a, b], h0, None, "identity", "positive", False, False)
    one_rounding = 2.0**-24
    assert relative_error(h[:, -1], exact[:, -1]) < 1.1 * one_rounding
    assert relative_error(plain, exact[:, -1]) > 2 * one_rounding


class AtOnce:
    """A kernel whose programs run in threads, so many at a time."""

    number: ContextVar[int] = ContextVar("number")
    """The number of the program that runs in this thread."""

    def __init__(self, kernel: Any, at_a_time: int) -> None:
        self.kernel, self.at_a_time = kernel, at_a_time
        self.program = kernel.rewrite()
        # What the interpreter asks a kernel for.
        self.__name__, self.__globals__ = self.program.__name__, self.program.__globals__
        self.__signature__ = inspect.signature(self.program)

    def __getitem__(self, grid: tuple[int]) -> Any:
        self.count = grid[0]
        interpreter = importlib.import_module("triton.runtime.interpreter")
        executor = interpreter.GridExecutor(self.program, self.kernel.arg_names, (1,), [])
        executor.fn = self
        return executor

    def __call__(self, **arguments: Any) -> None:
        free = threading.Semaphore(self.at_a_time)

        def run(number: int) -> None:
            with free:
                self.number.set(number)
                self.program(**arguments)

        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "programs wait for each other for ever"


@pytest.mark.parametrize("at_a_time", [2, 16])
def test_programs_that_run_at_once_wait_for_each_other(
    in_chunks: ModuleType, at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order, and however few at a time, they run, all end, and with the same bits."""
    pre, h0, reset, dh = inputs("mingru", 1, 14, 3, torch.float32)
    reset[:, 5:] = False
    mode = (h0, reset, *laws.mode("mingru"))
    h = in_chunks.forward(pre, *mode)
    gradients = in_chunks.backward(dh, pre, h, *mode)
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    store = builder.create_masked_store

    def late(*arguments: Any) -> Any:
        """The two programs of every other chunk are slow: those after them have to wait, or find NaN."""
        time.sleep(0.01 * (AtOnce.number.get() % 4 < 2))
        return store(*arguments)

    monkeypatch.setattr(builder, "create_masked_store", late)
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(in_chunks, name, AtOnce(getattr(in_chunks, name), at_a_time))
    with laws.poisoned():
        assert torch.equal(in_chunks.forward(pre, *mode), h)
        again = in_chunks.backward(dh, pre, h, *mode)
    assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True))


def test_only_the_last_program_writes_the_gradient_of_h0(
    in_chunks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another's would be overwritten or not, as it happens."""
    pre, h0, _, dh = inputs("mingru", 1, 14, 2, torch.float32)
    h, whole = torch.zeros_like(dh), in_chunks.backward_kernel

    class AllButTheLast:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return whole[(grid[0] - 1,)]

    mode = (h0, None, *laws.mode("mingru"))
    with laws.poisoned():
        assert not in_chunks.backward(dh, pre, h, *mode)[-1].isnan().any()
        monkeypatch.setattr(in_chunks, "backward_kernel", AllButTheLast())
        assert in_chunks.backward(dh, pre, h, *mode)[-1].isnan().all()


# ----------------------------------------------------------------------------------------------------------
# Gates


def test_every_gate_and_candidate_has_a_function() -> None:
    assert GATE_FUNCTIONS.keys() == minrnn.ops.GATES.keys()
    assert CANDIDATE_FUNCTIONS.keys() == minrnn.ops.CANDIDATES.keys()


@pytest.mark.parametrize(
    ("gate", "candidate", "signed", "error"),
    [
        ("unknown", "positive", False, KeyError),
        ("mingru", "unknown", False, KeyError),
        *(
            (gate, "positive", True, ValueError)
            for gate, record in minrnn.ops.GATES.items()
            if not record.can_be_signed
        ),
    ],
)
def test_what_has_no_function_is_refused_before_a_kernel_is_compiled(
    gate: str, candidate: str, signed: bool, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "forward_kernel", {(1,): pytest.fail})
    pre = [torch.zeros(1, 2, 2) for _ in range(minrnn.ops.GATES[gate].num_pre if gate != "unknown" else 2)]
    with pytest.raises(error, match=f"'{gate if candidate != 'unknown' else candidate}'"):
        compiled.forward(pre, None, None, gate, candidate, signed, False)


# ----------------------------------------------------------------------------------------------------------
# How work is cut


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("rows", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(8, 4096, 2048), (64, 512, 256), (1, 2**20, 256), (1, 1, 1), (3, 65, 7)])
def test_chunks_cover_time_exactly(shape: tuple[int, int, int], rows: int, itemsize: int) -> None:
    B, T, D = shape
    cut = compiled._cut(shape, rows, itemsize, 132)
    steps = cut.WARPS * cut.STEPS
    assert (cut.chunks - 1) * steps < T <= cut.chunks * steps
    assert (cut.tiles - 1) * cut.BLOCK_D < D <= cut.tiles * cut.BLOCK_D
    for power in (cut.WARPS, cut.STEPS, cut.GROUP):
        assert power.bit_count() == 1
    assert cut.GROUP < 31  # a word has a bit for each member, and one for the carry
    assert cut.GROUP == 1 or B * cut.tiles < 2 * 132


# ----------------------------------------------------------------------------------------------------------
# Who serves

MODULES = {name: module for name, (module, *_) in ENGINES.items()}


def test_without_a_gpu_the_engine_says_so_and_the_portable_one_would_serve() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    described = {engine.name: engine for engine in engines()}["triton"]
    assert not described.serves
    assert described.detail == "not available: torch finds no CUDA device"
    assert serving("triton", MODULES).__name__.endswith(".portable")
