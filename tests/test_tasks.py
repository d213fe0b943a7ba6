"""The synthetic tasks: answers against independent oracles, pure batches, evaluation without traces."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minrnn.cli.main import COMMANDS
from minrnn.models import ModelConfig, SequenceModel
from minrnn.tasks import (
    IGNORED,
    LANGUAGES,
    TASKS,
    Batch,
    FormalLanguageConfig,
    FormalLanguageTask,
    LabeledTask,
    ListOpsConfig,
    ListOpsTask,
    SelectiveCopyingConfig,
    SelectiveCopyingTask,
    make_task,
)
from minrnn.tasks.arrays import write_arrays
from minrnn.tasks.draws import Draws
from minrnn.tasks.labeled import BLOCK, pack
from minrnn.tasks.listops import SYMBOLS, generate_expressions
from minrnn.training import RunConfig, RunLog, TrainConfig, read_metrics, train

pytestmark = pytest.mark.usefixtures("cache")

SMALL: dict[str, Any] = {
    "selective-copying": SelectiveCopyingConfig(length=12, num_tokens=3, kinds=5, eval_sequences=100),
    "formal-languages": FormalLanguageConfig("bucket-sort", 1, 6, 6, 12, eval_sequences=100),
    "listops": ListOpsConfig(40, 4, 4, 4, num_train=200, num_validation=100, num_test=70),
}


@pytest.fixture(params=SMALL)
def task(request: pytest.FixtureRequest) -> LabeledTask:
    config = SMALL[request.param]
    made = make_task(config)
    assert isinstance(made, LabeledTask)
    return made


def model_of(task: LabeledTask) -> SequenceModel:
    return SequenceModel(task.model_config(ModelConfig(d_model=8, num_layers=1)))


def questions(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """What each row says before its answers, at its answers, and the answers."""
    rows = []
    for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
        asked = (targets != IGNORED).nonzero().flatten().tolist()
        assert asked == list(range(asked[0], asked[-1] + 1))  # answers follow one another
        rows.append((inputs[: asked[0]].tolist(), inputs[asked].tolist(), targets[asked].tolist()))
    return rows


def test_every_task_but_text_and_decisions_is_swept() -> None:
    """Which have files of their own."""
    assert SMALL.keys() == TASKS.keys() - {"text", "decisions"}


@pytest.mark.parametrize("name", TASKS)
def test_a_configuration_names_its_task_and_the_command_that_follows(name: str) -> None:
    config = TASKS[name].config_type()
    assert config.task == name
    assert config.verb in COMMANDS
    resolved = config.resolved(ModelConfig())
    assert type(resolved) is type(config)
    assert resolved.resolved(ModelConfig()) == resolved
    assert RunConfig(task=config).resolved().task == resolved


# --- batches ---------------------------------------------------------------------------------------------


def test_a_batch_is_a_pure_function_of_step_and_seed(task: LabeledTask) -> None:
    seen = []
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for step, seed in ((0, 0), (1, 0), (10**12, 0), (0, 1), (0, 2**64 - 1)):
        batch, again = task.batch(step, 5, seed), task.batch(step, 5, seed)
        assert torch.equal(batch.inputs, again.inputs)
        assert torch.equal(batch.targets, again.targets)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape
        assert batch.fresh
        assert 0 <= int(batch.inputs.min()) <= int(batch.inputs.max()) < task.vocab_size
        assert (batch.targets != IGNORED).any(dim=1).all()
        assert int(batch.targets.max()) < task.vocab_size
        seen.append(batch.inputs.tolist())
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, 0), "step must be at least 0, got -1"),
        ((0, 0, 0), "batch_size must be at least 1, got 0"),
        ((0, 4, -1), "seed must lie in 0 .. 2\\^64 - 1, got -1"),
        ((0, 4, 2**64), "seed must lie in"),
    ],
)
def test_arguments_out_of_range_are_refused(
    task: LabeledTask, arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"batch: {message}"):
        task.batch(*arguments)


def test_sequences_continue_nothing(task: LabeledTask) -> None:
    with pytest.raises(ValueError, match="carry_state must be off"):
        task.stream_batch(0, 2)


def test_draws_are_the_same_on_every_machine() -> None:
    assert Draws(7, "train", 3).integers(1000, 2, 3).tolist() == [[601, 499, 807], [587, 637, 854]]
    assert Draws(0, "test", 0).subsets(10, 3, 2).tolist() == [[2, 6, 7], [0, 3, 8]]
    assert Draws(0, "test", 0).integers(99).tolist() != Draws(0, "validation", 0).integers(99).tolist()


@given(size=st.integers(1, 40), count=st.integers(1, 40), seed=st.integers(0, 2**64 - 1))
def test_subsets_are_sorted_and_hold_each_number_once(size: int, count: int, seed: int) -> None:
    count = min(size, count)
    sets = Draws(seed, "train", 0).subsets(size, count, 3)
    assert sets.shape == (3, count)
    assert (np.diff(sets, axis=1) > 0).all()
    assert 0 <= sets.min() <= sets.max() < size


def test_packed_rows_ask_at_their_markers() -> None:
    batch = pack([np.array([1, 2, 3]), np.array([4])], [np.array([5]), np.array([6, 7])], marker=9)
    assert batch.inputs.tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, IGNORED, 5], [IGNORED, 6, 7, IGNORED]]


# --- evaluation ------------------------------------------------------------------------------------------


def test_evaluation_is_counted_answer_by_answer(task: LabeledTask) -> None:
    torch.manual_seed(0)
    model = model_of(task).train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = task.evaluate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    losses, hits, whole = [], [], []
    for batch in task.evaluation_batches():
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True):
            log_p = model.eval()(inputs[None])[0][0].log_softmax(dim=-1)
            asked = [int(t) for t in (targets != IGNORED).nonzero()]
            losses += [-log_p[t, targets[t]].item() for t in asked]
            row = [int(log_p[t].argmax()) == int(targets[t]) for t in asked]
            hits += row
            whole.append(all(row))
    assert found["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    assert found["exact_match"] == pytest.approx(np.mean(whole))
    assert (found["val_tokens"], found["val_sequences"]) == (len(hits), len(whole))
    assert task.evaluate(model) == found


def test_a_part_of_the_evaluation_is_its_first_blocks(task: LabeledTask) -> None:
    model = model_of(task)
    part = task.evaluate(model, max_tokens=1)
    assert part["val_sequences"] == BLOCK
    assert task.evaluate(model, max_tokens=10**6) == task.evaluate(model)
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        task.evaluate(model, max_tokens=-1)


def test_parts_are_different_sequences(task: LabeledTask) -> None:
    config = task.config  # type: ignore[attr-defined]
    other = type(task)(dataclasses.replace(config, part="test"))  # type: ignore[call-arg]
    rows = [
        {tuple(question) for batch in one.evaluation_batches() for question, *_ in questions(batch)}
        for one in (task, other)
    ]
    trained = {tuple(question) for question, *_ in questions(task.batch(0, 100, 0))}
    if isinstance(task, ListOpsTask):
        assert not rows[0] & rows[1]
        assert not trained & (rows[0] | rows[1])
    else:
        assert rows[0] != rows[1]


class Oracle(nn.Module):
    """Knows the answers of a task's validation part, and says something else where it is told to."""

    def __init__(self, task: LabeledTask, wrong: int) -> None:
        super().__init__()
        self.vocab_size, self.wrong = task.vocab_size, wrong
        self.batches = task.evaluation_batches()

    def forward(self, inputs: Tensor, state: None) -> tuple[Tensor, None]:
        targets = next(self.batches).targets.clamp(min=0)
        if self.wrong:
            targets[0] = (targets[0] + 1) % self.vocab_size  # the first sequence of each block
        return nn.functional.one_hot(targets, self.vocab_size).double(), None


def test_all_right_is_one_and_a_wrong_sequence_is_counted(task: LabeledTask) -> None:
    right = task.evaluate(Oracle(task, wrong=0))
    assert right["accuracy"] == right["exact_match"] == 1.0
    wrong = task.evaluate(Oracle(task, wrong=1))
    assert wrong["exact_match"] == pytest.approx(1 - 2 / wrong["val_sequences"])  # of two blocks


def test_the_commonest_answer_is_counted(task: LabeledTask) -> None:
    answers = [a for batch in task.evaluation_batches() for *_, row in questions(batch) for a in row]
    assert task.commonest_answer() == Counter(answers).most_common(1)[0][1] / len(answers)


def test_unanswered_positions_move_nothing(task: LabeledTask) -> None:
    """The gradient at an input after a row's last answer is zero: what fills a row up is not learnt from."""
    model = model_of(task).double()
    batch = task.batch(0, 4, 0)
    caught: list[Tensor] = []
    model.embedding.register_forward_hook(lambda *a: caught.append(a[2].requires_grad_()))  # type: ignore[func-returns-value]
    loss, _ = task.loss(model, batch)
    (gradient,) = torch.autograd.grad(loss, caught)
    for row, targets in enumerate(batch.targets):
        last = int((targets != IGNORED).nonzero().max())
        assert (gradient[row, last + 1 :] == 0).all()
        assert (gradient[row, : last + 1] != 0).any()


# --- answers ---------------------------------------------------------------------------------------------


@given(
    length=st.integers(1, 60),
    num_tokens=st.integers(1, 60),
    kinds=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_selective_copying_asks_for_what_is_no_blank(
    length: int, num_tokens: int, kinds: int, seed: int
) -> None:
    num_tokens = min(num_tokens, length)
    task = SelectiveCopyingTask(SelectiveCopyingConfig(length, num_tokens, kinds))
    for question, markers, answers in questions(task.batch(3, 4, seed)):
        assert len(question) == length
        assert markers == [0] * num_tokens
        assert [token for token in question if token != kinds + 1] == answers
        assert set(answers) <= set(range(1, kinds + 1))


def test_data_tokens_stand_everywhere() -> None:
    task = SelectiveCopyingTask(SelectiveCopyingConfig(10, 2, 3))
    inputs = task.batch(0, 1000, 0).inputs[:, :10]
    assert ((inputs != 4).double().mean(dim=0) - 0.2).abs().max() < 0.05


def count_ones(string: list[int]) -> int:
    odd = 0
    for symbol in string:
        odd = (1 - odd) if symbol else odd
    return odd


def walk(string: list[int]) -> int:
    place = 0
    for symbol in string:
        place += {0: 4, 1: 0, 2: 1}[symbol]
        place = place - 5 if place >= 5 else place
    return place


ORACLES = {
    "parity": lambda s: [count_ones(s)],
    "even-pairs": lambda s: [int(s[0] == s[-1])],  # changes pair up unless the ends differ
    "cycle-navigation": lambda s: [walk(s)],
    "majority": lambda s: [min(k for k in s if s.count(k) == max(map(s.count, s)))],
    "majority-count": lambda s: [max(map(s.count, s))],
    "bucket-sort": sorted,
}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("longest", [1, 7, 40])
def test_languages_against_their_oracles(language: str, longest: int) -> None:
    task = FormalLanguageTask(FormalLanguageConfig(language, 1, longest, 1, longest))  # type: ignore[arg-type]
    lengths = Counter[int]()
    for question, markers, answers in questions(task.batch(0, 400, seed=5)):
        assert markers == [task.vocab_size - 1] * len(answers)
        assert max(question) < LANGUAGES[language].symbols
        assert max(answers) < LANGUAGES[language].answers
        if language == "missing-duplicate":
            sizes = [
                size
                for size in range(1, longest + 1)
                if size <= len(question) < 2 * size and question[size:] == question[: len(question) - size]
            ]
            # The gap's symbol, wherever the string may have ended.
            assert answers[0] in [question[len(question) - size] for size in sizes]
        else:
            assert ORACLES[language](question) == answers
            lengths[len(question)] += 1
    if language != "missing-duplicate":
        assert set(lengths) == set(range(1, longest + 1))


@pytest.mark.parametrize("gap", [0, 2])
def test_a_missing_duplicate_is_said_after_the_string_and_its_beginning(gap: int) -> None:
    task = FormalLanguageTask(FormalLanguageConfig("missing-duplicate", 3, 3, 3, 3))
    rows = questions(task.batch(0, 100, 0))
    chosen = [(q, a) for q, _, a in rows if len(q) == 3 + gap]
    assert chosen
    for question, answer in chosen:
        assert question[3:] == question[:gap]
        assert answer == [question[gap]]


def test_training_and_measuring_lengths_differ() -> None:
    task = FormalLanguageTask(FormalLanguageConfig("parity", 2, 5, 9, 11, eval_sequences=200))
    assert {len(q) for q, *_ in questions(task.batch(0, 200, 0))} == {2, 3, 4, 5}
    measured = [len(q) for batch in task.evaluation_batches() for q, *_ in questions(batch)]
    assert set(measured) == {9, 10, 11}


def value_of(text: str) -> int:
    """Evaluate an expression's text by rewriting its innermost operators until a digit is left."""
    innermost = re.compile(r"\[(MIN|MAX|MED|SM) ([\d ]+) \]")
    rules = {
        "MIN": min,
        "MAX": max,
        "MED": lambda values: int(median(values)),
        "SM": lambda values: sum(values) % 10,
    }
    while not text.isdigit():
        text, replaced = innermost.subn(
            lambda found: str(rules[found[1]]([int(digit) for digit in found[2].split()])), text
        )
        assert replaced, text
    return int(text)


def depth_of(question: list[int]) -> int:
    level = deepest = 1
    for token in question:
        level += (10 <= token <= 13) - (token == 14)
        deepest = max(deepest, level)
    return deepest


def test_expressions_are_worth_what_an_evaluator_of_text_finds() -> None:
    config = ListOpsConfig(60, 3, 5, 4, num_train=400, num_validation=50, num_test=50)
    task = ListOpsTask(config)
    arguments, operators = Counter[int](), Counter[str]()
    for question, markers, (answer,) in questions(task.batch(0, 300, 0)):
        text = " ".join(SYMBOLS[token] for token in question)
        assert markers == [15]
        assert value_of(text) == answer
        assert config.min_length < len(question) < config.max_length
        assert depth_of(question) <= config.max_depth
        operators.update(re.findall(r"\[\w+", text))
        arguments.update(len(found.split()) for found in re.findall(r"\[\w+ ([\d ]+) \]", text))
    assert set(operators) == {"[MIN", "[MAX", "[MED", "[SM"}
    assert set(arguments) == {2, 3, 4}


def test_the_median_of_an_even_number_is_rounded_down() -> None:
    assert value_of("[MED 1 2 9 8 ]") == 5
    assert value_of("[MED 1 2 5 8 ]") == 3  # 3.5, as the source's int(median) has it


def test_expressions_have_the_grammars_probabilities() -> None:
    """Of operators' arguments, three quarters are digits wherever operators are allowed."""
    expressions = generate_expressions(ListOpsConfig(2000, 2, 3, 10, 4000, 1, 1))
    inner = Counter[bool]()
    for index in range(4000):
        level = 1
        for token in expressions.question(index).tolist():
            if level == 2 and token != 14:
                inner[token < 10] += 1
            level += (10 <= token <= 13) - (token == 14)
    assert inner[True] / inner.total() == pytest.approx(0.75, abs=0.01)


def test_expressions_are_cached_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path))
    first = ListOpsTask(SMALL["listops"])
    (file,) = (tmp_path / "listops").iterdir()
    changed = file.stat().st_mtime_ns
    second = ListOpsTask(dataclasses.replace(SMALL["listops"], part="test"))
    assert file.stat().st_mtime_ns == changed
    assert first.sha256 == second.sha256
    assert torch.equal(first.batch(0, 9, 0).inputs, second.batch(0, 9, 0).inputs)
    ListOpsTask(dataclasses.replace(SMALL["listops"], data_seed=1))
    assert len(list((tmp_path / "listops").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="MINRNN_CACHE can name another folder"):
        ListOpsTask(SMALL["listops"])


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SelectiveCopyingConfig, {"length": 0}, "length must be at least 1, got 0"),
        (SelectiveCopyingConfig, {"length": 3, "num_tokens": 4}, "num_tokens must be at most length = 3"),
        (FormalLanguageConfig, {"language": "dyck"}, "language must be one of bucket-sort"),
        (FormalLanguageConfig, {"min_length": 50}, "min_length must lie in 1 .. max_length = 40, got 50"),
        (FormalLanguageConfig, {"eval_min_length": 0}, "eval_min_length must lie in 1"),
        (FormalLanguageConfig, {"eval_sequences": 0}, "eval_sequences must be at least 1"),
        (ListOpsConfig, {"max_args": 1}, "max_args must be at least 2, got 1"),
        (ListOpsConfig, {"max_length": 501}, "max_length must be at least min_length \\+ 2 = 502"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**settings)


def test_too_few_different_expressions_are_said() -> None:
    config = ListOpsConfig(3, 0, 1, num_train=9, num_validation=1, num_test=1)
    with pytest.raises(ValueError, match="must allow 11 different expressions, got 10"):
        generate_expressions(config)


# --- the one loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_tasks_are_learnt_by_the_one_loop(name: str, tmp_path: Path) -> None:
    settings = TrainConfig(
        steps=40, batch_size=16, learning_rate=1e-2, warmup_steps=2, eval_every=20, log_every=5, device="cpu"
    )
    model = ModelConfig(d_model=16, num_layers=1, mlp_ratio=1.0)
    config = RunConfig("test", model, SMALL[name], settings)
    assert RunConfig.from_dict(config.to_dict()) == config
    results = train(config, tmp_path / "run", log=RunLog())
    assert {"val_loss", "accuracy", "exact_match"} <= results.keys()
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]
    again = train(config, tmp_path / "run", resume=True, log=RunLog())
    assert again["val_loss"] == results["val_loss"]
    other = RunConfig("test", model, SMALL["listops" if name != "listops" else "formal-languages"], settings)
    with pytest.raises(ValueError, match=f"the task is '{name}' in this run"):
        train(other, tmp_path / "run", resume=True, log=RunLog())


def test_a_state_cannot_be_carried_from_sequence_to_sequence(tmp_path: Path) -> None:
    config = RunConfig("test", ModelConfig(d_model=8), SMALL["listops"], TrainConfig(carry_state=True))
    with pytest.raises(ValueError, match="carry_state must be off"):
        train(config, tmp_path / "run", log=RunLog())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "listop"}, "task.name must be one of text, .*; did you mean 'listops'"),
        ({"name": "listops", "max_arg": 3}, "unknown key 'task.max_arg'; did you mean 'max_args'"),
        ({"name": "listops", "window": 3}, "unknown key 'task.window'"),
        ({"max_args": 3}, "unknown key 'task.max_args'"),  # without a name it is the text's
        (3, "task must be a table, got 3"),
    ],
)
def test_mistakes_in_a_tasks_table_are_named(table: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict({"task": table})


@pytest.mark.parametrize("name", SMALL)
def test_the_digest_depends_on_what_is_trained_on_alone(name: str) -> None:
    """So that a run of other data is told apart, and one may be evaluated on more or on another part."""
    changes = {
        "selective-copying": {
            "length": 13,
            "num_tokens": 2,
            "kinds": 6,
            "eval_sequences": None,
            "part": None,
        },
        "formal-languages": {
            "language": "parity",
            "min_length": 2,
            "max_length": 5,
            "eval_min_length": None,
            "eval_max_length": None,
            "eval_sequences": None,
            "part": None,
        },
        "listops": {
            "max_length": 30,
            "min_length": 6,
            "max_depth": 3,
            "max_args": 3,
            "num_train": 150,
            "num_validation": 90,
            "num_test": 60,
            "data_seed": 1,
            "part": None,
        },
    }[name]
    config = SMALL[name]
    assert {field.name for field in dataclasses.fields(config)} == changes.keys()
    others = {"eval_sequences": 50, "eval_min_length": 7, "eval_max_length": 11, "part": "test"}
    for field, value in changes.items():
        other = dataclasses.replace(config, **{field: others[field] if value is None else value})
        same = make_task(other).sha256 == make_task(config).sha256
        assert same == (value is None), field


def test_an_evaluation_has_as_many_sequences_as_its_configuration_says(task: LabeledTask) -> None:
    config = task.config  # type: ignore[attr-defined]
    expected = config.num_validation if isinstance(config, ListOpsConfig) else config.eval_sequences
    found = task.evaluate(model_of(task))
    assert found["val_sequences"] == expected == 100
    asked = [len(answers) for batch in task.evaluation_batches() for *_, answers in questions(batch)]
    assert found["val_tokens"] == sum(asked)
    most = sum(asked[:BLOCK])  # the targets of the first block, which is the last where that many are enough
    assert task.evaluate(model_of(task), max_tokens=most)["val_sequences"] == BLOCK
    assert task.evaluate(model_of(task), max_tokens=most + 1)["val_sequences"] == 100


def test_a_batch_is_moved_whole() -> None:
    batch = Batch(torch.ones(1, 2), torch.ones(1, 2), fresh=False, reset=torch.ones(1, 2, dtype=torch.bool))
    moved = batch.to(torch.device("meta"))
    assert [part.device.type for part in (moved.inputs, moved.targets, moved.reset)] == ["meta"] * 3  # type: ignore[union-attr]
    assert not moved.fresh


def test_lengths_of_expressions_lie_strictly_between_the_limits() -> None:
    config = ListOpsConfig(12, 4, 4, 4, num_train=300, num_validation=1, num_test=1)
    found = generate_expressions(config)
    assert set(np.diff(found.ends, prepend=0).tolist()) == set(range(5, 12))  # 4 and 12 are possible too


@pytest.mark.parametrize("name", ["tokens", "ends", "values"])
def test_expressions_that_do_not_fit_are_made_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path))
    config = ListOpsConfig(40, 4, 4, 4, num_train=20, num_validation=5, num_test=5)
    whole = ListOpsTask(config)._expressions
    (path,) = (tmp_path / "listops").iterdir()
    for wrong in (getattr(whole, name)[:-1], np.append(getattr(whole, name), getattr(whole, name)[-1:])):
        write_arrays(path, {**whole._asdict(), name: wrong})
        again = ListOpsTask(config)._expressions
        for one, other in zip(again, whole, strict=True):
            np.testing.assert_array_equal(one, other)
