"""What all verbs share: dataclasses become options, and mistakes in them one line."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Sequence
from typing import TypeVar

import tyro

C = TypeVar("C")


def parse(kind: type[C], command: str, args: Sequence[str], defaults: C | None = None) -> C:
    """Read options into a dataclass, whose docstring and attributes' docstrings are the help.

    Args:
        kind: the dataclass.
        command: the verb.
        args: the arguments after it.
        defaults: what is not given keeps this instance's value, or the field's default.

    Returns:
        The instance that the arguments describe.

    Raises:
        ValueError: for an argument that cannot be read, in one line that names the nearest option.
        SystemExit: after printing help.
    """
    box = io.StringIO()
    config = (tyro.conf.PositionalMetavarFromFieldName,)
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                kind,
                prog=f"minrnn {command}",
                default=tyro.MISSING_NONPROP if defaults is None else defaults,
                args=args,
                config=config,
            )
    except SystemExit:
        if not box.getvalue():
            raise
        raise ValueError(f"{_one_line(box.getvalue())} (minrnn {command} --help lists the options)") from None


def _one_line(box: str) -> str:
    """Return what tyro says in a box: its first part, and the first option that it suggests."""
    rows = [row.strip("│").strip() for row in box.splitlines()[1:-1]]
    groups = itertools.groupby(rows, lambda row: set(row) == {"─"})
    parts = [list(group) for is_rule, group in groups if not is_rule]
    options = [row.split()[0] for row in itertools.chain(*parts[1:]) if row.startswith("--")]
    nearest = f"; did you mean {options[0]}?" if options and "Perhaps you meant:" in parts[1] else ""
    return " ".join(parts[0]) + nearest
