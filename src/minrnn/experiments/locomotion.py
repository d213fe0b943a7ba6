"""Table 3: policies learnt from recorded episodes of locomotion, and what they earn when they act."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minrnn.experiments import scores
from minrnn.experiments.experiment import Cell, Choice, Record, Table
from minrnn.experiments.scores import BC, BEST_TENTH, ENVIRONMENTS, HIGHEST, MEAN, QUALITIES, score
from minrnn.experiments.trained import Plan, TrainedExperiment
from minrnn.experiments.variants import every_mixer, model_of
from minrnn.files import nearest
from minrnn.models import DecisionModel, Policy
from minrnn.tasks import DecisionsConfig, DecisionsTask
from minrnn.tasks.decisions import Tokens
from minrnn.tasks.environments import make_environment
from minrnn.tasks.locomotion import local_name
from minrnn.tasks.rollouts import play
from minrnn.training import RunConfig, TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRICE = ("mingru", "minlstm", "rnn", BC)
"""Three seeds: ours, cloning, and the strongest rival by one seed of all here."""

FIRST_SEED = 1000
"""Of the episodes that are reported."""

TOGETHER = 10
"""Episodes that are played at a time."""


@dataclass(frozen=True)
class Size:
    """The settings of a scale."""

    d_model: int
    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate_ratio: float
    warmup_steps: int
    eval_every: int
    episodes: int
    tokens: Tokens | None = None
    window: int = 20
    num_layers: int = 3
    dropout: float = 0.1
    seeds: int = 3
    environments: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENTS)
    exceptions: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Width and learning rate of data that have others."""


class Locomotion(TrainedExperiment[Size]):
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
        f"seeds of {', '.join(THRICE)} and one of the others; recurrences read a step as one token, and "
        "attention as three. paper: five seeds, 100 episodes, three tokens a step for all, as Decision "
        "Transformer and Decision Mamba have it, width 256 and a rate of 1e-4 where the paper says so; "
        "its expansion is not known, and ours is 1 (2 for mamba). The sources read their last 20 steps "
        "anew for every action, recurrences included."
    )
    sizes: ClassVar = {
        "cpu": Size(128, 800, 64, 1e-3, 0.1, 100, 200, 10),
        "paper": Size(
            128,
            100_000,
            64,
            1e-3,
            1.0,
            10_000,
            5000,
            100,
            "interleaved",
            seeds=5,
            exceptions={
                "hopper-medium": (256, 1e-4),
                "hopper-medium-replay": (256, 1e-4),
                "walker2d-medium": (128, 1e-4),
            },
        ),
        "tiny": Size(
            8, 2, 4, 1e-3, 0.1, 1, 1, 2, window=5, num_layers=1, environments={"pendulum": "Pendulum-v1"}
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

    def cells(self, choice: Choice) -> list[Cell]:
        data = choice.data or "local"
        return [
            cell
            for cell in super().cells(choice)
            if cell.setting["data"] == data and (not choice.envs or cell.setting["env"] in choice.envs)
        ]

    def plans(self, size: Size, mixer: str) -> Iterator[Plan]:
        # Three of those that matter most, one of the rest; the paper's own number at its own scale.
        seeds = size.seeds if mixer in THRICE or size.seeds > 3 else 1
        for data, qualities in QUALITIES.items():
            for env in size.environments:
                for quality in qualities:
                    setting = {"mixer": mixer, "env": env, "quality": quality, "data": data}
                    name = f"{mixer}-{env}-{quality}-{data}"
                    yield Plan(name, setting, _run(size, mixer, env, quality, data), seeds)

    def examine(self, model: DecisionModel, config: RunConfig, size: Size) -> dict[str, Any]:
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


def _run(size: Size, mixer: str, env: str, quality: str, data: str) -> RunConfig:
    clones = mixer == BC
    d_model, learning_rate = size.exceptions.get(f"{env}-{quality}", (size.d_model, size.learning_rate))
    model = model_of(
        "mingru" if clones else mixer,
        d_model=d_model,
        num_layers=size.num_layers,
        expansion=2.0 if mixer == "mamba" else 1.0,
        conv_width=0,
        mlp_ratio=4.0,
        dropout=size.dropout,
        **({"num_heads": 1} if mixer == "attention" else {}),  # as Decision Transformer has it
    )
    task = DecisionsConfig(
        data=_source(env, size.environments[env], quality, data),
        tokens="observation" if clones else size.tokens,
        carry=False if clones else None,
        window=1 if clones else size.window,
    )
    return RunConfig(
        recipe="decisions",
        model=model,
        task=task,
        train=TrainConfig(
            steps=size.steps,
            # As many steps of episodes for all.
            batch_size=size.batch_size * size.window if clones else size.batch_size,
            learning_rate=learning_rate,
            min_learning_rate_ratio=size.min_learning_rate_ratio,
            warmup_steps=size.warmup_steps,
            weight_decay=1e-4,
            beta2=0.999,
            grad_clip=0.25,
            eval_every=size.eval_every,
            checkpoint_every=size.eval_every,
            log_every=max(1, size.eval_every // 5),
        ),
    ).resolved()


def _source(env: str, environment: str, quality: str, data: str) -> str:
    """Return what `find_episodes` knows the data by: a name, which is the same on every machine."""
    if data == "local":
        return local_name(environment, quality)
    return f"{env}-{quality}-v2" if data == "d4rl" else f"mujoco/{env}/{quality}-v0"


def _played(model: DecisionModel, environment: str, target: float | None, size: Size) -> dict[str, Any]:
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
