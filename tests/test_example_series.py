"""The classifier of series: what is missing, what the model reads in its place, and unequal lengths."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from example_scripts import imported, run
from hypothesis import given
from hypothesis import strategies as st

nan = float("nan")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with imported("series/classify.py") as module:
        yield module


def made_up(script: ModuleType, count: int, seed: int, missing: float = 0.0) -> Any:
    """Return series of two channels; the first channel's mean says the class, 0, 1 or 2."""
    rng = np.random.default_rng(seed)
    classes = torch.arange(count) % 3
    centers = np.array([[5.0 * int(label), 100.0] for label in classes])
    series = [rng.normal(center, size=(rng.integers(4, 12), 2)) for center in centers]
    return script.remove(script.Split(series, classes), missing, rng)


# --- missing values --------------------------------------------------------------------------------------


def test_the_last_value_a_mask_and_an_age(script: ModuleType) -> None:
    series = np.array([[nan, 4.0], [3.0, nan], [nan, nan], [7.0, 6.0]])
    found = script.encode_one(series, np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    values = [[0.0, 0.5], [1.0, 0.5], [1.0, 0.5], [3.0, 1.0]]
    seen = [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    ages = np.log1p([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(found, torch.tensor(np.concatenate([values, seen, ages], 1)).float())
    assert found.dtype == torch.float32


@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_what_is_missing_does_not_matter(script: ModuleType, seed: int, share: float) -> None:
    """Inputs are finite, hold no later value, and of what is there everything."""
    rng = np.random.default_rng(seed)
    series = rng.normal(size=(6, 2))
    missing = rng.random((6, 2)) < share
    center, scale = np.zeros(2), np.ones(2)
    found = script.encode_one(np.where(missing, nan, series), center, scale)
    assert found.isfinite().all()
    values, seen, ages = found.split(2, dim=1)
    assert np.array_equal(seen.numpy() == 1, ~missing)
    np.testing.assert_allclose(values.numpy()[~missing], series[~missing], rtol=1e-6)
    assert np.array_equal(ages.numpy() == 0, ~missing)
    early = script.encode_one(np.where(missing, nan, series)[:3], center, scale)
    assert torch.equal(early, found[:3])


def test_a_share_is_removed(script: ModuleType) -> None:
    split = script.Split([np.ones((500, 4)), np.ones((300, 4))], torch.tensor([0, 1]))
    for share in (0.0, 0.2, 0.5, 1.0):
        found = script.remove(split, share, np.random.default_rng(0))
        assert abs(np.isnan(np.concatenate(found.series)).mean() - share) < 0.03
        assert [x.shape for x in found.series] == [(500, 4), (300, 4)]
        whole_steps = np.isnan(found.series[0]).all(axis=1).mean()
        assert abs(whole_steps - share**4) < 0.03  # channels are drawn apart
    assert not np.isnan(np.concatenate(split.series)).any()


def test_statistics_are_of_what_is_there(script: ModuleType) -> None:
    split = script.Split([np.array([[1.0, nan], [nan, 5.0]]), np.array([[3.0, 5.0]])], torch.tensor([0, 1]))
    center, scale = script.statistics(split)
    np.testing.assert_allclose(center, [2.0, 5.0])
    np.testing.assert_allclose(scale[0], 1.0)


# --- the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gru", "lstm", "mingru", "minlstm"])
def test_series_of_a_batch_do_not_meet(script: ModuleType, kind: str) -> None:
    """The logits of a series are the same alone and beside longer and shorter ones."""
    torch.manual_seed(0)
    model = script.Classifier(kind, 3, 8, 4)
    inputs = [torch.randn(length, 3) for length in (5, 9, 1, 7)]
    pack = torch.nn.utils.rnn.pack_sequence
    together = model(pack(inputs, enforce_sorted=False))
    alone = torch.cat([model(pack([x])) for x in inputs])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert len(together.unique(dim=0)) == 4


@pytest.mark.parametrize("kind", ["gru", "mingru"])
def test_training_finds_a_class(script: ModuleType, kind: str) -> None:
    known, asked = made_up(script, 60, 0, 0.2), made_up(script, 60, 1, 0.2)
    model = script.fit(kind, 8, known, 60, 1e-2, 0)
    loss, accuracy = script.evaluate(model, known, asked)
    assert accuracy > 0.9
    assert loss < 0.4
    assert not model.training


def test_accuracy_is_the_share_of_classes_found(script: ModuleType) -> None:
    known = made_up(script, 10, 0)  # of class 2 three
    model = script.Classifier("mingru", 6, 4, 3)
    with torch.no_grad():
        model.out.weight.zero_()
        model.out.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    loss, accuracy = script.evaluate(model, known, known)
    assert accuracy == pytest.approx(0.3)
    assert loss == pytest.approx(float(torch.tensor([0.0, 0.0, 1.0]).logsumexp(0)) - 0.3)


def test_a_seed_decides_a_training(script: ModuleType) -> None:
    known = made_up(script, 30, 0, 0.5)
    one, again, other = (script.fit("mingru", 4, known, 3, 1e-2, seed).out.weight for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# --- choices ---------------------------------------------------------------------------------------------


def test_each_class_is_held_out(script: ModuleType) -> None:
    classes = torch.tensor([0] * 10 + [1] * 20 + [2] * 3)
    kept, held = script.stratified(classes, 0.2, np.random.default_rng(0))
    assert sorted(kept + held) == list(range(33))
    assert classes[held].bincount().tolist() == [2, 4, 1]
    assert held != script.stratified(classes, 0.2, np.random.default_rng(1))[1]


def test_the_rate_with_the_lowest_loss_is_chosen(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {(0, 3e-3): 2.0, (1, 3e-3): 1.0, (2, 3e-3): 9.0, (0, 1e-2): 1.0, (1, 1e-2): 8.0, (2, 1e-2): 5.0}
    held: list[int] = []

    def fit(kind: str, width: int, split: Any, steps: int, rate: float, seed: int) -> tuple[int, float]:
        held.append(len(split.series))
        return seed, rate

    monkeypatch.setattr(script, "RATES", (3e-3, 1e-2))
    monkeypatch.setattr(script, "fit", fit)
    monkeypatch.setattr(script, "evaluate", lambda model, known, asked: (losses[model], 0.0))
    known = made_up(script, 30, 0)
    assert script.choose_rate("mingru", 4, known, 3, folds=1) == 1e-2
    assert script.choose_rate("mingru", 4, known, 3, folds=3) == 3e-3
    assert set(held) == {24}


def test_the_table(script: ModuleType) -> None:
    found = (("gru:8", 0.0, 0.9), ("gru:8", 0.5, 0.5), ("gru:8", 0.5, 0.7), ("m:8", 0.0, 1.0))
    known = {"data": "A", "parameters": 12345, "seconds": 2.0}
    rows = [{**known, "model": name, "removed": share, "accuracy": value} for name, share, value in found]
    rows.append({**rows[-1], "removed": 0.5, "seconds": 4.0})
    assert script.table(rows).splitlines() == [
        "| data | model | parameters | 0% removed | 50% removed | CPU seconds |",
        "|---|---|---|---|---|---|",
        "| A | gru:8 | 12,345 | 90.0 | 60.0 ± 14.1 | 2.0 |",
        "| A | m:8 | 12,345 | 100.0 | 100.0 | 3.0 |",
    ]


# --- the script ------------------------------------------------------------------------------------------


def test_without_aeon_one_line_says_what_to_install(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aeon.datasets", None)
    with pytest.raises(SystemExit, match=r"^classify\.py: aeon, .* cannot be imported .*: pip install aeon$"):
        script.load("JapaneseVowels")


def test_the_script_runs_on_the_data_that_aeon_ships(script: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("aeon", reason="aeon is not installed: the extra examples")
    train, test = script.load("JapaneseVowels")
    assert (len(train.series), len(test.series)) == (270, 370)
    assert {x.shape[1] for x in train.series} == {12}
    assert len({len(x) for x in train.series}) > 10
    assert train.classes.unique().tolist() == test.classes.unique().tolist() == list(range(9))
    with pytest.raises(SystemExit, match=r"--datasets must be of JapaneseVowels, .*, not No"):
        script.load("No")
    options = (
        "--models",
        "gru:4",
        "mingru:4",
        "--removed",
        "0.5",
        "--seeds",
        "0",
        "--steps",
        "3",
        "--folds",
        "1",
    )
    done = run("series/classify.py", *options, "--output", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert [record["data"] for record in records] == ["JapaneseVowels"] * 2 + ["PickupGestureWiimoteZ"] * 2
    assert script.table(records) in done.stdout
