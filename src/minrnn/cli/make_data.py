"""`minrnn make-data`: train a policy in an environment and record its episodes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from minrnn.cli.arguments import check_range, parse
from minrnn.demonstrations import make_data
from minrnn.tasks.recordings import read_episodes
from minrnn.training import MOST_SEEDS, MOST_STEPS, Interrupted, Output

LINE_SECONDS = 10.0  # between lines, if the output is not a terminal


@dataclass(frozen=True)
class MakeDataCommand:
    """Make data for policies: train a policy in an environment, and record its episodes in D4RL's layout.

    The same command resumes an interrupted one. The data are labeled as local: their scores are not
    comparable with those of D4RL's or Minari's data sets.
    """

    environment: tyro.conf.Positional[str]
    """Gymnasium's id, such as Hopper-v5, HalfCheetah-v5, or package.module:Name-v0, which imports the module;
    actions must be continuous."""
    quality: Literal["random", "medium", "medium-replay", "medium-expert"] = "medium"
    """Random actions; the best policy of the training, with noise; policies of the whole training; or half
    medium, half without noise."""
    output: Path | None = None
    """File to write (None: one in the cache folder, whose name is printed)."""
    seed: int = 0
    """Seed of training and recording."""
    steps: int = 200_000
    """Number of recorded steps."""
    training_steps: int = 0
    """Number of training steps (0: the default of the environment)."""
    algorithm: Literal["", "ppo", "ars"] = ""
    """Proximal policy optimization or augmented random search (empty: the default of the environment)."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn make-data`."""
    command = parse(MakeDataCommand, "make-data", args)
    check_range("make-data", "seed", command.seed, 0, MOST_SEEDS - 1)
    for name in ("steps", "training_steps"):
        check_range("make-data", name, getattr(command, name), 0, MOST_STEPS)
    console = Output()
    view = _Bars(console) if console.is_terminal else _Lines(console)
    try:
        with view:
            path = make_data(
                command.environment,
                command.quality,
                view.report,
                output=command.output,
                seed=command.seed,
                steps=command.steps,
                training_steps=command.training_steps,
                algorithm=command.algorithm,
            )
    except Interrupted as stop:
        with contextlib.suppress(OSError):  # the reader may have gone
            _say(console, f"{stop}; the same command resumes")
        return 128 + stop.signum
    except KeyboardInterrupt:  # a second signal, or one outside training and recording
        with contextlib.suppress(OSError):
            _say(console, "stopped; the same command resumes from here")
        raise
    episodes = read_episodes(path)
    _say(console, episodes.describe())
    if "policy_return" in episodes.about:
        score = episodes.about["policy_score"]
        _say(
            console,
            f"policy without noise: return {episodes.about['policy_return']:,.0f}"
            + ("" if score is None else f", D4RL's score {score:.1f}")
            + f", after {episodes.about['best_after_steps']:,} steps of {episodes.about['algorithm']}",
        )
    _say(console, episodes.about["label"])
    _say(console, f"file: {path}")
    source = episodes.about["name"] if command.output is None else path
    _say(console, f"next: minrnn train decisions --task.data {source}")
    return 0


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """Plain lines at intervals: for pipes, files and batch systems."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed_at = 0.0

    def report(self, what: str, done: int, total: int, text: str) -> None:
        """Print the progress, at most every LINE_SECONDS."""
        if done >= total or time.monotonic() - self._printed_at > LINE_SECONDS:
            self._printed_at = time.monotonic()
            _say(self._console, f"{what} {done:,}/{total:,}  {text}")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class _Bars:
    """A progress bar for each activity, with the remaining time."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[what]:10}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.description}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def report(self, what: str, done: int, total: int, text: str) -> None:
        """Update the progress bar of the activity."""
        done = min(done, total)
        if what in self._tasks:
            self._progress.update(self._tasks[what], completed=done, description=text)
        else:  # steps of earlier sessions do not count for the speed
            self._tasks[what] = self._progress.add_task(text, total=total, completed=done, what=what)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
