"""The selective scan's GPU engine: interpreted, compiled ahead of time, and run where there is a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from interpreting import checked_addresses, interpreted_copy
from laws import TOLERANCE, relative_error, same
from selective_laws import NAMES, cast, compare, draw, gradients_like
from torch import Tensor

from minrnn.ops.registry import serving
from minrnn.ops.selective import reference
from minrnn.ops.selective.operator import MODULES
from minrnn.ops.selective.reference import CHUNK, Inputs

triton = pytest.importorskip("triton", reason="Triton is not installed: the extra gpu")
import minrnn.ops.selective.triton.engine as compiled  # noqa: E402  # needs Triton

# NumPy warns of what becomes of infinities, and of the terms whose place others take then.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Yield a second copy of the engine, whose kernels run on the CPU, with short chunks and narrow tiles."""
    constants = {"CHUNK": 4, "_LANES": 8, "_FORWARD_STEPS": 4, "_BACKWARD_STEPS": 2}
    with interpreted_copy(compiled.__name__) as module:
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(reference, "CHUNK", 4)
        yield module


# ----------------------------------------------------------------------------------------------------------
# Interpreted: small, because it takes milliseconds a step


@pytest.mark.parametrize(
    ("processors", "T"), [(1, 11), (100, 8)], ids=["tiles share programs", "a program for each tile"]
)
def test_interpreted(
    interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch, processors: int, T: int
) -> None:
    """The engine equals the reference, with a short or a whole last chunk and tiles that are not full."""
    monkeypatch.setattr(interpreted, "_processors", lambda _: processors)
    x = draw(2, T, 5, 3, torch.float32)
    x.reset[0, -1] = True
    with checked_addresses():
        compare(interpreted, x)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_interpreted_dtypes(interpreted: ModuleType, dtype: torch.dtype) -> None:
    """Every dtype, without what may be left out."""
    compare(
        interpreted, draw(1, 6, 3, 2, dtype)._replace(D=None, z=None, delta_bias=None, h0=None, reset=None)
    )


def test_interpreted_layouts(interpreted: ModuleType) -> None:
    """Time-major, and channels that are not contiguous."""
    x = draw(2, 5, 3, 2, torch.float32)
    late = x._replace(u=x.u.transpose(0, 1).contiguous().transpose(0, 1), B=x.B.mT.contiguous().mT)
    compare(interpreted, late._replace(reset=x.reset.t().contiguous().t()))
    dy, dlast = gradients_like(x)
    borders = interpreted.forward(x, True)[2]
    apart = interpreted.backward(dy.mT.contiguous().mT, dlast.mT.contiguous().mT, borders, x)
    for ours, theirs in zip(apart, interpreted.backward(dy, dlast, borders, x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("channels", "N"), [(9, 3), (2, 9)], ids=["unequal groups", "a channel is a tile"])
def test_interpreted_tiles(interpreted: ModuleType, channels: int, N: int) -> None:
    """Programs with fewer tiles than others, and more states than a program has lanes."""
    with checked_addresses():
        compare(interpreted, draw(1, 3, channels, N, torch.float32))


def test_interpreted_sums_are_rounded_once(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those over tiles of channels, whatever the dtype."""
    monkeypatch.setattr(interpreted, "_PROGRAMS", 1)
    x = draw(1, 2, 32, 2, torch.bfloat16)
    dy, dlast = gradients_like(x)
    exact = cast(x, torch.float64)
    borders = reference.forward(exact, True)[2]
    expected = reference.backward(dy.double(), dlast.double(), borders, exact)
    actual = interpreted.backward(dy, dlast, interpreted.forward(x, True)[2], x)
    for index in (NAMES.index("B"), NAMES.index("C")):
        assert relative_error(actual[index], expected[index]) <= 2.0**-8


def test_errors_do_not_add_up(interpreted: ModuleType) -> None:
    """States and adjoints are as good as those carried in float64, however slow forgetting is."""
    T = 200
    x = draw(1, T, 2, 1, torch.float32)._replace(D=None, z=None, delta_bias=None, reset=None)
    x = x._replace(A=x.A * 1e-4, B=x.B.abs(), C=x.C.abs(), u=x.u.abs())
    dy, dlast = torch.rand_like(x.u), torch.rand_like(x.h0)
    exact = cast(x, torch.float64)
    _, last, borders = reference.forward(exact, True)
    expected = reference.backward(dy.double(), dlast.double(), borders, exact)[-1]
    _, found, saved = interpreted.forward(x, True)
    assert relative_error(found, last) < 2.0**-24
    assert relative_error(interpreted.backward(dy, dlast, saved, x)[-1], expected) < 2.0**-24


def test_interpreted_nan(interpreted: ModuleType) -> None:
    """A NaN reaches every later step until a reset forgets it, and nothing else."""
    x = draw(1, 9, 3, 2, torch.float32)
    x.reset[:] = False
    x.reset[0, 6] = True
    x.u[0, 2, 1] = torch.nan
    x.h0[0, 2] = torch.nan
    x = x._replace(D=None, z=None)
    expected = torch.zeros(1, 9, 3, dtype=torch.bool)
    expected[0, 2:6, 1] = True
    expected[0, :6, 2] = True
    assert torch.equal(interpreted.forward(x, False)[0].isnan(), expected)


def test_interpreted_infinities(interpreted: ModuleType) -> None:
    """They stand where the reference has them, and so does NaN."""
    x = draw(1, 7, 3, 2, torch.float32)._replace(D=None, z=None)
    x.reset[:] = False
    x.reset[0, 5] = True
    x.h0[0, 0], x.u[0, 2, 1] = torch.inf, -torch.inf
    for ours, theirs in zip(interpreted.forward(x, True), reference.forward(x, True), strict=True):
        same(ours, theirs, TOLERANCE[torch.float32])
    x = draw(1, 7, 3, 2, torch.float32)._replace(D=None, z=None, reset=None)
    dy, dlast = gradients_like(x)
    dy[0, 3, 0], dlast[0, 1] = torch.inf, -torch.inf
    borders = reference.forward(x, True)[2]
    expected = reference.backward(dy, dlast, borders, x)
    actual = interpreted.backward(dy, dlast, borders, x)
    same(actual[-1], expected[-1], 5 * TOLERANCE[torch.float32])
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name


def test_interpreted_extremes(interpreted: ModuleType) -> None:
    """Step sizes and rates of every size."""
    pre = torch.tensor([-1e4, -90.0, -20.0, -1e-3, 0.0, 3.0, 30.0, 1e4])
    rates = -torch.tensor([0.0, 1e-30, 1.0, 80.0, 1e4, 1e9])
    x = draw(1, 2, len(pre), len(rates), torch.float32)
    x = x._replace(
        delta_pre=pre.expand(1, 2, -1), A=rates.expand(len(pre), -1), z=None, delta_bias=None, reset=None
    )
    _, last, _ = reference.forward(cast(x, torch.float64), False)
    found = interpreted.forward(x, False)[1]
    torch.testing.assert_close(found.double(), last, rtol=3e-6, atol=1e-30)


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
    """A kernel that is compiled where it would be launched, and what it was given."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.binary = b""
        self.largest = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **settings: Any) -> None:
            built = self.kernel.warmup(*arguments, grid=grid, **settings)
            self.binary = (built.result() if hasattr(built, "result") else built).asm["cubin"]
            self.largest = max(x.numel() for x in arguments if isinstance(x, Tensor))

        return compile_only


@pytest.mark.parametrize(("dtype", "capability"), [(torch.float32, 90), (torch.bfloat16, 80)], ids=str)
def test_compiled(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both kernels compile, and are given nothing of the size of all steps' states."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Absent(capability))
    monkeypatch.setattr(compiled, "_processors", lambda _: 132)
    kernels = [Compiling(compiled.forward_kernel), Compiling(compiled.backward_kernel)]
    monkeypatch.setattr(compiled, "forward_kernel", kernels[0])
    monkeypatch.setattr(compiled, "backward_kernel", kernels[1])
    batch, T, channels, N = 8, 4 * CHUNK, 64, 16
    x = draw(batch, T, channels, N, dtype)
    _, _, borders = compiled.forward(x, True)
    compiled.backward(*gradients_like(x), borders, x)
    for kernel in kernels:
        assert kernel.binary
        assert kernel.largest <= batch * T * channels * N // 8


@pytest.mark.parametrize(("N", "warps"), [(1, 4), (16, 4), (200, 8), (1024, 8)])
def test_a_program_has_eight_warps_at_most(N: int, warps: int) -> None:
    """One for 32 numbers of its channels' states; where a state has more than 256, a lane has several."""
    settings, tiles = compiled._settings(draw(1, 1, 3, N, torch.float32), 1)
    assert settings["num_warps"] == warps
    assert tiles == -(-3 // settings["BLOCK_D"])


# ----------------------------------------------------------------------------------------------------------
# On a GPU


def test_without_a_gpu_the_portable_engine_would_serve() -> None:
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    assert serving("triton", MODULES).__name__.endswith(".portable")


@on_gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 101, 37, 5), (2, 64, 100, 16), (70, 33, 40, 16)], ids=str
)
def test_engine(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    """The engine equals the reference, and equal calls give equal bits."""
    x = Inputs(*(t.cuda() for t in draw(*shape, dtype)))
    compare(compiled, x)
    gradients = tuple(d.cuda() for d in gradients_like(x))
    borders = compiled.forward(x, True)[2]
    first, second = (compiled.backward(*gradients, borders, x) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
