"""Trials of trained and of timed experiments: variants, estimates, systems that do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.benchmarks.measure import System
from minrnn.experiments import selective_copying, timed, trained
from minrnn.experiments.experiment import Choice, Workplace
from minrnn.experiments.timed import TimedExperiment, TimedSize
from minrnn.experiments.variants import VARIANTS, model_of
from minrnn.training import RunConfig

CHOICE = Choice("tiny", seeds=1, mixers=("mingru",), device="cpu")


def test_variants_are_settings_of_mixers_and_come_after_all_others() -> None:
    assert VARIANTS == {
        "minlstm-unnormalised": {"mixer": "minlstm", "normalize": False},
        "mingru-signed": {"mixer": "mingru", "signed": True},
        "minlstm-signed": {"mixer": "minlstm", "signed": True},
        "transformer": {"mixer": "attention", "conv_width": 0, "mlp_ratio": 4.0},
    }
    model = model_of("minlstm-signed", mixer="gru", signed=False, d_model=24)
    assert (model.mixer, model.signed, model.d_model) == ("minlstm", True, 24)
    assert model_of("rnn", mixer="gru", d_model=24).mixer == "rnn"


def test_estimates_are_of_all_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "step_seconds", lambda seconds, whole: 2.0 * whole)
    (trial, *_) = selective_copying.EXPERIMENT.trials(CHOICE)
    train = {"steps": 6, "accumulate": 3, "batch_size": 4}
    config = RunConfig.from_dict(trial.config).override(train=train).to_dict()
    assert (
        selective_copying.EXPERIMENT.estimate(dataclasses.replace(trial, config=config), CHOICE) == 8 * 3 * 6
    )


class Timed(TimedExperiment):
    """Two systems, one of which does not fit."""

    name = "timed"
    sizes = {"tiny": TimedSize(seconds=0.25, samples=3)}  # noqa: RUF012
    tables = draw = None  # type: ignore[assignment]

    def systems(self) -> list[str]:
        return ["small", "large", "bad"]

    def settings(self, size: TimedSize) -> Iterator[dict[str, Any]]:
        yield {"B": 2, "T": 3}

    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> Any:
        return None

    def build(self, system: str, setting: Mapping[str, Any], inputs: Any) -> System:
        def work() -> dict[str, float]:
            if system != "small":
                raise RuntimeError("does not fit\nat all" if system == "large" else "")
            return {"step": 2.0}

        return System(work)


def test_systems_that_do_not_fit_say_why_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    Timed.__abstractmethods__ = frozenset()  # of tables and plots there are none
    experiment = Timed()
    (trial,) = experiment.trials(Choice("tiny", device="cpu"))
    assert trial.name == "B2-T3"
    assert trial.config == {
        "B": 2,
        "T": 3,
        "seconds": 0.25,
        "samples": 3,
        "systems": ["small", "large", "bad"],
    }
    assert experiment.estimate(trial, CHOICE) == 0.75
    monkeypatch.setattr(timed, "time_in_turns", lambda ready, *_: {name: {"seconds": 1} for name in ready})
    result = experiment.measure(trial, Workplace(Path(), CHOICE), lambda fraction, text: None)
    assert result["systems"] == {
        "small": {"seconds": 1},
        "large": {"failed": "does not fit"},
        "bad": {"failed": ""},
    }


def test_lines_are_scaled() -> None:
    assert timed.scaled({"a": [(1, 2.0), (2, 3.0)]}, 1e3) == {"a": [(1, 2000.0), (2, 3000.0)]}
