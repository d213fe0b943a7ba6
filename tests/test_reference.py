"""The API reference: it has every public name once, and what it shows of one that has no docstring itself."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path
from types import GenericAlias, UnionType

import pytest

import minrnn

REFERENCE = Path(__file__).parents[1] / "docs" / "api"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(REFERENCE.glob("*.rst"))}
ROOMS = {
    "layers": "mixers",
    "operators": "ops",
    "models": "models",
    "tasks": "tasks",
    "training": "training",
    "distributed": "distributed",
    "export": "export",
}
"""The reference's pages, and the subpackage that each is about."""
EXTRAS = "integrations"
"""The page of modules that are imported by themselves, where what they are for is installed."""

DIRECTIVE = re.compile(r"^\.\. (auto\w+):: (\S+)$", re.MULTILINE)


def public(room: str) -> list[str]:
    """Return the names that a subpackage exports, each by the path that it is imported from."""
    tree = ast.parse(inspect.getsource(import_module(f"minrnn.{room}")))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    return sorted(f"minrnn.{name}" if name in minrnn.__all__ else f"minrnn.{room}.{name}" for name in names)


def found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def directive(value: object) -> str:
    """Return the directive that documents a value."""
    if inspect.isclass(value) and not isinstance(value, GenericAlias | UnionType):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction" if inspect.isfunction(value) else "autodata"


def documented(page: str) -> list[tuple[str, str]]:
    return DIRECTIVE.findall(PAGES[page])


@pytest.mark.parametrize(("page", "room"), ROOMS.items())
def test_every_public_name_is_in_the_reference_once(page: str, room: str) -> None:
    assert sorted(path for _, path in documented(page)) == public(room)


def test_every_name_of_the_package_itself_is_there() -> None:
    listed = {path for page in ROOMS for _, path in documented(page)}
    assert {f"minrnn.{name}" for name in minrnn.__all__} <= listed


def test_every_page_of_the_reference_is_in_its_list() -> None:
    assert re.findall(r"^   (\w+)$", PAGES["index"], re.MULTILINE) == [*ROOMS, EXTRAS]
    assert PAGES.keys() == {"index", *ROOMS, EXTRAS}


@pytest.mark.parametrize("page", ROOMS)
def test_names_are_documented_as_what_they_are(page: str) -> None:
    assert [(kind, path) for kind, path in documented(page) if kind != directive(found(path))] == []
