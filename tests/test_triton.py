"""The GPU engine: interpreted against the reference, compiled ahead of time, and run where there is a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from minrnn.ops import CANDIDATES, GATES, engines, reference
from minrnn.ops.engines import serving
from minrnn.ops.operator import MODULES

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'minrnn[gpu]'")
import minrnn.ops.triton as compiled  # noqa: E402  # needs Triton

CELLS = [
    (gate, candidate)
    for gate, candidate in itertools.product(GATES, CANDIDATES)
    if GATES[gate].has_candidate or candidate == "positive"
]
# As in test_scan.py: largest error relative to the largest value.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """Yield a second copy of the engine, whose kernels run on the CPU, one program after another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec = importlib.util.spec_from_file_location("interpreted_triton", compiled.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def cut_in_time(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the interpreted engine on what it takes for a large device: five steps are a chunk."""
    monkeypatch.setattr(interpreted, "_MIN_CHUNK", 5)
    monkeypatch.setattr(interpreted, "_processors", lambda _: 8)
    return interpreted


def inputs(
    gate: str, B: int, T: int, D: int, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Pre-activations, an initial state, sparse resets, and a gradient of h."""
    generator = torch.Generator().manual_seed(seed)
    pre = [torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in GATES[gate].pre]
    if gate == "identity":
        pre[0] = pre[0].tanh()
    h0 = torch.randn(B, D, generator=generator, dtype=torch.float64)
    reset = torch.rand(B, T, generator=generator) < 0.15
    dh = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    return [x.to(dtype) for x in pre], h0.to(dtype), reset, dh.to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), "the engine left or produced a value that is not finite"
    return float((actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def compare(
    engine: ModuleType,
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    dh: Tensor,
    *mode: Any,
) -> None:
    """Hold h and every gradient to the reference's in float64, with poisoned output buffers."""
    dtype = dh.dtype
    exact = [x.double() for x in pre]
    start = None if h0 is None else h0.double()
    expected = reference.forward(exact, start, reset, *mode)
    h = expected.to(dtype)
    gradients = reference.backward(dh.double(), exact, h.double(), start, reset, *mode)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        assert relative_error(engine.forward(pre, h0, reset, *mode), expected) < TOLERANCE[dtype]
        actual = engine.backward(dh, pre, h, h0, reset, *mode)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [x.dtype for x in actual] == [*(x.dtype for x in pre), reference.state_dtype(dtype)]
    for x, y in zip(actual, gradients, strict=True):
        assert relative_error(x, y) < 2.5 * TOLERANCE[dtype]


# ----------------------------------------------------------------------------------------------------------
# Interpreted: small, because it takes milliseconds a step


@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
def test_interpreted(interpreted: ModuleType, gate: str, candidate: str, reverse: bool) -> None:
    """The engine equals the reference; six steps are a whole block and a remainder."""
    pre, h0, reset, dh = inputs(gate, 2, 6, 3, torch.float32)
    compare(interpreted, pre, h0, reset, dh, gate, candidate, reverse)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_interpreted_dtypes(interpreted: ModuleType, gate: str, dtype: torch.dtype) -> None:
    """Every dtype, without an initial state and resets."""
    pre, _, _, dh = inputs(gate, 1, 5, 3, dtype)
    compare(interpreted, pre, None, None, dh, gate, "positive", False)


@pytest.mark.parametrize("gate", GATES)
@directions
def test_interpreted_in_chunks(cut_in_time: ModuleType, gate: str, reverse: bool) -> None:
    """Time cut into chunks with joined prefixes; resets and the initial state cross their borders rightly."""
    T = 12
    assert cut_in_time._cut(1, T, 35, 4, 8).chunks == 2
    pre, h0, reset, dh = inputs(gate, 1, T, 35, torch.float32)
    reset[:] = False
    compare(cut_in_time, pre, h0, None, dh, gate, "positive", reverse)
    reset[0, 3] = True
    compare(cut_in_time, pre, h0, reset, dh, gate, "positive", reverse)


def test_interpreted_layouts(interpreted: ModuleType) -> None:
    """Packed, time-major, sliced, expanded and channel-strided inputs."""
    pre, h0, reset, dh = inputs("mingru", 2, 5, 4, torch.float32)
    packed = torch.cat(pre, -1)
    time_major = packed.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.randn(4, 8, 10)[::2, 1:6, 1:-1].copy_(packed)
    strided = [torch.empty(2, 4, 5).transpose(1, 2).copy_(x) for x in pre]
    late = dh.transpose(0, 1).contiguous().transpose(0, 1)
    for variant in ([packed], [time_major], [sliced], strided, [x[:1].expand(2, -1, -1) for x in pre]):
        compare(interpreted, variant, h0, reset.t().contiguous().t(), late, "mingru", "positive", False)
    assert interpreted.forward([time_major], None, None, "mingru", "positive", False).stride(0) == 4


@pytest.mark.parametrize("gate", GATES)
def test_interpreted_extremes(interpreted: ModuleType, gate: str) -> None:
    """Gates saturate without overflow."""
    values = torch.tensor([-torch.inf, -1e4, -90.0, -20.0, -1e-3, 0.0, 3.0, 30.0, 1e4])
    values = values[1:] if gate == "identity" else values
    grid = torch.cartesian_prod(*[values[:-1]] * (GATES[gate].num_pre - 1), values[1:])
    pre = [grid[:, j].reshape(1, 1, -1).contiguous() for j in range(grid.shape[1])]
    h0 = torch.linspace(-2, 2, grid.shape[0])[None]
    mode = (None, gate, "positive", False)
    exact = reference.forward([x.double() for x in pre], h0.double(), *mode)
    known = exact.isfinite()  # the reference's log f - log i has no value where both are -inf
    h = interpreted.forward(pre, h0, *mode)
    torch.testing.assert_close(h.double()[known], exact[known], rtol=3e-6, atol=1e-30)


def test_interpreted_nan(cut_in_time: ModuleType) -> None:
    """A NaN reaches every later step, chunks included, until a reset forgets it, and nothing else."""
    pre, h0, reset, _ = inputs("mingru", 1, 15, 3, torch.float32)
    reset[:] = False
    reset[0, 9] = True
    pre[0][0, 2, 1] = torch.nan
    h0[0, 2] = torch.nan
    expected = torch.zeros(1, 15, 3, dtype=torch.bool)
    expected[0, 2:9, 1] = True
    expected[0, :9, 2] = True
    h = cut_in_time.forward(pre, h0, reset, "mingru", "positive", False)
    assert torch.equal(h.isnan(), expected)


def test_pairs_of_floats_carry_what_one_rounds_away(interpreted: ModuleType) -> None:
    """Where forgetting is slow, the state is as good as one carried in float64."""
    T, D = 200, 32
    generator = torch.Generator().manual_seed(0)
    a = 1 - 1e-5 * torch.rand(1, T, D, generator=generator)
    b = 1e-3 * torch.rand(1, T, D, generator=generator)
    h0 = torch.ones(1, D)
    exact = reference.forward([a.double(), b.double()], h0.double(), None, "identity", "positive", False)
    plain = h0
    for t in range(T):
        plain = a[:, t] * plain + b[:, t]
    h = interpreted.forward([a, b], h0, None, "identity", "positive", False)
    one_rounding = 2.0**-24
    assert relative_error(h[:, -1], exact[:, -1]) < 1.1 * one_rounding
    assert relative_error(plain, exact[:, -1]) > 4 * one_rounding


# ----------------------------------------------------------------------------------------------------------
# How work is cut


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("shape", [(8, 4096, 2048), (64, 512, 256), (1, 2**20, 256), (1, 1, 1), (3, 65, 7)])
def test_chunks_cover_time_exactly(shape: tuple[int, int, int], itemsize: int) -> None:
    B, T, D = shape
    cut = compiled._cut(B, T, D, itemsize, 132)
    assert (cut.chunks - 1) * cut.length < T <= cut.chunks * cut.length
    assert (cut.tiles - 1) * cut.BLOCK_D < D <= cut.tiles * cut.BLOCK_D
    warps = B * cut.tiles * cut.chunks
    assert cut.chunks == 1 or warps <= 2 * compiled._WARPS_CUT * 132
    assert warps >= compiled._WARPS_UNCUT * 132 or cut.length < 2 * compiled._MIN_CHUNK


# ----------------------------------------------------------------------------------------------------------
# Compiled ahead of time, for cards that need not be there


class Absent(NamedTuple):
    """A driver for a card that is not there: enough for a kernel's arguments to be typed, and it compiled."""

    capability: int

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # under which compiled kernels are kept, so not a number of a device that is

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, built: list[tuple[str, Any]]) -> None:
        self.kernel, self.built = kernel, built

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **settings: Any) -> None:
            kernel = self.kernel.warmup(*arguments, grid=grid, **settings)
            self.built.append(
                (self.kernel.__name__, kernel.result() if hasattr(kernel, "result") else kernel)
            )

        return compile_only


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """Return the kernels, by name, that the engine's calls have compiled instead of launched."""
    kernels: list[tuple[str, Any]] = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in ("forward_kernel", "backward_kernel", "join_kernel"):
        monkeypatch.setattr(compiled, name, Compiling(getattr(compiled, name), kernels))
    return kernels


# What a kernel does not use, it does not read: of the pre-activations, those that backward needs, and of
# these the ones that the decay depends on.
NEEDED = {"identity": 1, "mingru": 2, "minlstm": 3, "minlstm_unnormalised": 3}
NEEDED_BY_DECAY = {"identity": 1, "mingru": 1, "minlstm": 2, "minlstm_unnormalised": 1}
BUILDS = [
    *((gate, torch.float32, False, 90) for gate in GATES),
    ("mingru", torch.float64, False, 90),
    ("minlstm", torch.bfloat16, False, 80),
    ("mingru", torch.bfloat16, True, 80),
]


@pytest.mark.parametrize(("gate", "dtype", "cut", "capability"), BUILDS)
def test_compiled_traffic(
    gate: str,
    dtype: torch.dtype,
    cut: bool,
    capability: int,
    built: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the loop each row is read once, ahead of its use, each output written once; offsets are 64-bit."""
    monkeypatch.setattr(triton.runtime.driver, "_active", Absent(capability))
    monkeypatch.setattr(compiled, "_processors", lambda _: 132 if cut else 1)
    n = GATES[gate].num_pre
    pre, reset, h0 = torch.zeros(2, 128, 64 * n, dtype=dtype), torch.zeros(2, 128).bool(), torch.zeros(2, 64)
    optional = (h0, reset) if cut else (None, None)
    h = compiled.forward([pre], *optional, gate, "positive", False)
    compiled.backward(h, [pre], h, *optional, gate, "positive", False)
    # name, rows read and written in a step, and what is written after the loop
    passes = {
        "forward prefix": ("forward_kernel", n, 0, 2),
        "forward": ("forward_kernel", n, 1, 0),
        "backward prefix": ("backward_kernel", NEEDED_BY_DECAY[gate] + 1, 0, 2),
        "backward": ("backward_kernel", NEEDED[gate] + 2, n, 1),
        "join": ("join_kernel", 2, 1, 0),
    }
    order = ["forward prefix", "join", "forward", "backward prefix", "join", "backward"]
    expected = [passes[name] for name in (order if cut else ["forward", "backward"])]
    assert [name for name, _ in built] == [name for name, *_ in expected]
    steps = compiled._cut(2, 128, 64, dtype.itemsize, 1).STEPS
    for (name, kernel), (_, reads, writes, after) in zip(built, expected, strict=True):
        assert kernel.asm["cubin"]
        joins = name == "join_kernel"
        rows, flags = (1, 0) if joins else (steps, int(cut))
        loop = re.search(r"scf\.for.*?\n    \}", kernel.asm["ttgir"], re.DOTALL)
        assert loop is not None
        assert loop[0].count("async_copy_global_to_local") == rows * (reads + flags)
        assert loop[0].count("tt.load") == 0
        assert loop[0].count("tt.store") == rows * writes
        # Blocks of steps have a loop, and what remains of them another.
        assert kernel.asm["ttgir"].count("tt.store") == (rows + (not joins)) * writes + after
        offsets = re.findall(r"tt\.addptr .*? : .*, (?:tensor<\d+x)?(i\d+)>?", kernel.asm["ttir"])
        assert set(offsets) == {"i64"}


# ----------------------------------------------------------------------------------------------------------
# Who serves


def test_without_a_gpu_the_engine_says_so_and_the_reference_would_serve() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    described = {engine.name: engine for engine in engines()}["triton"]
    assert not described.serves
    assert described.detail == "not available: torch finds no CUDA device"
    assert serving("triton", MODULES) is reference


@on_gpu
def test_the_engine_serves_the_gpu() -> None:
    described = {engine.name: engine for engine in engines()}["triton"]
    assert described.serves
    assert serving("triton", MODULES) is compiled


# ----------------------------------------------------------------------------------------------------------
# On a GPU, the laws of test_scan.py


@on_gpu
@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, 2, 63, 64, 1000, 4099])
def test_engine(gate: str, candidate: str, reverse: bool, dtype: torch.dtype, T: int) -> None:
    """The engine equals the reference."""
    arguments = inputs(gate, 3, T, 37 if T < 1000 else 5, dtype)
    pre, h0, reset, dh = [x.cuda() for x in arguments[0]], *(x.cuda() for x in arguments[1:])
    compare(compiled, pre, h0, reset, dh, gate, candidate, reverse)


@on_gpu
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 20000, 64), (2, 3000, 70), (64, 100, 256), (700, 40, 130)], ids=str)
def test_partitions(gate: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """However the work is cut, the engine equals the reference, and equal calls give equal bits."""
    arguments = inputs(gate, *shape, dtype)
    pre, h0, reset, dh = [x.cuda() for x in arguments[0]], *(x.cuda() for x in arguments[1:])
    compare(compiled, pre, h0, reset, dh, gate, "positive", False)
    first, second = (compiled.forward(pre, h0, reset, gate, "positive", False) for _ in range(2))
    assert torch.equal(first, second)


@on_gpu
def test_offsets_beyond_32_bits() -> None:
    """A tensor of more than 2^31 elements."""
    pre = torch.zeros(1, 2**17, 2 * 2**14, dtype=torch.bfloat16, device="cuda")
    h = compiled.forward([pre], None, None, "mingru", "linear", False)
    assert h[0, -1].count_nonzero() == 0
    pre[..., 2**14 :] = 1
    h = compiled.forward([pre], None, None, "mingru", "linear", False)
    assert torch.equal(h[0, -1], torch.ones_like(h[0, -1]))
