"""The driver of timed benchmarks, which measures the same systems in case after case."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console

from minrnn.benchmarks import plots
from minrnn.benchmarks.bench import Document, Timings
from minrnn.benchmarks.measure import System, measure
from minrnn.benchmarks.options import DTYPES, TimedBench, parse_shapes, select
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.report import CaseView, Report
from minrnn.training.extras import FOREIGN_ERRORS
from minrnn.training.threads import cpu_threads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Case", "Kind", "measure_case", "run", "that_compute_on", "that_import"]


@dataclass(frozen=True)
class Kind:
    """The properties of a timed benchmark's report."""

    name: str
    """The benchmark."""
    axes: str
    """A letter for each size of a shape."""
    across: str
    """The x axis of the plot."""
    limit: str | None
    """The system whose speed is an upper bound, if there is one."""
    phases: tuple[str, ...]
    """The timed phases of a call; the last is the whole."""
    unit: str
    """Unit of the times in tables: ms or us."""
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
        """The dtype of inputs and weights."""
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
    """Measure every combination of threads, gate, dtype and shape.

    Args:
        kind: the benchmark.
        options: the settings.
        gates: gates of the recurrence.
        table: all peers.
        systems: builds the systems of a case from the peers that support its gate.
        command: the command-line arguments that repeat it.
        console: console for its tables.

    Returns:
        The report, written and plotted. Each of its results holds gate, shape, dtype, threads, limit and
        `systems`, the records that `measure` describes.

    Raises:
        ValueError: an option is not valid here.
        RuntimeError: our own result differs from the reference.
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
            able = {name: peer for name, peer in peers.items() if gate in peer.gates}
            measure_case(kind, case, partial(systems, case, able), options.seconds, options.samples, report)
    report.finish(partial(_draw, axis=kind.across))
    return report


def measure_case(
    kind: Kind,
    case: Case,
    systems: Callable[[], dict[str, System]],
    seconds: float,
    samples: int,
    report: Report,
    **about: object,
) -> None:
    """Measure the systems of one case, and add the result to the report.

    Args:
        kind: the benchmark.
        case: the setting.
        systems: builds the systems.
        seconds: see `interleave`.
        samples: see `interleave`.
        report: the report.
        about: further entries of the result.

    Raises:
        RuntimeError: our own result differs from the reference.
    """
    torch.compiler.reset()  # else code for earlier shapes would be generalized, which is slower
    with CaseView(report.console, str(case), kind.phases, kind.unit, kind.limit) as view:
        view.show({}, "computing the reference")
        records = measure(
            systems(),
            limit=kind.limit,
            dtype=case.torch_dtype,
            memory_of=case.device if kind.memory else None,
            seconds=seconds,
            samples=samples,
            show=view.show,
        )
        report.add(  # before the table is printed, which fails if the output is closed
            {
                **about,
                "gate": case.gate,
                "shape": case.shape,
                "dtype": case.dtype,
                "threads": case.threads,
                "limit": kind.limit,
                "systems": records,
            }
        )


def _draw(document: Document, axis: str) -> Figure:
    """Draw step times, shares of the limit and peak memory against an axis of the shapes.

    Each setting of the other axes, the gate and the dtype has its own row of panels.
    """
    results = sorted(document["results"], key=lambda result: (_setting(result, axis), result["shape"][axis]))
    rows = [list(group) for _, group in itertools.groupby(results, lambda result: _setting(result, axis))]
    limit = results[0]["limit"]
    columns: dict[str, Callable[[Timings], float | None]] = {"step (ms)": _milliseconds}
    if limit:
        columns[f"step: speed as % of {limit}'s"] = _share
    if any(_megabytes(record) for result in results for record in result["systems"].values()):
        columns["peak memory of a step (MB)"] = _megabytes
    figure, panels = plots.new_figure(len(rows), len(columns), width=5)
    cells = itertools.product(rows, columns.items())
    for axes, (group, (label, value)) in zip(panels, cells, strict=True):
        lines = _lines(group, axis, value)
        plots.draw_lines(axes, lines, plots.system_style(lines, limit))
        title = _setting(group[0], axis) if value is _milliseconds else ""
        plots.finish(axes, title, axis, label, log="xy")
    return figure


def _setting(result: Mapping[str, Any], axis: str) -> str:
    """Describe the setting that a row of panels shares."""
    sizes = [f"{name} = {size}" for name, size in result["shape"].items() if name != axis]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return ", ".join([result["gate"], *sizes, result["dtype"], threads])


def _lines(
    group: Sequence[Mapping[str, Any]], axis: str, value: Callable[[Timings], float | None]
) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    records = [(result, *item) for result in group for item in result["systems"].items()]
    inexact = {name for _, name, record in records if record["status"] == "inexact"}
    for result, name, record in records:
        y = value(record)
        if y:  # a logarithmic axis cannot show zero
            label = f"{name} (inexact)" if name in inexact else name
            lines.setdefault(label, []).append((result["shape"][axis], y))
    return lines


def _milliseconds(record: Timings) -> float | None:
    return 1e3 * record["seconds"]["step"]["median"] if "seconds" in record else None


def _share(record: Timings) -> float | None:
    return 100 * record["share"]["step"] if "share" in record else None


def _megabytes(record: Timings) -> float | None:
    peak = record.get("peak_bytes") or 0
    return peak / 1e6 if peak >= 1e5 else None  # less is within the measuring error


def _device(name: str) -> torch.device:
    """Return the device of this name, and check that it works."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"bench: device must be one that works here, got {name!r} ({reason})") from error


def that_compute_on(device: torch.device, peers: Mapping[str, P], report: Report) -> dict[str, P]:
    """Return the peers that support the device; report the others."""
    for name, peer in peers.items():
        if device.type not in peer.devices:
            report.say(f"{name} takes no part: it computes on {', '.join(peer.devices)} only")
    return {name: peer for name, peer in peers.items() if device.type in peer.devices}


def that_import(peers: Mapping[str, P], report: Report) -> dict[str, P]:
    """Return the peers that can be imported, and record their versions; report the others."""
    able = {}
    for name, peer in peers.items():
        try:
            import_module(peer.module)
        except FOREIGN_ERRORS as error:  # some raise other errors where they find no compiler
            report.note_peer(name, peer.package, None)
            hint = f" (pip install {peer.package})" if isinstance(error, ImportError) else ""
            report.say(f"{name} takes no part: {(str(error).splitlines() or [''])[0]}{hint}")
        else:
            report.note_peer(name, peer.package, _version(peer.package))
            able[name] = peer
    return able


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # on the path, but not installed
        return "unknown"
