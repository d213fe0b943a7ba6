"""What the site's build does to docstrings and links (docs/sphinx), and the looks of its figures."""

from __future__ import annotations

import re
import sys
import zlib
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS / "sphinx"))

from docstrings import mark_equations, mark_returns, origin, variable_docstring  # noqa: E402
from inventories import ADDRESSES, NAMES, entries, inventory  # noqa: E402
from repository_links import PROJECT_PAGES, redirect  # noqa: E402

import minrnn  # noqa: E402

sys.path.remove(str(DOCS / "sphinx"))

VARIABLES = [
    path
    for page in sorted((DOCS / "api").glob("*.rst"))
    for path in re.findall(r"^\.\. autodata:: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
]
"""Variables that the reference documents."""


def test_equations_become_literal_blocks() -> None:
    lines = ["Do it.", "", "    a = b", "", "    c = d", "", "More.", "    no equation", "", "    e = f"]
    marked = ["Do it.", "", "::", "", "    a = b", "", "    c = d", "", "More.", "    no equation"]
    assert list(mark_equations(lines)) == [*marked, "", "::", "", "    e = f"]


@pytest.mark.parametrize("section", ["Args", "Returns", "Raises", "Example"])
def test_sections_are_no_equations(section: str) -> None:
    lines = [
        "Do it.",
        "",
        f"{section}:",
        "    one: a",
        "",
        "    two: b",
        "",
        "Source: here.",
        "",
        "    a = b",
    ]
    assert list(mark_equations(lines)) == [*lines[:9], "::", "", "    a = b"]


def test_what_is_returned_under_names_is_a_list() -> None:
    lines = [
        "Args:",
        "    x: in",
        "Returns:",
        "    y: out, which",
        "        goes on",
        "    h_n: state",
        "Raises:",
    ]
    lines += ["    ValueError: no"]
    marked = ["    - **y** -- out, which", "      goes on", "    - **h_n** -- state"]
    assert list(mark_returns(lines)) == [*lines[:3], "    ..", "", *marked, *lines[6:]]


def test_what_is_returned_without_a_name_is_left_alone() -> None:
    lines = ["Yields:", "    The module; `(B,)`: a shape."]
    assert list(mark_returns(lines)) == ["Yields:", "    ..", "", lines[1]]


def test_variables_are_documented_where_they_are_defined() -> None:
    assert origin(minrnn, "GATES").__name__ == "minrnn.ops.gates"
    assert variable_docstring("minrnn.GATES") == variable_docstring("minrnn.ops.gates.GATES") != []
    assert variable_docstring("minrnn.ops.chunks.ALL") == []


@pytest.mark.parametrize("path", VARIABLES)
def test_variables_of_the_reference_have_a_docstring(path: str) -> None:
    assert variable_docstring(path)


def test_links_lead_to_the_pages_of_the_site() -> None:
    others = "[b](numerics.md#x) [c](../tests/costs.py) [d](https://x.org/RESULTS.md) [e](../tests/x.md)"
    text, ours = f"[a](../RESULTS.md#speed) {others}", f"[a](project/results.md#speed) {others}"
    assert redirect(text, "docs", ".") == ours
    assert redirect("[a](docs/numerics.md) [b](CHANGELOG.md)", ".", "project") == (
        "[a](../numerics.md) [b](changelog.md)"
    )


@pytest.mark.parametrize(("path", "page"), PROJECT_PAGES.items())
def test_pages_outside_of_docs_are_included(path: str, page: str) -> None:
    assert f"```{{include}} ../../{path}\n" in (DOCS / page).read_text(encoding="utf-8")
    assert (DOCS.parent / path).is_file()


def test_inventories_hold_the_names_of_the_list() -> None:
    listed = [line for line in NAMES.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    assert sum(len(list(entries(project))) for project in ADDRESSES) == len(listed) > 0
    *header, body = inventory("torch").split(b"\n", 4)
    assert header[0] == b"# Sphinx inventory version 2"
    lines = zlib.decompress(body).decode().splitlines()
    assert "torch.nn.GRU py:class 1 generated/torch.nn.GRU.html#$ -" in lines
    assert not [line for line in lines if "numpy" in line]
