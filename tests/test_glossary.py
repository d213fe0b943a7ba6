"""The package's words: each has one meaning (docs/glossary.md), names are American, prose is plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "minrnn"
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]

DIALECT = {
    r"how manieth": "its index",
    r"doors?": "entry",
    r"store?ys?": "layer",
    r"nobody (watches|tells|can tell|wants|asks|asked)": "unless hooks are active, ...",
    r"who (serves|watches|acts|learns|computes|owns|takes|moves|pays)": "which backend, which policy, ...",
    r"whom": "which",
    r"dress(es)?": "repack",
    r"glances?": "look-back",
    r"as (it|they) (lie|lies|stand|stands)": "unchanged, in place",
    r"drives?": "input term b",
    r"law of": "definition",
    r"what (it is|they are) told": "its arguments",
    r"for want of": "because there is no",
    r"figures for people": "a table",
    r"thrice": "three times",
    r"the house": "the architecture",
    r"a line and no more": "a one-line error",
}
"""Words that the field does not use, as patterns, and what it says in their place."""

BRITISH = re.compile(
    r"colour|behaviour|honour|neighbour|favour|flavour|centre|grey|artefact|catalogue|licence"
    r"|(label|model|cancel|travel|signal|total)l(ed|ing)"
    r"|(normal|initial|token|optim|quant|serial|organ|recogn|synchron|summar|standard|orthogonal|discret|vector"
    r"|parametr|final|general|random|minim|maxim|util|visual|special|local|material|regular|real|factor)is(e|ing|ation)"
)
"""British spellings, in names written in lower case."""


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield what people read of a module, with lines: docstrings, help texts, messages."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def dialect(text: str) -> list[str]:
    """Return the banned phrases of a text, each with what to say in its place."""
    text = re.sub(r"\s+", " ", text)
    return [
        f"{found[0]!r}: say {plain}"
        for pattern, plain in DIALECT.items()
        for found in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE)
    ]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_texts_are_in_plain_words(path: Path) -> None:
    assert [f"line {line}: {found}" for line, text in texts(path) for found in dialect(text)] == []


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_are_in_plain_words(path: Path) -> None:
    assert dialect(path.read_text(encoding="utf-8")) == []


def test_dialect_is_found() -> None:
    assert dialect("The\n    drive b, while nobody\n    watches.") == [
        "'nobody watches': say unless hooks are active, ...",
        "'drive': say input term b",
    ]
    assert dialect("Driven by data; the state is carried, unobserved.") == []


def targets(node: ast.stmt) -> Iterator[str]:
    """Yield the names that an assignment, or a definition with its parameters, introduces."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
        arguments = node.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            yield argument.arg
    elif isinstance(node, ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Assign):
        yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def is_public(node: ast.stmt) -> bool:
    return not getattr(node, "name", "").startswith("_") or getattr(node, "name", "") == "__init__"


def public_names(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the public names of a module: functions, classes and their members, parameters, constants."""
    for node in body:
        if is_public(node):
            yield from (name for name in targets(node) if not name.startswith("_"))
            if isinstance(node, ast.ClassDef):
                yield from public_names(node.body)


def british(name: str) -> bool:
    return BRITISH.search(name.lower()) is not None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_names_are_in_american_spelling(path: Path) -> None:
    names = [path.stem, *public_names(ast.parse(path.read_text(encoding="utf-8")).body)]
    assert [name for name in names if british(name)] == []


def test_british_names_are_found() -> None:
    code = (
        "UNNORMALISED = 1\nclass Behaviour:\n    colour: str = ''\n"
        "    def tokenise(self, *, labelled=True): ...\n    def _initialise(self): ..."
    )
    found = list(public_names(ast.parse(code).body))
    assert [name for name in found if british(name)] == [*found[:4], "labelled"]
    american = [
        "normalize",
        "analysis",
        "emphasis",
        "otherwise",
        "raises",
        "precision",
        "supervised",
        "noise",
    ]
    assert [name for name in american if british(name)] == []


def entries() -> list[str]:
    """Return the words that the glossary defines."""
    text = (REPOSITORY / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    return [word.strip("` ") for row in rows if row not in ("word", "---") for word in row.split(",")]


def test_a_word_has_one_entry() -> None:
    words = entries()
    assert sorted(set(words)) == sorted(words)


def test_words_that_had_several_meanings_are_in_it() -> None:
    several = {"batch", "cell", "chunk", "hidden state", "packed", "step", "task", "window"}
    assert several <= {*entries()}
