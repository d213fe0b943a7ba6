"""A behavior's training as it went: every round's policy, kept in a file that training goes on from."""

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

SMOOTHED_ROUNDS = 3  # a round's mean return is noisy, so its neighbors count as well
SAVE_EVERY = 15.0  # seconds, which is what an interruption costs at most, and a round

ReportProgress = Callable[[str, int, int, str], None]
"""Called with what is going on, steps that are done, steps in all, and what there is to say."""


@dataclass
class History:
    """What each round of training left, and what the next one needs."""

    behaviors: list[Behavior] = field(default_factory=list)
    """The policy that each round began with."""
    steps: list[int] = field(default_factory=list)
    """Steps in the environment up to the end of each round."""
    returns: list[float] = field(default_factory=list)
    """Mean return of each round's episodes, with the noise of training; NaN where none ended."""
    state: Arrays = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Steps in the environment so far."""
        return self.steps[-1] if self.steps else 0

    @property
    def last_start(self) -> int:
        """Steps in the environment before the last round."""
        return self.steps[-2] if len(self.steps) > 1 else 0

    def add(self, result: Round) -> None:
        """Append a round."""
        self.behaviors.append(result.behavior)
        self.steps.append(self.total_steps + result.steps)
        self.returns.append(result.mean_return)
        self.state = result.state

    def until(self, steps: int) -> History:
        """Return the rounds up to the one that reached so many steps, without what more would need."""
        count = int(np.searchsorted(self.steps, steps)) + 1
        return History(self.behaviors[:count], self.steps[:count], self.returns[:count])

    def best(self) -> int:
        """Return the number of the round with the highest mean return, averaged with those beside it."""
        reach = SMOOTHED_ROUNDS // 2
        means = []
        for number in range(len(self.returns)):
            window = self.returns[max(0, number - reach) : number + reach + 1]
            known = [value for value in window if not math.isnan(value)]
            means.append(sum(known) / len(known) if known else -math.inf)
        return int(np.argmax(means))

    def save(self, path: Path) -> None:
        """Write the history, whole or not at all.

        Raises:
            OSError: it cannot be written.
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
    """Read what `History.save` wrote.

    Raises:
        ValueError: the file is damaged or something else.
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
            f"make_data: {path} must hold as much of each round, in order, and policies of {sizes}, got "
            f"arrays of {', '.join(f'{name} {arrays[name].shape}' for name in columns)}; remove it"
        )
    return History(
        [Behavior(row[0], sizes, *row[1:]) for row in zip(*(arrays[name] for name in columns), strict=True)],
        arrays["steps"].tolist(),
        arrays["returns"].tolist(),
        {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")},
    )


INTEGER_ARRAYS = ("sizes", "steps", "ends")
"""Arrays of whole numbers."""


def check_arrays(path: Path, arrays: Arrays, axes: Mapping[str, int]) -> None:
    """Raise ValueError unless there are arrays of numbers of these names, each with so many axes."""
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
    """Return the rounds of a training of `steps` steps or a little more, and keep them in a file.

    What the file holds is not trained again: training that was interrupted goes on to where it would have
    gone, and a shorter one is the beginning of a longer one.

    Args:
        environment: gymnasium's id.
        trainer: the algorithm's settings.
        steps: in the environment, at least 1.
        seed: of all random numbers.
        path: the file, of trainings with these arguments only; `steps` may differ.
        report: is told of the progress.

    Raises:
        InUseError: another process is at it.
        Interrupted: a signal asked for a stop, or nobody reads the reports, and all whole rounds are saved.
        ValueError: the file is damaged, or there is no such environment.
        ImportError: a library is not installed; the extra is named.
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
    """Add rounds to a history, and save it now and then."""
    # One thread: networks this small are slower on more.
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
    """Return a round's own seed, which the libraries want below 2^32."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0] >> 1)
