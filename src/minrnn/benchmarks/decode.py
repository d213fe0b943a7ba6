"""`minrnn bench decode`: the latency of single steps from a carried state, as in text generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from rich.console import Console

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors, layer_reference
from minrnn.benchmarks.layer import build_linear, build_ours, build_peer, our_weight, peer_call
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import LAYER_PEERS, LayerPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import by_system
from minrnn.benchmarks.workloads import Step, run_steps, steps_in_a_row

__all__ = ["BENCH", "DecodeBench"]

LIMIT = "linear"
KIND = Kind("decode", "BD", across="B", limit=LIMIT, phases=("step",), unit="us", memory=False)

CHECKED_STEPS = 4


@dataclass(frozen=True)
class DecodeBench(TimedBench):
    """Time one step (T = 1) of a layer of D channels from a carried state, and torch's GRU or LSTM.

    A time is the latency of one token for each of the B sequences. Layers with the same equations are first
    compared with a float64 loop. The limit is the time of Linear(D, 2 D), or 3 D for minLSTM.
    """

    shapes: tuple[str, ...] = ("1x512", "8x512", "64x512")
    """BxD: sequences and channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    cells: tuple[Literal["mingru", "minlstm"], ...] = ("mingru", "minlstm")
    """Gates; mingru is compared with a GRU, minlstm with an LSTM."""


def bench_decode(options: DecodeBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, options.cells, LAYER_PEERS, _systems, command, console)


def render(document: Document) -> str:
    """Return a table of the latency of each system in each case."""
    return by_system(document["results"], KIND.phases, KIND.unit).markdown()


BENCH = Bench(DecodeBench, bench_decode, render)


@torch.inference_mode()
def _systems(case: Case, peers: Mapping[str, LayerPeer]) -> dict[str, System]:
    torch.manual_seed(case.seed)
    B, D = case.shape.values()
    x = torch.randn(B, CHECKED_STEPS, D).to(case.device, case.torch_dtype)
    ours, linear = build_ours(case, D), build_linear(case, D)
    exact = layer_reference(case.gate, x, our_weight(ours), torch.zeros_like(x))

    def system(step: Step, reason: str = "", is_comparable: bool = True) -> System:
        compare = (lambda: errors({"h": run_steps(step, x)}, exact)) if is_comparable else None
        return System(steps_in_a_row(step, x[:, :1]), compare, reason)

    systems = {
        LIMIT: system(lambda x, state: (linear(x), None), is_comparable=False),
        OURS: system(ours),
    }
    for name, peer in peers.items():
        step = partial(peer_call(peer), build_peer(peer, case, D, our_weight(ours)))
        systems[name] = system(step, peer.reason(case.torch_dtype), is_comparable=peer.load is not None)
    return systems
