"""`minrnn train`: a recipe and overrides in, a run directory out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tyro

from minrnn.cli.arguments import parse
from minrnn.files import fresh_directory
from minrnn.models import ModelConfig
from minrnn.tasks import TaskConfig
from minrnn.training import (
    Interrupted,
    Output,
    RunConfig,
    RunLog,
    TrainConfig,
    load_recipe,
    read_config,
    recipe_names,
    recipe_summary,
    train,
)

DEFAULT_RECIPE = "demo"

TaskConfigT = TypeVar("TaskConfigT")


@dataclass(frozen=True)
class TrainCommand(Generic[TaskConfigT]):
    """Train a model, and leave its checkpoints, metrics and results in a directory."""

    recipe: tyro.conf.Positional[str]
    """Name of a recipe, or a path that ends in .toml; it comes first, and gives the defaults of all else."""
    run: Path | None
    """Directory of the run (None: runs/RECIPE-TIME)."""
    resume: tyro.conf.FlagCreatePairsOff[bool]
    """Go on from the last checkpoint in --run DIR, with the settings that are saved there."""
    model: ModelConfig
    """The network."""
    task: TaskConfigT
    """What it learns."""
    train: TrainConfig
    """How it learns."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn train`; a stop by signal n that was saved is the exit status 128 + n."""
    resumed = _resumed_run(args)
    config = load_recipe(_named_recipe(args)) if resumed is None else read_config(resumed)
    command = _parse(args, config, config.recipe if resumed else _named_recipe(args))
    config = dataclasses.replace(config, model=command.model, task=command.task, train=command.train)
    place = fresh_directory(default_run(config.recipe)) if command.run is None else nullcontext(command.run)
    with place as run_dir:
        return _train(config, run_dir, command.resume)


def _train(config: RunConfig, run_dir: Path, resume: bool) -> int:
    log = RunLog(Output())
    try:
        results = train(config, run_dir, resume=resume, log=log)
    except Interrupted as stop:
        with contextlib.suppress(OSError):  # whoever has asked by leaving does not read it
            log.note(f"{stop}; go on with: minrnn train --run {_argument(run_dir)} --resume")
        return 128 + stop.signum
    except KeyboardInterrupt:  # a second signal, or one outside the loop
        if (run_dir / "checkpoints" / "last").exists():
            with contextlib.suppress(OSError):
                log.note(
                    "stopped; go on from the last checkpoint with: "
                    f"minrnn train --run {_argument(run_dir)} --resume"
                )
        raise
    log.note(_summary(config.task, results, run_dir))
    return 0


def _summary(task: TaskConfig, results: Mapping[str, Any], run_dir: Path) -> str:
    """Say how well it went, and what can be done with it."""
    loss = f"val_loss {results['val_loss']:.4f} {results['unit']} at step {results['step']}"
    found = {"bits_per_byte": "{:.4f} bits a byte", "accuracy": "accuracy {:.4f}"}
    parts = [loss, *(text.format(results[name]) for name, text in found.items() if name in results)]
    return f"{', '.join(parts)}; next: minrnn {task.verb} {_argument(run_dir)}"


def default_run(recipe: str) -> Path:
    """Name the directory of a run that starts now; others of the same second get numbers after it."""
    return Path("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")


def _argument(path: Path) -> str:
    """Return a path as a shell takes it for a command's argument."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _named_recipe(args: Sequence[str]) -> str:
    """Return the recipe that the arguments begin with; it must be known before the others can be read."""
    return args[0] if args and not args[0].startswith("-") else DEFAULT_RECIPE


def _resumed_run(args: Sequence[str]) -> Path | None:
    """Return the run whose settings are the defaults, or None where the recipe's are."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A missing value is the real parser's to report.
    finder.add_argument("--run", type=lambda text: Path(text).expanduser(), nargs="?")
    finder.add_argument("--resume", action="store_true")
    found, _ = finder.parse_known_args(args)
    if found.resume and found.run is None:
        raise ValueError("--resume needs --run DIR, the directory of the run to go on with")
    return found.run if found.resume else None


def _parse(args: Sequence[str], config: RunConfig, recipe: str) -> TrainCommand[Any]:
    """Read the arguments over the values of a configuration, which are the defaults that the help shows."""
    defaults: TrainCommand[Any] = TrainCommand(recipe, None, False, config.model, config.task, config.train)
    kind: Any = TrainCommand[type(config.task)]  # type: ignore[misc]  # which one, the recipe says
    command: TrainCommand[Any] = parse(kind, "train", args, defaults=defaults, description=_description())
    if command.recipe != recipe and command.resume:
        raise ValueError(f"{command.run} is a run of the recipe {recipe}, got {command.recipe}; leave it out")
    if command.recipe != recipe:
        raise ValueError(f"the recipe comes first: minrnn train {command.recipe} [options]")
    return command


def _description() -> str:
    recipes = "\n".join(f"  {name}: {recipe_summary(name)}" for name in recipe_names())
    return f"{TrainCommand.__doc__}\n\nrecipes:\n{recipes}"
