"""`minrnn plan`: compute what training on many GPUs would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tyro
from rich.table import Table

from minrnn.cli.arguments import check_range, parse
from minrnn.cli.train import named_recipe
from minrnn.distributed.costs import Cluster, Costs, costs, work_of
from minrnn.models import ModelConfig
from minrnn.tasks import TextConfig
from minrnn.training import Output, load_recipe
from minrnn.training.config import Weights

WIDTH = 110
"""Of the table if the output is not a terminal."""

MOST = 1 << 40
"""Largest number of rows, tokens and ranks."""


@dataclass(frozen=True)
class PlanCommand:
    """Compute what a training step of a language model would cost on many GPUs. Nothing is run or measured.

    Assumed are the rates of --cluster, six floating-point operations a parameter and token, AdamW in float32,
    and that gradients are exchanged while others are computed. `minrnn.distributed.costs` has the equations.
    """

    recipe: tyro.conf.Positional[str]
    """Name of a recipe for text, or a path that ends in .toml; it must come first, and sets the model."""
    rows: int
    """Sequences of a step, of all ranks. With more ranks than rows, each sequence is divided too."""
    rows_per_rank: int
    """Sequences of each rank, in place of --rows (0: none)."""
    length: int
    """Tokens of a sequence."""
    weights: Weights
    """As --train.weights: all weights on every rank, or a part of them."""
    ranks: tuple[int, ...]
    """Numbers of GPUs."""
    model: ModelConfig
    """The network."""
    cluster: Cluster
    """The hardware."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn plan`."""
    recipe = named_recipe(args)
    config = load_recipe(recipe)
    if not isinstance(config.task, TextConfig):
        raise ValueError(f"plan: the recipe must be one for text, got {recipe}")
    size, window = config.train.batch_size, config.task.window
    defaults = PlanCommand(recipe, size, 0, window, "replicated", (1, 8, 64, 1024), config.model, Cluster())
    command = parse(PlanCommand, "plan", args, defaults=defaults)
    if command.recipe != recipe:
        raise ValueError(f"the recipe must come first: minrnn plan {command.recipe} [options]")
    given = [("rows", command.rows), ("length", command.length), *(("ranks", n) for n in command.ranks)]
    for name, value in given:
        check_range("plan", name, value, 1, MOST)
    check_range("plan", "rows_per_rank", command.rows_per_rank, 0, MOST)
    console = Output()
    (console if console.is_terminal else Output(width=WIDTH)).print(_table(command))
    return 0


def _table(command: PlanCommand) -> Table:
    table = Table(
        *("GPUs", "of a row", "computing", "traffic", "carries", "step", "tokens/s", "weights", "kept"),
        title=f"{command.recipe}: a training step, computed and not measured",
    )
    work = work_of(command.model, command.rows, command.length)
    for ranks in command.ranks:
        rows = command.rows_per_rank * ranks or command.rows
        found = costs(replace(work, rows=rows), command.cluster, ranks, command.weights)
        table.add_row(*_cells(found, command.cluster))
    table.caption = (
        f"{work.parameters:,} parameters. Traffic: gradients, and weights if sharded; hidden as far as "
        "computing takes longer. Carries: what a split scan exchanges. Weights: with gradients and moments. "
        "Kept: by the backward pass, in float32. "
        f"!: together more than the {command.cluster.memory:g} GB of a GPU."
    )
    return table


def _cells(found: Costs, cluster: Cluster) -> list[str]:
    seconds = (found.compute, found.traffic, found.carries, found.step)
    full = "!" if found.weights + found.activations > 1e9 * cluster.memory else ""
    return [
        str(found.ranks),
        str(found.sequence_ranks),
        *map(_time, seconds),
        f"{found.tokens_per_second:,.0f}",
        f"{found.weights / 1e9:,.1f} GB",
        f"{found.activations / 1e9:,.1f} GB{full}",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
