"""`minrnn demo`: the whole of it once: a small model is trained, compared with a baseline, and writes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from minrnn.cli import sample, train
from minrnn.cli.arguments import parse
from minrnn.tasks import TextConfig, TextTask
from minrnn.tasks.ngram import ngram_baseline
from minrnn.training import load_recipe

BASELINE_ORDER = 3


@dataclass(frozen=True)
class DemoCommand:
    """Train a small model, compare it with counting what follows what, and let it write."""

    recipe: tyro.conf.Positional[str] = train.DEFAULT_RECIPE
    """Name of a recipe, or a path that ends in .toml."""
    prompt: str = "def "
    """Text that the trained model goes on from."""
    tokens: int = 400
    """Tokens that it writes."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn demo`: `minrnn train`, a comparison, and `minrnn sample`."""
    command = parse(DemoCommand, "demo", args)
    config = load_recipe(command.recipe)
    if not isinstance(config.task, TextConfig):
        raise ValueError(f"demo: the recipe must be one of text, got {command.recipe}, of {config.task.task}")
    run_dir = train.new_run_dir(config.recipe)
    status = train.run([command.recipe, "--run", str(run_dir)])
    if status:
        return status
    Console().print(_comparison(run_dir, TextTask(config.task)))
    again = [str(run_dir), *f"--tokens {command.tokens} --temperature 0.8 --prompt".split(), command.prompt]
    print(f"$ minrnn sample {shlex.join(again)}")
    sample.run(again)
    print(f"\nrun:  {run_dir}")
    if (run_dir / "loss.png").exists():  # without matplotlib there is none, and training has said so
        print(f"plot: {run_dir / 'loss.png'}")
    return 0


def _comparison(run_dir: Path, task: TextTask) -> Table:
    """Put the run's result beside that of an n-gram model on the same text, in bits per byte."""
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    baseline = ngram_baseline(task, BASELINE_ORDER)
    bits_per_byte = {
        f"order-{BASELINE_ORDER} n-gram of {task.vocabulary.kind}": baseline["bits_per_byte"],
        f"{results['mixer']}, {results['parameters']:,} parameters": results["bits_per_byte"],
    }
    table = Table("model", "bits per byte", title="validation, lower is better")
    for name, bits in bits_per_byte.items():
        table.add_row(name, f"{bits:.3f}")
    return table
