"""Strict reading of JSON and TOML: every problem with a file is a one-line ValueError that names the file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from minrnn.files.schema import convert

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """Return the content of a JSON file, checked against a type.

    Args:
        path: the file.
        kind: the expected type, as for `convert`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not of that type; the message names the file and the key.
    """
    return parse_json(_content(path), kind, str(path))


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """Return the values of a JSON Lines file.

    A last line without a line end is ignored: a killed process may leave one.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON, or not of that type; the message names the file and the line.
    """
    lines = _content(path).splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
    return [parse_json(line, kind, f"{path}, line {number}") for number, line in enumerate(whole, 1)]


def read_toml(path: Path, kind: type[T]) -> T:
    """Return the content of a TOML file, checked against a type; see `read_json`."""
    return parse_toml(_content(path), kind, str(path))


def parse_json(text: str | bytes, kind: type[T], origin: str) -> T:
    """Return the value of JSON text, checked against a type; error messages begin with `origin`."""
    return _parse(text, json.loads, "JSON", kind, origin)


def parse_toml(text: str | bytes, kind: type[T], origin: str) -> T:
    """Return the value of TOML text, checked against a type; error messages begin with `origin`."""
    return _parse(text, tomllib.loads, "TOML", kind, origin)


@contextmanager
def naming(origin: object) -> Iterator[None]:
    """Prefix the messages of ValueErrors raised in the block with `origin`, such as a file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _content(path: Path) -> bytes:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} must be a regular file, got a pipe or device")  # could block forever
    return path.read_bytes()


def _parse(text: str | bytes, loads: Callable[[str], Any], name: str, kind: Any, origin: str) -> Any:
    try:
        value = loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # parse errors and Unicode errors are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{origin} is not valid {name} ({reason})") from error
    with naming(origin):
        return convert(value, kind)
