"""`minrnn bench gpu`: the GPU engine's tests, followed by its timings."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks import plots
from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import differentiate, errors
from minrnn.benchmarks.layer import layer_systems
from minrnn.benchmarks.loops import LOOPS
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import Dtype, require
from minrnn.benchmarks.peers import LAYER_PEERS, SCAN_PEERS, LayerPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.scan import KIND as SCAN
from minrnn.benchmarks.scan import LIMIT, draw_inputs, scan_systems, share_table, traffic
from minrnn.benchmarks.session import Case, Kind, measure_case, that_compute_on, that_import
from minrnn.benchmarks.tables import Result, by_system, sizes
from minrnn.benchmarks.workloads import calls_in_a_row
from minrnn.files import NoEffect, warn_without_effect
from minrnn.ops import GATES, engines, gated_scan
from minrnn.ops.registry import load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BENCH", "GpuBench", "Sweep", "dry_sweep", "full_sweep"]

CHECKED_CHANNELS = 8  # they are independent of each other
CACHE_BYTES = 256 << 20  # several times a GPU's L2 cache, so that inputs are not in it
TESTS = Path(__file__).parents[3] / "tests" / "test_triton_gpu.py"

DRY_NOTE = (
    "**A dry run on the CPU.** It shows that the benchmark runs. No figure below says anything about a GPU, "
    "or about the engine's speed anywhere.\n\n"
)
CLASSIC = {"mingru": "gru", "minlstm": "lstm"}

Shape = tuple[int, int, int]
"""(B, T, D)."""

WITHOUT_EFFECT = tuple(NoEffect(name, "dry", lambda s: s["dry"]) for name in ("tests", "tf32"))
"""Options that have no effect where only a small part is run, on the CPU."""


@dataclass(frozen=True)
class GpuBench:
    """Run the GPU engine's tests on this machine's GPU, then measure its speed in three stages.

    If a test fails, nothing is timed. The stages are: the scan's throughput relative to the copy bandwidth,
    which is measured in turns with it; time and memory of training steps of MinGRU and MinLSTM, compared with
    loops in plain PyTorch (the paper's baseline) and cuDNN's GRU and LSTM; and other implementations of the
    scan, from pre-activations to states in (B, T, D). Writes JSON, Markdown and a plot.
    """

    minutes: float = 15.0
    """Minutes after which no further measurement starts; those left out are listed."""
    tests: bool = True
    """Run the engine's tests first; requires a checkout of the repository."""
    tf32: bool = False
    """Use TF32 in all float32 matrix products that are timed; results are compared without it."""
    dry: bool = False
    """Run a small part on the CPU, to test the benchmark; its results have no meaning."""
    output: Path | None = None
    """JSON file to write, with Markdown and a plot of the same name (None: runs/bench-gpu-TIME.json)."""

    def __post_init__(self) -> None:
        require("minutes", 0 <= self.minutes < float("inf"), "0 or more, and finite", self.minutes)
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)


class Sweep(NamedTuple):
    """The settings of the measurements."""

    device: torch.device
    shapes: Sequence[Shape]
    """Of the scan."""
    dtypes: Sequence[Dtype]
    """Of the scans."""
    batch: int
    lengths: Sequence[int]
    widths: Sequence[int]
    peer_shapes: Sequence[Shape]
    peers: Sequence[str]
    seconds: float
    """For each system in each case."""
    samples: int


def full_sweep() -> Sweep:
    """Return the settings on which statements about the GPU are based."""
    return Sweep(
        device=torch.device("cuda"),
        shapes=[(8, 4096, 2048), (64, 512, 256), (1, 1 << 20, 256)],
        dtypes=["float32", "bfloat16"],
        batch=64,
        lengths=[512, 4096],
        widths=[64, 256, 1024],
        peer_shapes=[(8, 4096, 2048), (64, 512, 256), (16, 16384, 128)],
        peers=[name for name, peer in SCAN_PEERS.items() if "cpu" not in peer.devices],
        seconds=1.0,
        samples=30,
    )


def dry_sweep() -> Sweep:
    """Return the smallest settings, for a CPU."""
    return Sweep(
        device=torch.device("cpu"),
        shapes=[(1, 64, 16)],
        dtypes=["float32"],
        batch=2,
        lengths=[8],
        widths=[8],
        peer_shapes=[(2, 32, 4)],
        peers=["loop", "mambapy"],
        seconds=0.01,
        samples=3,
    )


def bench_gpu(options: GpuBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark.

    Args:
        options: what to measure.
        command: the command-line arguments that repeat it.
        console: console for its tables.

    Returns:
        The report. Each of its results is that of a timed benchmark with its `stage`, a key in STAGES; the
        document also holds `tests` (status, seconds and the end of the output) and `left_out` (stage,
        setting and reason).

    Raises:
        ValueError: torch finds no GPU, or the tests are requested and missing.
        RuntimeError: a test fails, or a result of ours differs from the reference.
    """
    if not options.dry and not torch.cuda.is_available():
        raise ValueError("bench gpu: torch finds no CUDA device; --dry runs a small part on the CPU")
    if not options.dry and options.tests and not TESTS.is_file():
        raise ValueError(f"bench gpu: the tests are in a checkout only, not at {TESTS}; add --no-tests")
    end = time.monotonic() + 60 * options.minutes
    sweep = dry_sweep() if options.dry else full_sweep()
    report = Report("gpu", options.output, command, asdict(options), sweep.device, console)
    report.document |= {"tests": {"status": "not run"}, "left_out": []}
    if options.tests and not options.dry:
        report.document["tests"] = tested = run_tests(60 * options.minutes)
        report.write()
        if tested["status"] != "passed":
            report.say(tested["tail"])
            raise RuntimeError(f"bench gpu: the engine's tests: {tested['status']}; nothing is timed")
    try:
        with _float32_products(options.tf32):
            _measure(sweep, end, report)
    finally:
        path = report.write_text(render(report.document))
    report.say(render(report.document))
    report.say(f"tables: {path}")
    report.finish(_draw)
    return report


@contextmanager
def _float32_products(tf32: bool) -> Iterator[None]:
    """Context manager that switches TF32 on or off for float32 matrix products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _measure(sweep: Sweep, end: float, report: Report) -> None:
    """Measure all cases until time is up; leave out those for which time or memory does not suffice."""
    peers = {name: SCAN_PEERS[name] for name in sweep.peers}
    able = that_import(that_compute_on(sweep.device, peers, report), report)
    for name, stage in STAGES.items():
        for case in stage.cases(sweep):
            if time.monotonic() >= end:
                _leave_out(report, name, case, "time is up")
                continue
            try:
                systems = partial(stage.systems, case, able)
                measure_case(stage.kind, case, systems, sweep.seconds, sweep.samples, report, stage=name)
            except torch.cuda.OutOfMemoryError:
                _leave_out(report, name, case, "the device's memory does not suffice")
            if sweep.device.type == "cuda":
                torch.cuda.empty_cache()


def _leave_out(report: Report, stage: str, case: Case, reason: str) -> None:
    report.document["left_out"].append({"stage": stage, "setting": str(case), "reason": reason})
    report.say(f"left out: {stage}, {case}: {reason}")
    report.write()


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the engine's tests on this GPU, in parallel if pytest-xdist is installed.

    Args:
        seconds: the time limit.

    Returns:
        The status ("passed", "failed" or "not finished"), seconds, and the tail of the output.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", str(min(12, os.cpu_count() or 1))]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=TESTS.parents[1], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "not finished", "seconds": time.monotonic() - start, "tail": ""}
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
    passed = done.returncode == 0 and " passed" in tail  # skipped tests have not passed
    return {"status": "passed" if passed else "failed", "seconds": time.monotonic() - start, "tail": tail}


# ----------------------------------------------------------------------------------------------------------
# The stages


class Stage(NamedTuple):
    """One of the stages."""

    question: str
    """Heading of its table."""
    kind: Kind
    cases: Callable[[Sweep], Iterator[Case]]
    systems: Callable[[Case, Mapping[str, Any]], dict[str, System]]
    """(case, available scan peers) -> systems."""


def _case(gate: str, shape: Shape, dtype: Dtype, sweep: Sweep) -> Case:
    sizes = dict(zip("BTD", shape, strict=True))
    return Case(gate, sizes, dtype, torch.get_num_threads(), sweep.device, seed=0)


def _share_cases(sweep: Sweep) -> Iterator[Case]:
    for shape, dtype, gate in product(sweep.shapes, sweep.dtypes, CLASSIC):
        yield _case(gate, shape, dtype, sweep)


def _share_systems(case: Case, peers: Mapping[str, Any]) -> dict[str, System]:
    """Return the engine's forward and backward, and copies of as many bytes, all on cold inputs."""
    elements = case.shape["B"] * case.shape["T"] * case.shape["D"]
    moved = {phase: size * elements for phase, size in traffic(case.gate, case.torch_dtype).items()}
    drawn = [
        draw_inputs(replace(case, seed=seed), packed=True)
        for seed in range(1 + CACHE_BYTES // moved["forward"])
    ]
    sets = [([pre.detach()], dh) for (pre,), dh in drawn]
    engine, mode = _engine(case.device), (None, None, case.gate, "positive", False, False)
    states = [engine.forward(pre, *mode) for pre, _ in sets]

    def forward(index: int) -> Tensor:
        return engine.forward(sets[index % len(sets)][0], *mode)

    def backward(index: int) -> Sequence[Tensor]:
        pre, dh = sets[index % len(sets)]
        return engine.backward(dh, pre, states[index % len(sets)], *mode)

    halves = {phase: torch.ones(size // 8, device=case.device) for phase, size in moved.items()}
    copies = {phase: partial(_copy, torch.empty_like(half), half) for phase, half in halves.items()}
    ours = calls_in_a_row({"forward": forward, "backward": backward}, case.device)
    return {
        LIMIT: System(calls_in_a_row(copies, case.device), traffic=moved),
        OURS: System(ours, lambda: _check_channels(case.gate, *sets[0])),
    }


def _copy(target: Tensor, source: Tensor, index: int) -> None:
    target.copy_(source)


def _engine(device: torch.device) -> ModuleType:
    """Return the engine of a device, whose functions are timed without autograd."""
    names = [engine.name for engine in engines() if engine.serves and engine.device in (device.type, "any")]
    engine = load(names[0])
    assert isinstance(engine, ModuleType)
    return engine


def _check_channels(gate: str, pre: Sequence[Tensor], dh: Tensor) -> dict[str, float]:
    """Compare some channels of h and of the gradients with float64 on the CPU."""
    (packed,) = pre
    dh = dh[:, :, :CHECKED_CHANNELS].contiguous()
    parts = [part[:, :, :CHECKED_CHANNELS] for part in packed.chunk(GATES[gate].num_pre, -1)]
    found = []
    for convert in (lambda x: x, lambda x: x.double().cpu()):
        leaves = [convert(part.contiguous()).requires_grad_() for part in parts]
        found.append(differentiate(partial(gated_scan, gate, *leaves), leaves, convert(dh)))
    ours, exact = found
    return errors({name: value.cpu() for name, value in ours.items()}, exact)


def _step_cases(sweep: Sweep) -> Iterator[Case]:
    for T, D, cell in product(sweep.lengths, sweep.widths, CLASSIC):
        yield _case(cell, (sweep.batch, T, D), "float32", sweep)


def _step_systems(case: Case, peers: Mapping[str, Any]) -> dict[str, System]:
    """Return our layer, torch's (cuDNN's on a GPU), and the loop in plain PyTorch."""
    classic = CLASSIC[case.gate]
    loop = LayerPeer(
        build=lambda cell, input_size, hidden_size: LOOPS[f"{classic}-loop"](input_size, hidden_size),
        call=lambda layer, x, state: (layer(x), None),
        gates=(case.gate,),
    )
    layers = {classic: LAYER_PEERS[classic], f"{classic}-loop": loop}
    with _float32_products(tf32=False):
        systems = layer_systems(case, layers, case.shape["D"])
    compare = systems[OURS].errors

    def compare_in_float32() -> dict[str, float]:
        assert compare is not None
        with _float32_products(tf32=False):  # with TF32 no gradient of a weight is within the tolerance
            return compare()

    return {
        OURS: replace(systems[OURS], errors=compare_in_float32),
        **{name: systems[name] for name in layers},
    }


def _peer_cases(sweep: Sweep) -> Iterator[Case]:
    for shape, dtype in product(sweep.peer_shapes, sweep.dtypes):
        yield _case("mingru", shape, dtype, sweep)


def _peer_systems(case: Case, peers: Mapping[str, Any]) -> dict[str, System]:
    """Return all scans, forward and backward, on packed pre-activations."""
    systems = scan_systems(case, peers, packed=True)
    return {name: system for name, system in systems.items() if name != LIMIT}


STAGES = {
    "shares": Stage(
        "The scan's share of the copy bandwidth",
        replace(SCAN, unit="us", memory=False),
        _share_cases,
        _share_systems,
    ),
    "steps": Stage(
        "Training steps of a layer, against loops and cuDNN",
        replace(SCAN, limit=None, unit="us"),
        _step_cases,
        _step_systems,
    ),
    "peers": Stage(
        "Other implementations of the scan",
        replace(SCAN, limit=None, unit="us"),
        _peer_cases,
        _peer_systems,
    ),
}


# ----------------------------------------------------------------------------------------------------------
# The page and the plot


def render(document: Document) -> str:
    """Return the document as Markdown, with a table for each stage."""
    products = "TF32" if document["options"]["tf32"] else "float32 throughout"
    parts = [
        f"{document['device']}, {document['engines'].get('triton', 'no GPU engine')}, "
        f"torch {document['versions'].get('torch', '?')}. Products in float32: {products}. "
        f"The engine's tests: {document['tests']['status']}.",
        f"    {document['command']}",
    ]
    for name, stage in STAGES.items():
        if results := _of_stage(document, name):
            table = share_table if name == "shares" else partial(by_system, phases=SCAN.phases)
            parts += [f"## {stage.question}", table(results, unit="us").markdown()]
    parts += [
        f"Left out: {left['stage']}, {left['setting']}: {left['reason']}." for left in document["left_out"]
    ]
    return (DRY_NOTE if document["options"]["dry"] else "") + "\n\n".join(parts) + "\n"


BENCH = Bench(GpuBench, bench_gpu, render)


def _of_stage(document: Document, name: str) -> list[Result]:
    return [result for result in document["results"] if result["stage"] == name]


def _draw(document: Document) -> Figure:
    """Draw our shares of the copy bandwidth, and the others' times relative to ours."""
    panels = {
        f"{STAGES['shares'].question}, %": _share_bars(_of_stage(document, "shares")),
        "Training steps, times ours": _system_bars(_of_stage(document, "steps")),
        "Scans, times ours": _system_bars(_of_stage(document, "peers")),
    }
    panels = {title: values for title, values in panels.items() if values}
    if not panels:
        raise ValueError("nothing was measured")
    heights = [1 + 0.22 * len(values) for values in panels.values()]
    figure, all_axes = plots.new_figure(
        len(panels), 1, width=9, height=sum(heights) / len(panels), gridspec_kw={"height_ratios": heights}
    )
    for axes, (title, values) in zip(all_axes, panels.items(), strict=True):
        plots.bars(axes, title, values, log=title.endswith("ours"))
    dry = document["options"]["dry"]
    figure.suptitle("A dry run on the CPU: the figures have no meaning" if dry else document["device"])
    return figure


def _share_bars(results: Sequence[Result]) -> list[tuple[str, float]]:
    return [
        (
            f"{result['gate']} {phase}, {sizes(result)}, {result['dtype']}",
            100 * result["systems"][OURS]["share"][phase],
        )
        for result in results
        for phase in ("forward", "backward")
    ]


def _system_bars(results: Sequence[Result]) -> list[tuple[str, float]]:
    return [
        (f"{name}, {sizes(result)}, {result['dtype']}", record["times_ours"])
        for result in results
        for name, record in result["systems"].items()
        if name != OURS and "times_ours" in record
    ]
