"""The one reader of structured files: what it takes, and the line that it says of all else."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.files import (
    check_bounds,
    check_types,
    convert,
    first_difference,
    parse_json,
    read_json,
    read_json_lines,
    read_toml,
    replace_text,
    write_directory,
    write_file,
    write_json,
)
from minrnn.files.writing import CONFIG_FILE


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict)
    pair: tuple[int, ...] = ()
    either: int | str = 0


class Open(TypedDict):
    step: int
    note: NotRequired[str]


WHOLE = {
    "name": "n",
    "kind": "b",
    "inner": {"size": 1, "rate": 2},
    "many": [{"size": 3}],
    "by_name": {"x": 1},
    "pair": [1, 2],
    "either": "s",
}


def test_a_whole_value_is_read_as_declared() -> None:
    read = convert(WHOLE, Outer)
    assert read == Outer("n", "b", Inner(1, 2.0), [Inner(3)], {"x": 1.0}, (1, 2), "s")
    assert type(read.inner.rate) is float
    assert convert({"step": 1, "more": [1]}, Open) == {"step": 1, "more": [1]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 1}, "name must be str, got 1"),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'"),
        ({"inner": []}, r"inner must be a table, got \[\]"),
        ({"inner": {"size": True}}, "inner.size must be int, got True"),
        ({"inner": {"rate": 1.0}}, "inner.size is missing"),
        ({"inner": {"size": 1, "rate": 10**400}}, "inner.rate must be float, got 10"),
        ({"inner": {"size": 1, "ratio": 1.0}}, "unknown key 'inner.ratio'; did you mean 'rate'"),
        ({"many": {}}, "many must be a list, got {}"),
        ({"many": [{"size": 1}, 2]}, r"many\[1\] must be a table, got 2"),
        ({"by_name": {"x": "y"}}, "by_name.x must be float, got 'y'"),
        ({"pair": [1, None]}, r"pair\[1\] must be int, got None"),
        ({"either": 1.5}, "either must be int or str, got 1.5"),
    ],
)
def test_what_is_not_as_declared_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "file.json"
    write_json(path, WHOLE | change)
    with pytest.raises(ValueError, match=f"file.json: {message}"):
        read_json(path, Outer)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"\0", b'{"name": "a"} x', b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(text)
    for read in (read_json, read_json_lines):
        path.write_bytes(text + b"\n")
        if text:
            with pytest.raises(ValueError, match=r"file.json.* is not valid JSON \("):
                read(path, Outer)


@pytest.mark.parametrize("text", [b"a = ", b"\xff", b"a = " + b"[" * 100_000, b"name = 1"])
def test_what_is_no_toml_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "file.toml"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"file.toml( is not valid TOML \(|: name must be str)"):
        read_toml(path, Outer)


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st', encoding="utf-8")
    assert read_json_lines(path, Open) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"stop": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: step is missing"):
        read_json_lines(path, Open)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*WHOLE, "other"]), JSON))
def test_any_json_is_read_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    text = json.dumps(WHOLE | changes)
    for kind in (Outer, Open, Inner, list[Outer], dict[str, Outer], int):
        message = "origin"
        try:
            parse_json(text, kind, "origin")
        except ValueError as error:
            message = str(error)
        assert message.startswith("origin")
        assert "\n" not in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    os.mkfifo(path)
    for read in (read_json, read_json_lines, read_toml):
        with pytest.raises(ValueError, match=r"file.json must be a regular file, got a pipe or device"):
            read(path, Outer)


# --- writing ---------------------------------------------------------------------------------------------


def test_a_directory_is_flushed_before_it_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the content of what is renamed, unless that is flushed first."""
    flushed: set[int] = set()
    at_rename: list[set[int]] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def noted_rename(path: Path, target: Path) -> Path:
        at_rename.append(set(flushed))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    with write_directory(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_text(name)
    written = {path.stat().st_ino for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]}
    assert len(written) == 4
    assert written <= at_rename[0]
    assert tmp_path.stat().st_ino in flushed - at_rename[-1]  # and the rename itself, in the folder above


def test_a_replacement_that_was_killed_meanwhile_is_cleared_up(tmp_path: Path) -> None:
    place, aside = tmp_path / "last", tmp_path / ".last.previous"
    with write_directory(place) as folder:
        (folder / CONFIG_FILE).write_text("ours")
        for left, text in (
            (place, "theirs"),
            (aside, "before theirs"),
        ):  # of a process killed after its renames
            left.mkdir()
            (left / CONFIG_FILE).write_text(text)
    assert (place / CONFIG_FILE).read_text() == "ours"
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with write_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_text_is_written_in_utf8(tmp_path: Path) -> None:
    replace_text(tmp_path / "text", "é€\n")
    assert (tmp_path / "text").read_bytes() == b"\xc3\xa9\xe2\x82\xac\n"


@pytest.mark.parametrize("value", [True, 1.0, "1", 2])
def test_a_literal_is_of_its_own_type(value: object) -> None:
    assert convert(1, Literal[1, "a"]) == 1  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape(f"it must be one of 1, a, got {value!r}")):
        convert(value, Literal[1, "a"])  # type: ignore[arg-type]


# --- fields ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    count: int = 1
    rate: float = 1.0
    name: str | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, {"count": (1, 9)}, " item")


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "at least 1 item, got 0"), (-5, "at least 1 item, got -5"), (10, "at most 9 item, got 10")],
)
def test_bounds_are_inclusive_and_the_one_that_is_passed_is_named(count: int, message: str) -> None:
    assert [Checked(inside).count for inside in (1, 5, 9)] == [1, 5, 9]
    with pytest.raises(ValueError, match=f"Checked: count must be {message}"):
        Checked(count)


def test_numbers_of_numpy_become_pythons_and_whole_ones_are_rates_too() -> None:
    made = Checked(np.int64(3), np.float32(0.5), None, np.bool_(True))  # type: ignore[arg-type]
    assert [type(value) for value in vars(made).values()] == [int, float, type(None), bool]
    assert (made, Checked(rate=2).rate) == (Checked(3, 0.5, None, True), 2)
    json.dumps(vars(made))


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": {"b": 1, "c": 2}, "d": 3}, {"d": 3, "a": {"c": 2, "b": 1}}, None),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 4}}, ("a.c", 2, 4)),
        ({"a": 1}, {"a": 1, "b": {"c": 2}}, ("b", None, {"c": 2})),
        ({"a": None}, {}, ("a", None, None)),
        ("x", "y", ("", "x", "y")),
    ],
)
def test_the_first_difference_is_named(one: Any, other: Any, found: tuple[str, Any, Any] | None) -> None:
    assert first_difference(one, other) == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 1.0}, "count must be int, got 1.0"),
        ({"count": True}, "count must be int, got True"),
        ({"rate": "1"}, "rate must be float, got '1'"),
        ({"name": 1}, r"name must be str \| None, got 1"),
        ({"flag": 1}, "flag must be bool, got 1"),
    ],
)
def test_a_field_of_another_type_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"Checked: {message}"):
        Checked(**settings)


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    def fail() -> None:
        with write_file(tmp_path / "a.json"):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full") as caught:
        fail()
    assert caught.value.filename == str(tmp_path / "a.json")
