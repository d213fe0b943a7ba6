"""`minrnn bench prefix`: what a sequence that is divided over ranks costs each of them beside its scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import ScanPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.scan import GateName, draw_inputs
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import UNITS, Result, Table, sizes
from minrnn.benchmarks.timing import Phases, Workload, clock
from minrnn.ops import GATES, gated_scan
from minrnn.ops.prefix import Mode, prefix, prefix_backward
from minrnn.ops.reference import prefix as exact_prefix
from minrnn.ops.reference import prefix_backward as exact_backward
from minrnn.ops.reference import state_dtype

__all__ = ["BENCH", "PrefixBench"]

PHASES = ("forward", "prefix", "backward", "prefix of gradients", "step")
KIND = Kind("prefix", "BTD", across="T", limit=None, phases=PHASES, unit="ms", memory=False)


@dataclass(frozen=True)
class PrefixBench(TimedBench):
    """Time the prefix of a gated scan, and that of its gradients, beside the scan's forward and backward.

    A rank that holds a part of a sequence computes these in addition, and sends two numbers for each row and
    channel. Both prefixes are first compared with a float64 loop. There are no peers.
    """

    shapes: tuple[str, ...] = ("1x65536x256", "8x4096x512")
    """BxTxD of a part: batch, length, channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    gates: tuple[GateName, ...] = ("mingru",)
    """Gates of the recurrence (identity: the plain scan of a and b)."""
    keeping: float = 0.0
    """Added to the logits of what is kept: at 14, a step forgets a millionth, and all steps are read."""


def bench_prefix(options: PrefixBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""

    def systems(case: Case, _: Mapping[str, ScanPeer]) -> dict[str, System]:
        return {OURS: _system(case, options.keeping)}

    return run(KIND, options, options.gates, {}, systems, command, console)


def render(document: Document) -> str:
    """Return a table of times, of the prefixes' shares of the scans, and of the bytes that a rank sends."""
    return Table("", _HEAD, [_row(result) for result in document["results"]]).markdown()


BENCH = Bench(PrefixBench, bench_prefix, render)

_HEAD = ["B, T, D", "gate", "dtype", *(f"{phase}, ms" for phase in PHASES[:-1])]
_HEAD += ["prefix / forward", "of gradients / backward", "sent forward, kB", "backward, kB"]


def _row(result: Result) -> list[str]:
    ours, (scale, digits) = result["systems"][OURS], UNITS["ms"]
    times = [ours["seconds"][phase]["median"] for phase in PHASES[:-1]]
    shares = [f"{times[1] / times[0]:.1%}", f"{times[3] / times[2]:.1%}"]
    sent = f"{ours['bytes_sent'] / 1e3:.1f}"
    cells = [sizes(result), result["gate"], result["dtype"]]
    return [*cells, *(f"{time * scale:{digits}}" for time in times), *shares, sent, sent]


def _system(case: Case, keeping: float) -> System:
    pre, dh = draw_inputs(case, packed=False)
    _keep(case.gate, pre, keeping)
    mode = Mode(case.gate, "positive", False, False)

    def compare() -> dict[str, float]:
        plain = [x.detach() for x in pre]
        decay, end = prefix(plain, None, mode)
        found = {"h": end, "decay": decay, "before": prefix_backward(dh, plain, None, mode)}
        wide = [x.double() for x in plain]
        decay, end = exact_prefix(wide, None, *mode)
        exact = {"h": end, "decay": decay, "before": exact_backward(dh.double(), wide, None, *mode)}
        for of in (found, exact):  # below 2^-64 it is not exact, nor has to be
            of["decay"] = torch.where(exact["decay"].abs() < 2.0**-60, 0.0, of["decay"].double())
        return errors(found, exact)

    sent = 2 * case.shape["B"] * case.shape["D"] * state_dtype(case.torch_dtype).itemsize
    return System(_workload(mode, pre, dh), compare, facts={"bytes_sent": sent})


def _keep(gate: str, pre: Sequence[Tensor], keeping: float) -> None:
    """Add to the logits of what a gate keeps, in place; the identity gate's decay has none."""
    keeps = GATES[gate].keeps
    if keeps is not None:
        name, sign = keeps
        with torch.no_grad():
            pre[GATES[gate].pre.index(name)].add_(sign * keeping)


def _workload(mode: Mode, pre: Sequence[Tensor], dh: Tensor) -> Workload:
    plain, device = [x.detach() for x in pre], dh.device

    def step() -> Phases:
        start = clock(device)
        prefix(plain, None, mode)
        found = clock(device)
        h = gated_scan(mode.gate, *pre)
        middle = clock(device)
        prefix_backward(dh, plain, None, mode)
        back = clock(device)
        gradients = torch.autograd.grad(h, pre, dh)
        end = clock(device)
        del h, gradients  # after the clock was read
        times = (middle - found, found - start, end - back, back - middle, end - start)
        return dict(zip(PHASES, times, strict=True))

    return step
