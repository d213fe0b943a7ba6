"""Parts never mix: what a task trains on, chooses weights by and reports are different data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minrnn.models import ModelConfig, Steps
from minrnn.tasks import (
    TASKS,
    Batch,
    DecisionsConfig,
    DecisionsTask,
    FormalLanguageConfig,
    ListOpsConfig,
    SelectiveCopyingConfig,
    Task,
    TaskConfig,
    TextConfig,
    make_task,
)
from minrnn.tasks.draws import PARTS, Draws
from minrnn.tasks.episodes import Episodes

pytestmark = pytest.mark.usefixtures("cache")

Parts = dict[str, set[Any]]
SEEDS = (0, 1, 2**64 - 1)


class Spy(nn.Module):
    """Notes the rows that it is asked about, and answers zeros."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.rows: list[list[Any]] = []

    def forward(self, inputs: Any, state: Any = None, *, reset: Tensor | None = None) -> tuple[Tensor, None]:
        self.rows += rows_of(inputs)
        seen = inputs.times if isinstance(inputs, Steps) else inputs
        return torch.zeros(*seen.shape, self.outputs), None


def rows_of(inputs: Tensor | Steps) -> list[list[Any]]:
    """The sequences of a batch; of a policy's the observations, each of which is a step's number."""
    return (inputs.observations[..., 0] if isinstance(inputs, Steps) else inputs).tolist()


def evaluated(task: Task, outputs: int) -> list[list[Any]]:
    """What an evaluation reads."""
    spy = Spy(outputs)
    task.evaluate(spy)
    return spy.rows


def trained(task: Task, batch_size: int = 4, streams: bool = False) -> list[list[Any]]:
    """What training reads in its first steps, with several seeds."""
    batches: list[Batch] = [task.batch(step, batch_size, seed) for seed in SEEDS for step in range(40)]
    if streams:
        batches += [task.stream_batch(step, batch_size) for step in range(40)]
    return [row for batch in batches for row in rows_of(batch.inputs)]


def of_sequences(config: Any, outputs: int) -> Parts:
    """Parts of sequences so long that no two are the same by chance."""
    parts = {
        part: evaluated(make_task(replace(config, part=part)), outputs) for part in ("validation", "test")
    }
    rows = {**parts, "train": trained(make_task(config), batch_size=64)}
    shortest = min(len(row) for part in rows.values() for row in part)
    assert shortest > 20
    return {name: {tuple(row[:shortest]) for row in part} for name, part in rows.items()}


def of_text(source: Path) -> Parts:
    """Parts of a text in which each character occurs once, so that a token tells where it stands."""
    parts: Parts = {}
    for held_out, name in ((0.0, "validation"), (0.25, "held out")):
        config = TextConfig(str(source), vocabulary="characters", window=5, held_out=held_out)
        task = make_task(config)
        mark = {task.vocabulary.end_of_text}  # type: ignore[attr-defined]
        read = evaluated(task, task.vocab_size)  # type: ignore[attr-defined]
        parts[name] = {token for row in read for token in row} - mark
        parts["train"] = {token for row in trained(task, streams=True) for token in row} - mark
        assert not parts["train"] & parts[name]
    return parts  # those of training without what is held out


def characters(count: int, first: int) -> str:
    return "".join(map(chr, range(first, first + count)))


def of_a_file(folder: Path) -> Parts:
    (folder / "text.txt").write_text(characters(500, 0x4E00), encoding="utf-8")
    return of_text(folder / "text.txt")


def of_a_folder(folder: Path) -> Parts:
    for number in range(12):
        text = characters(50, 0x4E00 + 50 * number)
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return of_text(folder)


def episodes(salt: int = 0, spared: Any = ()) -> Episodes:
    """Twenty episodes, whose numbers depend on the salt, except those of the episodes that are spared."""
    lengths = np.arange(3, 23)
    ends = np.cumsum(lengths)
    number = np.repeat(np.arange(20), lengths)
    shift = np.where(np.isin(number, spared), 0, salt).astype(np.float32)
    steps = np.arange(ends[-1], dtype=np.float32)
    return Episodes(
        np.stack([steps + 1000 * shift, np.sin(steps) + shift], axis=1),
        (np.cos(steps) + 3 * shift)[:, None],
        1 + number.astype(np.float32) + 50 * shift,
        ends,
        np.zeros(20, bool),
    )


def decisions(carry: bool, data: Episodes) -> DecisionsTask:
    config = DecisionsConfig(window=5, carry=carry).resolved(ModelConfig())
    return DecisionsTask(config, data)


def of_episodes(carry: bool) -> Parts:
    task = decisions(carry, episodes())
    rows = {"validation": evaluated(task, 1), "train": trained(task)}
    return {name: {step for row in part for step in row} for name, part in rows.items()}


MAKE: dict[str, list[Callable[[Path], Parts]]] = {
    "text": [of_a_file, of_a_folder],
    "selective-copying": [lambda _: of_sequences(SelectiveCopyingConfig(40, 16, eval_sequences=200), 16)],
    "formal-languages": [
        lambda _: of_sequences(FormalLanguageConfig("bucket-sort", 30, 40, 30, 60, eval_sequences=200), 11),
        lambda _: of_sequences(
            FormalLanguageConfig("missing-duplicate", 30, 40, 30, 60, eval_sequences=200), 10
        ),
        lambda _: of_sequences(FormalLanguageConfig("parity", 60, 70, 60, 80, eval_sequences=200), 3),
    ],
    "listops": [lambda _: of_sequences(ListOpsConfig(120, 60, 6, 5, 100, 80, 70), 16)],
    "decisions": [lambda _: of_episodes(carry=False), lambda _: of_episodes(carry=True)],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, made in MAKE.items() for i in range(len(made))]
)
def test_parts_never_mix(name: str, index: int, tmp_path: Path) -> None:
    parts = MAKE[name][index](tmp_path)
    assert all(len(part) > 20 for part in parts.values())
    for one, other in combinations(parts, 2):
        assert not parts[one] & parts[other], f"{one} and {other} share data"


def test_every_task_is_swept() -> None:
    assert MAKE.keys() == TASKS.keys()


def test_every_task_that_draws_has_a_part_to_choose_by_and_one_to_report() -> None:
    for name in TASKS.keys() - {"text", "decisions"}:
        config: type[TaskConfig] = TASKS[name].config_type
        assert config().part == "validation"  # type: ignore[attr-defined]


def test_no_seed_part_or_step_shares_a_number_with_another() -> None:
    drawn = [
        Draws(seed, part, step).integers(1 << 62, 50).tolist()
        for seed, part, step in product(SEEDS, PARTS, (0, 1, 2, 3, 1000))
    ]
    assert len(PARTS) == 3
    assert len({number for numbers in drawn for number in numbers}) == 50 * len(drawn)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("tokens", ["joined", "observation"])
def test_nothing_that_a_policy_learns_from_depends_on_held_out_episodes(carry: bool, tokens: Any) -> None:
    """Neither its batches nor its statistics, its scale and the return that it is asked for."""
    plain = decisions(carry, episodes())
    changed = decisions(carry, episodes(salt=7, spared=plain.train_episodes))
    assert not np.array_equal(plain.episodes.observations, changed.episodes.observations)
    config = ModelConfig(d_model=8, num_layers=1)
    for task in (plain, changed):
        task.config = replace(task.config, tokens=tokens)
    assert plain.decision_config(config) == changed.decision_config(config)
    assert plain.target_return == changed.target_return
    for (name, one), other in zip(
        plain.make_model(config).named_buffers(), changed.make_model(config).buffers(), strict=True
    ):
        assert torch.equal(one, other), name
    for step in range(20):
        one, other = plain.batch(step, 4, 0), changed.batch(step, 4, 0)
        assert torch.equal(one.targets, other.targets)
        assert all(map(torch.equal, one.inputs, other.inputs))
