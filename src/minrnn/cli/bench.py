"""`minrnn bench`: time and check the engines and layers beside other implementations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from minrnn.benchmarks import (
    AccuracyBench,
    DecodeBench,
    LayerBench,
    ScanBench,
    bench_accuracy,
    bench_decode,
    bench_layer,
    bench_scan,
)
from minrnn.cli.arguments import parse
from minrnn.files import nearest
from minrnn.training import Output


class Bench(NamedTuple):
    """A benchmark: its options, what runs it, and its line in the help."""

    options: type[Any]
    run: Callable[[Any, Sequence[str], Console], object]
    help: str


BENCHES: dict[str, Bench] = {
    "scan": Bench(ScanBench, bench_scan, "gated scans: time, share of the copy bandwidth, peak memory"),
    "layer": Bench(LayerBench, bench_layer, "training steps of whole layers beside GRU, LSTM and Linear"),
    "decode": Bench(DecodeBench, bench_decode, "latency of single steps from a carried state"),
    "accuracy": Bench(AccuracyBench, bench_accuracy, "errors against a float64 loop as sequences grow"),
}

WIDTH = 150  # of the tables where there is no terminal


def run(args: Sequence[str]) -> int:
    """Run `minrnn bench`."""
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0)
    name, *rest = args
    if name not in BENCHES:
        raise ValueError(f"bench: unknown benchmark {name!r}{nearest(name, BENCHES)} ({', '.join(BENCHES)})")
    bench = BENCHES[name]
    options = parse(bench.options, f"bench {name}", rest)
    console = Output()
    bench.run(options, rest, console if console.is_terminal else Output(width=WIDTH))
    return 0


def help_text() -> str:
    """Return what `minrnn bench --help` prints."""
    return "\n".join(
        [
            "usage: minrnn bench BENCHMARK [OPTIONS]",
            "",
            "Check and time the engines and layers beside other implementations that are installed.",
            "",
            "benchmarks:",
            *(f"  {name:8}  {bench.help}" for name, bench in BENCHES.items()),
            "",
            "`minrnn bench BENCHMARK -h` shows a benchmark's options.",
        ]
    )
