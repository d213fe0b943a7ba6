"""Plots of benchmarks and experiments: a color for each system, names at the ends of lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minrnn.benchmarks.bench import OURS
from minrnn.training.extras import draw, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "Style",
    "band",
    "bars",
    "color",
    "draw_lines",
    "finish",
    "mixer_style",
    "name_ends",
    "new_figure",
    "save_figure",
    "save_plot",
    "system_style",
]

Line = Sequence[tuple[float, float]]
"""Points (x, y)."""

BLUE, BLACK = "#0b5fd6", "#222222"
MIXER_COLORS = {
    "mingru": BLUE,
    "minlstm": "#2a9d8f",
    "minlstm-unnormalised": "#8ab17d",
    "mingru-signed": "#6f9ceb",
    "minlstm-signed": "#57cc99",
    "rnn": "#9a9a9a",
    "gru": "#d1495b",
    "lstm": "#e08e2b",
    "gru-loop": "#7f1d2d",
    "lstm-loop": "#8a5a00",
    "attention": BLACK,
    "transformer": "#555555",
    "aaren": "#8d5a97",
    "mamba": "#b5179e",
    "s4d": "#7a6a53",
    "bc": "#c9a227",
    "attention-joined": "#777777",
    "attention-sliding": "#999999",
    "attention-whole": "#bb3333",
}
EMPHASIZED = ("mingru", "minlstm")
UNKNOWN = "#3b8ea5"
PEER_COLORS = ("#d1495b", "#e08e2b", "#6a994e", "#8d5a97", "#7a6a53", "#3b8ea5", "#9a9a9a", "#b5838d")


class Style(NamedTuple):
    """The style of a line."""

    color: str
    dashed: bool = False
    emphasized: bool = False


def color(name: str) -> str:
    """Return a mixer's color."""
    return MIXER_COLORS.get(name, UNKNOWN)


def mixer_style(name: str) -> Style:
    """Return a mixer's style: ours are emphasized, loops are dashed."""
    return Style(color(name), name.endswith("-loop"), name in EMPHASIZED)


def system_style(names: Iterable[str], limit: str | None) -> Callable[[str], Style]:
    """Return the styles of a benchmark's lines, whose names begin with the system's.

    Args:
        names: names of all lines.
        limit: the system that is an upper bound; it and lines of 16-bit dtypes are dashed.
    """
    peers = cycle(PEER_COLORS)
    systems = dict.fromkeys(name.split()[0] for name in names)
    colors = {system: {OURS: BLUE, limit: BLACK}.get(system) or next(peers) for system in systems}
    return lambda name: Style(
        colors[name.split()[0]], name == limit or name.endswith("16"), name.split()[0] == OURS
    )


def new_figure(
    rows: int, columns: int, *, width: float = 5.2, height: float = 4.0, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row.

    Args:
        rows: number of rows.
        columns: number of columns.
        width: width of a panel in inches.
        height: height of a panel in inches.
        options: keyword arguments of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def draw_lines(
    axes: Axes, lines: Mapping[str, Line], style: Callable[[str], Style] = mixer_style, *, marker: str = "o"
) -> None:
    """Draw a line for each name through its points, sorted by x."""
    for name, points in lines.items():
        if not points:
            continue
        color, dashed, emphasized = style(name)
        axes.plot(
            *zip(*sorted(points), strict=True),
            label=name,
            color=color,
            linestyle="--" if dashed else "-",
            linewidth=2.4 if emphasized else 1.4,
            marker=marker,
            markersize=4,
            zorder=3 if emphasized else 2,
        )


def band(axes: Axes, name: str, xs: Sequence[float], runs: Sequence[Sequence[float]]) -> None:
    """Draw the mean of several runs at common xs, and the range from the lowest to the highest."""
    columns = list(zip(*runs, strict=True))
    axes.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=color(name), alpha=0.15)
    means = [sum(column) / len(column) for column in columns]
    axes.plot(xs, means, color=color(name), linewidth=2.0, label=name)


def bars(axes: Axes, title: str, values: Sequence[tuple[str, float]], *, log: bool = False) -> None:
    """Draw horizontal bars with their labels and values, the first at the top."""
    labels, lengths = zip(*values, strict=True)
    drawn = axes.barh(range(len(values)), lengths, color=BLUE)
    axes.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
    axes.set_yticks(range(len(values)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=min(0.5, *lengths))


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, *, log: str = "", names: str = "ends") -> None:
    """Give a panel its title, labels and scales.

    Args:
        axes: the panel.
        title: the panel's title.
        xlabel: label of the x axis.
        ylabel: label of the y axis.
        log: the logarithmic axes: "", "x", "y" or "xy".
        names: "ends" names each line at its right end, "legend" in a box, "none" nowhere.
    """
    if "x" in log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(_few_powers(axes))
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if names == "ends" and axes.lines:
        name_ends(axes)
    elif names == "legend" and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def _few_powers(axes: Axes) -> Callable[[float, float], str]:
    """Return a formatter of the ticks between powers of ten: some have labels where there are few powers."""
    low, high = axes.get_ylim()
    labelled = "" if high > 100 * low else "25" if high > 10 * low else "23457"
    return lambda value, _: f"{value:g}" if f"{value:e}"[0] in labelled else ""


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
    """Move sorted heights apart until neighbors are at least `gap` apart; groups keep their centers.

    The result stays below 1 unless there are too many heights.

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


def save_plot(make: Callable[[], Figure], path: Path) -> str | None:
    """Save a figure as a PNG file; return None, or why there is no plot."""
    return draw(lambda: save_picture(make(), path, dpi=130))


def save_figure(make: Callable[[], Figure], folder: Path) -> str | None:
    """Save a figure as plot.png and plot.svg in a folder.

    Returns:
        None, or the reason if there is no plot.
    """

    def save() -> None:
        import matplotlib

        figure = make()
        save_picture(figure, folder / "plot.png", dpi=130)
        # Equal results give equal files: no date, and element ids that do not depend on the process.
        with matplotlib.rc_context({"svg.hashsalt": "minrnn"}):
            save_picture(figure, folder / "plot.svg", metadata={"Date": None})

    return draw(save)
