"""Training of a behavior policy, saved round by round to a file from which it resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from minrnn.demonstrations.behavior import Behavior
from minrnn.demonstrations.trainers import Arrays, Round, Trainer, training_environments
from minrnn.files import lock, naming
from minrnn.tasks.arrays import read_arrays, write_arrays
from minrnn.training import interruptible
from minrnn.training.threads import cpu_threads

SMOOTHED_ROUNDS = 3  # a round's mean return is noisy, so it is averaged with its neighbors
SAVE_EVERY = 15.0  # seconds; an interruption loses at most this and a round

ReportProgress = Callable[[str, int, int, str], None]
"""A progress callback: (activity, steps done, total steps, further text)."""


@dataclass
class History:
    """The rounds of a training, and the state for the next one."""

    behaviors: list[Behavior] = field(default_factory=list)
    """The policy at the start of each round."""
    steps: list[int] = field(default_factory=list)
    """Total environment steps at the end of each round."""
    returns: list[float] = field(default_factory=list)
    """Mean return of the episodes that ended in each round, with exploration noise; NaN if none did."""
    state: Arrays = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Total environment steps."""
        return self.steps[-1] if self.steps else 0

    @property
    def last_start(self) -> int:
        """Environment steps before the last round."""
        return self.steps[-2] if len(self.steps) > 1 else 0

    def add(self, result: Round) -> None:
        """Append a round."""
        self.behaviors.append(result.behavior)
        self.steps.append(self.total_steps + result.steps)
        self.returns.append(result.mean_return)
        self.state = result.state

    def until(self, steps: int) -> History:
        """Return the rounds up to the one that reaches `steps`, without the state for the next."""
        count = int(np.searchsorted(self.steps, steps)) + 1
        return History(self.behaviors[:count], self.steps[:count], self.returns[:count])

    def best(self) -> int:
        """Return the index of the round with the highest mean return, averaged over adjacent rounds."""
        reach = SMOOTHED_ROUNDS // 2
        means = []
        for number in range(len(self.returns)):
            near = self.returns[max(0, number - reach) : number + reach + 1]
            known = [value for value in near if not math.isnan(value)]
            means.append(sum(known) / len(known) if known else -math.inf)
        return int(np.argmax(means))

    def save(self, path: Path) -> None:
        """Write the history to a file atomically.

        Raises:
            OSError: the file cannot be written.
        """
        columns = {
            "parameters": [behavior.parameters for behavior in self.behaviors],
            "mean": [behavior.mean for behavior in self.behaviors],
            "variance": [behavior.variance for behavior in self.behaviors],
            "action_noise": [behavior.action_noise for behavior in self.behaviors],
        }
        write_arrays(
            path,
            {
                "sizes": np.array(self.behaviors[0].sizes),
                "steps": np.array(self.steps),
                "returns": np.array(self.returns),
                **{name: np.stack(values) for name, values in columns.items()},
                **{f"state/{name}": value for name, value in self.state.items()},
            },
        )


def read_history(path: Path) -> History:
    """Return the history in a file written by `History.save`.

    Raises:
        ValueError: the file is damaged or has another content.
    """
    with naming("make_data"):
        arrays = read_arrays(path)
    columns = ("parameters", "mean", "variance", "action_noise")
    check_arrays(path, arrays, {"sizes": 1, "steps": 1, "returns": 1, **dict.fromkeys(columns, 2)})
    rounds = {len(arrays[name]) for name in (*columns, "steps", "returns")}
    sizes = tuple(map(int, arrays["sizes"]))
    widths = [arrays[name].shape[1] for name in columns]
    expected = [sum((a + 1) * b for a, b in pairwise(sizes)), sizes[0], sizes[0], sizes[-1]] if sizes else []
    if len(rounds) != 1 or widths != expected or np.any(np.diff(arrays["steps"], prepend=0) < 1):
        raise ValueError(
            f"make_data: {path} must hold equal numbers of rounds, in order, and policies of {sizes}, got "
            f"arrays of {', '.join(f'{name} {arrays[name].shape}' for name in columns)}; remove it"
        )
    return History(
        [Behavior(row[0], sizes, *row[1:]) for row in zip(*(arrays[name] for name in columns), strict=True)],
        arrays["steps"].tolist(),
        arrays["returns"].tolist(),
        {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")},
    )


INTEGER_ARRAYS = ("sizes", "steps", "ends")
"""Names of the integer arrays."""


def check_arrays(path: Path, arrays: Arrays, axes: Mapping[str, int]) -> None:
    """Raise ValueError unless `arrays` has a numeric array of each name with that number of axes."""
    for name, count in axes.items():
        if name not in arrays:
            found = ", ".join(arrays) or "nothing"
            raise ValueError(f"make_data: {path} must hold {name}, got {found}; remove it")
        array = arrays[name]
        if array.ndim != count or array.dtype.kind not in ("iu" if name in INTEGER_ARRAYS else "biuf"):
            raise ValueError(
                f"make_data: {path}: {name} must be numbers with {count} axes, got {array.shape} "
                f"{array.dtype}; remove it"
            )


def train_behavior(
    environment: str, trainer: Trainer, steps: int, seed: int, path: Path, report: ReportProgress
) -> History:
    """Train a behavior policy for at least `steps` steps, and return the rounds.

    Rounds are saved to a file and not trained again: an interrupted training gives the same rounds as an
    uninterrupted one, and a shorter training is a prefix of a longer one.

    Args:
        environment: gymnasium's id.
        trainer: the algorithm and its settings.
        steps: environment steps, at least 1.
        seed: seed of all random numbers.
        path: the file; it must be used with the same other arguments, except `steps`.
        report: progress callback.

    Raises:
        InUseError: another process uses the file.
        Interrupted: a signal or a closed output requested a stop; all completed rounds are saved.
        ValueError: the file is damaged, or there is no such environment.
        ImportError: a library is not installed; the message names the extra to install.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f"{path.name}.lock")):
        history = read_history(path) if path.exists() else History()
        if history.total_steps < steps:
            _train(history, environment, trainer, steps, seed, path, report)
    return history.until(steps)


def _train(
    history: History,
    environment: str,
    trainer: Trainer,
    steps: int,
    seed: int,
    path: Path,
    report: ReportProgress,
) -> None:
    """Add rounds to a history until it has `steps` steps, and save it at intervals."""
    # Networks this small are slower with more than one thread.
    with (
        training_environments(environment, trainer) as environments,
        cpu_threads(1),
        interruptible() as interruption,
    ):
        saved = time.monotonic()
        while history.total_steps < steps:
            history.add(trainer.train(environments, history.state, _round_seed(seed, len(history.steps))))
            with interruption.guard_output():
                report("training", history.total_steps, steps, f"return {history.returns[-1]:,.0f}")
            is_last = history.total_steps >= steps or interruption.requested
            if is_last or time.monotonic() - saved > SAVE_EVERY:
                history.save(path)
                saved = time.monotonic()
            if interruption.requested:
                raise interruption.to_exception(f"{history.total_steps:,} of {steps:,} steps of training")


def _round_seed(seed: int, number: int) -> int:
    """Return the seed of a round; the libraries require it to be below 2^32."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
