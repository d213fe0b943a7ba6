"""Every mixer and every task trained by compiled steps: their losses are those of plain ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compilation import outcome
from test_decisions_task import make_episodes
from test_tasks import SMALL
from test_training import run_config

from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig
from minrnn.tasks import TASKS, DecisionsConfig, TaskConfig, decisions
from minrnn.training import RunConfig, TrainConfig

pytestmark = pytest.mark.usefixtures("cache")

UNROLLED = ("rnn", "gru", "lstm")
"""Mixers of torch.nn, which torch does not compile."""


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_find", lambda config: make_episodes((40,) * 12))
    torch.compiler.reset()


def check(config: RunConfig, folder: Path) -> None:
    plain = outcome(config, folder / "plain")
    compiled = outcome(config.override(train={"compile": True}), folder / "compiled")
    for one, other in zip(plain[:2], compiled[:2], strict=True):
        assert one
        assert other == pytest.approx(one, rel=1e-5)
    assert compiled[2]["val_loss"] == pytest.approx(plain[2]["val_loss"], rel=1e-5)
    assert compiled[3].compiling


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(mixer: str, corpus: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 3, "log_every": 1, "carry_state": True, "fresh_share": 0.3}
    config = run_config(corpus, mixer=mixer, **settings).override(model={"dropout": 0.0})
    if mixer not in UNROLLED:
        check(config, tmp_path)
        return
    with pytest.raises(
        RuntimeError, match=r"train\.compile: the model cannot be compiled: .* not support RNN"
    ):
        check(config, tmp_path)


TINY: dict[str, TaskConfig] = {**SMALL, "decisions": DecisionsConfig(data="made", window=5)}


@pytest.mark.parametrize("task", [name for name in TASKS if name != "text"])
def test_every_task(task: str, tmp_path: Path) -> None:
    train = TrainConfig(steps=3, batch_size=4, log_every=1, warmup_steps=1, device="cpu")
    check(RunConfig("test", ModelConfig(d_model=8, num_layers=1), TINY[task], train), tmp_path)


@pytest.mark.parametrize("precision", ["bfloat16-products", "bfloat16"])
def test_narrow_precisions(precision: str, corpus: Path, tmp_path: Path) -> None:
    """Compiled code rounds fewer numbers on their way: losses agree to bfloat16's digits."""
    config = run_config(corpus, steps=3, log_every=1, precision=precision).override(model={"dropout": 0.0})
    plain = outcome(config, tmp_path / "plain")[0]
    compiled = outcome(config.override(train={"compile": True}), tmp_path / "compiled")[0]
    assert compiled == pytest.approx(plain, rel=2e-2)


def test_dropout_is_drawn_anew(corpus: Path, tmp_path: Path) -> None:
    """Compiled graphs draw other masks, of the same probability: losses differ, and learning goes on."""
    config = run_config(corpus, steps=40, log_every=1).override(model={"dropout": 0.2})
    plain = outcome(config, tmp_path / "plain")[0]
    compiled = outcome(
        dataclasses.replace(config, train=dataclasses.replace(config.train, compile=True)),
        tmp_path / "compiled",
    )[0]
    assert compiled != pytest.approx(plain, rel=1e-5)
    assert sum(compiled[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.1)
