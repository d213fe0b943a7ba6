"""Making of demonstration data: a file of episodes in D4RL's layout, labeled as local data."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minrnn.demonstrations.behavior import Behavior
from minrnn.demonstrations.history import ReportProgress, train_behavior
from minrnn.demonstrations.record import Share, always, play_episode, record, replayed, uniform
from minrnn.demonstrations.trainers import TRAINERS, Trainer, library_versions
from minrnn.files import NoEffect, lock, warn_without_effect
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.environments import make_environment
from minrnn.tasks.locomotion import local_name, local_path, normalized_score
from minrnn.tasks.recordings import read_episodes, write_episodes

if TYPE_CHECKING:
    from minrnn.tasks.environments import Environment
    from minrnn.tasks.episodes import Episodes

QUALITIES = ("random", "medium", "medium-replay", "medium-expert")
"""Kinds of data, with D4RL's names.

- random: actions drawn uniformly between their bounds.
- medium: the best policy of the training, with its exploration noise.
- medium-replay: policies of the training up to the best, with their noise, as in the training's episodes.
- medium-expert: one half medium, one half the same policy without noise.
"""

EVALUATION_EPISODES = 10
EPISODE_LIMIT = 10_000  # steps of an evaluation episode, if the environment sets no limit
LABEL = (
    "made locally in minutes, with a policy of its own: not one of D4RL's or Minari's data sets, and scores "
    "are not comparable with theirs"
)

WITHOUT_EFFECT = tuple(
    NoEffect(name, "quality", lambda s: s["quality"] == "random") for name in ("training_steps", "algorithm")
)
"""Arguments of `make_data` that have no effect where nothing is trained."""


class Plan(NamedTuple):
    """The default algorithm and training steps of an environment."""

    algorithm: str
    steps: int


PLANS = {
    "Hopper": Plan("ppo", 250_000),  # after 500,000 steps it reaches the score of D4RL's expert
    "HalfCheetah": Plan("ars", 1_200_000),  # random search suits cheap steps and episodes without falls
    "Walker2d": Plan("ppo", 500_000),
}
OTHER_PLAN = Plan("ppo", 300_000)


def plan_for(environment: str) -> Plan:
    """Return the default plan of an environment, independent of its version."""
    name = environment.rpartition(":")[2]  # an id may start with the module that registers it
    return PLANS.get(name.rpartition("-v")[0], OTHER_PLAN)


def make_data(
    environment: str,
    quality: str,
    report: ReportProgress,
    *,
    output: Path | None = None,
    seed: int = 0,
    steps: int = 200_000,
    training_steps: int = 0,
    algorithm: str = "",
) -> Path:
    """Train a behavior policy, record its episodes, and return the file, in D4RL's layout.

    The same call resumes an interrupted one, and leaves a finished file as it is. All qualities share one
    training.

    Args:
        environment: gymnasium's id of an environment with vectors as observations and actions: Hopper-v5.
        quality: one of QUALITIES.
        report: progress callback.
        output: the file; by default `local_path(local_name(environment, quality, seed))`.
        seed: seed of training and recording.
        steps: number of recorded steps.
        training_steps: number of training steps; 0 for `plan_for(environment)`.
        algorithm: a name in TRAINERS; empty for `plan_for(environment)`.

    Raises:
        InUseError: another process is making the same file.
        Interrupted: a signal requested a stop; completed work is saved.
        ValueError: an argument is out of range, or the environment is unknown or has unsupported spaces.
        FileExistsError: the output exists and was made with other arguments.
        ImportError: a library is not installed.
    """
    chosen = {"quality": quality, "training_steps": training_steps, "algorithm": algorithm}
    warn_without_effect(make_data, chosen, WITHOUT_EFFECT)
    plan = plan_for(environment)
    algorithm, training_steps = algorithm or plan.algorithm, training_steps or plan.steps
    _check(quality, algorithm, seed, steps, training_steps)
    name = local_name(environment, quality, seed)
    path = local_path(name) if output is None else output
    trainer = TRAINERS[algorithm]
    training = {"environment": environment, "algorithm": algorithm, "seed": seed, **trainer.settings()}
    made = {"environment": environment, "quality": quality, "seed": seed, "steps": steps}
    if quality != "random":
        made |= {"training_steps": training_steps, "training": training}
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name(f"{path.name}.lock")):
        if path.exists():
            _check_made(path, made)
            return path
        shares, said = _shares(environment, quality, trainer, training, training_steps, steps, report)
        # A training with other versions is another one, and so are the episodes of its policy.
        parts = _work_folder() / f"recording-{_digest({**made, **library_versions(trainer)})}"
        recording = record(environment, shares, seed, parts, report)
        episodes = recording.episodes(environment, {"source": "local", "name": name, **said})
        about = {**episodes.about, **_summary(environment, episodes), "made": made}
        about |= {"versions": library_versions(trainer), "label": LABEL}
        write_episodes(path, replace(episodes, about=about), recording.next_observations)
        shutil.rmtree(parts, ignore_errors=True)
    return path


def _summary(environment: str, episodes: Episodes) -> dict[str, Any]:
    """Return the mean return of episodes and D4RL's normalized score of it."""
    mean_return = float(episodes.returns.mean())
    return {"mean_return": mean_return, "score": normalized_score(environment, mean_return)}


def _check(quality: str, algorithm: str, seed: int, steps: int, training_steps: int) -> None:
    if quality not in QUALITIES:
        raise ValueError(f"make_data: quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    if algorithm not in TRAINERS:
        raise ValueError(f"make_data: algorithm must be one of {', '.join(TRAINERS)}, got {algorithm!r}")
    for name, value, least in (("seed", seed, 0), ("steps", steps, 2), ("training_steps", training_steps, 1)):
        if value < least:
            raise ValueError(f"make_data: {name} must be at least {least}, got {value}")


def _check_made(path: Path, made: dict[str, Any]) -> None:
    """Raise FileExistsError unless the existing file was made with these settings."""
    episodes = read_episodes(path)
    before = episodes.about.get("made")
    # Earlier versions wrote all in one table, in which PPO's own `steps` replaced the recorded ones.
    one_table = {**made, **made.get("training", {})}
    one_table.pop("training", None)
    if before != made and (before, len(episodes)) != (one_table, made["steps"]):
        raise FileExistsError(
            f"make_data: {path} exists, and was made with {before} instead of {made}; remove it, or name "
            f"another with --output"
        )


def _shares(
    environment: str,
    quality: str,
    trainer: Trainer,
    training: dict[str, Any],
    training_steps: int,
    steps: int,
    report: ReportProgress,
) -> tuple[list[Share], dict[str, Any]]:
    """Return the shares of a recording, and the metadata of the policy."""
    with closing(make_environment(environment)) as made:
        _check_spaces(made)
        if quality == "random":
            draw = uniform(made.action_space.low, made.action_space.high)
            return [Share(draw, steps)], {"quality": quality}
        file = _work_folder() / f"training-{_digest({**training, **library_versions(trainer)})}.npz"
        history = train_behavior(environment, trainer, training_steps, training["seed"], file, report)
        history = history.until(history.steps[history.best()])
        best = history.behaviors[-1]
        quiet = replace(best, action_noise=np.zeros_like(best.action_noise))
        returns = _evaluate(made, quiet, training["seed"], report)
    shares = {
        "medium": [Share(always(best), steps)],
        "medium-replay": [Share(replayed(history, trainer.parameter_noise), steps)],
        "medium-expert": [Share(always(best), steps - steps // 2), Share(always(quiet), steps // 2)],
    }
    said = {
        "quality": quality,
        "algorithm": f"{trainer.title} ({trainer.library})",
        "best_after_steps": history.last_start,
        "policy_return": float(returns.mean()),
        "policy_return_deviation": float(returns.std()),
        "policy_score": normalized_score(environment, float(returns.mean())),
        "action_noise": best.action_noise.tolist(),
    }
    return shares[quality], said


def _check_spaces(environment: Environment) -> None:
    """Raise ValueError unless observations are vectors and actions are vectors within bounds."""
    seen, done = environment.observation_space, environment.action_space
    if hasattr(done, "n"):
        raise ValueError(
            f"make_data: actions must be continuous, got {done}; the algorithms here support no others"
        )
    bounds = getattr(done, "low", np.array(np.inf)), getattr(done, "high", np.array(np.inf))
    vectors = len(seen.shape or ()) == 1 and len(done.shape or ()) == 1 and hasattr(seen, "low")
    if not vectors or done.dtype is None or done.dtype.kind != "f" or not np.isfinite(bounds).all():
        raise ValueError(
            f"make_data: observations and actions must be vectors, and actions bounded floats, got {seen} "
            f"and {done}; wrappers in gymnasium.wrappers flatten, scale and bound them"
        )


def _evaluate(
    environment: Environment, behavior: Behavior, seed: int, report: ReportProgress
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the returns of EVALUATION_EPISODES episodes."""
    returns: list[float] = []
    for number in range(EVALUATION_EPISODES):
        played = play_episode(environment, always(behavior), (seed, len(QUALITIES), number), EPISODE_LIMIT)
        returns.append(float(played.rewards.sum(dtype=np.float64)))
        report("evaluating", number + 1, EVALUATION_EPISODES, f"return {np.mean(returns):,.0f}")
    return np.array(returns)


def _work_folder() -> Path:
    return cache_folder() / "demonstrations"


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
