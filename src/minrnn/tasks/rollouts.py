"""Policies in environments: whole episodes, several at a time, and pictures of them."""

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
"""Where gymnasium's MuJoCo environments are, which alone take the size of a picture."""

PICTURE = {"width": 240, "height": 240, "camera_name": "track"}
"""Pixels; where there is no GPU, one takes 0.15 s on one core. The camera is the one that goes
along, where there is one: else a body that moves on leaves the picture."""


@dataclass
class Rollout:
    """An episode that a policy acts in, so far."""

    number: int
    """Which one, from 0; it is also what is added to the seed."""
    steps: int = 0
    """Actions taken."""
    total_return: float = 0.0
    """Sum of the rewards."""
    ended: str = ""
    """How it ended: "terminated" by the environment, at a "time limit", or not yet."""


def play(
    policy: Policy, environments: Sequence[Environment], episodes: int, *, seed: int = 0
) -> Iterator[list[Rollout]]:
    """Let a policy act in as many episodes as are asked for, as many at a time as there are environments.

    Episode k begins with `seed + k` as the environment's seed, so that equal policies on a machine play equal
    episodes, however many play at a time. Actions are cut to what the environment allows.

    Args:
        policy: acts in all environments at once.
        environments: of one kind; more than there are episodes are left alone.
        episodes: how many, >= 1.
        seed: of the first episode.

    Yields:
        After every step, the episodes that have begun: the same list, brought up to date.

    Raises:
        ValueError: an environment's observations, actions or time limit are not those that the policy is for.
    """
    if episodes < 1 or not environments:
        raise ValueError(
            f"play: episodes must be at least 1, in one environment at least, got {episodes} episodes and "
            f"{len(environments)} environments"
        )
    environments = environments[:episodes]
    for environment in environments:
        check_fit(policy.model.config, environment)
    # Not in the generator, whose body would not run before its first step is asked for.
    return _play(policy, environments, episodes, seed)


def _play(
    policy: Policy, environments: Sequence[Environment], episodes: int, seed: int
) -> Iterator[list[Rollout]]:
    played: list[Rollout] = []
    spaces = [action_space(environment) for environment in environments]
    seats: list[Rollout | None] = [None] * len(environments)
    observations = np.zeros((len(environments), policy.model.config.observation_size))
    rewards = np.zeros(len(environments))
    starts = np.ones(len(environments), dtype=bool)

    def begin(seat: int) -> None:
        starts[seat], seats[seat] = True, None
        if len(played) < episodes:
            observations[seat], _ = environments[seat].reset(seed=seed + len(played))
            seats[seat] = episode = Rollout(len(played))
            played.append(episode)

    for seat in range(len(environments)):
        begin(seat)
    while any(episode is not None for episode in seats):
        actions = policy.act(observations, rewards, reset=starts).numpy()
        for seat, (environment, episode) in enumerate(zip(environments, seats, strict=True)):
            if episode is None:
                continue  # nobody plays here any more; the row starts again and again, and bothers nobody
            action = spaces[seat].to_environment(actions[seat], environment.action_space)
            seen, reward, terminated, truncated, _ = environment.step(action)
            observations[seat], rewards[seat], starts[seat] = seen, reward, False
            episode.steps += 1
            episode.total_return += float(reward)
            if terminated or truncated:
                episode.ended = "terminated" if terminated else "time limit"
                begin(seat)
        yield played


def check_fit(config: DecisionConfig, environment: Environment) -> None:
    """Raise ValueError unless a policy can act in an environment."""
    name = environment.spec.id if environment.spec is not None else type(environment).__name__
    seen, done = environment.observation_space, environment.action_space
    if seen.shape != (config.observation_size,):
        raise ValueError(
            f"act: the environment must have observations of {config.observation_size} numbers, as the "
            f"policy learned from, got {name} with {seen}"
        )
    takes = action_space(environment)
    wanted = ActionSpace(config.discrete, config.action_size)
    fits = (takes.discrete, takes.size) == (wanted.discrete, wanted.size)
    if not fits:
        raise ValueError(
            f"act: the environment must take {_described(wanted)}, as the policy learned from, got {name} "
            f"with {done}"
        )
    limit = None if environment.spec is None else environment.spec.max_episode_steps
    if config.max_steps and limit is not None and limit > config.max_steps:
        raise ValueError(
            f"act: an episode must end within {config.max_steps} steps, for as many have an embedding of "
            f"their time, got {name}, which lasts {limit}; train with --task.timesteps {limit}, or 0 for none"
        )


def action_space(environment: Environment) -> ActionSpace:
    """Return what an environment takes for an action.

    Raises:
        ValueError: no policy here acts in such an environment.
    """
    try:
        return ActionSpace.from_gymnasium(environment.action_space)
    except ValueError as error:
        name = environment.spec.id if environment.spec is not None else type(environment).__name__
        raise ValueError(f"act: {name}: {error}") from error


def make_filmed(name: str) -> Environment:
    """Make an environment whose pictures can be taken, on a screen or without one.

    Raises:
        ValueError: there is no environment of that name.
        ImportError: gymnasium, or what the environment needs, is not installed; the extra is named.
        RuntimeError: this machine cannot draw it.
    """
    if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
        os.environ["MUJOCO_GL"] = "egl"  # what needs no screen; read when mujoco is first imported
    with _needs_opengl():  # which mujoco looks for when it is imported
        spec = make_environment(name).spec
        size = PICTURE if spec is not None and str(spec.entry_point).startswith(MUJOCO) else {}
        return make_environment(name, render_mode="rgb_array", **size)


def picture(environment: Environment) -> NDArray[np.uint8]:
    """Return what an environment of `make_filmed` looks like now, (height, width, 3).

    Raises:
        ImportError: what draws it is not installed.
        RuntimeError: this machine cannot draw it.
    """
    from gymnasium.error import DependencyNotInstalled

    try:
        with _needs_opengl():
            return np.asarray(environment.render())
    except DependencyNotInstalled as missing:
        raise ImportError(f"act: --record needs what is not installed: {missing}") from missing


@contextmanager
def _needs_opengl() -> Iterator[None]:
    """Raise RuntimeError where OpenGL's library is missing."""
    try:
        yield
    except AttributeError as error:  # what OpenGL's bindings say where the library is missing
        raise RuntimeError(
            f"act: --record needs OpenGL ({error}); without a screen that is EGL (libegl1), which MUJOCO_GL "
            "names"
        ) from error


def _described(space: ActionSpace) -> str:
    return f"one of {space.size} discrete actions" if space.discrete else f"actions of {space.size} numbers"
