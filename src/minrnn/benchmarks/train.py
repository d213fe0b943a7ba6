"""`minrnn bench train`: a model's training step, as it is and with train.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import Table
from minrnn.benchmarks.timing import Phases, Workload, clock
from minrnn.models import ModelConfig, SequenceModel
from minrnn.training.compilation import Compilation

__all__ = ["BENCH", "TrainBench", "draw_tokens", "make_model", "mean_loss", "training_step"]

Mixer = Literal["mingru", "minlstm", "minema", "attention", "aaren", "s4d", "mamba"]

KIND = Kind("train", "BTDL", across="T", limit=None, phases=("forward", "backward", "step"), unit="ms")
VOCABULARY = 256

COMPILED = "compiled"
TRAIN_PEERS = {COMPILED: Peer(gates=get_args(Mixer), compiled=True)}


@dataclass(frozen=True)
class TrainBench(TimedBench):
    """Time a model's training step with AdamW, as it is and compiled as by train.compile.

    The models are those of `minrnn train` (convolution, mixer, MLP), untrained, on random tokens. The logits
    of both are first compared with the model in float64. The time that compiling took is reported beside
    them, and after how many steps it has been regained.
    """

    shapes: tuple[str, ...] = ("8x256x192x3",)
    """BxTxDxL: batch, length, width, layers; by default the recipe demo's."""
    cells: tuple[Mixer, ...] = ("mingru",)
    """Mixers."""


def bench_train(options: TrainBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    return run(KIND, options, options.cells, TRAIN_PEERS, _systems, command, console)


def render(document: Document) -> str:
    """Return a table of a step's time as it is and compiled, and of what compiling costs and saves."""
    rows = []
    for result in document["results"]:
        plain, compiled = (result["systems"].get(name, {}) for name in (OURS, COMPILED))
        if "seconds" not in compiled:
            continue
        before, after = (record["seconds"]["step"]["median"] for record in (plain, compiled))
        cost = compiled["compile_seconds"]
        regained = f"{cost / (before - after):,.0f} steps" if after < before else "never"
        sizes = (f"{size:,}" for size in result["shape"].values())
        times = (f"{1e3 * before:.3g}", f"{1e3 * after:.3g}", f"{after / before:.2f}")
        rows.append([result["gate"], *sizes, *times, f"{cost:.0f}", regained])
    head = ["mixer", "batch", "steps", "width", "layers", "plain, ms", "compiled, ms", "compiled / plain"]
    return Table("", [*head, "compiling, s", "regained after"], rows).markdown()


BENCH = Bench(TrainBench, bench_train, render)


def _systems(case: Case, peers: Mapping[str, Peer]) -> dict[str, System]:
    tokens = draw_tokens(case)
    model = make_model(case).to(case.torch_dtype)
    with torch.no_grad():
        exact = {"h": deepcopy(model).double()(tokens)[0]}

    def system(module: nn.Module, weights: nn.Module, **facts: Any) -> System:
        def compare() -> dict[str, float]:
            return errors({"h": module(tokens)[0].detach()}, exact)

        return System(training_step(module, weights, tokens), compare, facts=facts)

    systems = {OURS: system(model, model)}
    if COMPILED in peers:
        other = deepcopy(model)
        compilation = Compilation(other)
        with compilation.watch():
            mean_loss(compilation.model, tokens).backward()
        other.zero_grad(set_to_none=True)
        seconds = compilation.take_seconds()
        systems[COMPILED] = system(compilation.model, other, compile_seconds=seconds)
    return systems


def make_model(case: Case) -> SequenceModel:
    """Return the model of a case, in float32; the same for each call."""
    torch.manual_seed(case.seed)
    _, _, D, L = case.shape.values()
    config = ModelConfig(vocab_size=VOCABULARY, d_model=D, num_layers=L, mixer=case.gate)
    return SequenceModel(config).to(case.device)


def draw_tokens(case: Case) -> Tensor:
    """Return tokens (B, T), the same for each call."""
    B, T, _, _ = case.shape.values()
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randint(VOCABULARY, (B, T), generator=generator).to(case.device)


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of tokens, each with itself as the target."""
    logits, _ = model(tokens)
    return functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def training_step(model: nn.Module, weights: nn.Module, tokens: Tensor, scale: float = 1.0) -> Workload:
    """Return a training step with AdamW.

    Args:
        model: the module that is called.
        weights: the module that holds its parameters.
        tokens: (B, T).
        scale: factor of the loss.
    """
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-3)

    def step() -> Phases:
        start = clock(tokens.device)
        loss = scale * mean_loss(model, tokens)
        middle = clock(tokens.device)
        loss.backward()
        end = clock(tokens.device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        whole = clock(tokens.device)
        return {"forward": middle - start, "backward": end - middle, "step": whole - start}

    return step
