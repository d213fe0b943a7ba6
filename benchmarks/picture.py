"""Draw the README's picture from the committed results: python benchmarks/picture.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLUE, RED, ORANGE, GRAY = "#0b5cd6", "#d1495b", "#e08e26", "#555555"
LAYERS = {
    "minrnn": ("minrnn's MinGRU", BLUE),
    "gru": ("torch.nn.GRU", RED),
    "mingru-pytorch": ("minGRU-pytorch (log space)", ORANGE),
    "linear": ("its matrix product alone", GRAY),
}
# Points, for labels that would meet.
LIFT = {"torch.nn.GRU": -6, LAYERS["mingru-pytorch"][0]: 5, LAYERS["minrnn"][0]: 6, LAYERS["linear"][0]: -7}
SYSTEMS = {"minrnn": ("minrnn", BLUE), "log-space": ("minGRU-pytorch (log space)", ORANGE)}


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_speed(left, read("layer-lengths"))
    draw_accuracy(right, read("accuracy"))
    path = ROOT / "docs" / "images" / "speed-and-accuracy.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_speed(axes: Axes, report: dict[str, Any]) -> None:
    """Training-step time of a layer against length."""
    shape = report["results"][0]["shape"]
    lines: dict[str, list[tuple[int, float]]] = {name: [] for name in LAYERS}
    for result in report["results"]:
        for name in LAYERS:
            step = result["systems"][name]["seconds"]["step"]
            lines[name].append((result["shape"]["T"], step["median"] * 1e3))
    for name, (label, color) in LAYERS.items():
        draw_line(axes, lines[name], label, color, dashed=name == "linear")
    axes.set_title(
        f"Training step of a layer, ms (B = {shape['B']}, D = {shape['D']}, two cores)",
        fontsize=10,
        loc="left",
    )
    finish(axes)


def draw_accuracy(axes: Axes, report: dict[str, Any]) -> None:
    """Error against length, where forgetting is fast."""
    for system, (label, color) in SYSTEMS.items():
        points = [
            (result["T"], result["error"]["h"])
            for result in report["results"]
            if (result["system"], result["dtype"], result["forgetting"]) == (system, "float32", "medium")
        ]
        draw_line(axes, points, label, color)
    axes.set_title("Largest error against a float64 loop, relative (float32)", fontsize=10, loc="left")
    finish(axes)


def draw_line(
    axes: Axes, points: list[tuple[int, float]], label: str, color: str, *, dashed: bool = False
) -> None:
    points = sorted(points)
    lengths, values = zip(*points, strict=True)
    axes.plot(lengths, values, color=color, marker="o", markersize=3, linestyle="--" if dashed else "-")
    axes.annotate(
        label,
        points[-1],
        (6, LIFT.get(label, 0)),
        textcoords="offset points",
        color=color,
        va="center",
        fontsize=9,
    )


def finish(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sequence length T")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
