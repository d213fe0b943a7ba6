"""`minrnn bench kernels`: the GPU engine's kernels, compiled for GPUs that need not be present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from minrnn.benchmarks.bench import Bench, Document
from minrnn.benchmarks.options import DTYPES, Dtype, parse_shapes, require
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.tables import Table

__all__ = ["BENCH", "KernelsBench"]


@dataclass(frozen=True)
class KernelsBench:
    """Compile the GPU engine's kernels and count bytes, registers and instructions; needs Triton, but no GPU.

    The bytes of the rows that a program moves are counted in the kernels' intermediate code. Registers,
    spilled bytes and instructions, including those for incomplete chunks, are counted in the assembly. The
    messages between programs, which mostly stay in the GPU's cache, are computed. Writes JSON and Markdown.
    """

    shapes: tuple[str, ...] = ("8x4096x2048", "1x1048576x256")
    """BxTxD: batch, length, channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    gates: tuple[Literal["mingru", "minlstm"], ...] = ("mingru", "minlstm")
    """Gates of the recurrence."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Dtypes of the pre-activations."""
    capabilities: tuple[Literal[80, 90], ...] = (80, 90)
    """Compute capabilities: 80 for the A100, 90 for the H100."""
    output: Path | None = None
    """JSON file to write, with Markdown of the same name beside it (None: runs/bench-kernels-TIME.json)."""

    def __post_init__(self) -> None:
        for name in ("shapes", "gates", "dtypes", "capabilities"):
            require(name, bool(getattr(self, name)), "at least one", getattr(self, name))


def bench_kernels(options: KernelsBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark.

    Args:
        options: what to compile.
        command: the command-line arguments that repeat it.
        console: console for its table.

    Returns:
        The report, with a result for each kernel.

    Raises:
        ValueError: an option is not valid here.
        RuntimeError: Triton is not installed.
    """
    shapes = parse_shapes(options.shapes, "BTD")
    try:
        compiled = import_module("minrnn.benchmarks.compiled")
    except ImportError as error:
        raise RuntimeError(f"bench kernels: needs Triton, pip install 'minrnn[gpu]' ({error})") from error
    report = Report("kernels", options.output, command, asdict(options), torch.device("cpu"), console)
    for capability, gate, dtype, shape in product(
        options.capabilities, options.gates, options.dtypes, shapes
    ):
        for result in compiled.count(gate, DTYPES[dtype], shape, capability):
            report.add(result)
    text = render(report.document)
    report.say(text.rstrip())
    report.say(f"table: {report.write_text(text)}")
    report.finish()
    return report


def render(document: Document) -> str:
    """Return a table with a row for each kernel."""
    head = [
        "card, gate, dtype",
        "B x T x D",
        "",
        "bytes an element",
        "budget",
        "messages",
        "steps in a chunk",
    ]
    head += ["registers", "spilled, bytes", "instructions a step"]
    rows = [
        [
            f"sm_{r['capability']} {r['gate']} {r['dtype']}",
            " x ".join(f"{size:,}" for size in r["shape"]),
            r["direction"],
            *map(str, (r["bytes"], r["budget"], f"{r['message_bytes']:.2f}", r["steps"], r["registers"])),
            *map(str, (r["stack_bytes"], f"{r['instructions_a_step']:.0f}")),
        ]
        for r in document["results"]
    ]
    return Table("", head, rows).markdown() + "\n"


BENCH = Bench(KernelsBench, bench_kernels, render)
