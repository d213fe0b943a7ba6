"""Parsing of options into dataclasses, with one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import tyro

C = TypeVar("C")
V = TypeVar("V")


def parse(
    kind: type[C],
    command: str,
    args: Sequence[str],
    *,
    defaults: C | None = None,
    description: str | None = None,
) -> C:
    """Parse options into a dataclass, whose docstring and attributes' docstrings are the help.

    Args:
        kind: the dataclass.
        command: name of the command.
        args: the arguments after it.
        defaults: instance with the defaults; None for the defaults of the fields.
        description: description for the help; by default the docstring of the dataclass.

    Returns:
        The instance.

    Raises:
        ValueError: an argument is invalid; the one-line message suggests the nearest option.
        SystemExit: after printing help.
    """
    if {"-h", "--help"} & set(args):
        args = ["--help"]  # tyro omits options that precede --help from the help
    box = io.StringIO()
    config = (tyro.conf.PositionalMetavarFromFieldName,)
    try:
        with contextlib.redirect_stderr(box):
            read = tyro.cli(
                kind,
                prog=f"minrnn {command}",
                description=description,
                default=tyro.MISSING_NONPROP if defaults is None else defaults,
                args=args,
                config=config,
            )
    except SystemExit:
        if not box.getvalue():
            raise
        raise ValueError(f"{_one_line(box.getvalue())} (minrnn {command} --help lists the options)") from None
    return expand_paths(read)


def expand_paths(value: V) -> V:
    """Return options with `~` expanded in their paths, as shells do not expand it in `--run=~/here`.

    Args:
        value: a path, a dataclass, a list or tuple; any other value is returned unchanged.
    """
    if isinstance(value, Path):
        return cast(V, value.expanduser())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: expand_paths(each) for name, each in old.items()}
        changed = {name: each for name, each in new.items() if each is not old[name]}
        return cast(V, dataclasses.replace(value, **changed)) if changed else value
    if isinstance(value, list | tuple) and any(isinstance(each, Path) for each in value):
        return cast(V, type(value)(map(expand_paths, value)))
    return value


def check_range(command: str, name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless an option lies between two bounds, inclusive."""
    if not least <= value <= most:
        option = name.replace("_", "-")
        raise ValueError(f"{command}: --{option} must be {least} to {most}, got {value}")


def _one_line(box: str) -> str:
    """Return the first part of an error box of tyro, with the first suggested option, in one line.

    A box has a title, then parts between rules; without UTF-8 it has no sides.
    """
    rows = [row.strip("│ ") for row in box.splitlines()[1:]]
    groups = itertools.groupby(rows, lambda row: set(row) <= set("─-╰╯"))
    message, *others = [list(group) for is_rule, group in groups if not is_rule]
    suggested = [row.split()[0] for part in others if "Perhaps you meant:" in part for row in part[1:]]
    nearest = f"; did you mean {suggested[0]}?" if suggested else ""
    return " ".join(message) + nearest
