"""`minrnn evaluate`: evaluate a trained model on its validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from minrnn.cli.arguments import check_range, parse
from minrnn.files import write_json
from minrnn.tasks import Task, TextConfig, TextTask, make_task
from minrnn.training import (
    MOST_STEPS,
    Output,
    Progress,
    choose_device,
    load_trained,
    provenance,
    read_config,
)


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a trained model on its validation split; print the metrics and write evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    window: int | None = None
    """Tokens per window of val_loss_windowed (None: as in training); for text only."""
    max_tokens: int = 0
    """Maximum number of predicted tokens (0: all)."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn evaluate`."""
    command = parse(EvaluateCommand, "evaluate", args)
    check_range("evaluate", "max_tokens", command.max_tokens, 0, MOST_STEPS)
    config = read_config(command.run)
    device = choose_device(command.device)
    model, vocabulary, step, corpus = load_trained(command.run, command.checkpoint, device)
    settings: dict[str, object] = {"checkpoint": command.checkpoint, "step": step}
    if isinstance(config.task, TextConfig):
        window = config.task.window if command.window is None else command.window
        task: Task = TextTask(replace(config.task, window=window), vocabulary)
        settings["window"] = window
    elif command.window is None:
        task = make_task(config.task)
    else:
        raise ValueError(f"evaluate: window must be left out for {config.task.task}, got {command.window}")
    if task.sha256 != corpus:
        raise ValueError(
            f"evaluate: the text or data has changed since {command.run} was trained on it; it is now "
            f"{task.describe()}"
        )
    console = Output()
    with Progress(console, "evaluating") as progress:
        metrics = task.evaluate(model, max_tokens=command.max_tokens, tell=progress)
    results = {**settings, **metrics}
    table = Table("metric", "value", title=str(command.run))
    for name, value in results.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    try:
        write_json(command.run / "evaluation.json", {**results, **provenance(device)})
    finally:  # print the metrics even if the run directory is read-only
        console.print(table)
    return 0
