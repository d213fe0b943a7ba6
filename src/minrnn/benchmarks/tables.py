"""Tables rendered as Markdown, and tables that several benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minrnn.benchmarks.bench import OURS, Timings

__all__ = ["UNITS", "Result", "Table", "by_length", "by_system", "sizes"]

Result = Mapping[str, Any]
"""One case of a timed benchmark: see `session.run`."""

UNITS = {"ms": (1e3, ".2f"), "us": (1e6, ".1f")}
"""Units of time: number of units per second, and number format."""


@dataclass(frozen=True)
class Table:
    """A table of strings."""

    title: str
    """The title; empty if the surrounding text has one."""
    head: Sequence[str]
    """Names of the columns; a column of published figures is labeled as such."""
    rows: Sequence[Sequence[str]]
    """The cells."""
    note: str = ""
    """Text below the table."""

    def markdown(self) -> str:
        """Return the table as Markdown, its title above and its note below."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        title = f"**{self.title}**" if self.title else ""
        return "\n\n".join(part for part in (title, text, self.note) if part)


def by_system(results: Sequence[Result], phases: Sequence[str], unit: str = "ms") -> Table:
    """Return a table with a row for each case and system: times, their ratio to ours, peak memory.

    Args:
        results: the cases.
        phases: the columns of times.
        unit: unit of the times, a key in UNITS.
    """
    scale, digits = UNITS[unit]
    keys = [key for key in ("gate", "dtype", "threads") if len({result[key] for result in results}) > 1]
    memory = any("peak_bytes" in record for result in results for record in result["systems"].values())

    def cells(record: Timings) -> list[str]:
        if "seconds" not in record:
            return [record["status"], *[""] * (len(phases) + memory)]
        times = [f"{record['seconds'][phase]['median'] * scale:{digits}}" for phase in phases]
        return [*times, f"{record['times_ours']:.2f}", *([megabytes(record)] if memory else [])]

    rows = [
        [sizes(result), *(str(result[key]) for key in keys), name, *cells(record)]
        for result in results
        for name, record in result["systems"].items()
    ]
    axes = ", ".join(results[0]["shape"]) if results else ""
    times = [f"{phase}, {unit}" for phase in phases]
    head = [axes, *keys, "system", *times, "times ours", *(["memory at the peak, MB"] if memory else [])]
    return Table("", head, rows)


def by_length(results: Sequence[Result]) -> Table:
    """Return a table with a row for each length: our step, the others relative to it, all peak memories."""
    names = [name for name in results[0]["systems"] if name != OURS]
    rows = []
    for result in results:
        systems = result["systems"]
        ratios = [f"{systems[name]['times_ours']:.2f}" if name in systems else "" for name in names]
        peaks = [megabytes(systems[name]) if name in systems else "" for name in (OURS, *names)]
        ours = systems[OURS]["seconds"]["step"]["median"]
        rows.append([f"{result['shape']['T']:,}", f"{ours * 1e3:.1f}", *ratios, *peaks])
    head = ["T", f"{OURS}, ms", *(f"{name}, times ours" for name in names)]
    return Table("", [*head, *(f"{name}, MB" for name in (OURS, *names))], rows)


def sizes(result: Result) -> str:
    """Return the sizes of a case's shape."""
    return ", ".join(str(size) for size in result["shape"].values())


def megabytes(record: Timings) -> str:
    """Return the peak memory in MB; empty if it is unknown."""
    peak = record.get("peak_bytes")
    return "" if peak is None else f"{peak / 1e6:.0f}"
