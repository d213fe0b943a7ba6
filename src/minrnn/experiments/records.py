"""Queries of records for tables and plots: groups of runs, means over seeds, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from minrnn.experiments.experiment import Record

__all__ = ["bests", "by_kind", "counted", "duration", "points", "spread"]


def by_kind(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Group the records that did not fail by these entries of their settings, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["failed"] is None:
            groups.setdefault(tuple(record["setting"].get(name) for name in names), []).append(record)
    return groups


def spread(values: Sequence[float], digits: int = 3, scale: float = 1.0) -> str:
    """Return the mean over seeds as text, with the standard deviation if there are several.

    >>> spread([0.5, 0.7], 1), spread([0.123], 1, scale=100)
    ('0.6 ± 0.1', '12.3')
    """
    scaled = [scale * value for value in values]
    text = f"{mean(scaled):.{digits}f}"
    return f"{text} ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else text


def bests(records: Sequence[Record], *path: str) -> list[float]:
    """Return an entry of each record's result, given its path.

    >>> bests([{"result": {"test": {"accuracy": 1.0}}}], "test", "accuracy")
    [1.0]
    """
    found = []
    for record in records:
        value = record["result"]
        for name in path:
            value = value[name]
        found.append(value)
    return found


def points(record: Record, y: str, x: str = "step") -> list[tuple[float, float]]:
    """Return a metric at each evaluation of a run."""
    return [(entry[x], entry[y]) for entry in record["result"]["evaluations"] if y in entry]


def counted(number: int, noun: str) -> str:
    """Return a number of things as text.

    >>> counted(1, "trial"), counted(1200, "trial")
    ('1 trial', '1,200 trials')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time with its unit as text.

    >>> duration(50), duration(600), duration(4000), duration(200_000)
    ('50 seconds', '10.0 minutes', '1.1 hours', '2.3 days')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size or (unit == "hours" and seconds >= size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"
