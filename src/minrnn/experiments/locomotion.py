"""Table 3: policies learnt from recorded episodes of locomotion, and what they earn when they act."""

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
"""Ours, cloning, and the strongest baseline by one seed of all here."""

SLOW = {"train": {"learning_rate": 1e-4}}
WIDE = {**SLOW, "model": {"d_model": 256}}
"""The paper's settings for some data sets of D4RL."""

FIRST_SEED = 1000
"""Of the episodes that are reported."""

TOGETHER = 10
"""Episodes that are played at a time."""


@dataclass(frozen=True, kw_only=True)
class ActingSize(Size):
    """A scale, the environments, and how many episodes are played."""

    episodes: int
    """Episodes that a trained policy plays for each return that it is asked for."""
    environments: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENTS)
    """Environments by their names in D4RL."""
    exceptions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Tables of settings, as `RunConfig.override` takes them, of the data sets that have others."""


class Locomotion(TrainedExperiment[ActingSize]):
    """Learn to act from episodes, and act."""

    name = "locomotion"
    title = "Acting: D4RL's locomotion tasks (table 3)"
    question = (
        "Policies that are told the return still to come learn from recorded episodes of MuJoCo's Hopper, "
        "HalfCheetah and Walker2d, and then act. One trunk (three blocks of a mixer and an MLP), in which "
        "only the mixer changes: `attention` is Decision Transformer, which reads its last 20 steps anew "
        "for every action, `s4d` Decision S4, `mamba` Decision Mamba, `aaren` Decision Aaren; `bc` is "
        "behaviour cloning, minGRU's trunk that sees one observation and no return. Recurrences carry "
        "their state from the first step of an episode to its last, in training as when they act; all see "
        "the same steps as often, and gradients reach 20 steps back. All are asked for the same return, the "
        "mean of the best episodes that they learn from, those with a tenth of the steps; two others are "
        "asked for beside it, the data's mean and their highest, in a table of their own. Weights are those "
        "with the lowest loss on held-out episodes; acting chooses nothing. Scores are D4RL's, 0 for random "
        "actions and 100 for its expert."
    )
    changes = (
        "cpu: data made here, 800 steps of 64 x 20 steps in place of 100,000, 100 steps of warm-up "
        "(then a cosine) in place of 10,000, width 128 and a rate of 1e-3 throughout, 10 episodes, three "
        f"seeds of {', '.join(THREE_SEEDS)} and one of the others; recurrences read a step as one token, and "
        "attention as three. paper: five seeds, 100 episodes, three tokens a step for all, as Decision "
        "Transformer and Decision Mamba have it, width 256 and a rate of 1e-4 where the paper says so; "
        "its expansion is not known, and ours is 1 (2 for mamba). The sources read their last 20 steps "
        "anew for every action, recurrences included."
    )
    recipe = "decisions"
    sizes: ClassVar = {
        "cpu": ActingSize(train=training(every=200, logs=5, steps=800), episodes=10),
        "paper": ActingSize(
            task={"tokens": "interleaved"},
            train=training(
                every=5000, logs=5, steps=100_000, min_learning_rate_ratio=1.0, warmup_steps=10_000
            ),
            seeds=5,
            other_seeds=5,
            episodes=100,
            exceptions={"hopper-medium": WIDE, "hopper-medium-replay": WIDE, "walker2d-medium": SLOW},
        ),
        "tiny": ActingSize(
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

    def config(self, size: ActingSize, mixer: str) -> RunConfig:
        config = super().config(size, "mingru" if mixer == BC else mixer)
        assert isinstance(config.task, DecisionsConfig)
        if mixer == BC:
            steps = config.train.batch_size * config.task.window  # of episodes: as many as the others'
            alone = {"tokens": "observation", "carry": False, "window": 1}
            return config.override(task=alone, train={"batch_size": steps})
        if mixer == "mamba":
            return config.override(model={"expansion": 2.0})
        # One head, as Decision Transformer has it.
        return config.override(model={"num_heads": 1} if mixer == "attention" else {})

    def grid(self, size: ActingSize, mixer: str) -> Iterator[GridPoint]:
        config = self.config(size, mixer)
        seeds = size.seeds if mixer in THREE_SEEDS else size.other_seeds
        for data, qualities in QUALITIES.items():
            for env, quality in product(size.environments, qualities):
                of_data = config.override(task={"data": _source(env, size.environments[env], quality, data)})
                of_data = of_data.override(**size.exceptions.get(f"{env}-{quality}", {}))
                setting = {"mixer": mixer, "env": env, "quality": quality, "data": data}
                yield GridPoint(f"{mixer}-{env}-{quality}-{data}", setting, of_data.resolved(), seeds)

    def examine(self, model: DecisionModel, config: RunConfig, size: ActingSize) -> dict[str, Any]:
        assert isinstance(config.task, DecisionsConfig)
        task = DecisionsTask(config.task)
        environment = task.environment
        if environment is None:
            raise ValueError(f"locomotion: the data {config.task.data} must name their environment")
        of_data = task.episodes.returns
        highest = float(of_data[task.train_episodes].max())
        targets: dict[str, float | None] = {BEST_TENTH: None}  # for a policy that is told none
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
    """Return what `find_episodes` knows the data by: a name, which is the same on every machine."""
    if data == "local":
        return local_name(environment, quality)
    return f"{env}-{quality}-v2" if data == "d4rl" else f"mujoco/{env}/{quality}-v0"


def _played(model: DecisionModel, environment: str, target: float | None, size: ActingSize) -> dict[str, Any]:
    """Return what a policy earns that is asked for a return."""
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
    """Return the median time of an action in one environment, late enough for every window to be full."""
    policy, observation = Policy(model), np.zeros(model.config.observation_size)
    taken = []
    for step in range(model.config.window + 50):
        began = time.perf_counter()
        policy.act(observation, 0.0)
        if step >= model.config.window:
            taken.append(time.perf_counter() - began)
    return median(taken)


EXPERIMENT = Locomotion()
