"""The GPU engine on a GPU: the laws of test_scan.py, however work is cut. Skipped where there is none."""

from __future__ import annotations

import laws
import pytest
import torch
from laws import CELLS, GATES, TOLERANCE, compare, gated_scan, inputs, relative_error
from torch import Tensor

from minrnn.ops import engines
from minrnn.ops.registry import ENGINES, serving

pytest.importorskip("triton", reason="Triton is not installed: the extra gpu")
if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)
import minrnn.ops.triton.engine as engine

directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def on_gpu(gate: str, *shape: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return inputs on the GPU."""
    pre, h0, reset, dh = inputs(gate, *shape, dtype)
    return [x.cuda() for x in pre], h0.cuda(), reset.cuda(), dh.cuda()


def test_the_engine_serves_the_gpu() -> None:
    described = {engine.name: engine for engine in engines()}["triton"]
    assert described.serves
    assert serving("triton", {name: module for name, (module, *_) in ENGINES.items()}) is engine


@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@directions
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, 31, 1000])
def test_every_cell(gate: str, candidate: str, reverse: bool, dtype: torch.dtype, T: int) -> None:
    """The engine equals the reference."""
    compare(engine, *on_gpu(gate, 3, T, 37, dtype=dtype), *laws.mode(gate, candidate, reverse))


SHAPES = [(1, 20000, 64), (2, 3000, 70), (64, 100, 256), (700, 40, 130), (40, 600, 320)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_partitions(gate: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """However the work is cut, the engine equals the reference."""
    pre, h0, reset, dh = on_gpu(gate, *shape, dtype=dtype)
    compare(engine, pre, h0, reset, dh, *laws.mode(gate))
    reset[:, 7:] = False
    compare(engine, pre, None, reset, dh, *laws.mode(gate, reverse=True))


@pytest.mark.parametrize("shape", [(1, 2**20, 32), (1, 2**17, 256), (8, 2**14, 512)], ids=str)
def test_equal_calls_give_equal_bits(shape: tuple[int, int, int]) -> None:
    """Many programs wait for each other, in an order that changes from call to call; nothing hangs."""
    B, T, D = shape
    pre, dh = torch.randn(B, T, 2 * D, device="cuda"), torch.randn(B, T, D, device="cuda")
    h = engine.forward([pre], None, None, "mingru", "positive", False, False)
    gradients = engine.backward(dh, [pre], h, None, None, "mingru", "positive", False, False)
    for _ in range(20):
        assert torch.equal(engine.forward([pre], None, None, "mingru", "positive", False, False), h)
        again = engine.backward(dh, [pre], h, None, None, "mingru", "positive", False, False)
        assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True))


def test_programs_wait_beside_other_work() -> None:
    """Calls on several streams share the device, each with counters of its own."""
    pre = [torch.randn(1, 2**16, 2 * 64, device="cuda") for _ in range(4)]
    alone = [engine.forward([x], None, None, "mingru", "positive", False, False) for x in pre]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in pre]
    together = []
    for _ in range(10):
        for x, stream in zip(pre, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(engine.forward([x], None, None, "mingru", "positive", False, False))
    torch.cuda.synchronize()
    assert all(torch.equal(h, alone[i % 4]) for i, h in enumerate(together))


@pytest.mark.parametrize("gate", ["mingru", "minlstm"])
@pytest.mark.parametrize("bias", [-12.0, -4.0, 0.0])
def test_errors_do_not_grow_with_the_length(gate: str, bias: float) -> None:
    """Up to 2^20 steps, forward and backward, h is as good as one carried in float64 on the CPU."""
    T, D = 2**20, 4
    generator = torch.Generator().manual_seed(0)
    pre = [torch.randn(1, T, D, generator=generator) for _ in GATES[gate].pre]
    pre[-2] = pre[-2] + bias  # z, or i
    dh = torch.randn(1, T, D, generator=generator)
    exact = [x.double().requires_grad_() for x in pre]
    h = gated_scan(gate, *exact)
    expected = torch.autograd.grad(h, exact, dh.double())
    ours = [x.cuda().requires_grad_() for x in pre]
    h_ours = gated_scan(gate, *ours)
    actual = torch.autograd.grad(h_ours, ours, dh.cuda())
    for length in (2**8, 2**14, 2**20):
        assert (
            relative_error(h_ours.detach()[:, :length].cpu(), h.detach()[:, :length])
            < TOLERANCE[torch.float32]
        )
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x.cpu(), y) < 2.5 * TOLERANCE[torch.float32]


def test_offsets_beyond_32_bits() -> None:
    """A tensor of more than 2^31 elements."""
    pre = torch.zeros(1, 2**17, 2 * 2**14, dtype=torch.bfloat16, device="cuda")
    h = engine.forward([pre], None, None, "mingru", "linear", False)
    assert h[0, -1].count_nonzero() == 0
    pre[..., 2**14 :] = 1
    h = engine.forward([pre], None, None, "mingru", "linear", False)
    assert torch.equal(h[0, -1], torch.ones_like(h[0, -1]))


def test_a_captured_graph_counts_anew() -> None:
    """A CUDA graph resets the counters at each replay."""
    pre = torch.randn(1, 2**14, 2 * 64, device="cuda")
    expected = engine.forward([pre], None, None, "mingru", "positive", False, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = engine.forward([pre], None, None, "mingru", "positive", False, False)
    for _ in range(3):
        h.zero_()
        graph.replay()
        assert torch.equal(h, expected)
