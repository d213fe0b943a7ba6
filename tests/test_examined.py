"""What is reported of a training run: whose weights, on which part of the data, from which seed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minrnn.experiments import (
    EXPERIMENTS,
    formal_languages,
    listops,
    locomotion,
    selective_copying,
    trained,
)
from minrnn.experiments.experiment import Choice, Experiment, Trial, Workplace
from minrnn.experiments.trained import TrainedExperiment
from minrnn.training import RunConfig

TRAINED = [name for name, entry in EXPERIMENTS.items() if isinstance(entry.load(), TrainedExperiment)]
WEIGHTS = dict.fromkeys(TRAINED, "best") | dict.fromkeys(("shakespeare-cpu", "documents"), "last")
"""The weights that each experiment's section names: nanoGPT's recipe for a CPU alone has the last ones."""

MODEL: Any = object()


def config_of(name: str, scale: Any = "cpu", mixer: str = "mingru") -> RunConfig:
    """Return the configuration of an experiment's last seed."""
    trial = EXPERIMENTS[name].load().trials(Choice(scale, seeds=3, mixers=(mixer,)))[-1]
    config = RunConfig.from_dict(trial.config)
    assert config.train.seed == 2
    return config


class Spy:
    """Takes the place of a task: keeps its configurations, and answers with their number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.configs: list[Any] = []
        self.models: list[Any] = []
        monkeypatch.setattr(module, name, self)

    def __call__(self, config: Any) -> Any:
        number = len(self.configs)
        self.configs.append(config)

        def evaluate(model: Any) -> dict[str, int]:
            self.models.append(model)
            return {"accuracy": number}

        return SimpleNamespace(evaluate=evaluate, commonest_answer=lambda: 100 + number)


# --- the weights and the seed ----------------------------------------------------------------------------


def test_all_trained_experiments_are_known() -> None:
    assert [
        *("selective-copying", "stability", "shakespeare", "shakespeare-best", "shakespeare-cpu"),
        *("documents", "formal-languages", "listops", "locomotion"),
    ] == TRAINED


def test_a_trial_examines_the_weights_of_its_own_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For every experiment and a seed other than 0."""
    calls: list[tuple[Any, ...]] = []

    def train(config: RunConfig, run_dir: Path, *, resume: bool, log: Any) -> dict[str, Any]:
        calls.append(("train", config, run_dir, resume))
        return {"step": 7, "val_loss": 1.23456789, "commit": "left out", "mixer": "left out"}

    def load(run_dir: Path, which: str, device: torch.device) -> Any:
        calls.append(("load", run_dir, which, device.type))
        return SimpleNamespace(model=MODEL)

    def examine(self: Experiment, model: Any, config: RunConfig, size: Any) -> dict[str, Any]:
        calls.append(("examine", model, config, size))
        return {"test": {"accuracy": 0.987654321}}

    monkeypatch.setattr(trained, "train", train)
    monkeypatch.setattr(trained, "load_trained", load)
    monkeypatch.setattr(trained, "read_metrics", lambda path: calls.append(("metrics", path)) or [])
    for name in TRAINED:
        experiment = EXPERIMENTS[name].load()
        monkeypatch.setattr(type(experiment), "examine", examine)
        choice = Choice("tiny", seeds=3, mixers=("mingru",), device="cpu", threads=1)
        trial: Trial = experiment.trials(choice)[-1]
        assert trial.setting["seed"] == 2
        result = experiment.measure(trial, Workplace(tmp_path, choice), lambda *_: None)
        config = RunConfig.from_dict(trial.config).override(train={"device": "cpu", "threads": 1, "seed": 2})
        size = experiment.sizes["tiny"]
        assert calls == [
            ("train", config, tmp_path / "run", False),
            ("load", tmp_path / "run", WEIGHTS[name], "cpu"),
            ("metrics", tmp_path / "run" / "metrics.jsonl"),
            ("examine", MODEL, config, size),
        ], name
        assert result.items() >= {"step": 7, "val_loss": 1.23457, "test": {"accuracy": 0.987654}}.items()
        assert {"commit", "mixer"}.isdisjoint(result)
        calls.clear()


# --- the part of the data --------------------------------------------------------------------------------


HELD_OUT = {
    "shakespeare": (0.1, "validation"),  # of the nine tenths, and the last tenth is the test
    "shakespeare-best": (pytest.approx(1 / 9), "test"),  # the last tenth chooses, and the ninth is the test
    "shakespeare-cpu": (0.0, "validation"),
    "documents": (0.0, "validation"),
}


@pytest.mark.parametrize("scale", ["cpu", "paper", "tiny"])
@pytest.mark.parametrize("name", TRAINED)
def test_weights_are_chosen_on_validation_data(name: str, scale: Any) -> None:
    """A run never sees the part that is reported; only where no weights are chosen does it."""
    if name == "locomotion":
        return  # its episodes that are held out choose, and those that are played are reported
    for trial in EXPERIMENTS[name].load().trials(Choice(scale)):
        task = trial.config["task"]
        if task["name"] == "text":
            held_out = (0.0, "validation") if "trained_on" in trial.setting else HELD_OUT[name]
            assert (task["held_out"], task["held_out_for"]) == held_out
            assert task["part"] == "validation"
            assert task["best_in_windows"] == (trial.setting["mixer"] == "aaren" and name == "shakespeare")
        else:
            assert task["part"] == "validation"


def test_a_recipe_that_holds_nothing_out_is_not_examined() -> None:
    experiment = EXPERIMENTS["shakespeare-best"].load()
    assert isinstance(experiment, TrainedExperiment)
    assert experiment.examine(MODEL, config_of("shakespeare-best"), experiment.sizes["cpu"]) == {}


def test_copying_is_reported_on_test_sequences_of_three_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    config, spy = config_of("selective-copying"), Spy(monkeypatch, selective_copying, "SelectiveCopyingTask")
    experiment = selective_copying.EXPERIMENT
    found = experiment.examine(MODEL, config, experiment.sizes["cpu"])
    assert found == {"test": {name: {"accuracy": n} for n, name in enumerate(("x1", "x2", "x4"))}}
    assert spy.configs == [
        dataclasses.replace(config.task, part="test", length=length) for length in (128, 256, 512)
    ]
    assert spy.models == [MODEL] * 3


def test_languages_are_reported_on_test_strings_and_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    config, spy = config_of("formal-languages"), Spy(monkeypatch, formal_languages, "FormalLanguageTask")
    experiment = formal_languages.EXPERIMENT
    found = experiment.examine(MODEL, config, experiment.sizes["cpu"])
    whole = dataclasses.replace(config.task, part="test", eval_sequences=1024)  # type: ignore[call-arg]
    lengths = (40, 64, 96, 128, 192, 256)
    assert spy.configs == [
        whole,
        *(dataclasses.replace(whole, eval_min_length=n, eval_max_length=n) for n in lengths),  # type: ignore[call-arg]
    ]
    assert (whole.eval_min_length, whole.eval_max_length) == (40, 256)  # type: ignore[attr-defined]
    assert found == {
        "test": {"accuracy": 0},
        "constant": 100,
        "by_length": {str(length): n for n, length in enumerate(lengths, start=1)},
    }
    assert spy.models == [MODEL] * 7


def test_listops_is_reported_on_test_expressions(monkeypatch: pytest.MonkeyPatch) -> None:
    config, spy = config_of("listops"), Spy(monkeypatch, listops, "ListOpsTask")
    found = listops.EXPERIMENT.examine(MODEL, config, listops.EXPERIMENT.sizes["cpu"])
    assert spy.configs == [dataclasses.replace(config.task, part="test")]
    assert found == {"test": {"accuracy": 0}, "constant": 100}
    assert spy.models == [MODEL]


@pytest.mark.parametrize(
    ("name", "changed", "window"),
    [
        ("shakespeare", {"part": "test"}, 256),
        ("shakespeare-best", {"part": "test"}, 256),
        ("shakespeare-cpu", {"window": 64}, 64),
        ("documents", {}, 256),
    ],
)
def test_texts_are_reported_on_their_part(
    name: str, changed: dict[str, Any], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task: dict[str, dict[str, Any]] = {
        "shakespeare-cpu": {"window": 1024},  # longer than what is published beside it
        "shakespeare-best": {"held_out": 1 / 9, "held_out_for": "test"},  # as that of its first trial
    }
    config = config_of(name).override(task=task.get(name, {}))
    experiment = EXPERIMENTS[name].load()
    assert isinstance(experiment, TrainedExperiment)
    spy = Spy(monkeypatch, sys.modules[type(experiment).__module__], "TextTask")
    found = experiment.examine(MODEL, config, experiment.sizes["cpu"])
    assert spy.configs == [dataclasses.replace(config.task, **changed)]
    assert spy.configs[0].window == window
    assert found == {"test": {"accuracy": 0}}
    assert spy.models == [MODEL]


def test_stability_reports_its_curves_alone() -> None:
    experiment = EXPERIMENTS["stability"].load()
    assert isinstance(experiment, TrainedExperiment)
    assert experiment.examine(MODEL, config_of("stability"), experiment.sizes["cpu"]) == {}


@pytest.mark.parametrize("conditioned", [True, False])
def test_policies_are_reported_by_what_they_play(conditioned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On episodes from seed 1000, with targets of the data; the highest is of training episodes."""
    played: list[tuple[Any, int, int, int]] = []
    closed: list[str] = []

    class Episodes:
        returns = np.array([1.0, 2.0, 3.0, 10.0])
        num_episodes = 4

        def __len__(self) -> int:
            return 4000

    class Data(SimpleNamespace):
        def __init__(self, config: Any) -> None:
            assert config is wanted.task
            super().__init__(
                environment="Hopper-v5",
                episodes=Episodes(),
                train_episodes=np.array([0, 1, 2]),
                target_return=2.5,
                sha256="digest",
            )

    class Actor:
        def __init__(self, model: Any, target_return: float | None) -> None:
            assert model is actor
            self.target_return = target_return

    def play(policy: Any, together: Any, episodes: int, *, seed: int) -> Any:
        played.append((policy.target_return, len(together), episodes, seed))
        runs = [SimpleNamespace(total_return=3234.3, steps=5), SimpleNamespace(total_return=1.0, steps=9)]
        yield runs[:1]
        yield runs

    def environment(name: str) -> Any:
        return SimpleNamespace(close=lambda: closed.append(name))

    wanted = config_of("locomotion")
    actor: Any = SimpleNamespace(config=SimpleNamespace(conditioned=conditioned))
    monkeypatch.setattr(locomotion, "DecisionsTask", Data)
    monkeypatch.setattr(locomotion, "Policy", Actor)
    monkeypatch.setattr(locomotion, "play", play)
    monkeypatch.setattr(locomotion, "make_environment", environment)
    monkeypatch.setattr(locomotion, "_seconds_per_action", lambda model: 0.5)
    found = locomotion.EXPERIMENT.examine(actor, wanted, locomotion.EXPERIMENT.sizes["paper"])
    targets = {"mean": 4.0, "best tenth": 2.5, "highest": 3.0} if conditioned else {"best tenth": None}
    assert {name: one["target_return"] for name, one in found["asked"].items()} == targets
    assert played == [(target, 10, 100, 1000) for target in targets.values()]
    assert closed == ["Hopper-v5"] * 10 * len(targets)
    score = 100 * ((3234.3 + 1.0) / 2 + 20.272305) / (3234.3 + 20.272305)
    assert found["score"] == found["asked"]["best tenth"]["score"] == pytest.approx(score)
    assert found["target_return"] == targets["best tenth"]
    assert (found["returns"], found["lengths"]) == ([3234.3, 1.0], [5, 9])
    assert found["seconds_per_action"] == 0.5
    assert found["data"] == {
        "sha256": "digest",
        "episodes": 4,
        "steps": 4000,
        "mean_return": 4.0,
        "score": pytest.approx(100 * 24.272305 / 3254.572305),
        "best_return": 3.0,
        "best_score": pytest.approx(100 * 23.272305 / 3254.572305),
    }
