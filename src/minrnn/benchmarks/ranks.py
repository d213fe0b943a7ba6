"""`minrnn bench ranks`: a model's training step by several processes, and by one with as many threads."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import Tensor, distributed

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench, parse_shapes, require
from minrnn.benchmarks.peers import Peer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import Table
from minrnn.benchmarks.timing import Phases, Workload, clock
from minrnn.benchmarks.train import Mixer, draw_tokens, make_model, mean_loss, training_step
from minrnn.distributed import ALONE, Launch, Ranks, join
from minrnn.models.shards import gathered

__all__ = ["BENCH", "RanksBench"]

KIND = Kind("ranks", "BTDL", across="D", limit=None, phases=("step",), unit="ms", memory=False)

Weights = Literal["replicated", "sharded"]
RANKS_PEERS = {weights: Peer(gates=get_args(Mixer)) for weights in get_args(Weights)}

LIMIT = 600
"""Seconds that a rank waits for the others."""


@dataclass(frozen=True)
class RanksBench(TimedBench):
    """Time a model's training step with AdamW by one process with N threads, and by N processes with one.

    The models are those of `minrnn train`, untrained, on random tokens. The processes exchange gradients by
    gloo, as `torchrun --nproc-per-node N -m -- minrnn train` does on CPUs; the peer `sharded` divides the
    weights too. The loss of all is first compared with float64, and the gradient with that of the first.
    """

    shapes: tuple[str, ...] = ("32x64x64x2", "8x256x192x3", "8x256x512x6")
    """BxTxDxL: batch of all processes, length, width, layers; the second is the recipe demo's."""
    cells: tuple[Mixer, ...] = ("mingru",)
    """Mixers."""
    threads: tuple[int, ...] = (2,)
    """N: threads of the one process, and number of the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threads", min(self.threads) > 1, "2 or more", self.threads)
        require("device", self.device == "cpu", "cpu", self.device)
        N, fewest = max(self.threads), min(B for B, *_ in parse_shapes(self.shapes, KIND.axes))
        require("shapes", fewest >= N, f"of {N} rows or more, one a process", fewest)


def bench_ranks(options: RanksBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""
    with ExitStack() as processes:

        def systems(case: Case, peers: Mapping[str, Peer]) -> dict[str, System]:
            processes.close()  # those of the case before
            alone = Part(case, ALONE)
            # Not the gradient in float64: the candidate's slope jumps at zero, and rounding decides where.
            exact = alone.gradient() | {"h": Part(case, ALONE, torch.float64).gradient()["h"]}
            found = {OURS: _system(alone.gradient, alone.step, exact)}
            for weights in peers:
                pool = processes.enter_context(Pool(case, weights))
                found[weights] = _system(pool.gradient, pool.step, exact)
            return found

        return run(KIND, options, options.cells, RANKS_PEERS, systems, command, console)


def render(document: Document) -> str:
    """Return a table of a step's time and tokens a second, by one process and by several."""
    head = ["mixer", "batch", "steps", "width", "layers", "threads in all", "by", "ms a step", "tokens/s"]
    rows = []
    for result in document["results"]:
        before = [result["gate"], *(f"{size:,}" for size in result["shape"].values()), f"{result['threads']}"]
        for name, record in result["systems"].items():
            title = "one process" if name == OURS else f"{result['threads']} processes, {name} weights"
            if "seconds" not in record:
                rows.append([*before, title, record["status"], ""])
                continue
            seconds = record["seconds"]["step"]["median"]
            tokens = result["shape"]["B"] * result["shape"]["T"] / seconds
            rows.append([*before, title, f"{1e3 * seconds:,.1f}", f"{tokens:,.0f}"])
    return Table("", head, rows).markdown()


BENCH = Bench(RanksBench, bench_ranks, render)

Gradient = dict[str, Tensor]
"""The loss and the gradient of all parameters in a row, under the names of `errors`."""


class Part:
    """A rank's part of a training step.

    Args:
        case: the setting.
        ranks: the ranks; ALONE for all of the step.
        dtype: dtype of the weights; None for the case's.
    """

    def __init__(self, case: Case, ranks: Ranks, dtype: torch.dtype | None = None) -> None:
        B = case.shape["B"]
        rows = ranks.rows(B)
        self.tokens = draw_tokens(case)[rows]
        # Gradients are averaged over the ranks, whose numbers of rows may differ.
        self.weight = (rows.stop - rows.start) * ranks.size / B
        self.ranks = ranks
        self.model = make_model(case).to(dtype or case.torch_dtype)
        self.called = ranks.distribute(self.model, case.device)
        self.step = training_step(self.called, self.model, self.tokens, self.weight)

    def gradient(self) -> Gradient:
        """Return the loss and the gradient of the first step, which is not taken."""
        loss = mean_loss(self.called, self.tokens) * self.weight
        loss.backward()
        gradients = (parameter.grad for parameter in self.model.parameters())
        parts = [gathered(gradient).flatten() for gradient in gradients if gradient is not None]
        self.model.zero_grad(set_to_none=True)
        (total,) = self.ranks.sums([loss.item()])
        return {"h": torch.tensor([total / self.ranks.size]), "gradient": torch.cat(parts)}


class Pool:
    """A context in which processes, with one thread each, are the ranks of a case.

    Args:
        case: the setting; its threads are the number of processes.
        weights: as of TrainConfig.
    """

    def __init__(self, case: Case, weights: str) -> None:
        self.case, self.weights = case, weights

    def __enter__(self) -> Pool:
        context, self._exit = _context(), ExitStack()
        folder = self._exit.enter_context(tempfile.TemporaryDirectory())
        pipes = [context.Pipe() for _ in range(self.case.threads)]
        self._ends = [end for end, _ in pipes]
        for rank, (_, other) in enumerate(pipes):
            arguments = (other, rank, self.case, self.weights, f"{folder}/store")
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            other.close()  # this process's copy: a rank that ends then closes the pipe
            self._exit.callback(process.join)
        for end in self._ends:  # all of them before the first is waited for, as ranks end together
            self._exit.callback(end.close)
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()

    def step(self) -> Phases:
        """Take a step, and return its time: from when it is asked for until the last rank has taken it."""
        start = clock(self.case.device)
        self._ask("step")
        return {"step": clock(self.case.device) - start}

    def gradient(self) -> Gradient:
        """Return the loss and the gradient of the first step, which is not taken."""
        return self._ask("gradient")

    def _ask(self, what: Literal["step", "gradient"]) -> Any:
        for end in self._ends:
            end.send(what)
        first, *_ = [end.recv() for end in self._ends]
        return first


def serve(end: Connection, rank: int, case: Case, weights: str, store: str) -> None:
    """Be a rank: call the methods of a `Part` that are asked for, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(1)
    size = case.threads
    with join("cpu", LIMIT, Launch(rank, size, rank, size), distributed.FileStore(store, size)) as ranks:
        part = Part(case, ranks.sharing(1, weights=weights == "sharded"))
        while True:
            try:
                what = end.recv()
            except EOFError:
                return
            found = getattr(part, what)()
            end.send(found if ranks.is_first else None)


def _context() -> Any:
    """Return a way to start processes: where the system can, forked from one that has loaded torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch.distributed.fsdp"])
    return context


def _system(gradient: Callable[[], Gradient], step: Workload, exact: Gradient) -> System:
    return System(step, lambda: errors(gradient(), exact))
