"""The package's docstrings in Sphinx's markup: equations as literal blocks, variables' docstrings."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

EQUATION = re.compile(r" {4}\S")
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Example|Examples|Attributes):$")
RETURNED = re.compile(r"^( {4})(\w+): ")


def mark_equations(lines: list[str]) -> Iterator[str]:
    """Yield a docstring's lines with `::` before each block that is indented and belongs to no section."""
    in_section = in_block = False
    before = ""
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_block = bool(SECTION.match(line)), False
        elif EQUATION.match(line) and not in_section and not in_block and not before:
            yield from ("::", "")
            in_block = True
        yield line
        before = line


def mark_returns(lines: list[str]) -> Iterator[str]:
    """Yield a docstring's lines with what is returned under names, `output: ...`, as a list.

    A comment comes first, as napoleon would read the words before the first line's colon as a type.
    """
    in_returns = False
    for line in lines:
        if line and not line.startswith(" "):
            in_returns = line in ("Returns:", "Yields:")
        yield RETURNED.sub(r"\1- **\2** -- ", line).replace(" " * 8, " " * 6, 1) if in_returns else line
        if in_returns and not line.startswith(" ") and line:
            yield from ("    ..", "")


def origin(module: ModuleType, name: str) -> ModuleType:
    """Return the module in which an exported name is defined, by the imports of its package."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return origin(import_module(node.module or ""), name)
    return module


def variable_docstring(path: str) -> list[str]:
    """Return the lines of the docstring below a variable, where it is defined; none if there is none."""
    package, _, name = path.rpartition(".")
    body = ast.parse(inspect.getsource(origin(import_module(package), name))).body
    for node, below in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if found and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            return inspect.cleandoc(str(below.value.value)).splitlines()
    return []


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "data":
        lines[:] = variable_docstring(name)
    lines[:] = mark_returns(list(mark_equations(lines)))
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # as in mark_returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}
