"""`minrnn train`: train a model from a recipe and overrides, or resume a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from minrnn.cli.arguments import parse
from minrnn.distributed import Launch, Ranks, join
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
    """Train a model, and write its checkpoints, metrics and results to a directory."""

    recipe: tyro.conf.Positional[str]
    """Name of a recipe, or a path that ends in .toml; it must come first, and sets the defaults."""
    run: Annotated[Path | None, tyro.conf.arg(aliases=["--run-dir"])]
    """Run directory (None: runs/RECIPE-TIME)."""
    resume: tyro.conf.FlagCreatePairsOff[bool]
    """Resume from the last checkpoint in --run DIR, with its saved settings."""
    model: ModelConfig
    """The network."""
    task: TaskConfigT
    """The task."""
    train: TrainConfig
    """Training settings."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn train`; the exit status is 128 + n if signal n stopped the run."""
    resumed = _resumed_run(args)
    config = load_recipe(named_recipe(args)) if resumed is None else read_config(resumed)
    command = _parse(args, config, config.recipe if resumed else named_recipe(args))
    config = dataclasses.replace(config, model=command.model, task=command.task, train=command.train)
    launch = Launch.of(os.environ)
    if launch.most_restarts and command.run is None:
        raise ValueError("torchrun --max-restarts needs --run-dir DIR, the directory to go on in")
    with (
        join(config.train.device, config.train.timeout, launch) as ranks,
        _run_directory(config, command.run, ranks) as run_dir,
    ):
        restarted = ranks.highest([launch.restarts])[0] > 0
        begun = ranks.first_says(lambda: (run_dir / "config.json").is_file())
        return _train(config, run_dir, command.resume or (restarted and begun), ranks)


@contextmanager
def _run_directory(config: RunConfig, named: Path | None, ranks: Ranks) -> Iterator[Path]:
    """Yield the run's directory: the one that is named, or a new one of the first rank, on all ranks."""
    if named is not None:
        yield named
        return
    with contextlib.ExitStack() as stack:

        def make() -> str:
            return str(stack.enter_context(fresh_directory(default_run(config.recipe))))

        yield Path(ranks.first_says(make))


def _train(config: RunConfig, run_dir: Path, resume: bool, ranks: Ranks) -> int:
    log = RunLog(Output() if ranks.is_first else None)
    again = f"{_launcher(ranks)}minrnn train --run {_argument(run_dir)} --resume"
    try:
        results = train(config, run_dir, resume=resume, log=log, ranks=ranks)
    except Interrupted as stop:
        with contextlib.suppress(OSError):  # the reader may have gone
            log.note(f"{stop}; resume with: {again}")
        return 128 + stop.signum
    except KeyboardInterrupt:  # a second signal, or one outside the loop
        if (run_dir / "checkpoints" / "last").exists():
            with contextlib.suppress(OSError):
                log.note(f"stopped; resume from the last checkpoint with: {again}")
        raise
    log.note(_summary(config.task, results, run_dir))
    return 0


def _summary(task: TaskConfig, results: Mapping[str, Any], run_dir: Path) -> str:
    """Return the final metrics and the next command, in one line."""
    loss = f"val_loss {results['val_loss']:.4f} {results['unit']} at step {results['step']}"
    found = {"bits_per_byte": "{:.4f} bits per byte", "accuracy": "accuracy {:.4f}"}
    parts = [loss, *(text.format(results[name]) for name, text in found.items() if name in results)]
    return f"{', '.join(parts)}; next: minrnn {task.verb} {_argument(run_dir)}"


def default_run(recipe: str) -> Path:
    """Return the default directory of a run that starts now."""
    return Path("runs", f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")


def _launcher(ranks: Ranks) -> str:
    """Return what starts a command on this many ranks of one machine, with a space; nothing for one rank."""
    return "" if ranks.size == 1 else f"torchrun --nproc-per-node {ranks.local_size} -m -- "


def _argument(path: Path) -> str:
    """Return a path quoted as an argument for a shell."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def named_recipe(args: Sequence[str]) -> str:
    """Return the recipe at the start of the arguments, which determines the defaults of the others."""
    return args[0] if args and not args[0].startswith("-") else DEFAULT_RECIPE


def _resumed_run(args: Sequence[str]) -> Path | None:
    """Return the run to resume, or None."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # A missing value is reported by the parser of all options.
    finder.add_argument(
        "--run", "--run-dir", dest="run", type=lambda text: Path(text).expanduser(), nargs="?"
    )
    finder.add_argument("--resume", action="store_true")
    found, _ = finder.parse_known_args(args)
    if found.resume and found.run is None:
        raise ValueError("--resume needs --run DIR, the directory of the run to resume")
    return found.run if found.resume else None


def _parse(args: Sequence[str], config: RunConfig, recipe: str) -> TrainCommand[Any]:
    """Parse the arguments, with the values of a configuration as defaults."""
    defaults: TrainCommand[Any] = TrainCommand(recipe, None, False, config.model, config.task, config.train)
    kind: Any = TrainCommand[type(config.task)]  # type: ignore[misc]  # known at run time only
    command: TrainCommand[Any] = parse(kind, "train", args, defaults=defaults, description=_description())
    if command.recipe != recipe and command.resume:
        raise ValueError(f"{command.run} is a run of the recipe {recipe}, got {command.recipe}; leave it out")
    if command.recipe != recipe:
        raise ValueError(f"the recipe must come first: minrnn train {command.recipe} [options]")
    return command


def _description() -> str:
    recipes = "\n".join(f"  {name}: {recipe_summary(name)}" for name in recipe_names())
    return f"{TrainCommand.__doc__}\n\nrecipes:\n{recipes}"
