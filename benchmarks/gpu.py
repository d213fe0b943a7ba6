"""The GPU engine on a GPU: its laws, then its speed, in one command.

    python benchmarks/gpu.py                # some ten minutes; results are saved as they come
    python benchmarks/gpu.py --minutes 4    # what does not fit is left out, and said to be
    python benchmarks/gpu.py --dry          # seconds, on a CPU: shows that the script runs, and nothing else

First the tests of tests/test_triton_gpu.py; if one fails, nothing is timed. Then three questions, the first
one first: what share of the copy bandwidth, measured in turns with it, the scan reaches; how long training
steps of MinGRU and MinLSTM take and what memory they need, beside loops in plain PyTorch (which the paper
measured itself against) and cuDNN's GRU and LSTM; how other implementations of the scan compare, from
pre-activations to states in (B, T, D). Writes a JSON file and, beside it, the same as Markdown and as a
picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minrnn import MinGRU, MinLSTM, gated_scan
from minrnn.benchmarks.check import TOLERANCE, errors, layer_reference, scan_reference
from minrnn.benchmarks.measure import OURS, Record, System, measure
from minrnn.benchmarks.peers import LAYER_PEERS, SCAN_PEERS, Scan
from minrnn.benchmarks.scan import traffic
from minrnn.benchmarks.timing import Phases, Task, clock, summary
from minrnn.experiments.loops import LOOPS
from minrnn.files import write_json
from minrnn.ops import GATES, engines
from minrnn.training import provenance
from minrnn.training.extras import FOREIGN_ERRORS

ROOT = Path(__file__).parents[1]
FORMAT = 1
CHANNELS = 8  # that are compared with the CPU's float64: they are independent
ROWS = 2  # of a layer's batch, likewise
CACHE = 256 << 20  # bytes: several times a GPU's L2 cache, so that calls do not find their inputs there
SETTLED = 2e-3  # seconds: calls are timed in bursts of this length at least

DRY_NOTE = (
    "**A dry run on the CPU.** It shows that the script runs. No figure below says anything about a GPU, or "
    "about the engine's speed anywhere.\n\n"
)
QUESTIONS = {
    "shares": "The scan's share of the copy bandwidth",
    "steps": "Training steps of a layer, against loops and cuDNN",
    "peers": "Other implementations of the scan",
}

Shape = tuple[int, int, int]


class Plan(NamedTuple):
    """What is measured."""

    device: torch.device
    shapes: Sequence[Shape]
    """Of the scan, (B, T, D)."""
    dtypes: Sequence[torch.dtype]
    batch: int
    lengths: Sequence[int]
    widths: Sequence[int]
    peer_shapes: Sequence[Shape]
    peers: Sequence[str]
    seconds: float
    """For each system in each setting."""
    samples: int


def full() -> Plan:
    """Return what the GPU's claims are about."""
    return Plan(
        device=torch.device("cuda"),
        shapes=[(8, 4096, 2048), (64, 512, 256), (1, 1 << 20, 256)],
        dtypes=[torch.float32, torch.bfloat16],
        batch=64,
        lengths=[512, 4096],
        widths=[64, 256, 1024],
        peer_shapes=[(8, 4096, 2048), (64, 512, 256), (16, 16384, 128)],
        peers=[name for name, peer in SCAN_PEERS.items() if "cpu" not in peer.devices],
        seconds=1.0,
        samples=30,
    )


def dry() -> Plan:
    """Return the least of everything, for a CPU."""
    return Plan(
        device=torch.device("cpu"),
        shapes=[(1, 64, 16)],
        dtypes=[torch.float32],
        batch=2,
        lengths=[8],
        widths=[8],
        peer_shapes=[(2, 32, 4)],
        peers=["loop", "mambapy"],
        seconds=0.01,
        samples=3,
    )


@dataclass
class Report:
    """The document, and the files that it is written to as it grows."""

    path: Path
    document: dict[str, Any]
    end: float
    """When time is up, as time.monotonic says it."""
    done: list[str] = field(default_factory=list)

    def add(self, stage: str, result: dict[str, Any]) -> None:
        """Keep a result, and write all files."""
        self.document[stage].append(result)
        self.write()

    def leave_out(self, stage: str, setting: str, reason: str) -> None:
        """Say what has not been measured."""
        self.document["left_out"].append({"stage": stage, "setting": setting, "reason": reason})
        print(f"left out: {stage}, {setting}: {reason}", flush=True)
        self.write()

    def has_time(self) -> bool:
        """Whether something more may be started."""
        return time.monotonic() < self.end

    def write(self) -> None:
        """Write the JSON and the Markdown file."""
        write_json(self.path, self.document)
        self.path.with_suffix(".md").write_text(page(self.document), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status is 1 where a law fails or our result is wrong, 2 where there is no GPU."""
    options = parse(arguments)
    if not options.dry and not torch.cuda.is_available():
        print("gpu.py: torch finds no CUDA device; --dry runs a small part on the CPU", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=options.tf32):
        return carry_out(dry() if options.dry else full(), options)


def carry_out(plan: Plan, options: argparse.Namespace) -> int:
    """Check the laws, measure what is planned, and write it; returns the exit status."""
    report = Report(options.output, heading(plan, options), time.monotonic() + 60 * options.minutes)
    report.path.parent.mkdir(parents=True, exist_ok=True)
    if not options.dry and options.laws:
        report.document["laws"] = laws(60 * options.minutes)
        report.write()
        if report.document["laws"]["status"] != "passed":
            print(report.document["laws"]["tail"])
            print("gpu.py: the laws do not hold here; nothing is timed", file=sys.stderr)
            return 1
    try:
        for stage, settings in (("shares", shares), ("steps", steps), ("peers", peers)):
            for setting, run in settings(plan):
                if not report.has_time():
                    report.leave_out(stage, setting, "time is up")
                    continue
                print(f"{stage}: {setting}", flush=True)
                try:
                    report.add(stage, run())
                except torch.cuda.OutOfMemoryError:
                    report.leave_out(stage, setting, "the device's memory does not suffice")
                if plan.device.type == "cuda":
                    torch.cuda.empty_cache()
    except RuntimeError as error:  # of `measure`, and of our own checks
        print(f"gpu.py: {error}", file=sys.stderr)
        return 1
    draw(report.document, report.path.with_suffix(".png"))
    print(page(report.document))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file (benchmarks/results/gpu.json)")
    parser.add_argument("--minutes", type=float, default=15, help="after these, nothing more is started")
    parser.add_argument("--dry", action="store_true", help="a small part on the CPU, without meaning")
    parser.add_argument("--no-laws", dest="laws", action="store_false", help="leave out the tests")
    parser.add_argument("--tf32", action="store_true", help="let everybody's float32 products be TF32's")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = Path("runs/gpu-dry.json") if options.dry else ROOT / "benchmarks/results/gpu.json"
    options.command = shlex.join(["python", "benchmarks/gpu.py", *(arguments or sys.argv[1:])])
    return options


def heading(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Return the document before anything has been measured."""
    versions = {name: version(name) for name in ("triton", "accelerated-scan", "flash-linear-attention")}
    served = [e.detail for e in engines() if e.serves and e.device == plan.device.type]
    return {
        "format": FORMAT,
        "benchmark": "gpu",
        "dry": options.dry,
        "command": options.command,
        **provenance(plan.device),
        "engine": served[0] if served else "reference",
        "packages": versions,
        "tf32": options.tf32,
        "laws": {"status": "not run"},
        "shares": [],
        "steps": [],
        "peers": [],
        "left_out": [],
    }


def version(package: str) -> str | None:
    """Return the version that is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def laws(seconds: float) -> dict[str, Any]:
    """Run the engine's tests on this GPU, in as many processes as there are cores where pytest can."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/test_triton_gpu.py",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["--numprocesses", str(min(12, os.cpu_count() or 1))]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"status": "not finished", "seconds": time.monotonic() - start, "tail": ""}
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
    passed = done.returncode == 0 and " passed" in tail
    status = "passed" if passed else "failed"
    return {"status": status, "seconds": time.monotonic() - start, "tail": tail}


# ----------------------------------------------------------------------------------------------------------
# The share of the copy bandwidth

Stage = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def shares(plan: Plan) -> Stage:
    """Yield each setting, and what measures it."""
    for shape, dtype, gate in product(plan.shapes, plan.dtypes, ("mingru", "minlstm")):
        yield (
            f"{gate}, {sizes(shape)}, {dtype_name(dtype)}",
            lambda shape=shape, dtype=dtype, gate=gate: share(plan, gate, shape, dtype),
        )


def share(plan: Plan, gate: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Time the scan's two directions and copies of as many bytes, in turns."""
    moved = {phase: size * shape[0] * shape[1] * shape[2] for phase, size in traffic(gate, dtype).items()}
    sets = [draw_inputs(plan, gate, shape, dtype, seed) for seed in range(1 + CACHE // moved["forward"])]
    found = check_scan(gate, *sets[0])
    if max(found.values()) > TOLERANCE[dtype]:
        raise RuntimeError(f"{OURS} differs from float64 ({found}); nothing more is timed")
    mode = (None, None, gate, "positive", False, False)
    forward, backward = torch.ops.minrnn.gated_scan.default, torch.ops.minrnn.gated_scan_backward.default
    states = [forward([pre], *mode) for pre, _ in sets]
    halves = {phase: torch.ones(size // 8, device=plan.device) for phase, size in moved.items()}
    targets = {phase: torch.empty_like(half) for phase, half in halves.items()}
    calls: dict[str, Callable[[int], object]] = {
        "forward": lambda i: forward([sets[i % len(sets)][0]], *mode),
        "backward": lambda i: backward(
            sets[i % len(sets)][1], [sets[i % len(sets)][0]], states[i % len(sets)], *mode
        ),
        "copy forward": lambda i: targets["forward"].copy_(halves["forward"]),
        "copy backward": lambda i: targets["backward"].copy_(halves["backward"]),
    }
    taken = {name: summary(times) for name, times in bursts(plan, calls).items()}
    speed = {phase: moved[phase] / taken[f"copy {phase}"]["median"] for phase in moved}
    return {
        "gate": gate,
        "shape": list(shape),
        "dtype": dtype_name(dtype),
        "error": found,
        "bytes": moved,
        "seconds": taken,
        "copy_bytes_per_second": speed,
        "share": {phase: moved[phase] / taken[phase]["median"] / speed[phase] for phase in moved},
    }


def draw_inputs(plan: Plan, gate: str, shape: Shape, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Draw packed pre-activations, and the gradient of h."""
    B, T, D = shape
    generator = torch.Generator(plan.device).manual_seed(seed)
    numbers = {"generator": generator, "device": plan.device}
    pre = torch.randn(B, T, GATES[gate].num_pre * D, **numbers).to(dtype)
    return pre, torch.randn(B, T, D, **numbers).to(dtype)


def check_scan(gate: str, pre: Tensor, dh: Tensor) -> dict[str, float]:
    """Compare some channels of h and of the gradients with float64 on the CPU."""
    parts = [part[:, :, :CHANNELS].contiguous() for part in pre.chunk(GATES[gate].num_pre, -1)]
    dh = dh[:, :, :CHANNELS].contiguous()
    ours = [part.requires_grad_() for part in parts]
    h = gated_scan(gate, *ours)
    gradients = torch.autograd.grad(h, ours, dh)
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    expected = gated_scan(gate, *exact)
    wanted = torch.autograd.grad(expected, exact, dh.double().cpu())
    actual = {"h": h.detach().cpu()} | {f"d{i}": d.cpu() for i, d in enumerate(gradients)}
    return errors(actual, {"h": expected.detach()} | {f"d{i}": d for i, d in enumerate(wanted)})


def bursts(plan: Plan, calls: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Time calls in turns, each in bursts: what it costs to launch them hides behind those before."""
    counts = {}
    for name, call in calls.items():
        burst(plan.device, call, 2)  # compiles
        counts[name] = 1 + int(SETTLED / max(burst(plan.device, call, 3), 1e-7))
    costs = sum(count * burst(plan.device, calls[name], count) for name, count in counts.items())
    rounds = max(3, min(plan.samples, int(plan.seconds * len(calls) / costs)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(burst(plan.device, call, counts[name]))
    return taken


def burst(device: torch.device, call: Callable[[int], object], count: int) -> float:
    """Return the seconds of one of `count` calls that follow each other."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(count):
            call(i)
        return (time.perf_counter() - start) / count
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for i in range(count):
        call(i)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / count


# ----------------------------------------------------------------------------------------------------------
# Training steps


def steps(plan: Plan) -> Stage:
    """Yield each setting, and what measures it."""
    for T, D, cell in product(plan.lengths, plan.widths, ("mingru", "minlstm")):
        yield (
            f"{cell}, {sizes((plan.batch, T, D))}, float32",
            lambda T=T, D=D, cell=cell: step(plan, cell, (plan.batch, T, D)),
        )


def step(plan: Plan, cell: str, shape: Shape) -> dict[str, Any]:
    """Time forward and backward of one layer, each synchronised, and measure its memory."""
    B, T, D = shape
    torch.manual_seed(0)
    x = torch.randn(B, T, D, device=plan.device, requires_grad=True)
    dy = torch.randn(B, T, D, device=plan.device)
    ours = {"mingru": MinGRU, "minlstm": MinLSTM}[cell](
        D, D, batch_first=True, bias=False, device=plan.device
    )
    classic = {"mingru": "gru", "minlstm": "lstm"}[cell]
    compiled = LAYER_PEERS[classic].build(cell, D, D).to(plan.device)
    loop = LOOPS[f"{classic}-loop"](D, D).to(plan.device)
    systems = {
        OURS: System(
            training_step(plan.device, ours, lambda x: ours(x)[0], x, dy),
            lambda: check_layer(cell, ours, x.detach()[:ROWS].requires_grad_(), dy[:ROWS]),
        ),
        classic: System(training_step(plan.device, compiled, lambda x: compiled(x)[0], x, dy), None),
        f"{classic}-loop": System(training_step(plan.device, loop, loop, x, dy), None),
    }
    return {"cell": cell, "shape": list(shape), "systems": compared(plan, systems, torch.float32)}


def training_step(
    device: torch.device, layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor
) -> Task:
    """Return what times forward, and backward to the input and all weights."""
    leaves = [x, *layer.parameters()]

    def timed() -> Phases:
        start = clock(device)
        y = call(x)
        middle = clock(device)
        gradients = torch.autograd.grad(y, leaves, dy)
        end = clock(device)
        del y, gradients
        return {"forward": middle - start, "backward": end - middle}

    return timed


def check_layer(cell: str, layer: MinGRU | MinLSTM, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Compare states and gradients of some rows with a float64 loop."""
    (weight,) = layer.parameters()
    y = layer(x)[0]
    dx, dweight = torch.autograd.grad(y, [x, weight], dy)
    return errors({"h": y, "dx": dx, "dweight": dweight}, layer_reference(cell, x, weight, dy))


def compared(plan: Plan, systems: dict[str, System], dtype: torch.dtype) -> dict[str, Record]:
    """Check all and time them in turns; of whoever cannot do it, the reason is kept."""
    failed: dict[str, Record] = {}
    for name, system in systems.items():
        if system.errors is None:
            try:
                system.task()
            except FOREIGN_ERRORS as error:
                detail = (str(error).splitlines() or [""])[0]
                failed[name] = {
                    "status": "failed",
                    "error": {},
                    "detail": f"{type(error).__name__}: {detail}",
                }
    records = measure(
        {name: system for name, system in systems.items() if name not in failed},
        limit=None,
        dtype=dtype,
        memory_of=plan.device,
        seconds=plan.seconds,
        samples=plan.samples,
        show=lambda records, doing: None,
    )
    return records | failed


# ----------------------------------------------------------------------------------------------------------
# Peers


def peers(plan: Plan) -> Stage:
    """Yield each setting, and what measures it."""
    for shape, dtype in product(plan.peer_shapes, plan.dtypes):
        yield (
            f"mingru, {sizes(shape)}, {dtype_name(dtype)}",
            lambda shape=shape, dtype=dtype: beside(plan, "mingru", shape, dtype),
        )


def beside(plan: Plan, gate: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Time everybody's scan from packed pre-activations to h, and back."""
    packed, dh = draw_inputs(plan, gate, shape, dtype, 0)
    pre = [packed.requires_grad_()]
    few = [packed.detach()[:1].requires_grad_()]
    exact = scan_reference(gate, few, dh[:1])

    def system(scan: Scan, reason: str) -> System:
        def compare() -> dict[str, float]:
            h = scan(gate, few)
            (gradient,) = torch.autograd.grad(h, few, dh[:1])
            return errors({"h": h, "d0": gradient}, exact)

        return System(scan_step(plan.device, scan, gate, pre, dh), compare, reason)

    systems = {OURS: system(lambda gate, pre: gated_scan(gate, *pre), "")}
    for name in plan.peers:
        peer = SCAN_PEERS[name]
        if gate in peer.gates and imports(peer.module):
            systems[name] = system(peer.scan(), peer.reason(dtype))
    return {
        "gate": gate,
        "shape": list(shape),
        "dtype": dtype_name(dtype),
        "systems": compared(plan, systems, dtype),
    }


def scan_step(device: torch.device, scan: Scan, gate: str, pre: list[Tensor], dh: Tensor) -> Task:
    """Return what times forward and backward of a scan."""

    def timed() -> Phases:
        start = clock(device)
        h = scan(gate, pre)
        middle = clock(device)
        gradients = torch.autograd.grad(h, pre, dh)
        end = clock(device)
        del h, gradients
        return {"forward": middle - start, "backward": end - middle}

    return timed


def imports(module: str) -> bool:
    """Whether a peer is installed."""
    try:
        import_module(module)
    except FOREIGN_ERRORS:  # some raise all kinds of things where they find no compiler
        return False
    return True


# ----------------------------------------------------------------------------------------------------------
# What people read


def sizes(shape: Sequence[int]) -> str:
    """Return a shape for people.

    >>> sizes((8, 4096, 256))
    '8 x 4,096 x 256'
    """
    return " x ".join(f"{size:,}" for size in shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Return a number format's name."""
    return str(dtype).removeprefix("torch.")


def page(document: dict[str, Any]) -> str:
    """Return the document as Markdown."""
    products = "TF32" if document["tf32"] else "float32 throughout"
    lines = [
        f"{document['device']}, {document['engine']}, torch {document['versions'].get('torch', '?')}. "
        f"Products in float32: {products}. The engine's tests: {document['laws']['status']}.",
        "",
        f"    {document['command']}",
    ]
    for stage, rows in (
        ("shares", share_rows(document["shares"])),
        ("steps", system_rows(document["steps"])),
        ("peers", system_rows(document["peers"])),
    ):
        if len(rows) > 1:
            lines += ["", f"## {QUESTIONS[stage]}", "", *markdown(rows)]
    lines += ["", *(f"Left out: {x['stage']}, {x['setting']}: {x['reason']}." for x in document["left_out"])]
    return (DRY_NOTE if document["dry"] else "") + "\n".join(lines).rstrip() + "\n"


def share_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table's rows, its head first."""
    head = ["gate", "B x T x D", "dtype", "forward, ms", "backward, ms", "copy, GB/s", "forward", "backward"]
    return [head] + [
        [
            r["gate"],
            sizes(r["shape"]),
            r["dtype"],
            *(f"{r['seconds'][phase]['median'] * 1e3:.3f}" for phase in ("forward", "backward")),
            f"{r['copy_bytes_per_second']['backward'] / 1e9:.0f}",
            *(f"{r['share'][phase]:.0%}" for phase in ("forward", "backward")),
        ]
        for r in results
    ]


def system_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a table's rows, its head first: one for each system."""
    head = ["", "B x T x D", "system", "forward, ms", "backward, ms", "step, ms", "times ours", "peak, MB"]
    rows = [head]
    for r in results:
        kind = r.get("cell") or f"{r['gate']}, {r['dtype']}"
        for name, record in r["systems"].items():
            if "seconds" not in record:
                rows.append([kind, sizes(r["shape"]), name, record["status"], "", "", "", ""])
                continue
            times = [
                f"{record['seconds'][phase]['median'] * 1e3:.3f}" for phase in ("forward", "backward", "step")
            ]
            peak = record["peak_bytes"]
            memory = "" if peak is None else f"{peak / 1e6:.0f}"
            rows.append([kind, sizes(r["shape"]), name, *times, f"{record['times_ours']:.2f}", memory])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw shares, and how many times as long as ours others take; without matplotlib, say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    panels = [
        (QUESTIONS["shares"] + ", %", share_bars(document["shares"]), False),
        ("Training steps, times ours", system_bars(document["steps"]), True),
        ("Scans, times ours", system_bars(document["peers"]), True),
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        print("no plot: nothing was measured")
        return
    height = sum(1 + 0.22 * len(bars) for _, bars, _ in panels)
    figure = Figure(figsize=(9, 1 + height), layout="constrained")
    ratios = [1 + 0.22 * len(bars) for _, bars, _ in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for (title, bars, logarithmic), ax in zip(panels, axes[:, 0], strict=True):
        labels, values = zip(*bars, strict=True)
        drawn = ax.barh(range(len(bars)), values, color="#0b5fd6")
        ax.bar_label(drawn, fmt="%.3g", fontsize=7, padding=2)
        ax.set_yticks(range(len(bars)), labels, fontsize=7)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=10)
        if logarithmic:
            ax.set_xscale("log")
            ax.set_xlim(left=min(0.5, *values))
    figure.suptitle(
        "A dry run on the CPU: no figure means anything" if document["dry"] else document["device"]
    )
    figure.savefig(path, dpi=130)


def share_bars(results: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return labels and shares in per cent."""
    return [
        (f"{r['gate']} {phase}, {sizes(r['shape'])}, {r['dtype']}", 100 * r["share"][phase])
        for r in results
        for phase in ("forward", "backward")
    ]


def system_bars(results: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return labels, and how many times as long as ours each system's step takes."""
    return [
        (f"{name}, {sizes(r['shape'])}{', ' + r['dtype'] if 'dtype' in r else ''}", record["times_ours"])
        for r in results
        for name, record in r["systems"].items()
        if name != OURS and "times_ours" in record
    ]


if __name__ == "__main__":
    sys.exit(main())
