"""The output of a benchmark: a live table in the console, a JSON file, a plot."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from minrnn.benchmarks.bench import OURS, Document, Timings
from minrnn.benchmarks.plots import save_plot
from minrnn.files import fresh_file, replace_text, write_json
from minrnn.ops import Engine, engines
from minrnn.training import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CaseView", "Report", "load_averages"]

FORMAT = 1
BUSY = 0.3  # load average above which times are distorted


class Report:
    """The JSON document of one benchmark, written after each case, so that an interruption loses no results.

    It holds format, benchmark, command, device, machine, versions, commit, load averages, engines, options,
    the peers' packages and versions, and `results`.

    Args:
        benchmark: name of the benchmark.
        output: the JSON file; None is runs/bench-NAME-TIME.json.
        command: the command-line arguments that repeat it.
        options: its options, as JSON.
        device: device of the computations.
        console: console for messages.
    """

    def __init__(
        self,
        benchmark: str,
        output: Path | None,
        command: Sequence[str],
        options: Mapping[str, Any],
        device: torch.device,
        console: Console,
    ) -> None:
        if output is not None and output.suffix != ".json":
            raise ValueError(f"bench: output must end in .json, got {str(output)!r}")
        default = Path("runs", f"bench-{benchmark}-{time.strftime('%Y%m%d-%H%M%S')}.json")
        self.path = fresh_file(default) if output is None else output
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.console = console
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "benchmark": benchmark,
            "command": shlex.join(["minrnn", "bench", benchmark, *command]),
            **provenance(device),
            "load": load_averages(),
            "engines": {engine.name: engine.detail for engine in engines() if engine.serves},
            "options": {name: str(v) if isinstance(v, Path) else v for name, v in options.items()},
            "peers": {},
            "results": [],
        }
        if output is None:
            self.write()  # so that the file is valid before the first result
        engine = _serving(device)
        self.say(f"bench {benchmark} on {device}: {engine.name} ({engine.detail})")
        load = self.document["load"]
        if load and load[0] > BUSY:
            self.say(f"the machine is busy (load {load[0]}): times will be distorted")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def note_peer(self, name: str, package: str, version: str | None) -> None:
        """Record a peer's package and its version; None if it is not installed."""
        self.document["peers"][name] = {"package": package, "version": version}

    def add(self, result: Mapping[str, Any]) -> None:
        """Add a case's result, and write the file."""
        self.document["results"].append(dict(result))
        self.write()

    def write(self) -> None:
        """Write the document with the results so far."""
        write_json(self.path, self.document)

    def finish(self, draw: Callable[[Document], Figure] | None = None) -> None:
        """Draw the plot, if there is one, and print the paths of all files."""
        self.say(f"results: {self.path}")
        if draw is not None:
            picture = self.path.with_suffix(".png")
            why_not = save_plot(lambda: draw(self.document), picture)
            self.say(f"no plot: {why_not}" if why_not else f"plot: {picture}")

    def write_text(self, text: str) -> Path:
        """Write Markdown beside the JSON file; return its path."""
        path = self.path.with_suffix(".md")
        replace_text(path, text)
        return path


class CaseView:
    """The live table of one case; without a terminal, its final form is printed once.

    Args:
        console: console for the table.
        title: title of the table.
        phases: the columns of times.
        unit: unit of times, "ms" or "us".
        limit: the system whose speed is 100 %, if there is one.
    """

    def __init__(
        self, console: Console, title: str, phases: Sequence[str], unit: str, limit: str | None
    ) -> None:
        self._console, self._title = console, title
        self._phases, self._unit, self._limit = phases, unit, limit
        self._table = Table()
        # Redrawn between measurements only, because a thread that redraws would distort them.
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> CaseView:
        if self._live is None:
            self._console.print(f"measuring {self._title}", highlight=False)
        else:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        elif self._table.row_count:
            self._console.print(self._table)

    def show(self, records: Mapping[str, Timings], doing: str) -> None:
        """Redraw the table with the results so far and a line of text below it."""
        self._table = self._draw(records, doing)
        if self._live is not None:
            self._live.update(self._table, refresh=True)

    def _draw(self, records: Mapping[str, Timings], doing: str) -> Table:
        title = self._title + (f" (%: speed relative to {self._limit}'s)" if self._limit else "")
        table = Table(title=title, caption=doing or None, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("error", no_wrap=True)
        times = [f"{phase} {self._unit}" for phase in self._phases]
        shares = [f"{phase} %" for phase in self._phases if self._limit]
        for header in (*times, "p10-p90", f"x {OURS}", *shares, "peak MB"):
            table.add_column(header, justify="right", no_wrap=True)
        for name, record in records.items():
            style = {OURS: "bold", self._limit: "dim"}.get(name, "")
            table.add_row(name, *self._cells(record), style=style)
        return table

    def _cells(self, record: Timings) -> list[str]:
        cells = [_verdict(record)]
        if "seconds" not in record:
            return cells
        seconds, step = record["seconds"], record["seconds"]["step"]
        cells += [self._time(seconds[phase]["median"]) for phase in self._phases]
        cells += [f"{self._time(step['p10'])}-{self._time(step['p90'])}"]
        cells += [f"{record['times_ours']:.2f}" if "times_ours" in record else ""]
        shares = record.get("share", {})
        if self._limit:
            cells += [f"{100 * shares[phase]:.0f}" if phase in shares else "" for phase in self._phases]
        peak = record.get("peak_bytes")
        return [*cells, "" if peak is None else f"{peak / 1e6:.1f}"]

    def _time(self, seconds: float) -> str:
        return f"{seconds * {'ms': 1e3, 'us': 1e6}[self._unit]:.3g}"


def _serving(device: torch.device) -> Engine:
    """Return the engine to which calls on a device are dispatched."""
    return next(engine for engine in engines() if engine.serves and engine.device in (device.type, "any"))


def _verdict(record: Timings) -> str:
    """Return the error, or, if nothing was compared, the throughput or the failure."""
    if "bytes_per_second" in record:
        return f"{max(record['bytes_per_second'].values()) / 1e9:.3g} GB/s"
    if record["status"] == "other function":
        return "-"
    if record["status"] == "failed":
        return f"failed: {record['detail']}"
    found = [_number(error) for error in record["error"].values()]
    mark = {"equal": "", "inexact": " inexact", "refused": " REFUSED"}[record["status"]]
    return f"{max(found):.0e}{mark}"


def _number(error: float | None) -> float:
    """Convert JSON's null, which stands for an error that is not finite, to infinity."""
    return float("inf") if error is None else error


def load_averages() -> list[float] | None:
    """Return the machine's load averages; None if the system has none."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None
