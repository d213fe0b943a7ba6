"""`minrnn evaluate`: evaluate a trained model on its validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.table import Table

from minrnn.cli.arguments import check_range, parse
from minrnn.files import NoEffect, warn_without_effect, write_json
from minrnn.models import SequenceModel
from minrnn.tasks import Task, TextConfig, TextTask, make_task
from minrnn.training import (
    MOST_STEPS,
    Output,
    Progress,
    Trained,
    choose_device,
    load_trained,
    provenance,
    read_config,
)


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluate a trained model on its validation split; print the metrics and write evaluation.json.

    With tasks of the evaluation harness, write harness.json.
    """

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
    harness: str = ""
    """Tasks of EleutherAI's evaluation harness to evaluate on instead, such as lambada_openai,piqa."""
    harness_folder: Path | None = None
    """Folder with tasks of your own for the harness."""
    harness_shots: int | None = None
    """Examples before each of the harness's questions (None: what its task says)."""
    harness_limit: int = 0
    """Maximum number of the harness's questions in a task (0: all)."""


WITHOUT_EFFECT = (
    *(
        NoEffect(name, "harness", lambda s: not s["harness"])
        for name in ("harness_folder", "harness_shots", "harness_limit")
    ),
    *(NoEffect(name, "harness", lambda s: bool(s["harness"])) for name in ("window", "max_tokens")),
)
"""Options that have no effect with or without tasks of the harness."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn evaluate`."""
    command = parse(EvaluateCommand, "evaluate", args)
    check_range("evaluate", "max_tokens", command.max_tokens, 0, MOST_STEPS)
    check_range("evaluate", "harness_limit", command.harness_limit, 0, MOST_STEPS)
    check_range("evaluate", "harness_shots", command.harness_shots or 0, 0, MOST_STEPS)
    warn_without_effect(EvaluateCommand, vars(command), WITHOUT_EFFECT)
    config = read_config(command.run)
    device = choose_device(command.device)
    trained = load_trained(command.run, command.checkpoint, device)
    if command.harness:
        return _run_harness(command, trained, device)
    model, vocabulary, step, corpus = trained
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
        table.add_row(name, _shown(value))
    _report(command.run / "evaluation.json", {**results, **provenance(device)}, table, console)
    return 0


def _report(path: Path, record: dict[str, object], table: Table, console: Output) -> None:
    """Write a record, and print a table of it, even if the run directory is read-only."""
    try:
        write_json(path, record)
    finally:
        console.print(table)


def _shown(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _run_harness(command: EvaluateCommand, trained: Trained, device: torch.device) -> int:
    """Evaluate on tasks of the harness; print the metrics and write harness.json."""
    from minrnn.integrations.harness import evaluate

    model, vocabulary, step, _ = trained
    if vocabulary is None or not isinstance(model, SequenceModel):
        raise ValueError(f"evaluate: harness takes runs of the text task, got {command.run}, one of another")
    found = evaluate(
        model,
        vocabulary,
        [name.strip() for name in command.harness.split(",")],
        folder=command.harness_folder,
        shots=command.harness_shots,
        limit=command.harness_limit or None,
    )
    table = Table("task", "metric", "value", title=str(command.run))
    for task, metrics in found.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                table.add_row(task, name, _shown(value))
    settings = {"checkpoint": command.checkpoint, "step": step, "shots": command.harness_shots}
    record = {**settings, "limit": command.harness_limit, "tasks": found, **provenance(device)}
    _report(command.run / "harness.json", record, table, Output())
    return 0
