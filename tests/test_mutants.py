"""The lists of planted faults (tests/mutants) are in order, and CONTRIBUTING.md gives what was measured."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mutants.faults import COMPILED, LISTS, REPOSITORY, TRITON, Fault, read_list, read_lists
from mutants.outcomes import (
    COLUMNS,
    DIED,
    EXPLAINED,
    LEAST,
    NOT_RUN,
    UNEXPLAINED,
    Outcome,
    amend,
    by_room,
    complaints,
    judged,
    keep,
    out_of_date,
    sentence,
    table,
    unexplained,
)
from mutants.outcomes import read as read_records

FAULTS = read_lists()
RESULT = LISTS / "result.json"

LEAST_IN_ALL, LEAST_IN_A_ROOM = 300, 15

PARTS = {
    "integrations/transformers": "integrations",
    "ops/triton": TRITON,
    "ops/selective/triton": TRITON,
    "ops/selective": "selective",
}
"""Folders of a package that are rooms of their own, or parts of one."""

OUTSIDE = {COMPILED: COMPILED, "examples": "examples", "docs": "site"}
"""Folders beside the package, and their rooms."""


every_list = pytest.mark.parametrize("path", sorted(LISTS.glob("*.toml")), ids=lambda path: path.stem)


@cache
def read(file: str) -> str:
    return (REPOSITORY / file).read_text(encoding="utf-8")


def room_of(file: str) -> str:
    """Return the room of a source file: its package, or the part of one; of what is outside, its folder."""
    if (folder := file.partition("/")[0]) in OUTSIDE:
        return OUTSIDE[folder]
    folder = Path(file).relative_to("src/minrnn").parent.as_posix()
    return PARTS.get(folder, folder)


def rooms() -> set[str]:
    """Return the packages of the architecture's table, the parts of `ops` with own lists, and OUTSIDE."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {*re.findall(r"^\| `(\w+)` \| \d+ \|", page, re.MULTILINE), *PARTS.values(), *OUTSIDE.values()}


def test_each_room_has_its_faults() -> None:
    counts = Counter(fault.room for fault in FAULTS)
    assert counts.keys() == rooms()
    assert min(counts.values()) >= LEAST_IN_A_ROOM
    assert counts.total() >= LEAST_IN_ALL


@every_list
def test_faults_can_be_planted(path: Path) -> None:
    """Each is where its list says, changes something, and Python can read what comes of it."""
    for fault in read_list(path):
        assert fault.room == room_of(fault.file), fault.name
        text = read(fault.file)
        changed = fault.planted(text)
        assert changed != text, fault.name
        if fault.file.endswith(".py"):
            assert compile(changed, fault.name, "exec") != compile(text, fault.name, "exec"), fault.name


@every_list
def test_tests_of_faults_exist_and_survivors_are_explained(path: Path) -> None:
    for fault in read_list(path):
        for test in fault.tests:
            file, _, name = test.partition("::")
            assert not name or f"def {name.partition('[')[0]}(" in read(file), f"{fault.name}: {test}"
        assert fault.survives is None or len(fault.survives.split()) >= 4, fault.name


def test_no_fault_is_listed_twice() -> None:
    counts = Counter((fault.file, fault.planted(read(fault.file))) for fault in FAULTS)
    assert [place for (place, _), count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("head", "entry", "message"),
    [
        ("test = ['t']", "file = 'a'\nold = 'b'\nnew = 'c'", "and this one 'test'"),
        ("tests = ['t']", "file = 'a'\nold = 'b'", r"ops-1: lacks \['new'\]"),
        ("tests = ['t']", "file = 'a'\nold = 'b'\nnew = 'c'\nsurvive = 'd'", r"unknown \['survive'\]"),
        ("", "file = 'a'\nold = 'b'\nnew = 'c'", "ops-1: no tests are named"),
    ],
)
def test_mistakes_in_a_list_are_named(head: str, entry: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ops.toml").write_text(f"{head}\n[[fault]]\n{entry}\n")
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / "ops.toml")


# ----------------------------------------------------------------------------------------------------------
# What is counted

FOUND = {"ops": ("failed",) * 19 + ("passed",), "cli": ("failed",) * 8 + ("passed", "explained", "not run")}


def outcome(room: str, number: int, what: str) -> Outcome:
    """Return what came of a made-up fault; `explained` passes the tests as its list says."""
    fault = Fault(
        room,
        f"{room}-{number}",
        "Makefile",
        "demo:",
        f"{room} {number}",
        ("t",),
        "why" if what == "explained" else None,
    )
    if what == "not run":
        return Outcome(fault, NOT_RUN, "no triton", 0.0)
    return judged(fault, "passed" if what == "explained" else what, "t::x" if what == "failed" else "", 1.0)


@pytest.fixture
def found() -> list[Outcome]:
    return [outcome(room, n, what) for room, all_of_it in FOUND.items() for n, what in enumerate(all_of_it)]


def test_outcomes_are_counted_by_room(found: list[Outcome]) -> None:
    lines = [line.split() for line in table(found).splitlines()]
    assert lines[1:] == [
        ["cli", "11", "8", "1", "1", "1", "80.0%"],
        ["ops", "20", "19", "0", "1", "0", "95.0%"],
        ["all", "31", "27", "1", "2", "1", "90.0%"],
    ]


def test_survivors_count_explained_or_not_and_a_sample_has_no_share(found: list[Outcome]) -> None:
    def first_words(rooms: bool, whole: bool) -> list[str]:
        return [line.partition(":")[0] for line in complaints(found, rooms=rooms, whole=whole)]

    unexplained = ["survived, unexplained"] * 2
    assert first_words(rooms=False, whole=False) == unexplained
    assert complaints(found, rooms=True, whole=False)[2:] == [
        "only 80.0% of the faults of 'cli' died; at least 90% must"
    ]
    assert complaints(found, rooms=True, whole=True)[3:] == [
        "only 90.0% of all faults died; at least 95% must"
    ]
    assert complaints([one for one in found if one.what == DIED], rooms=True, whole=True) == []


def test_a_fault_whose_list_is_wrong_is_no_death(found: list[Outcome]) -> None:
    wrong = judged(found[0].fault, "error", "does not compile: x", 1.0)
    assert wrong.what not in (DIED, EXPLAINED, UNEXPLAINED, NOT_RUN)
    assert complaints([wrong], rooms=False, whole=False) == [str(wrong)]
    assert "does not compile: x" in str(wrong)


def test_an_explanation_of_a_fault_that_dies_is_out_of_date(found: list[Outcome]) -> None:
    explained = next(one.fault for one in found if one.what == EXPLAINED)
    (line,) = out_of_date([*found, judged(explained, "failed", "t::x", 1.0)])
    assert explained.name in line
    assert "t::x noticed it" in line


def test_results_are_kept_by_room(found: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for room, outcomes in by_room(found).items():
        keep(path, room, outcomes[:1])  # an earlier one
        keep(path, room, outcomes)
    records = read_records(path)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert list(records) == ["cli", "ops"]
    assert {column: records["cli"][column] for column in ("planted", *COLUMNS)} == {
        "planted": 11,
        DIED: 8,
        EXPLAINED: 1,
        UNEXPLAINED: 1,
        NOT_RUN: 1,
    }
    assert [one["survives"] for one in records["cli"]["survivors"]] == [None, "why"]
    assert records["ops"]["seconds"] == 20
    assert "commit" in records["ops"]
    assert sentence(records, ["ops", "cli", "export", "csrc"]) == (
        "Of 30 planted faults the tests notice 27 (90.0 %), and in each room at least 80.0 %; "
        "the lists say why the other 3 go unnoticed. Not measured yet: csrc, export."
    )
    assert sentence(records, records).endswith("go unnoticed.")


def test_what_survived_is_counted_again(found: list[Outcome], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for room, outcomes in by_room(found).items():
        keep(path, room, outcomes)
    survivors = unexplained(read_records(path), [one.fault for one in found])
    assert [fault.name for fault in survivors] == ["ops-19", "cli-8"]
    amend(path, [judged(survivors[0], "passed", "", 1.0), judged(survivors[1], "failed", "t::x", 1.0)])
    records = read_records(path)
    assert {column: records["cli"][column] for column in ("planted", DIED, EXPLAINED, UNEXPLAINED)} == {
        "planted": 11,
        DIED: 9,
        EXPLAINED: 1,
        UNEXPLAINED: 0,
    }
    assert [one["name"] for one in records["cli"]["survivors"]] == ["cli-9"]
    assert records["cli"]["again"]["planted"] == 1
    assert (records["ops"][DIED], records["ops"][UNEXPLAINED]) == (19, 1)
    assert [one["name"] for one in records["ops"]["survivors"]] == ["ops-19"]


def measured() -> dict[str, dict[str, Any]]:
    if not RESULT.is_file():
        pytest.skip("no result of `make mutants` is committed yet")
    return read_records(RESULT)


def test_the_committed_result_is_of_these_lists() -> None:
    """Lists grow with the code; where a tenth of a room's faults is new, the room is measured again."""
    records = measured()
    planted = {room: record["planted"] for room, record in records.items()}
    counts = Counter(fault.room for fault in FAULTS)
    assert planted.keys() <= counts.keys()
    again = [room for room, count in planted.items() if abs(count - counts[room]) > counts[room] / 10]
    where = RESULT.relative_to(REPOSITORY)
    assert not again, f"make mutants ARGS='--output {where}', with --room for each of {again}"


def test_the_committed_result_is_good_enough() -> None:
    records = measured()
    for room, record in records.items():
        assert record[NOT_RUN] == record[UNEXPLAINED] == 0, room
        assert record[DIED] + record[EXPLAINED] == record["planted"], room
        assert len(record["survivors"]) == record[EXPLAINED], room
        assert record[DIED] / record["planted"] >= LEAST["room"], room
    died, planted = (sum(record[column] for record in records.values()) for column in (DIED, "planted"))
    assert died / planted >= LEAST["whole"]


def test_contributing_says_what_was_measured() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    assert page.count(" planted faults the tests notice ") == 1
    assert f"{sentence(measured(), {f.room for f in FAULTS})} `tests/mutants/run.py" in page
