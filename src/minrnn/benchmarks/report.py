"""What a benchmark leaves: a live table for people, a JSON file for programs, and a plot."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from minrnn.benchmarks.measure import OURS, Record
from minrnn.files import fresh_file, write_json
from minrnn.ops import engines
from minrnn.training import provenance

__all__ = ["CaseView", "Report", "load_averages"]

FORMAT = 1
BUSY = 0.3  # of the load average: something else runs a third of the time


class Report:
    """The document of one benchmark: written anew after each case, so that an interrupted run keeps the rest.

    Args:
        benchmark: its name.
        output: the JSON file; None is runs/bench-NAME-TIME.json.
        command: the arguments that repeat it.
        options: its options, as JSON.
        device: where it computes.
        console: where people read.
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
            self.write()  # a file without results, rather than an empty one
        served = [f"{engine.name} ({engine.detail})" for engine in engines() if engine.device == device.type]
        self.say(f"bench {benchmark} on {device}: {', '.join(served) or 'the reference engine'}")
        load = self.document["load"]
        if load and load[0] > BUSY:
            self.say(f"the machine is busy (load {load[0]}): threads that wait for each other distort times")

    def say(self, text: str) -> None:
        """Say one line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def note_peer(self, name: str, package: str, version: str | None) -> None:
        """Record a peer's package and its version; None where it is not installed."""
        self.document["peers"][name] = {"package": package, "version": version}

    def add(self, result: Mapping[str, Any]) -> None:
        """Add a case's result, and write the file."""
        self.document["results"].append(dict(result))
        self.write()

    def write(self) -> None:
        """Write the document as far as it has come."""
        write_json(self.path, self.document)

    def finish(self, plot: Callable[[Mapping[str, Any], Path], str | None]) -> None:
        """Draw the plot, and say where everything is."""
        picture = self.path.with_suffix(".png")
        why_not = plot(self.document, picture)
        self.say(f"results: {self.path}")
        self.say(f"no plot: {why_not}" if why_not else f"plot: {picture}")


class CaseView:
    """The live table of one case; where there is no terminal, its final form is printed once.

    Args:
        console: where to draw.
        title: what is measured.
        phases: the columns of times.
        unit: seconds are shown in "ms" or "us".
        limit: the system whose speed is 100 %.
    """

    def __init__(self, console: Console, title: str, phases: Sequence[str], unit: str, limit: str) -> None:
        self._console, self._title = console, title
        self._phases, self._unit, self._limit = phases, unit, limit
        self._table = Table()
        # Redrawn between measurements only: a thread that redraws would disturb what is being timed.
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

    def show(self, records: Mapping[str, Record], doing: str) -> None:
        """Redraw the table with what is known, and a line that says what goes on."""
        self._table = self._draw(records, doing)
        if self._live is not None:
            self._live.update(self._table, refresh=True)

    def _draw(self, records: Mapping[str, Record], doing: str) -> Table:
        title = f"{self._title} (%: speed beside {self._limit}'s)"
        table = Table(title=title, caption=doing or None, title_justify="left", box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("error", no_wrap=True)
        times = [f"{phase} {self._unit}" for phase in self._phases]
        shares = [f"{phase} %" for phase in self._phases]
        for header in (*times, "p10-p90", f"x {OURS}", *shares, "peak MB"):
            table.add_column(header, justify="right", no_wrap=True)
        for name, record in records.items():
            style = {OURS: "bold", self._limit: "dim"}.get(name, "")
            table.add_row(name, *self._cells(record), style=style)
        return table

    def _cells(self, record: Record) -> list[str]:
        cells = [_verdict(record)]
        if "seconds" not in record:
            return cells
        seconds, step = record["seconds"], record["seconds"]["step"]
        cells += [self._time(seconds[phase]["median"]) for phase in self._phases]
        cells += [f"{self._time(step['p10'])}-{self._time(step['p90'])}"]
        cells += [f"{record['times_ours']:.2f}" if "times_ours" in record else ""]
        shares = record.get("share", {})
        cells += [f"{100 * shares[phase]:.0f}" if phase in shares else "" for phase in self._phases]
        peak = record.get("peak_bytes")
        return [*cells, "" if peak is None else f"{peak / 1e6:.1f}"]

    def _time(self, seconds: float) -> str:
        return f"{seconds * {'ms': 1e3, 'us': 1e6}[self._unit]:.3g}"


def _verdict(record: Record) -> str:
    """Return the error that was found, or what there is to say instead."""
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
    """Undo JSON's null, which stands for what is not finite."""
    return float("inf") if error is None else error


def load_averages() -> list[float] | None:
    """Return the machine's load averages, which show whether it was quiet; None where the system has none."""
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None
