"""How experiments draw: one colour for each mixer everywhere, names at the ends of lines, PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minrnn.benchmarks.plots import name_ends
from minrnn.training.extras import draw as attempt_to_draw
from minrnn.training.extras import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Line", "band", "colour", "draw_lines", "finish", "new_figure", "save_figure"]

Line = Sequence[tuple[float, float]]

COLOURS = {
    "mingru": "#0b5fd6",
    "minlstm": "#2a9d8f",
    "minlstm-unnormalised": "#8ab17d",
    "mingru-signed": "#6f9ceb",
    "minlstm-signed": "#57cc99",
    "rnn": "#9a9a9a",
    "gru": "#d1495b",
    "lstm": "#e08e2b",
    "gru-loop": "#7f1d2d",
    "lstm-loop": "#8a5a00",
    "attention": "#222222",
    "transformer": "#555555",
    "aaren": "#8d5a97",
    "mamba": "#b5179e",
    "s4d": "#7a6a53",
    "bc": "#c9a227",
    "attention-joined": "#777777",
    "attention-sliding": "#999999",
    "attention-whole": "#bb3333",
}
OURS = ("mingru", "minlstm")
UNKNOWN = "#3b8ea5"


def colour(name: str) -> str:
    """Return a mixer's colour."""
    return COLOURS.get(name, UNKNOWN)


def new_figure(
    rows: int, columns: int, *, width: float = 5.2, height: float = 4.0
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row; sizes are inches of a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_lines(axes: Axes, lines: Mapping[str, Line], *, marker: str = "o") -> None:
    """Draw a line for each mixer in its colour, points sorted; ours are thick, and loops are dashed."""
    for name, points in lines.items():
        if not points:
            continue
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(
            xs,
            ys,
            label=name,
            color=colour(name),
            linestyle="--" if name.endswith("-loop") else "-",
            linewidth=2.4 if name in OURS else 1.4,
            marker=marker,
            markersize=4,
            zorder=3 if name in OURS else 2,
        )


def band(axes: Axes, name: str, xs: Sequence[float], runs: Sequence[Sequence[float]]) -> None:
    """Draw the mean of several runs over common xs, and the span from the lowest to the highest."""
    columns = list(zip(*runs, strict=True))
    axes.fill_between(
        xs, [min(c) for c in columns], [max(c) for c in columns], color=colour(name), alpha=0.15
    )
    means = [sum(column) / len(column) for column in columns]
    axes.plot(xs, means, color=colour(name), linewidth=2.0, label=name)


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, *, log: str = "", names: str = "ends") -> None:
    """Give a panel its title, labels and scales.

    Args:
        axes: the panel.
        title: what it shows.
        xlabel: the axis from left to right.
        ylabel: the axis upwards.
        log: the axes that are logarithmic: "", "x", "y" or "xy".
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
    """Return what labels the ticks between powers of ten: some of them, where there are few powers."""
    low, high = axes.get_ylim()
    labelled = "" if high > 100 * low else "25" if high > 10 * low else "23457"
    return lambda value, _: f"{value:g}" if f"{value:e}"[0] in labelled else ""


def save_figure(draw: Callable[[], Figure], folder: Path) -> str | None:
    """Draw plot.png and plot.svg into a folder.

    Returns:
        None, or, where there can be no plot, the reason.
    """

    def save() -> None:
        import matplotlib

        figure = draw()
        save_picture(figure, folder / "plot.png", dpi=130)
        # The same results give the same file: no date, and names of parts that do not depend on the process.
        with matplotlib.rc_context({"svg.hashsalt": "minrnn"}):
            save_picture(figure, folder / "plot.svg", metadata={"Date": None})

    return attempt_to_draw(save)
