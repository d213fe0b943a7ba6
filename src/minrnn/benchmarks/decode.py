"""`minrnn bench decode`: one step after another from a carried state, as when text is generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.check import errors, layer_reference
from minrnn.benchmarks.layer import build_linear, build_ours, build_peer, our_weight, peer_call
from minrnn.benchmarks.measure import OURS, System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import LAYER_PEERS, LayerPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.timing import Phases, Task, clock

__all__ = ["DecodeBench", "bench_decode"]

KIND = Kind("decode", "BD", across="B", limit="linear", phases=("step",), unit="us", memory=False)

CHECKED_STEPS = 4
SAMPLE_SECONDS = 2e-3  # a sample is as many steps as take this long: the clock's own cost is far below

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(x, state) -> (y, state), for x of (B, 1, D)."""


@dataclass(frozen=True)
class DecodeBench(TimedBench):
    """Time one step (T = 1) of a layer of D channels from a carried state, beside torch's GRU or LSTM.

    A time is the latency of one token for each of the B sequences. Layers of the same equations are first
    compared with a float64 loop. The limit is Linear(D, 2 D), or 3 D for minLSTM, alone.
    """

    shapes: tuple[str, ...] = ("1x512", "8x512", "64x512")
    """BxD: sequences and channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    cells: tuple[Literal["mingru", "minlstm"], ...] = ("mingru", "minlstm")
    """Cells; a GRU takes part beside mingru, an LSTM beside minlstm."""


def bench_decode(options: DecodeBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, options.cells, LAYER_PEERS, _systems, command, console)


@torch.inference_mode()
def _systems(case: Case, peers: Mapping[str, LayerPeer]) -> dict[str, System]:
    torch.manual_seed(case.seed)
    B, D = case.shape.values()
    x = torch.randn(B, CHECKED_STEPS, D).to(case.device, case.torch_dtype)
    ours, linear = build_ours(case, D), build_linear(case, D)
    exact = layer_reference(case.gate, x, our_weight(ours), torch.zeros_like(x))

    def system(step: Step, reason: str = "", is_comparable: bool = True) -> System:
        compare = (lambda: errors({"h": _steps(step, x)}, exact)) if is_comparable else None
        return System(_latency(step, case, x[:, :1]), compare, reason)

    systems = {
        KIND.limit: system(lambda x, state: (linear(x), None), is_comparable=False),
        OURS: system(ours),
    }
    for name, peer in peers.items():
        step = partial(peer_call(peer), build_peer(peer, case, D, our_weight(ours)))
        systems[name] = system(step, peer.reason(case.torch_dtype), is_comparable=peer.load is not None)
    return systems


@torch.inference_mode()
def _steps(step: Step, x: Tensor) -> Tensor:
    """Run x (B, T, D) through one step at a time, from the empty state."""
    ys, state = [], None
    for x_t in x.split(1, 1):
        y, state = step(x_t, state)
        ys.append(y)
    return torch.cat(ys, 1)


def _latency(step: Step, case: Case, x: Tensor) -> Task:
    """Time one step as the mean of a row of steps, each from the state that the one before left."""
    found: tuple[Any, int] | None = None

    @torch.inference_mode()
    def sample() -> Phases:
        nonlocal found
        found = found or _calibrate(step, case, x)
        state, steps = found
        start = clock(case.device)
        for _ in range(steps):
            _, state = step(x, state)
        return {"step": (clock(case.device) - start) / steps}

    return sample


def _calibrate(step: Step, case: Case, x: Tensor) -> tuple[Any, int]:
    """Return a state to start from, and how many steps a sample needs."""
    state = step(x, step(x, None)[1])[1]
    start = clock(case.device)
    step(x, state)
    return state, max(1, round(SAMPLE_SECONDS / (clock(case.device) - start)))
