"""`minrnn bench scan`: from pre-activations to states and back, ours beside everybody else's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.check import errors, scan_reference, some_rows
from minrnn.benchmarks.measure import OURS, System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import SCAN_PEERS, Scan, ScanPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.timing import Phases, Task, clock
from minrnn.ops import GATES, gated_scan

__all__ = ["ScanBench", "bench_scan", "traffic"]

KIND = Kind("scan", "BTD", across="T", limit="copy", phases=("forward", "backward", "step"), unit="ms")


@dataclass(frozen=True)
class ScanBench(TimedBench):
    """Time a gated scan from pre-activations to states, and back, beside the peers that are installed.

    Every result is first compared with a float64 loop. The limit is this machine's copy bandwidth: copies
    that move the bytes that the scan has to move at least, measured in the same run.
    """

    shapes: tuple[str, ...] = ("8x256..4096x512",)
    """BxTxD: batch, length, channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    gates: tuple[
        Literal["mingru", "minlstm", "minlstm_unnormalized", "identity"],
        ...,
    ] = ("mingru",)
    """Gates of the recurrence (identity: the plain scan of a and b)."""
    packed: bool = False
    """Take the pre-activations side by side in one tensor, as a linear layer emits them."""


def bench_scan(options: ScanBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""

    def systems(case: Case, peers: Mapping[str, ScanPeer]) -> dict[str, System]:
        return _systems(case, peers, options.packed)

    return run(KIND, options, options.gates, SCAN_PEERS, systems, command, console)


def traffic(gate: str, dtype: torch.dtype) -> dict[str, int]:
    """Return the bytes that a fused engine moves for each element of h, at least.

    Forward reads the pre-activations and writes h; backward reads the pre-activations, h and dh, and writes
    the pre-activations' gradients. The plain scan's backward has no use for b.

    >>> traffic("mingru", torch.float32), traffic("minlstm", torch.float32)
    ({'forward': 12, 'backward': 24}, {'forward': 16, 'backward': 32})
    """
    num_pre = GATES[gate].num_pre
    read_again = 1 if gate == "identity" else num_pre
    return {
        "forward": (num_pre + 1) * dtype.itemsize,
        "backward": (read_again + 2 + num_pre) * dtype.itemsize,
    }


def _systems(case: Case, peers: Mapping[str, ScanPeer], packed: bool) -> dict[str, System]:
    pre, dh = _inputs(case, packed)
    rows = some_rows(*dh.shape)
    few = [x[:rows].detach().requires_grad_() for x in pre]
    exact = scan_reference(case.gate, few, dh[:rows])

    def system(scan: Scan, reason: str) -> System:
        def compare() -> dict[str, float]:
            h = scan(case.gate, few)
            gradients = torch.autograd.grad(h, few, dh[:rows])
            return errors({"h": h} | {f"d{index}": d for index, d in enumerate(gradients)}, exact)

        return System(_step(scan, case, pre, dh), compare, reason)

    scans = {OURS: system(_ours, "")}
    for name, peer in peers.items():
        scans[name] = system(peer.scan(), peer.reason(case.torch_dtype))
    moved = {phase: size * dh.numel() for phase, size in traffic(case.gate, case.torch_dtype).items()}
    return {KIND.limit: System(_copies(case, moved), None, traffic=moved), **scans}


def _ours(gate: str, pre: list[Tensor]) -> Tensor:
    return gated_scan(gate, *pre)


def _inputs(case: Case, packed: bool) -> tuple[list[Tensor], Tensor]:
    """Draw pre-activations that need gradients, and the gradient of h."""
    generator = torch.Generator().manual_seed(case.seed)
    B, T, D = case.shape.values()
    pre = [torch.randn(B, T, D, generator=generator) for _ in GATES[case.gate].pre]
    if case.gate == "identity":
        pre[0] = pre[0].sigmoid()
    if packed:
        pre = [torch.cat(pre, -1)]
    dh = torch.randn(B, T, D, generator=generator)
    return [_placed(x, case).requires_grad_() for x in pre], _placed(dh, case)


def _placed(x: Tensor, case: Case) -> Tensor:
    return x.to(case.device, case.torch_dtype)


def _step(scan: Scan, case: Case, pre: list[Tensor], dh: Tensor) -> Task:
    """Time forward and backward; results are freed when the call returns, after the last reading."""

    def step() -> Phases:
        start = clock(case.device)
        h = scan(case.gate, pre)
        middle = clock(case.device)
        gradients = torch.autograd.grad(h, pre, dh)
        end = clock(case.device)
        del h, gradients
        return {"forward": middle - start, "backward": end - middle}

    return step


def _copies(case: Case, moved: Mapping[str, int]) -> Task:
    """Time copies between buffers that are there already; a copy of n bytes moves 2 n."""
    buffers = {}
    for phase, size in moved.items():
        source = torch.ones(max(1, size // 8), device=case.device)  # float32, half of the bytes
        buffers[phase] = source, torch.zeros_like(source)

    def copy() -> Phases:
        taken = {}
        for phase, (source, target) in buffers.items():
            start = clock(case.device)
            target.copy_(source)
            taken[phase] = clock(case.device) - start
        return taken

    return copy
