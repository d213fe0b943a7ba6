"""Table 3: policies trained on recorded episodes of locomotion, and their returns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import mean, median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minrnn.experiments import scores
from minrnn.experiments.experiment import Choice, Record, Table, Trial
from minrnn.experiments.scores import BC, BEST_TENTH, ENVIRONMENTS, HIGHEST, MEAN, QUALITIES, score
from minrnn.experiments.trained import TINY_TRAIN, GridPoint, Size, TrainedExperiment, training
from minrnn.experiments.variants import every_mixer
from minrnn.files import nearest
from minrnn.models import DecisionModel, Policy
from minrnn.tasks import DecisionsConfig, DecisionsTask
from minrnn.tasks.environments import make_environment
from minrnn.tasks.locomotion import local_name
from minrnn.tasks.rollouts import play
from minrnn.training import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THREE_SEEDS = ("mingru", "minlstm", "rnn", BC)
"""Ours, behavior cloning, and the strongest baseline according to one seed of all mixers."""

SLOW = {"train": {"learning_rate": 1e-4}}
WIDE = {**SLOW, "model": {"d_model": 256}}
"""The paper's settings for some data sets of D4RL."""

FIRST_SEED = 1000
"""Seed of the reported episodes."""

TOGETHER = 10
"""Episodes that are played at once."""


@dataclass(frozen=True, kw_only=True)
class LocomotionSize(Size):
    """A scale, the environments, and the number of episodes."""

    episodes: int
    """Episodes that a trained policy plays for each target return."""
    environments: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENTS)
    """Environments by their names in D4RL."""
    exceptions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Overrides, as in `RunConfig.override`, for data sets with other settings."""


class Locomotion(TrainedExperiment[LocomotionSize]):
    """Train policies on episodes, and let them act."""

    name = "locomotion"
    title = "Acting: D4RL's locomotion tasks (table 3)"
    question = (
        "Policies that are conditioned on the return-to-go are trained on recorded episodes of MuJoCo's "
        "Hopper, HalfCheetah and Walker2d, and then act. They share one trunk (three blocks of a mixer and "
        "an MLP) and differ in the mixer: `attention` is Decision Transformer, which reads its last 20 steps "
        "again for every action, `s4d` Decision S4, `mamba` Decision Mamba, `aaren` Decision Aaren; `bc` is "
        "behavior cloning, minGRU's trunk with one observation and no return as input. Recurrences carry "
        "their state from the first step of an episode to its last, in training as in acting; all see the "
        "same steps equally often, and gradients reach 20 steps back. All get the same target return, the "
        "mean of the best training episodes, those that hold a tenth of the steps; a separate table shows "
        "two other target returns, the data's mean and maximum. Weights are those with the lowest loss on "
        "held-out episodes; returns select nothing. Scores are D4RL's, 0 for random actions and 100 for its "
        "expert."
    )
    changes = (
        "cpu: data made here, 800 steps of 64 x 20 steps in place of 100,000, 100 steps of warm-up "
        "(then a cosine) in place of 10,000, width 128 and a rate of 1e-3 throughout, 10 episodes, three "
        f"seeds of {', '.join(THREE_SEEDS)} and one of the others; recurrences read a step as one token, and "
        "attention as three. paper: five seeds, 100 episodes, three tokens a step for all, as Decision "
        "Transformer and Decision Mamba have it, width 256 and a rate of 1e-4 where the paper says so; "
        "its expansion is not known, and ours is 1 (2 for mamba). The sources read their last 20 steps "
        "again for every action, recurrences included."
    )
    recipe = "decisions"
    sizes: ClassVar = {
        "cpu": LocomotionSize(train=training(every=200, logs=5, steps=800), episodes=10),
        "paper": LocomotionSize(
            task={"tokens": "interleaved"},
            train=training(
                every=5000, logs=5, steps=100_000, min_learning_rate_ratio=1.0, warmup_steps=10_000
            ),
            seeds=5,
            other_seeds=5,
            episodes=100,
            exceptions={"hopper-medium": WIDE, "hopper-medium-replay": WIDE, "walker2d-medium": SLOW},
        ),
        "tiny": LocomotionSize(
            model={"d_model": 8, "num_layers": 1},
            task={"window": 5},
            train=TINY_TRAIN,
            episodes=2,
            environments={"pendulum": "Pendulum-v1"},
        ),
    }

    def mixers(self) -> Sequence[str]:
        return [*every_mixer(), BC]

    def check(self, choice: Choice) -> None:
        known = {"envs": self.sizes[choice.scale].environments, "data": QUALITIES}
        for name, wanted in (("envs", choice.envs), ("data", (choice.data,) if choice.data else ())):
            for one in wanted:
                if one not in known[name]:
                    raise ValueError(
                        f"reproduce: {name} must be among {', '.join(known[name])}, got {one!r}"
                        f"{nearest(one, known[name])}"
                    )

    def trials(self, choice: Choice) -> list[Trial]:
        data = choice.data or "local"
        return [
            trial
            for trial in super().trials(choice)
            if trial.setting["data"] == data and (not choice.envs or trial.setting["env"] in choice.envs)
        ]

    def config(self, size: LocomotionSize, mixer: str) -> RunConfig:
        config = super().config(size, "mingru" if mixer == BC else mixer)
        assert isinstance(config.task, DecisionsConfig)
        if mixer == BC:
            steps = config.train.batch_size * config.task.window  # as many as the others'
            alone = {"tokens": "observation", "carry": False, "window": 1}
            return config.override(task=alone, train={"batch_size": steps})
        if mixer == "mamba":
            return config.override(model={"expansion": 2.0})
        # One head, as in Decision Transformer.
        return config.override(model={"num_heads": 1} if mixer == "attention" else {})

    def grid(self, size: LocomotionSize, mixer: str) -> Iterator[GridPoint]:
        config = self.config(size, mixer)
        seeds = size.seeds if mixer in THREE_SEEDS else size.other_seeds
        for data, qualities in QUALITIES.items():
            for env, quality in product(size.environments, qualities):
                of_data = config.override(task={"data": _source(env, size.environments[env], quality, data)})
                of_data = of_data.override(**size.exceptions.get(f"{env}-{quality}", {}))
                setting = {"mixer": mixer, "env": env, "quality": quality, "data": data}
                yield GridPoint(f"{mixer}-{env}-{quality}-{data}", setting, of_data.resolved(), seeds)

    def examine(self, model: DecisionModel, config: RunConfig, size: LocomotionSize) -> dict[str, Any]:
        assert isinstance(config.task, DecisionsConfig)
        task = DecisionsTask(config.task)
        environment = task.environment
        if environment is None:
            raise ValueError(f"locomotion: the data {config.task.data} must name their environment")
        of_data = task.episodes.returns
        highest = float(of_data[task.train_episodes].max())
        targets: dict[str, float | None] = {BEST_TENTH: None}  # for a policy without a target return
        if model.config.conditioned:
            targets = {MEAN: float(of_data.mean()), BEST_TENTH: task.target_return, HIGHEST: highest}
        played = {asked: _played(model, environment, target, size) for asked, target in targets.items()}
        return {
            "environment": environment,
            **played[BEST_TENTH],
            "asked": played,
            "seconds_per_action": _seconds_per_action(model),
            "data": {
                "sha256": task.sha256,
                "episodes": task.episodes.num_episodes,
                "steps": len(task.episodes),
                "mean_return": float(of_data.mean()),
                "score": score(environment, float(of_data.mean())),
                "best_score": score(environment, highest),
                "best_return": highest,
            },
        }

    def tables(self, records: Sequence[Record]) -> list[Table]:
        return scores.tables(records)

    def draw(self, records: Sequence[Record]) -> Figure:
        return scores.draw(records)


def _source(env: str, environment: str, quality: str, data: str) -> str:
    """Return the name of the data for `find_episodes`, which is the same on every machine."""
    if data == "local":
        return local_name(environment, quality)
    return f"{env}-{quality}-v2" if data == "d4rl" else f"mujoco/{env}/{quality}-v0"


def _played(
    model: DecisionModel, environment: str, target: float | None, size: LocomotionSize
) -> dict[str, Any]:
    """Return the returns of a policy with a target return."""
    policy = Policy(model, target_return=target)
    together = [make_environment(environment) for _ in range(min(TOGETHER, size.episodes))]
    *_, played = play(policy, together, size.episodes, seed=FIRST_SEED)
    for one in together:
        one.close()
    returns = [episode.total_return for episode in played]
    return {
        "target_return": policy.target_return,
        "returns": returns,
        "lengths": [episode.steps for episode in played],
        "score": score(environment, mean(returns)),
    }


def _seconds_per_action(model: DecisionModel) -> float:
    """Return the median time of an action in one environment, after enough steps to fill every window."""
    policy, observation = Policy(model), np.zeros(model.config.observation_size)
    taken = []
    for step in range(model.config.window + 50):
        began = time.perf_counter()
        policy.act(observation, 0.0)
        if step >= model.config.window:
            taken.append(time.perf_counter() - began)
    return median(taken)


EXPERIMENT = Locomotion()
