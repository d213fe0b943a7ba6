"""`minrnn bench accuracy`: the error against a float64 loop by sequence length, compared with log space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console
from rich.table import Table as LiveTable
from torch import Tensor

from minrnn.benchmarks import plots
from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import differentiate, errors, scan_reference
from minrnn.benchmarks.options import DTYPES, Dtype, lengths, require, require_seed, select
from minrnn.benchmarks.peers import SCAN_PEERS, Scan
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import that_compute_on, that_import
from minrnn.benchmarks.tables import Table
from minrnn.ops import GATES, gated_scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BENCH", "FORGETTING", "AccuracyBench"]

SHOWN_LENGTHS = (2**8, 2**12, 2**16, 2**20)
"""The default lengths that the table shows."""

FORGETTING = {"fast": -4.0, "medium": 0.0, "slow": 6.0}
"""The logit of the decay around which the gates vary."""


@dataclass(frozen=True)
class AccuracyBench:
    """Measure the largest error against a float64 loop, relative to the largest value, by sequence length.

    Both states and gradients are measured, for slow, medium and fast forgetting. Inputs are exact in 16 bits,
    so that every dtype gets the same problem.
    """

    lengths: str = "256..1048576"
    """Lengths T; 256..1048576 stands for 256, 512, ... up to 2^20."""
    gates: tuple[Literal["mingru", "minlstm", "minlstm_unnormalized"], ...] = ("mingru",)
    """Gates of the recurrence."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Dtypes of inputs and states."""
    peers: tuple[str, ...] = ("log-space",)
    """Peers to compare with: names (an unknown one lists them all), all that are installed, or none."""
    channels: int = 8
    """Channels D; the error is the largest over all of them."""
    seed: int = 0
    """Seed of the inputs."""
    output: Path | None = None
    """JSON file to write, with a plot of the same name beside it (None: runs/bench-accuracy-TIME.json)."""

    def __post_init__(self) -> None:
        require("gates", bool(self.gates), "at least one", self.gates)
        require("dtypes", bool(self.dtypes), "at least one", self.dtypes)
        require("channels", self.channels >= 1, "1 or more", self.channels)
        require_seed(self.seed)


def bench_accuracy(options: AccuracyBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark.

    Args:
        options: what to measure.
        command: the command-line arguments that repeat it.
        console: console for its tables.

    Returns:
        The report, written and plotted. Each of its results holds gate, T, forgetting, system, dtype, and
        `error`: of h and gradients, relative to the largest value (null: not finite). The document's
        `half_lives` are the numbers of steps in which a typical gate of each kind of forgetting halves the
        state.

    Raises:
        ValueError: an option is not valid here.
    """
    peers = select(options.peers, SCAN_PEERS)
    all_lengths = lengths(options.lengths)
    report = Report("accuracy", options.output, command, asdict(options), torch.device("cpu"), console)
    report.document["half_lives"] = {name: _half_life(bias) for name, bias in FORGETTING.items()}
    able = that_import(that_compute_on(torch.device("cpu"), peers, report), report)
    for gate in options.gates:
        scans: dict[str, Scan] = {OURS: lambda gate, pre: gated_scan(gate, *pre)}
        scans |= {name: peer.scan() for name, peer in able.items() if gate in peer.gates}
        for T in all_lengths:
            _measure_length(gate, T, options, scans, report)
    report.finish(_draw)
    return report


def render(document: Document) -> str:
    """Return a table of the error of h, by system, kind of forgetting, and length."""
    results = document["results"]
    keys = [*(["gate"] if len({result["gate"] for result in results}) > 1 else []), "system", "forgetting"]
    measured = sorted({result["T"] for result in results})
    shown = [T for T in SHOWN_LENGTHS if T in measured] or measured
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for result in results:
        named = {**result, "system": f"{result['system']} {result['dtype']}"}
        row = rows.setdefault(tuple(named[key] for key in keys), {})
        row[result["T"]] = _text(result["error"]["h"])
    cells = [[*names, *(row[T] for T in shown)] for names, row in rows.items()]
    return Table("", [*keys, *(f"T = {T:,}" for T in shown)], cells).markdown()


BENCH = Bench(AccuracyBench, bench_accuracy, render)


def _text(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.1e}"


def _draw(document: Document) -> Figure:
    """Draw the error of h against the length, one panel for each kind of forgetting."""
    results = document["results"]
    panels = list(dict.fromkeys((result["gate"], result["forgetting"]) for result in results))
    figure, all_axes = plots.new_figure(1, len(panels), width=4.2, height=4.4, sharey=True)
    figure.suptitle("Largest error of h against a float64 loop, relative to the largest value", fontsize=12)
    for axes, (gate, forgetting) in zip(all_axes, panels, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for result in results:
            if (result["gate"], result["forgetting"]) == (gate, forgetting) and result["error"]["h"]:
                name = f"{result['system']} {result['dtype']}"
                lines.setdefault(name, []).append((result["T"], result["error"]["h"]))
        plots.draw_lines(axes, lines, plots.system_style(lines, None))
        half_life = float(f"{document['half_lives'][forgetting]:.2g}")
        title = f"{gate}, {forgetting} forgetting (half-life {half_life:g} steps)"
        plots.finish(axes, title, "T", "", log="xy", names="none")
    for axes in all_axes:  # after their common scale is known
        plots.name_ends(axes)
    return figure


def _half_life(bias: float) -> float:
    """Return the number of steps in which a decay of sigmoid(bias) halves the state."""
    return math.log(2) / math.log1p(math.exp(-bias))


def _measure_length(
    gate: str, T: int, options: AccuracyBench, scans: dict[str, Scan], report: Report
) -> None:
    pre, dh = _inputs(gate, T, options)
    exact = scan_reference(gate, pre, dh)
    table = LiveTable(
        "", *FORGETTING, title=f"{gate}, T = {T}", title_justify="left", box=None, pad_edge=False
    )
    for dtype in options.dtypes:
        for name, scan in scans.items():
            found = _errors(scan, gate, [x.to(DTYPES[dtype]) for x in pre], dh.to(DTYPES[dtype]), exact)
            for forgetting, error in zip(FORGETTING, found, strict=True):
                report.document["results"].append(
                    {
                        "gate": gate,
                        "T": T,
                        "forgetting": forgetting,
                        "system": name,
                        "dtype": dtype,
                        "error": {k: v if math.isfinite(v) else None for k, v in error.items()},
                    }
                )
            table.add_row(f"{name} {dtype}", *(f"{error['h']:.1e}" for error in found))
    report.write()
    report.console.print(table)


def _inputs(gate: str, T: int, options: AccuracyBench) -> tuple[list[Tensor], Tensor]:
    """Draw pre-activations, with one batch row for each kind of forgetting, and the gradient of h."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (len(FORGETTING), T, options.channels)
    pre = [torch.randn(shape, generator=generator) for _ in GATES[gate].pre]
    keep = torch.tensor(list(FORGETTING.values()))[:, None, None]
    if gate == "mingru":  # decay 1 - z
        pre[0] -= keep
    else:  # decay f, or f / (f + i)
        pre[0] += keep
        pre[1] -= keep
    dh = torch.randn(shape, generator=generator)
    return [x.bfloat16().float() for x in pre], dh.bfloat16().float()


def _errors(
    scan: Scan, gate: str, pre: list[Tensor], dh: Tensor, exact: dict[str, Tensor]
) -> list[dict[str, float]]:
    """Return the errors of h and of the gradients, for each row."""
    leaves = [x.requires_grad_() for x in pre]
    found = differentiate(lambda: scan(gate, leaves), leaves, dh)
    return [errors(_row(found, row), _row(exact, row)) for row in range(len(FORGETTING))]


def _row(tensors: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row] for name, tensor in tensors.items()}
