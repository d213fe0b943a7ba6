"""`minrnn demo`: train a small model, compare it with a baseline, and sample from it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import tyro
from rich.table import Table

from minrnn.cli import sample, train
from minrnn.cli.arguments import parse
from minrnn.files import fresh_directory, read_json
from minrnn.tasks import TextConfig, TextTask
from minrnn.tasks.ngram import ngram_baseline
from minrnn.training import Output, load_recipe

BASELINE_ORDER = 3

PROMPTS = ("def ", *sample.PROMPTS)
"""Default prompts, of which the first in the vocabulary is used; the demo's default text is Python."""


@dataclass(frozen=True)
class DemoCommand:
    """Train a small model, compare it with an n-gram baseline, and sample from it."""

    recipe: tyro.conf.Positional[str] = train.DEFAULT_RECIPE
    """Name of a recipe, or a path that ends in .toml."""
    prompt: str = ""
    """Prompt for the trained model (empty: "def ", if it is in the vocabulary)."""
    tokens: int = 400
    """Number of tokens to sample."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn demo`: `minrnn train`, a comparison, and `minrnn sample`."""
    command = parse(DemoCommand, "demo", args)
    config = load_recipe(command.recipe)
    if not isinstance(config.task, TextConfig):
        raise ValueError(f"demo: the recipe must be one of text, got {command.recipe}, of {config.task.task}")
    with fresh_directory(train.default_run(config.recipe)) as run_dir:
        status = train.run([command.recipe, "--run", str(run_dir)])
    if status:
        return status
    task = TextTask(config.task)
    Output().print(_comparison(run_dir, task))
    prompt = command.prompt or sample.default_prompt(task.vocabulary, PROMPTS)
    again = [str(run_dir), *f"--tokens {command.tokens} --temperature 0.8 --prompt".split(), prompt]
    print(f"$ minrnn sample {shlex.join(again)}")
    sample.run(again)
    print(f"\nrun:  {run_dir}")
    if (run_dir / "loss.png").exists():  # otherwise training has printed the reason
        print(f"plot: {run_dir / 'loss.png'}")
    return 0


class _Results(TypedDict):
    """The keys of results.json that are shown."""

    mixer: str
    parameters: int
    bits_per_byte: float


def _comparison(run_dir: Path, task: TextTask) -> Table:
    """Return a table of the run's result and that of an n-gram model on the same text, in bits per byte."""
    results = read_json(run_dir / "results.json", _Results)
    baseline = ngram_baseline(task, BASELINE_ORDER)
    bits_per_byte = {
        f"order-{BASELINE_ORDER} n-gram of {task.vocabulary.unit}": baseline["bits_per_byte"],
        f"{results['mixer']}, {results['parameters']:,} parameters": results["bits_per_byte"],
    }
    table = Table("model", "bits per byte", title="validation, lower is better")
    for name, bits in bits_per_byte.items():
        table.add_row(name, f"{bits:.3f}")
    return table
