"""Policies acting in environments: complete episodes, several at a time, and frames of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from minrnn.models import DecisionConfig, Policy
from minrnn.tasks.environments import make_environment
from minrnn.tasks.spaces import ActionSpace

if TYPE_CHECKING:
    import gymnasium

    Environment: TypeAlias = gymnasium.Env[Any, Any]

MUJOCO = "gymnasium.envs.mujoco"
"""Module of gymnasium's MuJoCo environments; only these take the size of a frame as an option."""

PICTURE = {"width": 240, "height": 240, "camera_name": "track"}
"""Size in pixels, and a camera that follows the body. Without a GPU a frame takes 0.15 s on one core."""


@dataclass
class Rollout:
    """Progress and result of an episode."""

    number: int
    """Index of the episode, from 0; it is added to the seed."""
    steps: int = 0
    """Number of steps so far."""
    total_return: float = 0.0
    """Sum of the rewards so far."""
    ended: str = ""
    """"terminated" (by the environment), "time limit", or "" while the episode is running."""


def play(
    policy: Policy, environments: Sequence[Environment], episodes: int, *, seed: int = 0
) -> Iterator[list[Rollout]]:
    """Run a policy for `episodes` episodes, one per environment at a time.

    Episode k starts with `seed + k` as the environment's seed, so episodes do not depend on how many run at a
    time. Actions are clipped to the bounds of the environment.

    Args:
        policy: the policy; it acts in all environments at once.
        environments: environments of one kind; those beyond the number of episodes are not used.
        episodes: number of episodes, >= 1.
        seed: seed of the first episode.

    Yields:
        After every step, the list of all episodes started so far; it is the same list, updated.

    Raises:
        ValueError: an environment's observations, actions or time limit do not match the policy.
    """
    if episodes < 1 or not environments:
        raise ValueError(
            f"play: episodes must be at least 1, in one environment at least, got {episodes} episodes and "
            f"{len(environments)} environments"
        )
    environments = environments[:episodes]
    for environment in environments:
        check_fit(policy.model.config, environment)
    # The checks are outside the generator, whose body does not run before the first step.
    return _play(policy, environments, episodes, seed)


def _play(
    policy: Policy, environments: Sequence[Environment], episodes: int, seed: int
) -> Iterator[list[Rollout]]:
    played: list[Rollout] = []
    spaces = [action_space(environment) for environment in environments]
    running: list[Rollout | None] = [None] * len(environments)
    observations = np.zeros((len(environments), policy.model.config.observation_size))
    rewards = np.zeros(len(environments))
    starts = np.ones(len(environments), dtype=bool)

    def begin(row: int) -> None:
        starts[row], running[row] = True, None
        if len(played) < episodes:
            observations[row], _ = environments[row].reset(seed=seed + len(played))
            running[row] = episode = Rollout(len(played))
            played.append(episode)

    for row in range(len(environments)):
        begin(row)
    while any(episode is not None for episode in running):
        actions = policy.act(observations, rewards, reset=starts).numpy()
        for row, (environment, episode) in enumerate(zip(environments, running, strict=True)):
            if episode is None:
                continue  # no episode is left for this environment; its row of the batch is unused
            action = spaces[row].to_environment(actions[row], environment.action_space)
            seen, reward, terminated, truncated, _ = environment.step(action)
            observations[row], rewards[row], starts[row] = seen, reward, False
            episode.steps += 1
            episode.total_return += float(reward)
            if terminated or truncated:
                episode.ended = "terminated" if terminated else "time limit"
                begin(row)
        yield played


def check_fit(config: DecisionConfig, environment: Environment) -> None:
    """Raise ValueError unless an environment matches a policy."""
    name = environment.spec.id if environment.spec is not None else type(environment).__name__
    seen, done = environment.observation_space, environment.action_space
    if seen.shape != (config.observation_size,):
        raise ValueError(
            f"act: the environment must have observations of {config.observation_size} numbers, as in the "
            f"policy's training data, got {name} with {seen}"
        )
    takes = action_space(environment)
    wanted = ActionSpace(config.discrete, config.action_size)
    fits = (takes.discrete, takes.size) == (wanted.discrete, wanted.size)
    if not fits:
        raise ValueError(
            f"act: the environment must take {_described(wanted)}, as in the policy's training "
            f"data, got {name} with {done}"
        )
    limit = None if environment.spec is None else environment.spec.max_episode_steps
    if config.max_steps and limit is not None and limit > config.max_steps:
        raise ValueError(
            f"act: an episode must end within {config.max_steps} steps, the size of the policy's table of "
            f"time steps, got {name} with {limit}; train with --task.timesteps {limit}, or 0 for none"
        )


def action_space(environment: Environment) -> ActionSpace:
    """Return the action space of an environment.

    Raises:
        ValueError: policies do not support this kind of space.
    """
    try:
        return ActionSpace.from_gymnasium(environment.action_space)
    except ValueError as error:
        name = environment.spec.id if environment.spec is not None else type(environment).__name__
        raise ValueError(f"act: {name}: {error}") from error


def make_filmed(name: str) -> Environment:
    """Make an environment that renders frames, with or without a display.

    Raises:
        ValueError: there is no environment of that name.
        ImportError: gymnasium or a dependency of the environment is not installed.
        RuntimeError: OpenGL is missing.
    """
    if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
        os.environ["MUJOCO_GL"] = "egl"  # needs no display; read when mujoco is first imported
    with _needs_opengl():  # mujoco loads OpenGL when it is imported
        spec = make_environment(name).spec
        size = PICTURE if spec is not None and str(spec.entry_point).startswith(MUJOCO) else {}
        return make_environment(name, render_mode="rgb_array", **size)


def picture(environment: Environment) -> NDArray[np.uint8]:
    """Return the current frame of an environment made by `make_filmed`, (height, width, 3) uint8.

    Raises:
        ImportError: a package for rendering is not installed.
        RuntimeError: OpenGL is missing.
    """
    from gymnasium.error import DependencyNotInstalled

    try:
        with _needs_opengl():
            return np.asarray(environment.render())
    except DependencyNotInstalled as missing:
        raise ImportError(f"act: --record needs a package that is not installed: {missing}") from missing


@contextmanager
def _needs_opengl() -> Iterator[None]:
    """Raise RuntimeError if the OpenGL library is missing."""
    try:
        yield
    except AttributeError as error:  # raised by the OpenGL bindings if the library is missing
        raise RuntimeError(
            f"act: --record needs OpenGL ({error}); without a display, install EGL (libegl1) and set "
            "MUJOCO_GL=egl"
        ) from error


def _described(space: ActionSpace) -> str:
    return f"one of {space.size} discrete actions" if space.discrete else f"actions of {space.size} numbers"
