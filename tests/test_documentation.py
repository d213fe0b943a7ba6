"""The documentation: links and anchors lead somewhere, Python runs, what a page names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
GUIDES = sorted(DOCS.glob("*.md"))
PAGES = [
    *(page for page in sorted(REPOSITORY.glob("*.md"))),
    *GUIDES,
    *sorted((REPOSITORY / "benchmarks").rglob("*.md")),
    *sorted((REPOSITORY / "results").rglob("*.md")),
]

LONGEST_PAGE = 120
"""Lines of a page in docs, which answers one question, without code cells and lists of pages."""

FRONT_MATTER = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n"
"""What makes a page a notebook, whose code cells run when the site is built."""

SOURCES = ("src", "csrc", "tests", "docs", "benchmarks", "results")
"""Folders whose files are named in full."""


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


CELL = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""A code cell; the site's build runs it."""

TREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""A list of pages below the one that holds it."""

every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_guide = pytest.mark.parametrize("page", GUIDES, ids=name_of)


def without_code(text: str) -> str:
    """Return Markdown without its code, fenced, indented or in a line."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> Iterator[str]:
    text = without_code(page.read_text(encoding="utf-8"))
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"<img[^>]*src=\"([^\"]+)\"", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def dead(page: Path, target: str) -> bool:
    """Whether a link to a file of this repository, or to a heading in one, leads nowhere."""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return not file.exists() or bool(anchor and anchor not in anchors(file))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    local = [target for target in links(page) if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if dead(page, target)] == []


def test_dead_links_are_found() -> None:
    page = DOCS / "index.md"
    assert not dead(page, "recurrence.md#the-laws")
    assert not dead(page, "../README.md")
    assert dead(page, "recurrence.md#no-such-heading")
    assert dead(page, "no-such-page.md")
    assert {"recurrence.md", "../RESULTS.md"} <= set(links(page))


@every_guide
def test_a_page_is_short_and_has_one_title(page: Path) -> None:
    text = page.read_text(encoding="utf-8").removeprefix(FRONT_MATTER)
    assert len(TREE.sub("", CELL.sub("", text)).splitlines()) <= LONGEST_PAGE
    assert re.sub(r"```.*?```", "", text, flags=re.DOTALL).count("\n# ") == 0
    assert text.startswith("# ")


@every_guide
def test_a_page_with_code_cells_is_a_notebook(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert bool(CELL.search(text)) == text.startswith(FRONT_MATTER)


@every_guide
def test_its_code_cells_are_python(page: Path) -> None:
    for cell in CELL.findall(page.read_text(encoding="utf-8")):
        ast.parse(re.sub(r"^(:tags:.*|%.*)\n", "", cell, flags=re.MULTILINE), name_of(page))


def test_every_page_is_listed() -> None:
    listed, names = set(links(DOCS / "index.md")), {page.name for page in GUIDES} - {"index.md"}
    assert names <= listed
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "".join(TREE.findall(index))
    assert {Path(name).stem for name in names} <= set(trees.split())
    assert "docs/index.md" in set(links(REPOSITORY / "README.md"))


@every_guide
def test_its_python_runs(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, name_of(page), "exec"), {})


@pytest.mark.parametrize("page", [*GUIDES, REPOSITORY / "CONTRIBUTING.md"], ids=name_of)
def test_files_that_it_names_are_there(page: Path) -> None:
    """Of the paths in backticks those that start with a folder of the repository, without placeholders."""
    named = re.findall(rf"`((?:{'|'.join(SOURCES)})/[\w./-]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@every_guide
def test_names_of_the_package_that_it_uses_are_there(page: Path) -> None:
    import minrnn

    for name in re.findall(r"\bminrnn\.(\w+)\(", page.read_text(encoding="utf-8")):
        assert hasattr(minrnn, name) or hasattr(minrnn.ops, name), name
