"""Recording of episodes of behavior policies, in parts on disk from which it resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minrnn.demonstrations.behavior import Behavior
from minrnn.demonstrations.history import History, ReportProgress, check_arrays
from minrnn.files import claim, naming
from minrnn.tasks.arrays import read_arrays, write_arrays
from minrnn.tasks.environments import make_environment
from minrnn.tasks.episodes import Episodes
from minrnn.training import interruptible

if TYPE_CHECKING:
    from minrnn.tasks.environments import Environment

Floats = NDArray[np.floating[Any]]
Act = Callable[[Floats, np.random.Generator], Floats]
"""Maps an observation and a random generator to an action."""
Draw = Callable[[np.random.Generator], Act]
"""Draws the policy of an episode."""

PART_STEPS = 10_000  # steps of a part, a few seconds; an interruption loses at most one


class Share(NamedTuple):
    """A share of a recording: how its policies are drawn, and its number of steps."""

    draw: Draw
    steps: int


class Recording(NamedTuple):
    """Recorded steps, as arrays like those of `Episodes`, and the next observations."""

    observations: NDArray[np.float32]
    actions: NDArray[np.float32]
    rewards: NDArray[np.float32]
    next_observations: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    ends: NDArray[np.int64]

    def episodes(self, environment: str, about: dict[str, Any]) -> Episodes:
        """Return the recording as episodes."""
        return Episodes(
            self.observations, self.actions, self.rewards, self.ends, self.terminated, environment, about
        )


# --- policies --------------------------------------------------------------------------------------------


def uniform(low: Floats, high: Floats) -> Draw:
    """Return a Draw of policies with uniform random actions between bounds (A,)."""

    def act(_: Floats, random: np.random.Generator) -> Floats:
        return random.uniform(low, high)

    return lambda _: act


def always(behavior: Behavior) -> Draw:
    """Return a Draw of the same behavior policy in every episode."""
    return lambda _: behavior.act


def replayed(history: History, parameter_noise: float) -> Draw:
    """Return a Draw of the policy at a uniformly random step of a training, with its exploration noise.

    The episodes have the same distribution as those of the training, which need not be stored.

    Args:
        history: the rounds of the training.
        parameter_noise: standard deviation of the parameter noise of an episode; if not 0, there is no noise
            on actions.
    """

    def draw(random: np.random.Generator) -> Act:
        step = random.integers(history.total_steps)
        behavior = history.behaviors[int(np.searchsorted(history.steps, step, side="right"))]
        if not parameter_noise:
            return behavior.act
        changes = parameter_noise * random.standard_normal(len(behavior.parameters))
        quiet = np.zeros_like(behavior.action_noise)
        return replace(behavior, parameters=behavior.parameters + changes, action_noise=quiet).act

    return draw


# --- episodes --------------------------------------------------------------------------------------------


def play_episode(environment: Environment, draw: Draw, seed: tuple[int, ...], limit: int) -> Recording:
    """Record an episode, truncated after `limit` steps.

    Args:
        environment: an environment with vectors as observations and actions.
        draw: draws the policy.
        seed: seed of the policy, the environment and the noise.
        limit: maximum number of steps, at least 1.
    """
    random = np.random.default_rng(seed)
    act = draw(random)
    low, high = environment.action_space.low, environment.action_space.high
    observation, _ = environment.reset(seed=int(random.integers(1 << 31)))
    rows: list[tuple[Floats, Floats, float, Floats]] = []
    terminated = truncated = False
    while not (terminated or truncated) and len(rows) < limit:
        action = np.clip(act(observation, random), low, high).astype(np.float32)
        following, reward, terminated, truncated, _ = environment.step(action)
        rows.append((observation, action, float(reward), following))
        observation = following
    observations, actions, rewards, followings = (
        np.array(column, np.float32) for column in zip(*rows, strict=True)
    )
    return Recording(
        observations, actions, rewards, followings, np.array([terminated]), np.array([len(rows)], np.int64)
    )


def record(
    environment: str, shares: list[Share], seed: int, folder: Path, report: ReportProgress
) -> Recording:
    """Record shares one after the other, and save completed parts to a folder.

    Each episode is a function of the seed and its index, so an interrupted recording that is resumed equals
    an uninterrupted one.

    Args:
        environment: gymnasium's id.
        shares: the shares; the last episode of each is truncated at its number of steps.
        seed: seed of all random numbers.
        folder: the folder of the parts; it must be used with the same other arguments.
        report: progress callback.

    Raises:
        InUseError: another process uses the folder.
        Interrupted: a signal or a closed output requested a stop; all completed parts are saved.
        ValueError: a part is damaged, or there is no such environment.
        ImportError: the environment is not installed.
    """
    parts: list[Recording] = []
    steps = sum(share.steps for share in shares)
    with (
        claim(folder),
        closing(make_environment(environment)) as made,
        interruptible() as interruption,
    ):
        for number, share in enumerate(shares):
            for part in _parts(made, share, (seed, number), folder):
                parts.append(part)
                done = sum(len(part.rewards) for part in parts)
                with interruption.guard_output():
                    report("recording", done, steps, f"return {part.rewards.sum() / len(part.ends):,.0f}")
                if interruption.requested:
                    raise interruption.to_exception(f"{done:,} of {steps:,} recorded steps")
    return _join(parts)


def _parts(
    environment: Environment, share: Share, seed: tuple[int, int], folder: Path
) -> Iterator[Recording]:
    """Yield the parts of a share, read from the folder or recorded and saved to it."""
    done = episode = 0
    while done < share.steps:
        path = folder / f"{seed[1]}-{episode}.npz"
        if path.exists():
            part = _read_part(path)
        else:
            part = _record_part(environment, share.draw, seed, episode, share.steps - done)
            write_arrays(path, part._asdict())
        yield part
        done += len(part.rewards)
        episode += len(part.ends)


def _read_part(path: Path) -> Recording:
    with naming("make_data"):
        arrays = read_arrays(path)
    vectors = ("observations", "actions", "next_observations")
    check_arrays(path, arrays, {name: 2 if name in vectors else 1 for name in Recording._fields})
    part = Recording(*(arrays[name] for name in Recording._fields))
    steps = {len(getattr(part, name)) for name in (*vectors, "rewards")}
    if len(part.ends) == 0 or steps != {int(part.ends[-1])} or len(part.terminated) != len(part.ends):
        raise ValueError(f"make_data: {path} must hold arrays of consistent lengths; remove it")
    return part


def _record_part(
    environment: Environment, draw: Draw, seed: tuple[int, int], episode: int, limit: int
) -> Recording:
    """Record episodes from index `episode` on: at least PART_STEPS steps, but at most `limit`."""
    played: list[Recording] = []
    done = 0
    while done < min(PART_STEPS, limit):
        played.append(play_episode(environment, draw, (*seed, episode + len(played)), limit - done))
        done += len(played[-1].rewards)
    return _join(played)


def _join(parts: list[Recording]) -> Recording:
    """Concatenate recordings."""
    starts = np.cumsum([0] + [len(part.rewards) for part in parts])
    moved = [part._replace(ends=part.ends + start) for part, start in zip(parts, starts, strict=False)]
    return Recording(*map(np.concatenate, zip(*moved, strict=True)))
