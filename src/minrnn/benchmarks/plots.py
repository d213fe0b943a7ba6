"""The pictures of the benchmarks, drawn from their JSON; without matplotlib there are none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minrnn.benchmarks.measure import OURS, Record
from minrnn.training.extras import draw, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["name_ends", "plot_errors", "plot_timings"]

Line = list[tuple[float, float]]

BLUE, BLACK = "#0b5fd6", "#222222"
OTHERS = ("#d1495b", "#e08e2b", "#6a994e", "#8d5a97", "#7a6a53", "#3b8ea5", "#9a9a9a", "#b5838d")


def plot_timings(document: Mapping[str, Any], path: Path, axis: str) -> str | None:
    """Draw time, share of the limit, and peak memory, against an axis of the shapes.

    Args:
        document: what a timed benchmark found.
        path: the PNG file.
        axis: the axis of the shapes that runs from left to right; each setting of the rest has its own row.

    Returns:
        None, or, where the picture cannot be drawn, the reason.
    """
    return draw(lambda: _plot_timings(document, path, axis))


def _plot_timings(document: Mapping[str, Any], path: Path, axis: str) -> None:
    from matplotlib.figure import Figure

    results = sorted(document["results"], key=lambda result: (_setting(result, axis), result["shape"][axis]))
    rows = [list(group) for _, group in groupby(results, lambda result: _setting(result, axis))]
    panels = 3 if any(_megabytes(record) for _, _, record in _records(results)) else 2
    figure = Figure(figsize=(5 * panels, 4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), panels, squeeze=False)
    for row, group in zip(grid, rows, strict=True):
        limit = group[0]["limit"]
        _draw(row[0], _lines(group, axis, _milliseconds), limit, "step (ms)", axis)
        _draw(row[1], _lines(group, axis, _share), limit, f"step: speed as % of {limit}'s", axis)
        if panels == 3:
            _draw(row[2], _lines(group, axis, _megabytes), limit, "peak memory of a step (MB)", axis)
        row[0].set_title(_setting(group[0], axis), loc="left", fontsize=10)
        for axes in row:
            name_ends(axes)
    save_picture(figure, path, dpi=130)


def plot_errors(document: Mapping[str, Any], path: Path) -> str | None:
    """Draw the error of h against the length, one panel for each way to forget.

    Args:
        document: what the benchmark of accuracy found.
        path: the PNG file.

    Returns:
        None, or, where the picture cannot be drawn, the reason.
    """
    return draw(lambda: _plot_errors(document, path))


def _plot_errors(document: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    results = document["results"]
    panels = list(dict.fromkeys((result["gate"], result["forgetting"]) for result in results))
    figure = Figure(figsize=(4.2 * len(panels) + 1, 4.4), layout="constrained")
    figure.suptitle("Largest error of h against a float64 loop, relative to the largest value", fontsize=12)
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (gate, forgetting) in zip(all_axes, panels, strict=True):
        lines: dict[str, Line] = {}
        for result in results:
            if (result["gate"], result["forgetting"]) == (gate, forgetting) and result["error"]["h"]:
                name = f"{result['system']} {result['dtype']}"
                lines.setdefault(name, []).append((result["T"], result["error"]["h"]))
        _draw(axes, lines, None, "", "T")
        half_life = float(f"{document['half_lives'][forgetting]:.2g}")
        axes.set_title(f"{gate}, {forgetting} forgetting (half-life {half_life:g} steps)", fontsize=10)
    for axes in all_axes:  # once their common scale is known
        name_ends(axes)
    save_picture(figure, path, dpi=150)


def _setting(result: Mapping[str, Any], axis: str) -> str:
    """Name all that a row of panels has in common."""
    sizes = [f"{name} = {size}" for name, size in result["shape"].items() if name != axis]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return ", ".join([result["gate"], *sizes, result["dtype"], threads])


def _lines(
    group: Sequence[Mapping[str, Any]], axis: str, value: Callable[[Record], float | None]
) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    inexact = {name for result, name, record in _records(group) if record["status"] == "inexact"}
    for result, name, record in _records(group):
        y = value(record)
        if y:  # neither missing nor zero, which a logarithmic axis cannot show
            label = f"{name} (inexact)" if name in inexact else name
            lines.setdefault(label, []).append((result["shape"][axis], y))
    return lines


def _records(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str, Record]]:
    for result in results:
        for name, record in result["systems"].items():
            yield result, name, record


def _milliseconds(record: Record) -> float | None:
    return 1e3 * record["seconds"]["step"]["median"] if "seconds" in record else None


def _share(record: Record) -> float | None:
    return 100 * record["share"]["step"] if "share" in record else None


def _megabytes(record: Record) -> float | None:
    peak = record.get("peak_bytes") or 0
    return peak / 1e6 if peak >= 1e5 else None  # less cannot be told from nothing


def _draw(axes: Axes, lines: Mapping[str, Line], limit: str | None, label: str, axis: str) -> None:
    """Draw lines on logarithmic axes, each named at its right end in its own colour; ours is thick."""
    systems = list(dict.fromkeys(name.split()[0] for name in lines))
    others = iter(OTHERS * len(systems))
    colours = {name: {OURS: BLUE, limit: BLACK}.get(name) or next(others) for name in systems}
    for name, points in lines.items():
        ours = name.split()[0] == OURS
        dashed = name == limit or name.endswith("16")
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=colours[name.split()[0]],
            linestyle="--" if dashed else "-",
            linewidth=2.5 if ours else 1.3,
            marker="o",
            markersize=4,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=axis, ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def name_ends(axes: Axes) -> None:
    """Write each line's name beside its last point, moved up or down where names would overlap."""
    scale = math.log if axes.get_yscale() == "log" else float
    low, high = map(scale, axes.get_ylim())
    lines = {line: (scale(np.asarray(line.get_ydata())[-1]) - low) / (high - low) for line in axes.lines}
    order = sorted(lines, key=lambda line: lines[line])
    for line, height in zip(order, spread([lines[line] for line in order], 0.055), strict=True):
        axes.text(
            1.02,
            height,
            str(line.get_label()),
            color=line.get_color(),
            transform=axes.transAxes,
            fontsize=8,
            va="center",
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move rising heights apart until neighbours are `gap` from each other, each crowd about its middle.

    None ends above 1, unless there are too many.

    >>> [round(height, 2) for height in spread([0.1, 0.5, 0.5, 1.0], 0.1)]
    [0.1, 0.45, 0.55, 1.0]
    """
    crowds: list[list[float]] = []  # of heights that share one evenly spaced stack
    for height in heights:
        crowds.append([height])
        while len(crowds) > 1 and _bottom(crowds[-1], gap) < _bottom(crowds[-2], gap) + gap * len(crowds[-2]):
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    apart = [_bottom(crowd, gap) + gap * place for crowd in crowds for place in range(len(crowd))]
    return [min(height, 1 - gap * above) for above, height in enumerate(reversed(apart))][::-1]


def _bottom(crowd: Sequence[float], gap: float) -> float:
    return sum(crowd) / len(crowd) - gap * (len(crowd) - 1) / 2
