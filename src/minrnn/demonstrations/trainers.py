"""Trainers of behavior policies: stable-baselines3's PPO and sb3-contrib's augmented random search.

Training is divided into rounds. A round is a pure function of its seed and of the state after the round
before (arrays that are saved to a file): models and environments are created or seeded anew. A resumed
training is therefore equal to an uninterrupted one.
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
    """The result of a round of training."""

    state: Arrays
    """The state for the next round."""
    behavior: Behavior
    """The policy at the start of the round."""
    steps: int
    """Environment steps of the round."""
    mean_return: float
    """Mean return of the episodes that ended in the round, with exploration noise; NaN if none did."""


class Trainer(Protocol):
    """The settings of an algorithm, and its rounds.

    Attributes:
        library: the package of the algorithm.
        title: its name for humans.
        environments: number of environments that are stepped in turn.
        parameter_noise: standard deviation of the noise that training adds to a policy's parameters for the
            length of an episode.

    `sizes` returns the widths of the policy's network. `train` runs a round from the state after the round
    before, which is empty for the first.
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
    """Augmented random search: perturb the weights of a linear policy, and move in the better directions.

    Source: Mania, Guy and Recht, "Simple random search of static linear policies is competitive for
    reinforcement learning" (arXiv 1803.07055), version V2-t, in sb3-contrib.
    """

    library: ClassVar[str] = "sb3-contrib"
    title: ClassVar[str] = "augmented random search, linear policy"
    environments: ClassVar[int] = 1

    directions: int = 8
    """Perturbations per round, each with both signs: 2 * directions episodes."""
    top: int = 4
    """Number of the best perturbations that are used for the update."""
    learning_rate: float = 0.02
    """Step size, in units of the standard deviation of the returns."""
    parameter_noise: float = 0.03
    """Standard deviation of the perturbations."""
    action_noise: float = 0.2
    """Standard deviation of the noise on recorded actions, as a fraction of half the distance of their
    bounds; training itself has none."""
    alive_bonus: float = 0.0
    """Reward of the environment for each step without a fall; it is subtracted during training."""

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    def sizes(self, observation_size: int, action_size: int) -> tuple[int, ...]:
        """Return the widths of the policy's network, which has no hidden layer."""
        return observation_size, action_size

    def train(self, environment: VecEnv, state: Mapping[str, NDArray[Any]], seed: int) -> Round:
        """Run a round: one update."""
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
    parameter_noise: ClassVar[float] = 0.0  # exploration noise is on actions

    environments: int = 8
    """Number of environments that are stepped in turn."""
    steps: int = 256
    """Steps of each environment between updates."""
    updates: int = 8
    """Updates in a round."""
    batch_size: int = 64
    """Steps in a minibatch."""
    epochs: int = 10
    """Passes over the steps per update."""
    learning_rate: float = 3e-4
    """Learning rate of Adam."""
    hidden_size: int = 64
    """Width of the two hidden layers, of the policy and of the value function."""

    def settings(self) -> dict[str, Any]:
        """Return the settings by name."""
        return asdict(self)

    def sizes(self, observation_size: int, action_size: int) -> tuple[int, ...]:
        """Return the widths of the policy's network."""
        return observation_size, self.hidden_size, self.hidden_size, action_size

    def train(self, environment: VecEnv, state: Mapping[str, NDArray[Any]], seed: int) -> Round:
        """Run a round: `updates` updates."""
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
"""Trainers by the name of their algorithm."""


@contextmanager
def training_environments(name: str, trainer: Trainer) -> Iterator[VecEnv]:
    """Make the environments of a trainer, and close them at the end of the block.

    Raises:
        ImportError: the library of the trainer or of the environment is not installed.
        ValueError: there is no such environment.
    """
    try:
        from stable_baselines3.common.monitor import Monitor
        from stable_baselines3.common.vec_env import DummyVecEnv

        import_module(trainer.library.replace("-", "_"))
    except ImportError as missing:
        raise ImportError(
            f"make_data: training needs {trainer.library}, which is not installed; {INSTALL}"
        ) from missing
    environments = DummyVecEnv([lambda: Monitor(make_environment(name))] * trainer.environments)
    try:
        yield environments
    finally:
        environments.close()


def library_versions(trainer: Trainer) -> dict[str, str]:
    """Return the versions of the installed packages that training depends on."""
    versions = {}
    for name in ("gymnasium", "mujoco", trainer.library):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _sizes(environment: VecEnv) -> tuple[int, int]:
    return environment.observation_space.shape[0], environment.action_space.shape[0]


def _normalize(environment: VecEnv, state: Mapping[str, NDArray[Any]], *, norm_reward: bool) -> VecNormalize:
    """Wrap environments in VecNormalize, with the statistics of `state` if there are any."""
    from stable_baselines3.common.vec_env import VecNormalize

    normalized = VecNormalize(environment, norm_reward=norm_reward)
    if state:
        for name, statistics in (("observation", normalized.obs_rms), ("return", normalized.ret_rms)):
            statistics.mean = state[f"{name}_mean"].copy()
            statistics.var = state[f"{name}_variance"].copy()
            statistics.count = float(state[f"{name}_count"])
    return normalized


def _moments(normalized: VecNormalize) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the running mean and variance of the observations."""
    return np.array(normalized.obs_rms.mean), np.array(normalized.obs_rms.var)


def _statistics(normalized: VecNormalize) -> Arrays:
    """Return the statistics of VecNormalize as arrays, for `_normalize`."""
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
    """Return the tensors of a model and its optimizer as arrays: policy/NAME and optimizer/NUMBER/NAME."""
    arrays = {f"policy/{name}": value.numpy().copy() for name, value in parameters["policy"].items()}
    for number, moments in parameters["policy.optimizer"]["state"].items():
        arrays |= {f"optimizer/{number}/{name}": value.numpy().copy() for name, value in moments.items()}
    return arrays


def _nested(state: Mapping[str, NDArray[Any]], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Invert `_flat`; values other than tensors are taken from a fresh model."""
    policy = {name: torch.from_numpy(state[f"policy/{name}"]) for name in fresh["policy"]}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in state.items():
        if name.startswith("optimizer/"):
            _, number, moment = name.split("/")
            moments.setdefault(int(number), {})[moment] = torch.from_numpy(value)
    return {"policy": policy, "policy.optimizer": {**fresh["policy.optimizer"], "state": moments}}
