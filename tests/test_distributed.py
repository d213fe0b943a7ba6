"""Data parallel: whatever the number of ranks, the run is the one that one process would do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import MISSING, Pool, training_pool
from test_decisions_task import make_episodes
from test_training import run_config

from minrnn.distributed import ALONE, Ranks
from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig
from minrnn.models.shards import gathered
from minrnn.tasks import (
    DecisionsConfig,
    FormalLanguageConfig,
    ListOpsConfig,
    SelectiveCopyingConfig,
    TaskConfig,
    decisions,
)
from minrnn.training import RunConfig, RunLog, TrainConfig, read_config, read_metrics, train
from minrnn.training.loop import Run
from minrnn.training.optim import clip_gradients

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]

STEPS = 10
"""Of a run that is compared; tests/slow/test_ranks_alike.py takes more, on more numbers of ranks."""

GRADIENTS, LOSSES, VALIDATION = 2e-6, 2e-6, 1e-6
"""Largest differences from one process: of gradients relative to the largest; of losses; of val_loss."""


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with training_pool(tmp_path_factory) as made:
        yield made


@dataclasses.dataclass
class Trace:
    """What a rank saw of a run."""

    gradients: dict[str, torch.Tensor]
    """Of the first step, clipped."""
    losses: list[float]
    norms: list[float]
    metrics: dict[str, float]
    weights: dict[str, torch.Tensor]
    tokens: int


def traced(ranks: Ranks, config: RunConfig, folder: Path, steps: int) -> Trace:
    """Take some steps of a run, and evaluate it."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decisions, "_find", lambda config: make_episodes((40,) * 12))
        run = Run(config, folder, RunLog(), ranks)
        first: dict[str, torch.Tensor] = {}

        def note(*_: Any) -> None:
            if not first:
                first.update({name: gathered(p.grad).clone() for name, p in run.model.named_parameters()})  # type: ignore[arg-type]

        run.optimizers[0].register_step_pre_hook(note)
        for _ in range(steps):
            run.step()
        run._collect()
        metrics = run._measure("evaluating", config.train.final_eval_tokens)
    torch.set_num_threads(before)
    weights = {name: gathered(value).clone() for name, value in run.model.state_dict().items()}
    return Trace(first, run.state.losses, run.state.grad_norms, metrics, weights, run.state.tokens)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def assert_alike(one: Trace, other: Trace) -> None:
    """The bounds within which runs of different numbers of ranks agree."""
    largest = max(value.abs().max().item() for value in one.gradients.values())
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        assert distance(gradient, other.gradients[name]) <= GRADIENTS * largest, name
    assert other.norms[0] == pytest.approx(one.norms[0], rel=GRADIENTS)
    assert other.losses == pytest.approx(one.losses, rel=0, abs=LOSSES)
    assert other.metrics.keys() == one.metrics.keys()
    for name, value in one.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=0, abs=VALIDATION * 2), name
    assert other.metrics["val_loss"] == pytest.approx(one.metrics["val_loss"], rel=0, abs=VALIDATION)
    assert other.tokens == one.tokens


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def compare(
    ranks_of: Pool, config: RunConfig, folder: Path, sizes: tuple[int, ...], steps: int, divided: int = 1
) -> None:
    """One process and each number of ranks agree; the ranks with each other to the last bit.

    Sequences are divided among so many ranks each.
    """
    alone = traced(ALONE, config, folder, steps)
    config = config.override(train={"sequence_ranks": divided})
    for size in sizes:
        first, *others = ranks_of.run(size, traced, config, folder, steps)
        assert_alike(alone, first)
        for other in others:
            assert_equal(first.weights, other.weights)
            assert other.losses == first.losses
            assert other.norms == first.norms
            assert other.metrics == first.metrics


def text_config(corpus: Path, mixer: str = "mingru", **settings: Any) -> RunConfig:
    """A run without dropout, whose masks differ from rank to rank."""
    defaults = {"learning_rate": 3e-3, "steps": 40, "batch_size": 8, "final_eval_tokens": 500}
    config = run_config(corpus, mixer=mixer, **(defaults | settings))
    return config.override(model={"dropout": 0.0})


def last_attribute(ranks: Ranks) -> tuple[str, bool]:
    averaged: Any = ranks.distribute(torch.nn.Linear(2, 2), torch.device("cpu"))
    name, value = list(vars(averaged).items())[-1]
    return name, value is torch.distributed.group.WORLD


def test_a_group_is_freed_after_the_reducer_that_uses_it(ranks_of: Pool) -> None:
    """Otherwise a rank hangs now and then when it ends: see `_averaging`."""
    assert ranks_of.run(2, last_attribute) == [("group_freed_last", True)] * 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_alike_on_any_number_of_ranks(
    corpus: Path, tmp_path: Path, ranks_of: Pool, mixer: str
) -> None:
    compare(ranks_of, text_config(corpus, mixer), tmp_path, (2, 4) if mixer == "mingru" else (2,), STEPS)


READING: list[dict[str, Any]] = [
    {"batch_size": 7},
    {"batch_size": 7, "carry_state": True},
    {"batch_size": 7, "carry_state": True, "fresh_share": 0.3},
    {"batch_size": 7, "accumulate": 3},
    {"batch_size": 4, "carry_state": True, "fresh_share": 0.25, "accumulate": 2},
]
"""Settings of how windows are read."""


@pytest.mark.parametrize("settings", READING, ids=lambda settings: " ".join(map(str, settings.values())))
def test_every_way_of_reading_is_alike(
    corpus: Path, tmp_path: Path, ranks_of: Pool, settings: dict[str, Any]
) -> None:
    """Uneven rows among them; of some batches a rank of three has no window."""
    compare(ranks_of, text_config(corpus, **settings), tmp_path, (3,), STEPS)


def test_muon_is_alike(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    """In the first step: after it, bfloat16 in its Newton-Schulz steps makes much of a last bit."""
    config = text_config(corpus, optimizer="muon", batch_size=7)
    alone = traced(ALONE, config, tmp_path, 1)
    one, two = ranks_of.run(2, traced, config, tmp_path, 1)
    assert_equal(one.weights, two.weights)
    assert_alike(alone, dataclasses.replace(one, metrics=alone.metrics))


# Three ranks do not share the four blocks of an evaluation evenly.
SHORT = {"min_length": 3, "max_length": 30, "num_train": 50, "num_validation": 200, "num_test": 1}
LABELED: dict[str, TaskConfig] = {
    "listops": ListOpsConfig(**SHORT),
    "formal-languages": FormalLanguageConfig(language="bucket-sort"),
    "selective-copying": SelectiveCopyingConfig(length=20),
    "windows": DecisionsConfig(data="made", window=5, carry=False),
    "streams": DecisionsConfig(data="made", window=5),
}
"""Tasks with ignored targets, as many in each sequence or not, and policies."""


@pytest.mark.parametrize("name", LABELED)
def test_every_task_trains_alike(tmp_path: Path, ranks_of: Pool, name: str) -> None:
    compare(ranks_of, labeled_config(name), tmp_path, (3,), STEPS)


def labeled_config(name: str) -> RunConfig:
    """A run of a task of LABELED."""
    settings = TrainConfig(
        steps=40, batch_size=7, learning_rate=3e-3, warmup_steps=3, device="cpu", final_eval_tokens=200
    )
    model = ModelConfig(d_model=16, num_layers=1, conv_width=4 if "-" in name or name == "listops" else 0)
    return RunConfig("test", model, LABELED[name], settings)


@pytest.mark.parametrize("fresh", [0.0, 0.5])
def test_every_rank_must_have_a_row(corpus: Path, ranks_of: Pool, tmp_path: Path, fresh: float) -> None:
    config = text_config(corpus, batch_size=4 if fresh else 2, carry_state=True, fresh_share=fresh)
    found = ranks_of.failures(3, traced, config, tmp_path, 1)
    windows = " without the windows of train.fresh_share" if fresh else ""
    told = f"ValueError: train.batch_size{windows} must be at least 3, the number of ranks, got 2"
    assert sorted(found) == ["Reported: 1", "Reported: 1", told]


# --- sequences that are divided --------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "aaren", "s4d", "mamba"])
def test_divided_sequences_train_alike(corpus: Path, tmp_path: Path, ranks_of: Pool, mixer: str) -> None:
    """Over two ranks, and over two groups of two."""
    compare(ranks_of, text_config(corpus, mixer, carry_state=True), tmp_path, (2, 4), STEPS, divided=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 7},
        {"batch_size": 7, "carry_state": True, "fresh_share": 0.3},
        {"batch_size": 7, "accumulate": 3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_every_way_of_reading_divided_sequences_is_alike(
    corpus: Path, tmp_path: Path, ranks_of: Pool, settings: dict[str, Any]
) -> None:
    compare(ranks_of, text_config(corpus, **settings), tmp_path, (4,), STEPS, divided=2)
    if len(settings) == 1:
        compare(ranks_of, text_config(corpus, **settings), tmp_path, (3,), STEPS, divided=3)


def test_documents_in_divided_sequences_start_from_an_empty_state(tmp_path: Path, ranks_of: Pool) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        text = f"document {number} has few words, or {'many ' * (number % 9)}\n"
        (folder / f"{number}.txt").write_text(text)
    config = text_config(folder, carry_state=True)
    assert Run(config, tmp_path, RunLog())._batches(0)[0].reset is not None
    compare(ranks_of, config, tmp_path, (4,), STEPS, divided=2)


def test_a_run_goes_on_with_sequences_divided_otherwise(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = text_config(corpus, steps=12, log_every=1, warmup_steps=12, **STREAMS)
    run_on(ranks_of, 1, config, tmp_path / "whole")
    for size, divided, steps in ((4, 2, 5), (1, 1, 9), (3, 3, 12)):
        part = config.override(train={"steps": steps, "sequence_ranks": divided})
        run_on(ranks_of, size, part, tmp_path / "parts", resume=size != 4)
    expected, found = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert expected == pytest.approx({key: found[key] for key in expected}, rel=0, abs=LOSSES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_ranks": 3}, "train.sequence_ranks must divide the number of ranks, 2 (torchrun starts"),
        ({"batch_size": 1}, "train.batch_size must be at least 2, the number of ranks, got 1"),
        ({"mixer": "gru", "sequence_ranks": 2}, "sequence_parallel: blocks.0.mixer (GRUMixer) cannot be"),
        ({"window": 5, "sequence_ranks": 2}, "train.sequence_ranks must leave each rank at least 3 of the 5"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    corpus: Path, tmp_path: Path, ranks_of: Pool, changes: dict[str, Any], message: str
) -> None:
    window = changes.get("window", 16)
    settings = {name: value for name, value in changes.items() if name != "window"}
    config = text_config(corpus, **settings).override(task={"window": window})
    found = sorted(ranks_of.failures(2, traced, config, tmp_path, 1))
    assert found[0] == "Reported: 1"
    assert found[1].startswith(f"ValueError: {message}")


def test_tasks_of_few_targets_are_not_divided(tmp_path: Path, ranks_of: Pool) -> None:
    settings = TrainConfig(steps=40, batch_size=8, device="cpu", sequence_ranks=2)
    config = RunConfig("test", ModelConfig(d_model=16, num_layers=1), LABELED["listops"], settings)
    _, told = sorted(ranks_of.failures(2, traced, config, tmp_path, 1))
    assert told.startswith("ValueError: train.sequence_ranks must be 1 for a task in which only some steps")


# --- to the last bit -------------------------------------------------------------------------------------


def in_micro_batches(config: RunConfig, folder: Path, steps: int) -> dict[str, torch.Tensor]:
    """Return the weights of one process that computes the rows of two ranks one after the other."""
    run = Run(config, folder, RunLog())
    for step in range(steps):
        for group in run.optimizers[0].param_groups:
            group["lr"] = config.train.learning_rate
        (batch,) = run._batches(step)
        for rank in range(2):
            part = batch.rows(Ranks(rank, 2).rows(config.train.batch_size))
            (run.task.loss(run.model, part)[0] * (part.num_targets / batch.num_targets)).backward()
        clip_gradients(run.model, config.train.grad_clip)
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.mark.parametrize("mixer", MIXERS)
def test_two_ranks_are_one_process_with_their_rows_as_micro_batches(
    corpus: Path, tmp_path: Path, ranks_of: Pool, mixer: str
) -> None:
    config = text_config(corpus, mixer, warmup_steps=0, min_learning_rate_ratio=1.0)
    expected = in_micro_batches(config, tmp_path, 3)
    assert_equal(expected, ranks_of.run(2, traced, config, tmp_path, 3)[1].weights)


def masks(ranks: Ranks, config: RunConfig, folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a dropout mask of the first step, of the first step again, and of the second."""
    run = Run(config, folder, RunLog(), ranks)
    found = []
    for step in (0, 0, 1):
        ranks.reseed(config.train.seed, step)
        found.append(run.model.dropout(torch.ones(5, 16)))
    return found[0], found[1], found[2]


def test_dropout_differs_from_rank_to_rank_and_from_step_to_step(
    corpus: Path, tmp_path: Path, ranks_of: Pool
) -> None:
    found = ranks_of.run(2, masks, run_config(corpus), tmp_path)
    for first, again, second in found:
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
    assert not torch.equal(found[0][0], found[1][0])
    (other, *_), _ = ranks_of.run(2, masks, run_config(corpus, seed=1), tmp_path)
    assert not torch.equal(found[0][0], other)


# --- runs ------------------------------------------------------------------------------------------------


def trained(ranks: Ranks, config: RunConfig, run_dir: Path, resume: bool) -> dict[str, Any]:
    return train(config, run_dir, resume=resume, log=RunLog(), ranks=ranks)


def run_on(ranks_of: Pool, size: int, config: RunConfig, run_dir: Path, *, resume: bool = False) -> Any:
    """Train on some ranks; return what the first returns."""
    if size == 1:
        return trained(ALONE, config, run_dir, resume)
    return ranks_of.run(size, trained, config, run_dir, resume)[0]


def losses_of(run_dir: Path) -> dict[tuple[int, str], float]:
    return {
        (line["step"], name): line[name]
        for line in read_metrics(run_dir / "metrics.jsonl")
        for name in ("loss", "val_loss")
        if name in line
    }


STREAMS = {"carry_state": True, "fresh_share": 0.25, "checkpoint_every": 5}


def test_a_run_goes_on_with_any_number_of_ranks(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    """As a run of one process does: on 2, then 4, then 1, with the state carried from each to the next."""
    config = text_config(corpus, steps=12, log_every=1, warmup_steps=12, **STREAMS)
    run_on(ranks_of, 1, config, tmp_path / "whole")
    for size, steps in ((2, 5), (4, 9), (1, 12)):
        part = config.override(train={"steps": steps})
        run_on(ranks_of, size, part, tmp_path / "parts", resume=size != 2)
    expected, found = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert {key for key in found if key[1] == "loss"} == {(step, "loss") for step in range(1, 13)}
    assert expected == pytest.approx({key: found[key] for key in expected}, rel=0, abs=LOSSES)


def test_two_ranks_go_on_to_the_last_bit(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    """With dropout, and with a carried state that is cut into the rows of the ranks."""
    from test_training import assert_same_run

    config = run_config(corpus, steps=9, **STREAMS | {"batch_size": 7})
    run_on(ranks_of, 2, config, tmp_path / "whole")
    ranks_of.run(2, stopped, config, tmp_path / "parts", 1)
    run_on(ranks_of, 2, config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def stopped(ranks: Ranks, config: RunConfig, run_dir: Path, by: int) -> str:
    """Train until one rank is asked to stop in its fifth step; return what the exception says."""
    from minrnn.training import Interrupted

    step = Run.step

    def ask(self: Run) -> None:
        if ranks.rank == by and self.state.step == 4:
            self.interruption.signum = 15
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", ask)
        try:
            train(config, run_dir, log=RunLog(), ranks=ranks)
        except Interrupted as stop:
            return f"{stop.signum} {stop}"
    return "not stopped"


def test_all_ranks_stop_after_the_same_step(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    for by in range(3):
        run_dir = tmp_path / f"run{by}"
        found = ranks_of.run(3, stopped, run_config(corpus), run_dir, by)
        assert found == ["15 SIGTERM: stopped and saved after step 5"] * 3
        state = json.loads((run_dir / "checkpoints" / "last" / "trainer.json").read_text())
        assert state["step"] == 5


def test_one_directory_is_written_by_one_rank(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = text_config(corpus, steps=6)
    results = ranks_of.run(2, trained, config, tmp_path / "two", False)
    alone = run_on(ranks_of, 1, config, tmp_path / "one")
    files = [
        {path.relative_to(folder) for path in folder.rglob("*") if "tensorboard" not in path.parts}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    assert results[0]["tokens"] == results[1]["tokens"] == alone["tokens"]
    assert results[0]["val_loss"] == pytest.approx(alone["val_loss"], rel=0, abs=VALIDATION)
    assert read_config(tmp_path / "two") == read_config(tmp_path / "one")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=0, abs=LOSSES)
