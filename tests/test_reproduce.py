"""A shrunken version of every experiment runs: trials, records, tables with their labels, plots."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from episode_files import MISSING, write_pendulum_data

from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.experiment import Choice, Experiment, Record, Table, Watch
from minrnn.experiments.published import LABELS
from minrnn.experiments.results import ResultsFolder
from minrnn.experiments.runner import reproduce

CHOSEN = {
    "runtime": ("mingru", "minlstm", "gru", "lstm", "attention", "gru-loop", "lstm-loop"),
    "inference": ("mingru", "gru", "attention"),
    "selective-copying": ("mingru", "gru", "minlstm-unnormalised"),
    "stability": ("minlstm",),
    "shakespeare": ("mingru", "minlstm", "transformer"),
    "shakespeare-best": ("mingru", "transformer"),
    "shakespeare-cpu": ("mingru", "attention"),
    "documents": ("mingru",),
    "formal-languages": ("mingru", "gru"),
    "listops": ("minlstm", "gru"),
    "locomotion": ("mingru", "attention", "bc"),
    "acting": ("mingru", "s4d", "attention", "attention-sliding", "attention-whole"),
}
LABEL = re.compile("|".join(map(re.escape, LABELS.values())))


class Silence(Watch):
    """Shows nothing."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINRNN_CACHE", str(tmp_path_factory.getbasetemp() / "minrnn-cache"))
        write_pendulum_data()
        yield tmp_path_factory.mktemp("results")


def choice_of(name: str) -> Choice:
    return Choice("tiny", seeds=1, mixers=CHOSEN[name], device="cpu")


def records_of(name: str, root: Path) -> list[Record]:
    """Return the trials of a shrunken experiment, computed where no test of this process has done it yet."""
    return reproduce(EXPERIMENTS[name].load(), choice_of(name), root, Silence()).records()


def headings(text: str) -> list[str]:
    return re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE)


def figures(table: Table) -> Iterator[tuple[str, Sequence[str], str]]:
    """Yield column, row and text of every cell that holds a figure."""
    for row in table.rows:
        for column, text in zip(table.head, row, strict=True):
            if text:
                yield column, row, text


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_shrunken_version_runs(name: str, root: Path) -> None:
    if name == "locomotion" and MISSING:
        pytest.skip(MISSING)
    experiment, choice = EXPERIMENTS[name].load(), choice_of(name)
    folder = reproduce(experiment, choice, root, Silence())
    trials = experiment.trials(choice)
    records = folder.records()
    assert {record["cell"] for record in records} == {trial.name for trial in trials}
    assert all(record["failed"] is None for record in records)
    assert folder.path.name == f"{name}-tiny"
    _check_plots(folder)
    _check_tables(experiment, folder)


def _check_plots(folder: ResultsFolder) -> None:
    png, svg = folder.path / "plot.png", folder.path / "plot.svg"
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert "<dc:date>" not in svg.read_text()


def _check_tables(experiment: Experiment, folder: ResultsFolder) -> None:
    """Published and measured figures share no column and no row without a label."""
    tables = experiment.tables(folder.records())
    assert tables
    assert headings((folder.path / "tables.md").read_text()) == [table.title for table in tables]
    for table in tables:
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.head)}
        own = "ublished" in table.title
        for column, row, text in figures(table):
            if LABEL.search(text):
                assert own or "published" in column or text == row[0], (table.title, column)
            elif "published" in column and text != row[0]:
                pytest.fail(f"{table.title}: {text} in column {column} has no label")
        for row in table.rows:
            if LABEL.search(row[0]):
                assert "published" in row[0]


def test_records_hold_what_the_tables_need(root: Path) -> None:
    (record, *_) = records_of("runtime", root)
    for name, found in record["result"]["systems"].items():
        seconds = found["seconds"]
        assert seconds.keys() == {"forward", "backward", "step"}, name
        assert seconds["step"]["samples"] >= 3
        assert found["parameters"] > 0
        assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


def test_states_grow_for_attention_alone(root: Path) -> None:
    records = records_of("inference", root)
    sizes: dict[str, set[int]] = {}
    for record in records:
        for name, found in record["result"]["systems"].items():
            sizes.setdefault(name, set()).add(found["state_bytes"])
    assert {name: len(found) for name, found in sizes.items()} == {"mingru": 1, "gru": 1, "attention": 3}


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_policies_are_reported_by_what_they_earn(root: Path) -> None:
    records = records_of("locomotion", root)
    assert {record["setting"]["quality"] for record in records} == {"medium", "medium-replay"}
    for record in records:
        result = record["result"]
        assert len(result["returns"]) == 2
        assert result["lengths"] == [200, 200]
        assert result["environment"] == "Pendulum-v1"
        assert result["seconds_per_action"] > 0
        asked = {name: played["target_return"] for name, played in result["asked"].items()}
        assert result["target_return"] == asked["best tenth"]
        assert result["score"] == result["asked"]["best tenth"]["score"]
        if record["setting"]["mixer"] == "bc":
            assert asked == {"best tenth": None}
        else:
            assert asked["mean"] == pytest.approx(result["data"]["mean_return"])
            assert asked["highest"] == pytest.approx(result["data"]["best_return"])
            assert asked["mean"] < asked["best tenth"] <= asked["highest"]


def test_what_acting_costs_grows_for_whole_attention_alone(root: Path) -> None:
    sizes: dict[str, list[int]] = {}
    for record in sorted(records_of("acting", root), key=lambda record: record["setting"]["steps"]):
        for name, found in record["result"]["systems"].items():
            assert found["seconds"]["action"]["samples"] >= 3
            sizes.setdefault(name, []).append(found["state_bytes"])
    assert sorted(sizes) == sorted(CHOSEN["acting"])
    for name in ("mingru", "s4d"):
        assert len(set(sizes[name])) == 1
    assert sizes["attention-whole"] == sorted(set(sizes["attention-whole"]))


def test_the_language_model_is_reported_on_a_part_that_chose_nothing(root: Path) -> None:
    for record in records_of("shakespeare", root):
        result, task = record["result"], record["config"]["task"]
        assert task["held_out"] == 0.1
        assert result["best"]["step"] in {entry["step"] for entry in result["evaluations"]}
        assert result["test"]["val_tokens"] != result["val_tokens"]


def test_longer_and_other_sequences_are_measured(root: Path) -> None:
    (record, *_) = records_of("selective-copying", root)
    assert record["result"]["test"].keys() == {"x1", "x2", "x4"}
    (record, *_) = records_of("formal-languages", root)
    assert record["result"]["by_length"].keys() == {"40", "48"}


def test_a_system_that_cannot_be_measured_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minrnn.experiments import runtime

    def refuse(*arguments: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(runtime.LOOPS, "gru-loop", refuse)  # type: ignore[arg-type]
    choice = Choice("tiny", mixers=("mingru", "gru-loop"), device="cpu")
    folder = reproduce(runtime.EXPERIMENT, choice, root / "refused", Silence())
    (record, *_) = folder.records()
    assert record["result"]["systems"]["gru-loop"] == {"failed": "out of memory"}
    assert "seconds" in record["result"]["systems"]["mingru"]
    assert json.loads((folder.path / "config.json").read_text())["experiment"] == "runtime"
