"""The API reference: it has every public name once, and what it shows of one that has no docstring itself."""

from __future__ import annotations

import ast
import inspect
import re
from contextlib import suppress
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


def is_checked(path: str) -> bool:
    """Whether a name is a function or class that checks its arguments, as all do that say nothing else."""
    value = found(path)
    return directive(value) in ("autofunction", "autoclass") and "Arguments are not checked." not in str(
        value.__doc__
    )


CALLABLES = sorted({path for page in ROOMS for _, path in documented(page) if is_checked(path)})


@pytest.mark.parametrize("path", CALLABLES)
@pytest.mark.parametrize("value", [20, "x", None, [1.5]], ids=repr)
def test_arguments_of_another_kind_are_refused(
    path: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever all required arguments are, the error is none of an attribute or key that they lack."""
    monkeypatch.chdir(tmp_path)
    call = found(path)
    assert callable(call)
    required = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
    positional = [value for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = {p.name: value for p in required if p.kind is p.KEYWORD_ONLY}
    with suppress(TypeError, ValueError, OSError, RuntimeError):
        call(*positional, **named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CALLABLES)
def test_paths_may_be_strings(path: str) -> None:
    call = found(path)
    assert callable(call)
    hints = {name: str(p.annotation) for name, p in inspect.signature(call).parameters.items()}
    assert [name for name, hint in hints.items() if "Path" in hint and "str" not in hint] == []
