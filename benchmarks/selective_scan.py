"""Mamba's selective scan beside mambapy's parallel scan: time of forward and backward, and peak memory.

    taskset -c 0 python benchmarks/selective_scan.py --shapes 4x1024x256x16

Both compute delta = softplus(delta_pre), the recurrence, and y = C h + D u from the same inputs; mambapy's
code is what its MambaBlock calls. Both are compared with a float64 loop first, and not timed if they differ.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from minrnn.benchmarks.check import TOLERANCE
from minrnn.benchmarks.options import parse_shapes
from minrnn.benchmarks.timing import Phases, clock, interleave, old_objects_set_aside, peak_bytes, summary
from minrnn.ops import selective_scan
from minrnn.ops.selective import reference
from minrnn.ops.selective.reference import Inputs
from minrnn.training.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "selective-scan.json"
CPU = torch.device("cpu")

Scan = Callable[..., Tensor]
"""(u, delta_pre, A, B, C, D) -> y."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4x1024x256x16"], help="batch x T x channels x N")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to spend on a system (default: 10)")
    parser.add_argument("--samples", type=int, default=30, help="of a system at most (default: 30)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [
        measure(shape, arguments.seconds, arguments.samples)
        for shape in parse_shapes(arguments.shapes, "BTDN")
    ]
    report = {
        "benchmark": "selective-scan",
        "dtype": "float32",
        "cases": cases,
        **provenance(CPU),
        "mambapy": metadata.version("mambapy"),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for case in cases:
        print(json.dumps({key: case[key] for key in ("shape", "times_ours", "memory_times_ours")}))


def measure(shape: tuple[int, ...], seconds: float, samples: int) -> dict[str, Any]:
    """Check, time and weigh both systems on one shape."""
    inputs = draw(shape)
    dy = torch.randn(shape[:3], generator=torch.Generator().manual_seed(1))
    scans = {"minrnn": ours, "mambapy": make_mambapy()}
    exact = differentiate_exactly(inputs, dy)
    errors = {name: compare(scan, inputs, dy, exact) for name, scan in scans.items()}
    del exact
    for name, error in errors.items():
        if not error <= TOLERANCE[torch.float32]:
            raise RuntimeError(f"{name} differs from the float64 loop by {error:.1e} of the largest value")
    tasks = {name: partial(step, scan, inputs, dy) for name, scan in scans.items()}
    with old_objects_set_aside():
        taken = interleave(tasks, seconds, samples, lambda text: print(text, flush=True))
        systems = {
            name: {
                "error": errors[name],
                "seconds": {phase: summary([sample[phase] for sample in taken[name]]) for phase in PHASES},
                "peak_bytes": peak_bytes(task, CPU),
            }
            for name, task in tasks.items()
        }
    ours_, theirs = systems["minrnn"], systems["mambapy"]
    return {
        "shape": dict(zip(("batch", "T", "channels", "N"), shape, strict=True)),
        "systems": systems,
        "times_ours": {
            phase: theirs["seconds"][phase]["median"] / ours_["seconds"][phase]["median"] for phase in PHASES
        },
        "memory_times_ours": theirs["peak_bytes"] / max(1, ours_["peak_bytes"]),
    }


PHASES = ("forward", "backward", "step")


def draw(shape: tuple[int, ...]) -> list[Tensor]:
    """Inputs as a block has them at its start: A = -1 .. -N, steps around 0.02."""
    batch, T, channels, N = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    u, delta_pre = normal(batch, T, channels), normal(batch, T, channels) - 4
    A = -torch.arange(1.0, N + 1).repeat(channels, 1)
    return [u, delta_pre, A, normal(batch, T, N), normal(batch, T, N), normal(channels)]


def ours(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs)[0]


def make_mambapy() -> Scan:
    scan = import_module("mambapy.mamba").MambaBlock.selective_scan

    def mambapy(u: Tensor, delta_pre: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return scan(None, u, softplus(delta_pre), A, B, C, D)

    return mambapy


def differentiate_exactly(inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    x = Inputs(*(tensor.double() for tensor in inputs), z=None, delta_bias=None, h0=None, reset=None)  # type: ignore[misc]
    y, last, borders = reference.forward(x, True)
    du, ddelta_pre, dA, dB, dC, dD, _, _ = reference.backward(dy.double(), torch.zeros_like(last), borders, x)
    return [y, du, ddelta_pre, dA, dB, dC, dD]


def compare(scan: Scan, inputs: list[Tensor], dy: Tensor, exact: list[Tensor]) -> float:
    """The largest error of y and of any gradient, each relative to its largest value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = scan(*leaves)
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    errors = ((a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True))
    return float(max(errors))


def step(scan: Scan, inputs: list[Tensor], dy: Tensor) -> Phases:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    start = clock(CPU)
    y = scan(*leaves)
    middle = clock(CPU)
    torch.autograd.grad(y, leaves, dy)
    end = clock(CPU)
    return {"forward": middle - start, "backward": end - middle, "step": end - start}


if __name__ == "__main__":
    main()
