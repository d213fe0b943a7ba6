"""The libraries that train behaviors: stable-baselines3's PPO and sb3-contrib's augmented random search.

Training goes round by round. A round is a pure function of what the one before left (arrays, which a file
can hold) and of its seed: models and environments are made or seeded anew for it. So training that was
interrupted and goes on ends as training that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from minrnn.demonstrations.behavior import Behavior
from minrnn.tasks.environments import INSTALL, make_environment

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

Arrays = dict[str, NDArray[Any]]


class Round(NamedTuple):
    """What a round of training left."""

    state: Arrays
    """What the next round needs."""
    behavior: Behavior
    """The policy that the round began with."""
    steps: int
    """Steps that the round took in the environment."""
    mean_return: float
    """Of the episodes that ended in the round, with all the noise that training adds; NaN where none did."""


class Trainer(Protocol):
    """Settings of an algorithm, and its rounds.

    `library` is the package that it is in and `title` what people call it; `environments` are stepped in
    turn; `parameter_noise` is the standard deviation of what training adds to a behavior's parameters for
    an episode. `sizes` are the widths of the behavior's network; `train` does a round from the state that
    the one before left, empty for the first.
    """

    library: ClassVar[str]
    title: ClassVar[str]

    @property
    def environments(self) -> int: ...

    @property
    def parameter_noise(self) -> float: ...

    def settings(self) -> dict[str, Any]: ...

    def sizes(self, observation_size: int, action_size: int) -> tuple[int, ...]: ...

    def train(self, environment: VecEnv, state: Mapping[str, NDArray[Any]], seed: int) -> Round: ...


@dataclass(frozen=True)
class RandomSearch:
    """Augmented random search: change a linear policy's weights this way and that, and move to the better
    side.

    Source: Mania, Guy and Recht, "Simple random search of static linear policies is competitive for
    reinforcement learning" (arXiv 1803.07055), version V2-t, in sb3-contrib.
    """

    library: ClassVar[str] = "sb3-contrib"
    title: ClassVar[str] = "augmented random search, linear policy"
    environments: ClassVar[int] = 1

    directions: int = 8
    """Changes that are tried in a round, each in both directions: 2 * directions episodes."""
    top: int = 4
    """From how many of them the move is made."""
    learning_rate: float = 0.02
    """Length of the move, in units of the returns' standard deviation."""
    parameter_noise: float = 0.03
    """Standard deviation of the changes."""
    action_noise: float = 0.2
    """Standard deviation of the noise on actions with which the behavior is recorded, in half the distance
    of their bounds; training itself adds none."""
    alive_bonus: float = 0.0
    """What the environment pays for each step that is survived; it does not count in the comparison."""

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    def sizes(self, observation_size: int, action_size: int) -> tuple[int, ...]:
        """Return the widths of the behavior's network, which has no hidden layer."""
        return observation_size, action_size

    def train(self, environment: VecEnv, state: Mapping[str, NDArray[Any]], seed: int) -> Round:
        """Make one move."""
        from sb3_contrib import ARS

        normalized = _normalize(environment, state, norm_reward=False)
        model = ARS(
            "LinearPolicy",
            normalized,
            n_delta=self.directions,
            n_top=self.top,
            learning_rate=self.learning_rate,
            delta_std=self.parameter_noise,
            alive_bonus_offset=-self.alive_bonus,
            seed=seed,
            device="cpu",
        )
        if state:
            model.weights = torch.from_numpy(state["weights"])
            model.policy.load_from_vector(model.weights)
        actions = environment.action_space
        behavior = Behavior(
            np.concatenate([model.weights.numpy(), np.zeros(actions.shape[0], np.float32)]),  # without biases
            self.sizes(*_sizes(environment)),
            *_moments(normalized),
            self.action_noise * (actions.high - actions.low) / 2,
        )
        model.learn(1, log_interval=None)
        left = {"weights": model.weights.numpy(), **_statistics(normalized)}
        return Round(left, behavior, model.num_timesteps, _mean_return(model))


@dataclass(frozen=True)
class PolicyGradient:
    """Proximal policy optimization with normalized observations and rewards.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (arXiv 1707.06347), in
    stable-baselines3.
    """

    library: ClassVar[str] = "stable-baselines3"
    title: ClassVar[str] = "proximal policy optimization"
    parameter_noise: ClassVar[float] = 0.0  # its noise is that of actions

    environments: int = 8
    """Environments that are stepped in turn."""
    steps: int = 256
    """Steps of each between updates."""
    updates: int = 8
    """Updates in a round."""
    batch_size: int = 64
    """Steps in a minibatch."""
    epochs: int = 10
    """How often an update goes over its steps."""
    learning_rate: float = 3e-4
    """Of Adam."""
    hidden_size: int = 64
    """Width of the two hidden layers, of the policy and of the value function."""

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    def sizes(self, observation_size: int, action_size: int) -> tuple[int, ...]:
        """Return the widths of the behavior's network."""
        return observation_size, self.hidden_size, self.hidden_size, action_size

    def train(self, environment: VecEnv, state: Mapping[str, NDArray[Any]], seed: int) -> Round:
        """Make `updates` updates."""
        from stable_baselines3 import PPO

        normalized = _normalize(environment, state, norm_reward=True)
        model = PPO(
            "MlpPolicy",
            normalized,
            n_steps=self.steps,
            batch_size=self.batch_size,
            n_epochs=self.epochs,
            learning_rate=self.learning_rate,
            policy_kwargs={"net_arch": [self.hidden_size, self.hidden_size]},
            seed=seed,
            device="cpu",
        )
        if state:
            model.set_parameters(_nested(state, model.get_parameters()))
        policy = {name: value.numpy().copy() for name, value in model.get_parameters()["policy"].items()}
        layers = ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net")
        behavior = Behavior(
            np.concatenate(
                [policy[f"{layer}.{part}"].ravel() for layer in layers for part in ("weight", "bias")]
            ),
            self.sizes(*_sizes(environment)),
            *_moments(normalized),
            np.exp(policy["log_std"]),
        )
        model.learn(self.steps * self.environments * self.updates, log_interval=None)
        left = {**_flat(model.get_parameters()), **_statistics(normalized)}
        return Round(left, behavior, model.num_timesteps, _mean_return(model))


TRAINERS: dict[str, Trainer] = {"ppo": PolicyGradient(), "ars": RandomSearch()}
"""Algorithms by name."""


@contextmanager
def training_environments(name: str, trainer: Trainer) -> Iterator[VecEnv]:
    """Open as many environments as a trainer steps in turn, and close them.

    Raises:
        ImportError: the trainer's library, or the environment's, is not installed.
        ValueError: there is no such environment.
    """
    try:
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import DummyVecEnv

        import_module(trainer.library.replace("-", "_"))
    except ImportError as missing:
        raise ImportError(
            f"make_data: training needs {trainer.library}, which is not here; {INSTALL}"
        ) from missing
    environments = DummyVecEnv([lambda: Monitor(make_environment(name))] * trainer.environments)
    try:
        yield environments
    finally:
        environments.close()


def library_versions(trainer: Trainer) -> dict[str, str]:
    """Return the versions of what training depends on, as far as it is installed."""
    versions = {}
    for name in ("gymnasium", "mujoco", trainer.library):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _sizes(environment: VecEnv) -> tuple[int, int]:
    return environment.observation_space.shape[0], environment.action_space.shape[0]


def _normalize(environment: VecEnv, state: Mapping[str, NDArray[Any]], *, norm_reward: bool) -> VecNormalize:
    """Return the environments with normalized observations, and the statistics that the last round left."""
    from stable_baselines3.common.vec_env import VecNormalize

    normalized = VecNormalize(environment, norm_reward=norm_reward)
    if state:
        for name, statistics in (("observation", normalized.obs_rms), ("return", normalized.ret_rms)):
            statistics.mean = state[f"{name}_mean"].copy()
            statistics.var = state[f"{name}_variance"].copy()
            statistics.count = float(state[f"{name}_count"])
    return normalized


def _moments(normalized: VecNormalize) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and variance of the observations so far."""
    return np.array(normalized.obs_rms.mean), np.array(normalized.obs_rms.var)


def _statistics(normalized: VecNormalize) -> Arrays:
    """Return what `_normalize` takes."""
    arrays: Arrays = {}
    for name, statistics in (("observation", normalized.obs_rms), ("return", normalized.ret_rms)):
        arrays[f"{name}_mean"] = np.array(statistics.mean)
        arrays[f"{name}_variance"] = np.array(statistics.var)
        arrays[f"{name}_count"] = np.array(statistics.count)
    return arrays


def _mean_return(model: BaseAlgorithm) -> float:
    returns = [episode["r"] for episode in model.ep_info_buffer]
    return float(np.mean(returns)) if returns else float("nan")


def _flat(parameters: Mapping[str, Any]) -> Arrays:
    """Return a model's and its optimizer's tensors as arrays: policy/NAME and optimizer/NUMBER/NAME."""
    arrays = {f"policy/{name}": value.numpy().copy() for name, value in parameters["policy"].items()}
    for number, moments in parameters["policy.optimizer"]["state"].items():
        arrays |= {f"optimizer/{number}/{name}": value.numpy().copy() for name, value in moments.items()}
    return arrays


def _nested(state: Mapping[str, NDArray[Any]], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `_flat`; what is no tensor comes from a fresh model."""
    policy = {name: torch.from_numpy(state[f"policy/{name}"]) for name in fresh["policy"]}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer/"):
            _, number, moment = name.split("/")
            moments.setdefault(int(number), {})[moment] = torch.from_numpy(value)
    return {"policy": policy, "policy.optimizer": {**fresh["policy.optimizer"], "state": moments}}
