"""The one reader of JSON and TOML: whatever is wrong with a file is a one-line ValueError that names it."""

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
    """Read a JSON file that holds a value of this type.

    Args:
        path: the file.
        kind: the type of what it holds, as `convert` takes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or does not hold such a value; the message names the file and the key.
    """
    return parse_json(_content(path), kind, str(path))


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """Read a file of one JSON value a line, less a last line without an end, as a killed run leaves it.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON, or holds another value; the message names the file and the line.
    """
    lines = _content(path).splitlines(keepends=True)
    whole = lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
    return [parse_json(line, kind, f"{path}, line {number}") for number, line in enumerate(whole, 1)]


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML file that holds a table of this type; see `read_json`."""
    return parse_toml(_content(path), kind, str(path))


def parse_json(text: str | bytes, kind: type[T], origin: str) -> T:
    """Read JSON text; `origin`, where it comes from, begins the message of an error."""
    return _parse(text, json.loads, "JSON", kind, origin)


def parse_toml(text: str | bytes, kind: type[T], origin: str) -> T:
    """Read TOML text; `origin`, where it comes from, begins the message of an error."""
    return _parse(text, tomllib.loads, "TOML", kind, origin)


@contextmanager
def naming(origin: object) -> Iterator[None]:
    """Begin the messages of ValueErrors with the file or other place that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _content(path: Path) -> bytes:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path} must be a regular file, got a pipe or device")  # which may never end
    return path.read_bytes()


def _parse(text: str | bytes, loads: Callable[[str], Any], name: str, kind: Any, origin: str) -> Any:
    try:
        value = loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # the parsers' own errors and Unicode's are ValueErrors
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{origin} is no {name} ({reason})") from error
    with naming(origin):
        return convert(value, kind)
