"""`minrnn bench step`: a model's single step from a carried state, by a Decoder and by its forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import Table
from minrnn.benchmarks.workloads import Step, forward_step, keeping_time, run_steps, steps_in_a_row
from minrnn.models import Decoder, ModelConfig, SequenceModel

__all__ = ["BENCH", "StepBench"]

KIND = Kind("step", "BDL", across="D", limit=None, phases=("step",), unit="us", memory=False)
VOCABULARY = 256
CHECKED_STEPS = 8

TORCH = "torch"
"""The model's own forward, in torch's operations."""

STEP_PEERS = {
    TORCH: Peer(gates=("mingru", "minlstm")),
    # The model with torch's recurrence.
    "gru": Peer(gates=("mingru",)),
    "lstm": Peer(gates=("minlstm",)),
}


@dataclass(frozen=True)
class StepBench(TimedBench):
    """Time one step (T = 1) of a model from a carried state, by a Decoder and by the model's forward.

    The models are those of `minrnn train` (convolution, mixer, MLP), untrained; a step takes a token for each
    row and returns logits. Both are first compared with the model in float64. The same model with torch's GRU
    or LSTM is timed too. The Decoder's backend must be the compiled engine; otherwise the error gives the
    reason.
    """

    shapes: tuple[str, ...] = tuple(
        f"{rows}x{size}" for rows in (1, 16) for size in ("128x3", "192x4", "512x6", "1024x8")
    )
    """BxDxL: rows, width, layers; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    cells: tuple[Literal["mingru", "minlstm"], ...] = ("mingru",)
    """Mixers; mingru is compared with a GRU, minlstm with an LSTM."""


def bench_step(options: StepBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, options.cells, STEP_PEERS, _systems, command, console)


def render(document: Document) -> str:
    """Return a table of a step's time in one call, in torch's operations, and with torch's recurrence."""
    rows = []
    for result in document["results"]:
        records = result["systems"].items()
        times = {n: 1e3 * record["seconds"]["step"]["median"] for n, record in records if "seconds" in record}
        cells = [f"{times[name]:.3g}" if name in times else record["status"] for name, record in records]
        ratio = f"{times[TORCH] / times[OURS]:.1f}" if TORCH in times else ""
        rows.append([*(f"{size:,}" for size in result["shape"].values()), *cells, ratio])
    names = {OURS: "in one call, ms", TORCH: "in torch's operations, ms", "gru": "a GRU in torch, ms"}
    systems = [names.get(name, f"{name}, ms") for name in document["results"][0]["systems"]]
    head = ["rows", "width", "layers", *systems, "torch's operations, times the call"]
    return Table("", head, rows).markdown()


BENCH = Bench(StepBench, bench_step, render)


@torch.inference_mode()
def _systems(case: Case, peers: Mapping[str, Peer]) -> dict[str, System]:
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(VOCABULARY, (case.shape["B"], CHECKED_STEPS), generator=generator).to(case.device)
    model = _model(case.gate, case)
    exact = {"h": _model(case.gate, case).double()(tokens)[0]}

    def system(step: Step, is_comparable: bool = True) -> System:
        def compare() -> dict[str, float]:
            return errors({"h": run_steps(keeping_time(step), tokens)}, exact)

        return System(steps_in_a_row(step, tokens[:, 0]), compare if is_comparable else None)

    systems = {OURS: system(_fused(model).step)}
    for name in peers:
        own = name == TORCH
        systems[name] = system(forward_step(model if own else _model(name, case)), is_comparable=own)
    return systems


def _fused(model: SequenceModel) -> Decoder:
    """Return a decoder; raise unless its backend is the compiled engine."""
    decoder = Decoder(model)
    if decoder.backend != "cpp":
        raise RuntimeError(f"bench step: the compiled engine must take the steps, but {decoder.reason}")
    return decoder


def _model(mixer: str, case: Case) -> SequenceModel:
    torch.manual_seed(case.seed)
    _, width, layers = case.shape.values()
    config = ModelConfig(vocab_size=VOCABULARY, d_model=width, num_layers=layers, mixer=mixer)
    return SequenceModel(config).eval().to(case.device, case.torch_dtype)
