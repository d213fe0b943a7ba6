"""`minrnn evaluate`: a trained model's metrics on its validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from minrnn.cli.arguments import parse
from minrnn.files import write_json
from minrnn.tasks import TASKS, Task, TextConfig, TextTask
from minrnn.training import choose_device, load_trained, provenance, read_config


@dataclass(frozen=True)
class EvaluateCommand:
    """Measure a trained model on its validation split; print that, and write evaluation.json in the run."""

    run: tyro.conf.Positional[Path]
    """Directory of the run whose model is measured."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    window: int | None = None
    """Tokens in each window of val_loss_windowed (None: as the run was trained); of text only."""
    max_tokens: int = 0
    """Tokens of the split that are predicted (0: all)."""
    device: str = "auto"
    """Device to compute on: auto (a GPU when there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn evaluate`."""
    command = parse(EvaluateCommand, "evaluate", args)
    config = read_config(command.run)
    device = choose_device(command.device)
    model, vocabulary, step = load_trained(command.run, command.checkpoint, device)
    settings: dict[str, object] = {"checkpoint": command.checkpoint, "step": step}
    if isinstance(config.task, TextConfig):
        window = config.task.window if command.window is None else command.window
        task: Task = TextTask(replace(config.task, window=window), vocabulary)
        settings["window"] = window
    elif command.window is None:
        task = TASKS[config.task.task](config.task)
    else:
        raise ValueError(f"evaluate: window must be left out for {config.task.task}, got {command.window}")
    metrics = task.evaluate(model, max_tokens=command.max_tokens)
    results = {**settings, **metrics}
    table = Table("metric", "value", title=str(command.run))
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    write_json(command.run / "evaluation.json", {**results, **provenance(device)})
    return 0
