"""Training with train.compile: the losses, checkpoints and evaluations of a run without it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import StopAt, assert_same_run, run_config, weights

from minrnn.models import load_checkpoint
from minrnn.training import Interrupted, RunConfig, RunLog, compilation, read_metrics, train

pytestmark = pytest.mark.usefixtures("cache", "backend")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs as for any backend, which are then run as they are; tests/slow has them compiled."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Notes(RunLog):
    """A log that keeps its notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def compiling(self) -> list[str]:
        return [note for note in self.notes if "compiling" in note]


def config_of(corpus: Path, *, dropout: float = 0.0, **settings: Any) -> RunConfig:
    config = run_config(corpus, **{"steps": 4, "eval_every": 2, "log_every": 1, **settings})
    return config.override(model={"num_layers": 1, "dropout": dropout})


def outcome(config: RunConfig, run_dir: Path) -> tuple[list[float], list[float], dict[str, Any], Notes]:
    """The losses and gradient norms of each step, the results and the log of a run."""
    log = Notes()
    results = train(config, run_dir, log=log)
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    return [r["loss"] for r in records], [r["grad_norm"] for r in records], results, log


RUNS: dict[str, dict[str, Any]] = {
    "windows": {"grad_clip": 0.5},
    "streams beside windows": {"carry_state": True, "fresh_share": 0.3, "accumulate": 2},
    "rounded activations": {"precision": "bfloat16", "carry_state": True},
}


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_a_compiled_run_is_the_run_that_it_would_have_been(
    settings: dict[str, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # forward and backward are graphs of their own
    config = config_of(corpus, **settings)
    plain = outcome(config, tmp_path / "plain")
    compiled = outcome(config.override(train={"compile": True}), tmp_path / "compiled")
    rounded = config.train.precision == "bfloat16"
    for one, other in zip(plain[:2], compiled[:2], strict=True):
        assert len(one) == 4
        assert other == pytest.approx(one, rel=2e-2 if rounded else 1e-5)
    assert compiled[2]["val_loss"] == pytest.approx(plain[2]["val_loss"], rel=1e-2 if rounded else 1e-5)
    assert not plain[3].compiling
    first, *later = compiled[3].compiling
    assert first.startswith("step 1: compiling the model took ")
    assert len(later) == (config.train.carry_state and config.train.accumulate == 1)
    kept = weights(tmp_path / "compiled")
    assert kept.keys() == weights(tmp_path / "plain").keys()
    model, _ = load_checkpoint(tmp_path / "compiled" / "checkpoints" / "best")
    assert set(model.state_dict()) == set(kept)


def test_evaluations_are_not_compiled(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    outcome(config_of(corpus, compile=True, steps=2, eval_every=1), tmp_path / "run")
    assert called == [True]


def test_a_compiled_run_is_resumed_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    """With masks of dropout, which compiled graphs draw from the generator that a checkpoint holds."""
    config = config_of(corpus, compile=True, dropout=0.3, steps=6, checkpoint_every=3)
    outcome(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", log=StopAt(3))
    train(config, tmp_path / "parts", resume=True, log=RunLog())
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_compiling_may_begin_and_end_in_a_run(corpus: Path, tmp_path: Path) -> None:
    expected = outcome(config_of(corpus, steps=3), tmp_path / "plain")[0]
    for steps, is_compiled in zip((1, 2, 3), itertools.cycle((True, False))):
        # The schedule of all three is that of three steps.
        config = config_of(corpus, steps=steps, warmup_steps=9, compile=is_compiled)
        train(config, tmp_path / "run", resume=steps > 1, log=RunLog())
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    found = [record["loss"] for record in records if "loss" in record]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found) == 3


def test_a_mixer_that_cannot_be_compiled_says_why(corpus: Path, tmp_path: Path) -> None:
    said = r"^train\.compile: the model cannot be compiled: .* not support RNN.*--train\.no-compile$"
    with pytest.raises(RuntimeError, match=said) as error:
        train(config_of(corpus, mixer="gru", compile=True), tmp_path / "run", log=RunLog())
    assert "\n" not in str(error.value)


def test_a_backend_that_fails_is_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: object, inputs: object) -> Any:
        raise OSError("no compiler in the folder\nof tools")

    monkeypatch.setattr(compilation, "BACKEND", fail)
    with pytest.raises(
        RuntimeError, match=r"cannot be compiled: .*no compiler in the folder; train"
    ) as error:
        train(config_of(corpus, compile=True), tmp_path / "run", log=RunLog())
    assert "\n" not in str(error.value)


def test_compiling_is_no_part_of_the_speed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's tokens per second are those that it would have had, were nothing compiled."""
    monkeypatch.setattr(compilation.Compilation, "take_seconds", lambda self: -1e6)
    config = config_of(corpus, compile=True, steps=1)
    outcome(config, tmp_path / "run")
    (record,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert 0 < record["tokens_per_second"] < 1
