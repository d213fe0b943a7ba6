"""`minrnn bench selective`: Mamba's selective scan, compared with mambapy's parallel scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import differentiate, errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import SELECTIVE, SELECTIVE_PEERS, Scan, ScanPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import by_system
from minrnn.benchmarks.workloads import training_step
from minrnn.ops import selective_scan
from minrnn.ops.selective import reference
from minrnn.ops.selective.reference import Inputs

__all__ = ["BENCH", "SelectiveBench"]

KIND = Kind(SELECTIVE, "BTDN", across="T", limit=None, phases=("forward", "backward", "step"), unit="ms")


@dataclass(frozen=True)
class SelectiveBench(TimedBench):
    """Time forward and backward of Mamba's selective scan, and of mambapy's parallel scan.

    Both compute delta = softplus(delta_pre), the recurrence, and y = C h + D u from the same inputs, and are
    first compared with a float64 loop.
    """

    shapes: tuple[str, ...] = ("4x1024x256x16",)
    """BxTxDxN: batch, length, channels, states per channel; 64..256 stands for 64, 128 and 256."""


def bench_selective(options: SelectiveBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, (SELECTIVE,), SELECTIVE_PEERS, _systems, command, console)


def render(document: Document) -> str:
    """Return a table of each system's times and memory in each case."""
    return by_system(document["results"], KIND.phases).markdown()


BENCH = Bench(SelectiveBench, bench_selective, render)


def _systems(case: Case, peers: Mapping[str, ScanPeer]) -> dict[str, System]:
    inputs, dy = _draw_inputs(case)
    exact = _reference(inputs, dy)

    def system(scan: Scan, reason: str) -> System:
        def call() -> Tensor:
            return scan(SELECTIVE, inputs)

        return System(
            training_step(call, inputs, dy), lambda: errors(differentiate(call, inputs, dy), exact), reason
        )

    return {
        OURS: system(lambda gate, inputs: selective_scan(*inputs)[0], ""),
        **{name: system(peer.scan(), peer.reason(case.torch_dtype)) for name, peer in peers.items()},
    }


def _draw_inputs(case: Case) -> tuple[list[Tensor], Tensor]:
    """Draw inputs like those of an untrained block (A = -1 .. -N, steps near 0.02), and the gradient of y."""
    B, T, D, N = case.shape.values()
    generator = torch.Generator(case.device).manual_seed(case.seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=case.device)

    u, delta_pre = normal(B, T, D), normal(B, T, D) - 4
    A = -torch.arange(1.0, N + 1, device=case.device).repeat(D, 1)
    inputs = [u, delta_pre, A, normal(B, T, N), normal(B, T, N), normal(D)]
    dy = normal(B, T, D).to(case.torch_dtype)
    return [x.to(case.torch_dtype).requires_grad_() for x in inputs], dy


def _reference(inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Return y and the gradients of the inputs, in float64."""
    given = [tensor.detach().double() for tensor in inputs]
    x = Inputs(*given, z=None, delta_bias=None, h0=None, reset=None)  # type: ignore[misc]
    y, last, borders = reference.forward(x, True)
    gradients = reference.backward(dy.double(), torch.zeros_like(last), borders, x)[: len(given)]
    return {"h": y} | {f"d{index}": gradient for index, gradient in enumerate(gradients)}
