"""Figure 1: time and memory of a training step against sequence length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from minrnn.benchmarks.loops import LOOPS
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.plots import Line, draw_lines, finish, new_figure
from minrnn.benchmarks.workloads import training_step
from minrnn.experiments.experiment import Record, Table
from minrnn.experiments.published import Published, derived, published
from minrnn.experiments.timed import TimedExperiment, TimedSize, growth, scaled, series
from minrnn.experiments.variants import every_mixer, settings_of
from minrnn.mixers import MIXERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64

SPEED_PAIRS = (("gru-loop", "mingru"), ("gru", "mingru"), ("lstm-loop", "minlstm"), ("lstm", "minlstm"))
"""(baseline, ours): the paper's loops, and torch's compiled layers."""

MEMORY_PAIRS = (
    ("mingru", "gru"),
    ("mingru", "gru-loop"),
    ("minlstm", "lstm"),
    ("minlstm", "lstm-loop"),
    ("mamba", "mingru"),
)
"""(numerator, denominator) of the ratios of memory, as in the paper."""

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class RuntimeSize(TimedSize):
    """The settings of a scale."""

    batch: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]


class Runtime(TimedExperiment):
    """Time a training step of one layer."""

    name = "runtime"
    title = "Runtime and memory against length (figure 1)"
    question = (
        "Forward and backward of one layer, (B, T, D) in and out, batch 64, synchronized, all in turns "
        "within one process; medians. `gru-loop` and `lstm-loop` are plain loops over time in PyTorch, "
        "the paper's baselines; `gru`, `lstm` and `rnn` are torch's own, compiled. "
        "*Growth* is the exponent p of a fit time ~ T^p over the upper half of the lengths. *Memory* is "
        "that of a step at its peak, beyond input and weights."
    )
    changes = (
        "The paper states neither the width nor the number of its layers; here it is one layer of several "
        "widths. cpu: widths 64 and 128, at least three rounds in place of 100. paper: widths 64, 256 and "
        "1,024 and 100 rounds, on the available GPU in place of a T4."
    )
    sizes: ClassVar = {
        "cpu": RuntimeSize(1.5, 20, BATCH, (64, 128), LENGTHS),
        "paper": RuntimeSize(60.0, 100, BATCH, (64, 256, 1024), LENGTHS),
        "tiny": RuntimeSize(0.01, 3, 2, (8,), (4, 8, 16)),
    }

    def systems(self) -> Sequence[str]:
        return [*every_mixer(), *LOOPS]

    def settings(self, size: RuntimeSize) -> Iterator[dict[str, Any]]:
        for width in size.widths:
            for length in size.lengths:
                yield {"B": size.batch, "D": width, "T": length}

    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (setting["B"], setting["T"], setting["D"])
        x = torch.randn(shape, device=device, requires_grad=True)
        return x, torch.randn(shape, device=device)

    def build(self, system: str, setting: Mapping[str, Any], inputs: tuple[Tensor, Tensor]) -> System:
        x, dy = inputs
        layer = make_layer(system, setting["D"]).to(x.device)

        def call() -> Tensor:
            y = layer(x)
            return y[0] if isinstance(y, tuple) else y

        parameters = sum(parameter.numel() for parameter in layer.parameters())
        workload = training_step(call, [x, *layer.parameters()], dy)
        return System(workload, facts={"parameters": parameters})

    def tables(self, records: Sequence[Record]) -> list[Table]:
        widths = sorted({record["setting"]["D"] for record in records})
        tables = [table for width in widths for table in _tables(records, width)]
        return [*tables, published_table()]

    def draw(self, records: Sequence[Record]) -> Figure:
        widths = sorted({record["setting"]["D"] for record in records})
        figure, panels = new_figure(len(widths), 3)
        for row, width in enumerate(widths):
            time, memory, faster = panels[3 * row : 3 * row + 3]
            steps = series(records, "T", "step", D=width)
            draw_lines(time, scaled(steps, 1e3))
            finish(time, f"width {width}: training step", "T", "milliseconds", log="xy")
            peaks = series(records, "T", "peak_bytes", D=width)
            draw_lines(memory, scaled(peaks, 1e-6))
            finish(memory, f"width {width}: memory at the peak", "T", "MB", log="xy")
            for (other, ours), line in _over(steps, SPEED_PAIRS).items():
                draw_lines(faster, {other: line})
                faster.lines[-1].set_label(f"{ours} against {other}")
            finish(faster, f"width {width}: times faster", "T", "time over ours", log="xy")
        return figure


def make_layer(system: str, width: int) -> nn.Module:
    """Return one layer: a mixer, a variant, or a loop."""
    if system in LOOPS:
        return LOOPS[system](width, width)
    options = settings_of(system)
    return MIXERS[options.pop("mixer")](width, width, **options)


def published_table() -> Table:
    """Return the figures published by the paper and by a replication, measured on their machines."""
    paper, replication = "paper, T4", "replication, D = 256, half precision"
    rows: list[list[str | Published]] = [
        [
            paper,
            "minGRU / minLSTM / Mamba, ms",
            published("2.72 / 2.97 / 2.71"),
            published("3.25 / 3.41 / 3.15"),
            "",
        ],
        [paper, "time of GRU's loop over minGRU's", published("175"), published("1,324"), ""],
        [paper, "time of LSTM's loop over minLSTM's", published("235"), published("1,361"), ""],
        [paper, "GRU's / LSTM's loop, ms", derived("476 / 698"), derived("4,303 / 4,641"), ""],
        [paper, "memory of minGRU and minLSTM over GRU's and LSTM's", "", "", published("1.88")],
        [paper, "memory of Mamba over minGRU's", "", "", published("1.56")],
        [replication, "time of GRU's loop over minGRU's", *_replicated("50", "56"), ""],
        [replication, "memory of minGRU over GRU's", *_replicated("1.19", "1.21"), ""],
    ]
    note = (
        "Published figures alone, of other machines; the replication is a course project's (MVA). The "
        "paper's loop and the replication's take about the same milliseconds: one for each step of time, "
        "which is the cost of starting kernels."
    )
    head = ["source", "figure", "T = 512", "T = 4,096", "length not given"]
    texts = [[str(figure) for figure in row] for row in rows]
    return Table("Published: time and memory, batch 64", head, texts, note)


def _replicated(*texts: str) -> list[Published]:
    return [published(text, "a notebook of the MVA course, GPU not named") for text in texts]


def _tables(records: Sequence[Record], width: int) -> Iterator[Table]:
    steps, peaks = (series(records, "T", figure, D=width) for figure in ("step", "peak_bytes"))
    lengths = sorted({record["setting"]["T"] for record in records if record["setting"]["D"] == width})
    columns = [f"T = {T:,}" for T in lengths]
    rows = []
    for name, line in steps.items():
        at = dict(line)
        times = [f"{1e3 * at[T]:.3g}" if T in at else "failed" for T in lengths]
        rows.append([name, *times, growth(line)])
    yield Table(f"Training step in milliseconds, width {width}", ["system", *columns, "growth"], rows)
    rows = [[name, *_at(line, lengths, 1e-6)] for name, line in peaks.items()]
    yield Table(f"Memory of a step at its peak in MB, width {width}", ["system", *columns], rows)
    if less := _over(peaks, MEMORY_PAIRS):
        rows = [[one, other, *_at(line, lengths)] for (one, other), line in less.items()]
        yield Table(f"Memory, times as much, width {width}", ["memory of", "over that of", *columns], rows)
    if faster := _over(steps, SPEED_PAIRS):
        rows = [[ours, other, *_at(line, lengths)] for (other, ours), line in faster.items()]
        note = "*-loop*: plain PyTorch, as the paper measured."
        yield Table(f"Times faster, width {width}", ["faster", "than", *columns], rows, note)


def _over(lines: Mapping[str, Line], pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Line]:
    """Return the ratio of the first of each pair to the second, at each length that both have."""
    found: dict[tuple[str, str], Line] = {}
    for one, other in pairs:
        below = dict(lines.get(other, ()))
        if line := [(T, value / below[T]) for T, value in lines.get(one, ()) if T in below]:
            found[one, other] = line
    return found


def _at(line: Line, lengths: Sequence[int], scale: float = 1.0) -> list[str]:
    """Return a line's values at these lengths as strings, empty where it has none."""
    values = dict(line)
    return [f"{scale * values[T]:.3g}" if T in values else "" for T in lengths]


EXPERIMENT = Runtime()
