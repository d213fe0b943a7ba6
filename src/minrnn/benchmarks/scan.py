"""`minrnn bench scan`: forward and backward of gated scans, compared with other implementations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import differentiate, errors, scan_reference, some_rows
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import SCAN_PEERS, Scan, ScanPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import UNITS, Result, Table, by_system, sizes
from minrnn.benchmarks.workloads import copies, training_step
from minrnn.ops import GATES, gated_scan

__all__ = [
    "BENCH",
    "KIND",
    "LIMIT",
    "GateName",
    "ScanBench",
    "draw_inputs",
    "scan_systems",
    "share_table",
    "traffic",
]

LIMIT = "copy"
KIND = Kind("scan", "BTD", across="T", limit=LIMIT, phases=("forward", "backward", "step"), unit="ms")


if TYPE_CHECKING:
    GateName = str
else:
    GateName = Literal[tuple(GATES)]


@dataclass(frozen=True)
class ScanBench(TimedBench):
    """Time forward and backward of a gated scan, from pre-activations to states, and of installed peers.

    Every result is first compared with a float64 loop. The limit is this machine's copy bandwidth: copies of
    the fewest bytes that the scan has to move, measured in the same run.
    """

    shapes: tuple[str, ...] = ("8x256..4096x512",)
    """BxTxD: batch, length, channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    gates: tuple[GateName, ...] = ("mingru",)
    """Gates of the recurrence (identity: the plain scan of a and b)."""
    packed: bool = False
    """Pass the pre-activations packed in one tensor, as a linear layer returns them."""


def bench_scan(options: ScanBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""

    def systems(case: Case, peers: Mapping[str, ScanPeer]) -> dict[str, System]:
        return scan_systems(case, peers, options.packed)

    return run(KIND, options, options.gates, SCAN_PEERS, systems, command, console)


def render(document: Document) -> str:
    """Return a table of each system's times, or, for several thread counts, of our shares of the limit."""
    results = document["results"]
    compares_threads = {1} < {result["threads"] for result in results}
    return (share_table(results) if compares_threads else by_system(results, KIND.phases)).markdown()


BENCH = Bench(ScanBench, bench_scan, render)


def traffic(gate: str, dtype: torch.dtype) -> dict[str, int]:
    """Return the fewest bytes that a fused engine moves for each element of h.

    Forward reads the pre-activations and writes h; backward reads the pre-activations, h and dh, and writes
    the pre-activations' gradients. The plain scan's backward does not need b.

    >>> traffic("mingru", torch.float32), traffic("minlstm", torch.float32)
    ({'forward': 12, 'backward': 24}, {'forward': 16, 'backward': 32})
    """
    num_pre = GATES[gate].num_pre
    read_again = 1 if gate == "identity" else num_pre
    return {
        "forward": (num_pre + 1) * dtype.itemsize,
        "backward": (read_again + 2 + num_pre) * dtype.itemsize,
    }


def scan_systems(case: Case, peers: Mapping[str, ScanPeer], packed: bool) -> dict[str, System]:
    """Return the copies, our scan and the peers' on the same inputs.

    Args:
        case: gate, shape (B, T, D), dtype, device and seed.
        peers: the scans to compare with.
        packed: whether the pre-activations are packed in one tensor.
    """
    pre, dh = draw_inputs(case, packed)
    rows = some_rows(*dh.shape)
    few = [x[:rows].detach().requires_grad_() for x in pre]
    exact = scan_reference(case.gate, few, dh[:rows])

    def system(scan: Scan, reason: str) -> System:
        return System(
            training_step(lambda: scan(case.gate, pre), pre, dh),
            lambda: errors(differentiate(lambda: scan(case.gate, few), few, dh[:rows]), exact),
            reason,
        )

    moved = {phase: size * dh.numel() for phase, size in traffic(case.gate, case.torch_dtype).items()}
    return {
        LIMIT: System(copies(moved, case.device), traffic=moved),
        OURS: system(lambda gate, pre: gated_scan(gate, *pre), ""),
        **{name: system(peer.scan(), peer.reason(case.torch_dtype)) for name, peer in peers.items()},
    }


def draw_inputs(case: Case, packed: bool) -> tuple[list[Tensor], Tensor]:
    """Draw pre-activations that require gradients, and the gradient of h."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    B, T, D = case.shape.values()

    def draw() -> Tensor:
        return torch.randn(B, T, D, generator=generator, device=case.device)

    pre = [draw() for _ in GATES[case.gate].pre]
    if case.gate == "identity":
        pre[0] = pre[0].sigmoid()
    if packed:
        pre = [torch.cat(pre, -1)]
    dh = draw().to(case.torch_dtype)
    return [x.to(case.torch_dtype).requires_grad_() for x in pre], dh


def share_table(results: Sequence[Result], unit: str = "ms") -> Table:
    """Return a table of our shares of the copy bandwidth, and of our speed relative to one thread.

    Args:
        results: the cases, with ours and the limit among their systems.
        unit: unit of the times, a key in UNITS.
    """
    scale, digits = UNITS[unit]
    several = len({result["threads"] for result in results}) > 1
    alone = {
        _key(result): result["systems"][OURS]["seconds"]["step"]["median"]
        for result in results
        if several and result["threads"] == 1
    }
    rows = []
    for result in results:
        if several and result["threads"] == 1:
            continue
        ours, copy = result["systems"][OURS], result["systems"][LIMIT]
        times = [f"{ours['seconds'][phase]['median'] * scale:{digits}}" for phase in ("forward", "backward")]
        shares = [f"{ours['share'][phase]:.0%}" for phase in ("forward", "backward")]
        rows.append([*_key(result), *times, f"{copy['bytes_per_second']['backward'] / 1e9:.0f}", *shares])
        if alone:
            rows[-1].append(f"{ours['seconds']['step']['median'] / alone[_key(result)]:.0%}")
    head = ["B, T, D", "gate", "dtype", f"forward, {unit}", f"backward, {unit}", "copy, GB/s"]
    head += ["share forward", "backward", *(["speed of one thread"] if alone else [])]
    return Table("", head, rows)


def _key(result: Result) -> tuple[str, str, str]:
    return sizes(result), result["gate"], result["dtype"]
