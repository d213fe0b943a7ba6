"""The package's docstrings in Sphinx's markup: equations are literal blocks, tables are documented where made."""

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

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
    """Yield a docstring's lines with what is returned under names, `output: ...`, as a list."""
    in_returns = False
    for line in lines:
        if line and not line.startswith(" "):
            in_returns = line == "Returns:"
        yield RETURNED.sub(r"\1- **\2** – ", line).replace(" " * 8, " " * 6, 1) if in_returns else line


def origin(module: ModuleType, name: str) -> str:
    """Return the module in which an exported name is defined, by the imports of its package."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            return origin(import_module(node.module or ""), name)
    return module.__name__


def attribute_docstring(path: str) -> list[str]:
    """Return the docstring below a module's variable, which autodoc looks for only where it is exported."""
    package, _, name = path.rpartition(".")
    analyzer = ModuleAnalyzer.for_module(origin(import_module(package), name))
    return analyzer.find_attr_docs().get(("", name), [])


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "data":
        lines[:] = attribute_docstring(name)
    lines[:] = mark_returns(list(mark_equations(lines)))
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment, as napoleon reads a first line's words before a colon as a type


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True}
