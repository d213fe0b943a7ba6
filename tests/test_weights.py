"""Sharded weights: the run is the one with replicated weights, and its files are the same."""

from __future__ import annotations

import dataclasses
import errno
import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import MISSING, Pool, training_pool
from test_distributed import (
    LABELED,
    LOSSES,
    Trace,
    assert_alike,
    assert_equal,
    compare,
    losses_of,
    run_on,
    stopped,
    text_config,
    traced,
)
from test_training import assert_same_run, run_config, weights

from minrnn.distributed import ALONE, Ranks
from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig, SequenceModel
from minrnn.models.checkpoint import load_tensors
from minrnn.models.shards import own_part
from minrnn.tasks import task
from minrnn.training import RunConfig, RunLog, TrainConfig, load_trained, resume, train
from minrnn.training.loop import Run

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with training_pool(tmp_path_factory) as made:
        yield made


def sharded(config: RunConfig, **settings: Any) -> RunConfig:
    return config.override(train={"weights": "sharded", **settings})


def config_of(corpus: Path, mixer: str = "mingru", **settings: Any) -> RunConfig:
    """A run of a model of one block: torch needs a third of a second for what is new in each."""
    return sharded(text_config(corpus, mixer, **settings)).override(model={"num_layers": 1})


# --- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_alike(corpus: Path, tmp_path: Path, ranks_of: Pool, mixer: str) -> None:
    compare(ranks_of, config_of(corpus, mixer), tmp_path, (2,), 3)


def test_four_ranks_train_alike(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = config_of(corpus).override(model={"tie_embeddings": True, "num_layers": 2})
    compare(ranks_of, config, tmp_path, (4,), 10)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 7, "grad_clip": 0.05},
        {"batch_size": 7, "carry_state": True, "fresh_share": 0.3, "accumulate": 2},
    ],
    ids=["clipped", "streams, accumulated"],
)
def test_every_way_of_reading_is_alike(
    corpus: Path, tmp_path: Path, ranks_of: Pool, settings: dict[str, Any]
) -> None:
    """Uneven rows among them; of some batches a rank of three has no window."""
    config = config_of(corpus, **settings)
    compare(ranks_of, config, tmp_path, (3,), 6)


@pytest.mark.parametrize("name", ["listops", "windows"])
def test_every_task_trains_alike(tmp_path: Path, ranks_of: Pool, name: str) -> None:
    """Evaluations whose batches three ranks do not share evenly among them."""
    settings = TrainConfig(
        steps=40, batch_size=7, learning_rate=3e-3, warmup_steps=3, device="cpu", final_eval_tokens=200
    )
    model = ModelConfig(d_model=16, num_layers=1, conv_width=4 if name == "listops" else 0)
    compare(ranks_of, sharded(RunConfig("test", model, LABELED[name], settings)), tmp_path, (3,), 4)


def test_divided_sequences_train_alike(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = config_of(corpus, carry_state=True, accumulate=2)
    compare(ranks_of, config, tmp_path, (4,), 6, divided=2)


def test_half_precision_is_that_of_replicated_weights(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = config_of(corpus, precision="bfloat16")
    replicated = config.override(train={"weights": "replicated"})
    expected, found = (ranks_of.run(2, traced, one, tmp_path, 3)[0] for one in (replicated, config))
    assert_alike(expected, found)


def without_logits(ranks: Ranks, config: RunConfig, folder: Path, steps: int) -> Trace:
    """Train a model that cannot return logits, as if its vocabulary were large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "LARGE_VOCABULARY", 1)
        patch.setattr(SequenceModel, "forward", lambda *_: None)
        return traced(ranks, config, folder, steps)


def test_logits_of_a_large_vocabulary_are_not_held(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    config = config_of(corpus, batch_size=7)
    alone = traced(ALONE, config, tmp_path, 3)
    found = ranks_of.run(2, without_logits, config, tmp_path, 3)[0]
    assert found.metrics["val_loss"] == pytest.approx(alone.metrics["val_loss"], rel=1e-6)
    assert_alike(alone, dataclasses.replace(found, metrics=alone.metrics))


def test_muon_turns_whole_matrices(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    """Its weights are those of one process but for bfloat16 in its Newton-Schulz steps."""
    config = config_of(corpus, optimizer="muon", batch_size=7, warmup_steps=0)
    before = traced(ALONE, config, tmp_path, 0).weights
    whole = traced(ALONE, config, tmp_path, 2)
    one, two = ranks_of.run(2, traced, config, tmp_path, 2)
    assert_equal(one.weights, two.weights)
    assert one.losses == pytest.approx(whole.losses, rel=0, abs=LOSSES)
    for name, value in whole.weights.items():
        turn = (value - before[name]).norm()
        assert (one.weights[name] - value).norm() <= 0.02 * turn, name


# --- memory ----------------------------------------------------------------------------------------------


def held(ranks: Ranks, config: RunConfig, folder: Path) -> dict[str, int]:
    """Return the bytes of this rank's weights, and of its optimizers' states, after a step."""
    run = Run(config, folder, RunLog(), ranks)
    run.step()
    run._measure("evaluating", 50)
    of_weights = [own_part(parameter) for parameter in run.model.parameters()]
    states = itertools.chain.from_iterable(each.state.values() for each in run.optimizers)
    of_states = [own_part(value) for state in states for name, value in state.items() if name != "step"]
    return {
        what: sum(part.untyped_storage().nbytes() for part in parts)
        for what, parts in (("weights", of_weights), ("moments", of_states))
    }


@pytest.mark.parametrize(("optimizer", "sizes"), [("adamw", (2, 4)), ("muon", (2,))])
def test_each_rank_holds_its_share(
    corpus: Path, tmp_path: Path, ranks_of: Pool, optimizer: str, sizes: tuple[int, ...]
) -> None:
    config = config_of(corpus, optimizer=optimizer)
    config = config.override(task={"documents": "joined"})  # 256 symbols: every size is a multiple of 4
    whole = held(ALONE, config, tmp_path)
    assert whole["weights"] <= whole["moments"] <= 2 * whole["weights"]
    for size in sizes:
        for found in ranks_of.run(size, held, config, tmp_path):
            assert found == {what: count // size for what, count in whole.items()}


# --- checkpoints -----------------------------------------------------------------------------------------


def test_a_run_goes_on_with_any_number_of_ranks_and_either_kind_of_weights(
    corpus: Path, tmp_path: Path, ranks_of: Pool
) -> None:
    settings = {"steps": 12, "log_every": 1, "warmup_steps": 12, "carry_state": True, "eval_every": 6}
    config = text_config(corpus, **settings).override(model={"num_layers": 1})
    run_on(ranks_of, 1, config, tmp_path / "whole")
    plan = [(2, "sharded", 3), (4, "sharded", 5), (1, "sharded", 7), (2, "replicated", 9), (2, "sharded", 12)]
    for size, kind, steps in plan:
        part = config.override(train={"steps": steps, "weights": kind})
        run_on(ranks_of, size, part, tmp_path / "parts", resume=steps != 3)
    expected, found = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert expected == pytest.approx({key: found[key] for key in expected}, rel=0, abs=LOSSES)
    for which in ("last", "best"):
        assert_same_form(*(tmp_path / name / "checkpoints" / which for name in ("whole", "parts")))
        trained = load_trained(tmp_path / "parts", which, torch.device("cpu"))
        assert_equal(dict(trained.model.state_dict()), weights(tmp_path / "parts", which))


def assert_same_form(one: Path, other: Path) -> None:
    """The same files, with tensors of the same names, shapes and dtypes."""
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.glob("*.safetensors"):
        forms = [
            {name: (x.shape, x.dtype) for name, x in load_tensors(folder / path.name).items()}
            for folder in (one, other)
        ]
        assert forms[0] == forms[1]


def test_two_ranks_go_on_to_the_last_bit(corpus: Path, tmp_path: Path, ranks_of: Pool) -> None:
    """With dropout, Muon and a carried state, after a signal and a checkpoint that did not fit."""
    settings = {"carry_state": True, "fresh_share": 0.25, "checkpoint_every": 7, "batch_size": 7}
    config, parts = sharded(run_config(corpus, steps=9, optimizer="muon", **settings)), tmp_path / "parts"
    config = config.override(model={"num_layers": 1})
    run_on(ranks_of, 2, config, tmp_path / "whole")
    found = ranks_of.run(2, stopped, config, parts, 1)
    assert found == ["15 SIGTERM: stopped and saved after step 5"] * 2
    last = parts / "checkpoints" / "last"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    found = ranks_of.failures(2, disk_full, config, parts)
    assert found[0].startswith(f"OSError: [Errno 28] could not write the checkpoint {last} (No space left")
    assert found[1] == "Reported: 1"
    assert before == {path.name: path.read_bytes() for path in last.iterdir()}
    assert not list(last.parent.glob("*.partial"))
    run_on(ranks_of, 2, config, parts, resume=True)
    assert_same_run(tmp_path / "whole", parts)


def disk_full(ranks: Ranks, config: RunConfig, run_dir: Path) -> None:
    """Go on with a run on a disk that is full when its model is to be written."""

    def fill(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if ranks.is_first:
            patch.setattr(resume, "write_model", fill)
        try:
            train(config, run_dir, resume=True, log=RunLog(), ranks=ranks)
        except OSError as error:
            told = str(error)
    gc.collect()  # as if the process ended: what is left of the run holds the connection to the other rank
    raise OSError(told)
