"""`minrnn train`: a recipe and overrides in, a run directory out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from minrnn.cli.arguments import parse
from minrnn.models import ModelConfig
from minrnn.tasks import TextConfig
from minrnn.training import Interrupted, RunConfig, RunLog, TrainConfig, load_recipe, read_config, train

DEFAULT_RECIPE = "demo"


@dataclass(frozen=True)
class TrainCommand:
    """Train a model, and leave its checkpoints, metrics and results in a directory."""

    recipe: tyro.conf.Positional[str]
    """Name of a recipe, or a path that ends in .toml; it comes first, and gives the defaults of all else."""
    run: Path | None
    """Directory of the run (None: runs/RECIPE-TIME)."""
    resume: tyro.conf.FlagCreatePairsOff[bool]
    """Go on from the last checkpoint in --run DIR, with the settings that are saved there."""
    model: ModelConfig
    """The model."""
    task: TextConfig
    """The task."""
    train: TrainConfig
    """The training."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn train`; a stop by signal n that was saved is the exit status 128 + n."""
    command = _parse(args)
    config = RunConfig(command.recipe, command.model, command.task, command.train)
    name = f"{Path(config.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run_dir = command.run or Path("runs", name)
    log = RunLog(Console(soft_wrap=True))
    try:
        results = train(config, run_dir, resume=command.resume, log=log)
    except Interrupted as stop:
        log.note(f"{stop}; go on with: minrnn train --run {run_dir} --resume")
        return 128 + stop.signum
    log.note(
        f"val_loss {results['val_loss']:.4f} nats a token at step {results['step']}, "
        f"{results['bits_per_byte']:.4f} bits a byte; everything is in {run_dir}"
    )
    return 0


def _parse(args: Sequence[str]) -> TrainCommand:
    """Read the arguments over the recipe's values, or, to resume, over those of the run."""
    config = _base(args)
    defaults = TrainCommand(config.recipe, None, False, config.model, config.task, config.train)
    command = parse(TrainCommand, "train", args, defaults)
    if command.recipe != config.recipe:
        raise ValueError(f"the recipe comes first: minrnn train {command.recipe} [options]")
    return command


def _base(args: Sequence[str]) -> RunConfig:
    """Return the configuration that the arguments change; it gives the defaults that their help shows."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--run", type=Path)
    finder.add_argument("--resume", action="store_true")
    found, rest = finder.parse_known_args(args)
    if found.resume and found.run is None:
        raise ValueError("--resume needs --run DIR, the directory of the run to go on with")
    if found.resume:
        return read_config(found.run)
    named = bool(rest) and not rest[0].startswith("-")
    return load_recipe(rest[0] if named else DEFAULT_RECIPE)
