"""`minrnn bench export`: a model's single step in other runtimes, and the size of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import Table
from minrnn.benchmarks.workloads import Step, forward_step, keeping_time, run_steps, steps_in_a_row
from minrnn.export import FORMATS, export_step
from minrnn.export.converting import Run
from minrnn.models import Decoder, ModelConfig, SequenceModel

__all__ = ["BENCH", "ExportBench"]

KIND = Kind("export", "BDL", across="D", limit=None, phases=("step",), unit="us", memory=False)
VOCABULARY = 256
CHECKED_STEPS = 8

TORCH = "torch"
"""The model's own forward."""

RUNTIMES = {"onnxruntime": ".onnx", "aotinductor": ".pt2", "executorch": ".pte"}
"""The runtimes, and the suffixes of their files."""

EXPORT_PEERS = {
    TORCH: Peer(gates=("mingru",)),
    "onnxruntime": Peer(gates=("mingru",), package="onnxruntime", module="onnxruntime", devices=("cpu",)),
    "aotinductor": Peer(gates=("mingru",), devices=("cpu",)),
    "executorch": Peer(gates=("mingru",), package="executorch", module="executorch", devices=("cpu",)),
}


@dataclass(frozen=True)
class ExportBench(TimedBench):
    """Time one step (T = 1) of a minGRU language model from a carried state in each runtime that is
    installed, called from Python, beside a Decoder and the model in torch.

    The models are those of `minrnn train`, untrained. A file has the batch of its case. All are first
    compared with the model in float64.
    """

    shapes: tuple[str, ...] = ("1x192x4", "64x192x4", "1x512x6", "64x512x6")
    """BxDxL: rows, width, layers; 64..1024 stands for 64, 128, 256, 512 and 1024."""


def bench_export(options: ExportBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, ("mingru",), EXPORT_PEERS, _systems, command, console)


def render(document: Document) -> str:
    """Return a table of a step's time in each runtime, and of the files' sizes."""
    rows = []
    for result in document["results"]:
        for name, record in result["systems"].items():
            known = record.get("seconds")
            time = f"{1e6 * known['step']['median']:,.0f}" if known else record["status"]
            size = f"{record['bytes'] / 1e6:.2f}" if "bytes" in record else ""
            title = "a Decoder" if name == OURS else name
            rows.append([*(f"{n:,}" for n in result["shape"].values()), title, time, size])
    return Table("", ["rows", "width", "layers", "runtime", "step, us", "file, MB"], rows).markdown()


BENCH = Bench(ExportBench, bench_export, render)


@torch.inference_mode()
def _systems(case: Case, peers: Mapping[str, Peer]) -> dict[str, System]:
    generator = torch.Generator().manual_seed(case.seed)
    tokens = torch.randint(VOCABULARY, (case.shape["B"], CHECKED_STEPS), generator=generator)
    model = _model(case)
    exact = {"h": _model(case).double()(tokens)[0]}

    def system(step: Step, facts: Mapping[str, Any] | None = None) -> System:
        def compare() -> dict[str, float]:
            return errors({"h": run_steps(keeping_time(step), tokens)}, exact)

        return System(steps_in_a_row(step, tokens[:, 0]), compare, facts={} if facts is None else facts)

    systems = {OURS: system(Decoder(model).step)}
    for name in peers:
        if name == TORCH:
            systems[name] = system(forward_step(model))
        else:
            facts: dict[str, Any] = {}
            systems[name] = system(_exported(model, RUNTIMES[name], case.shape["B"], facts), facts)
    return systems


def _exported(model: SequenceModel, suffix: str, batch: int, facts: dict[str, Any]) -> Step:
    """Return the step of an exported file, which the first call makes; the file's bytes go into `facts`."""

    @cache
    @torch.inference_mode(False)
    def made() -> tuple[Run, tuple[Tensor, ...]]:
        exported = export_step(model, batch=batch)
        contents = FORMATS[suffix].convert(exported)
        facts["bytes"] = len(contents)
        states = [(port.example, port.carried) for port in exported.inputs if port.carried is not None]
        empty = tuple(torch.full_like(example, carried.initial) for example, carried in states)
        return FORMATS[suffix].load(contents, exported), empty

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        run_file, empty = made()
        logits, *after = map(torch.as_tensor, run_file((tokens, *(empty if state is None else state))))
        return logits, tuple(after)

    return step


@torch.inference_mode(False)  # what was made in it cannot be exported
def _model(case: Case) -> SequenceModel:
    torch.manual_seed(case.seed)
    _, width, layers = case.shape.values()
    config = ModelConfig(vocab_size=VOCABULARY, d_model=width, num_layers=layers)
    return SequenceModel(config).eval().to(case.device, case.torch_dtype)
