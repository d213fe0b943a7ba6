"""What scan, layer and decode have in common: case after case, the same systems side by side."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from typing import TypeVar

import torch
from rich.console import Console

from minrnn.benchmarks.measure import System, measure
from minrnn.benchmarks.options import DTYPES, TimedBench, parse_shapes, select
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.plots import plot_timings
from minrnn.benchmarks.report import CaseView, Report
from minrnn.training.threads import cpu_threads

__all__ = ["Case", "Kind", "run", "that_compute_on", "that_import"]


@dataclass(frozen=True)
class Kind:
    """What distinguishes one timed benchmark from another in its report."""

    name: str
    """The benchmark."""
    axes: str
    """One letter for each size of a shape."""
    across: str
    """The axis that the plot runs along."""
    limit: str
    """The system that bounds the others' speed."""
    phases: tuple[str, ...]
    """What is timed of a call; the last is the whole."""
    unit: str
    """Of the times that people see: ms or us."""
    memory: bool = True
    """Whether a call's peak memory is measured."""


@dataclass(frozen=True)
class Case:
    """One setting in which all systems are measured."""

    gate: str
    shape: dict[str, int]
    dtype: str
    threads: int
    device: torch.device
    seed: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format of inputs and weights."""
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        sizes = ", ".join(f"{axis} = {size}" for axis, size in self.shape.items())
        return f"{self.gate}, {sizes}, {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"


P = TypeVar("P", bound=Peer)


def run(
    kind: Kind,
    options: TimedBench,
    gates: Sequence[str],
    table: dict[str, P],
    systems: Callable[[Case, Mapping[str, P]], dict[str, System]],
    command: Sequence[str],
    console: Console,
) -> Report:
    """Measure every combination of threads, gate, number format and shape.

    Args:
        kind: which benchmark.
        options: what to measure.
        gates: of the recurrence.
        table: all peers.
        systems: builds what takes part in a case, given the peers that can.
        command: the arguments that repeat it.
        console: where its tables are drawn.

    Returns:
        The report, written and plotted. Each of its results holds gate, shape, dtype, threads, limit and
        `systems`, the records that `measure` describes.

    Raises:
        ValueError: an option cannot be used.
        RuntimeError: our own result is not the reference's.
    """
    shapes = [dict(zip(kind.axes, sizes, strict=True)) for sizes in parse_shapes(options.shapes, kind.axes)]
    peers = select(options.peers, table)
    device = _device(options.device)
    report = Report(kind.name, options.output, command, asdict(options), device, console)
    peers = that_import(that_compute_on(device, peers, report), report)
    settings = itertools.product(options.threads, gates, options.dtypes, shapes)
    for threads, gate, dtype, shape in settings:
        with cpu_threads(threads) as used:
            case = Case(gate, shape, dtype, used, device, options.seed)
            _measure_case(kind, options, case, peers, systems, report)
    report.finish(partial(plot_timings, axis=kind.across))
    return report


def _measure_case(
    kind: Kind,
    options: TimedBench,
    case: Case,
    peers: Mapping[str, P],
    systems: Callable[[Case, Mapping[str, P]], dict[str, System]],
    report: Report,
) -> None:
    torch.compiler.reset()  # or the code of earlier shapes would lead to general, slower code for this one
    able = {name: peer for name, peer in peers.items() if case.gate in peer.gates}
    with CaseView(report.console, str(case), kind.phases, kind.unit, kind.limit) as view:
        view.show({}, "computing the reference")
        records = measure(
            systems(case, able),
            limit=kind.limit,
            dtype=case.torch_dtype,
            memory_of=case.device if kind.memory else None,
            seconds=options.seconds,
            samples=options.samples,
            show=view.show,
        )
        report.add(  # before the table is printed, which fails where nobody reads it
            {
                "gate": case.gate,
                "shape": case.shape,
                "dtype": case.dtype,
                "threads": case.threads,
                "limit": kind.limit,
                "systems": records,
            }
        )


def _device(name: str) -> torch.device:
    """Return the device of this name, which must work here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"bench: device must be one that works here, got {name!r} ({reason})") from error


def that_compute_on(device: torch.device, peers: Mapping[str, P], report: Report) -> dict[str, P]:
    """Return the peers that can compute on the device; note the absence of the others."""
    for name, peer in peers.items():
        if device.type not in peer.devices:
            report.say(f"{name} takes no part: it computes on {', '.join(peer.devices)} only")
    return {name: peer for name, peer in peers.items() if device.type in peer.devices}


def that_import(peers: Mapping[str, P], report: Report) -> dict[str, P]:
    """Return the peers that can be imported; note the versions of those, and the absence of the others."""
    able = {}
    for name, peer in peers.items():
        try:
            import_module(peer.module)
        except ImportError as error:
            report.note_peer(name, peer.package, None)
            report.say(f"{name} takes no part: {error} (pip install {peer.package})")
        else:
            report.note_peer(name, peer.package, _version(peer.package))
            able[name] = peer
    return able


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path without having been installed
        return "unknown"
