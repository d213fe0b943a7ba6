"""Figures in prose come from records: each is in STATEMENTS, or in DEFINITIONS with a reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from math import floor
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from measurements import QUALITY, Above, Below, case, minutes, records, short_loss, short_recipe
from statements import DEFINITIONS, STATEMENTS

from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.experiment import Choice
from minrnn.experiments.results import ResultsFolder

REPOSITORY = Path(__file__).parents[1]
READINGS = sorted((REPOSITORY / "results").glob("*/reading.md"))
PAGES = [
    path.relative_to(REPOSITORY).as_posix()
    for path in (
        REPOSITORY / "README.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
        REPOSITORY / "docs" / "results.md.template",
        *sorted((REPOSITORY / "src" / "minrnn" / "recipes").glob("*.toml")),
        *READINGS,
    )
]

COUNTS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
PARTS = [
    "half",
    "third",
    "quarter",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
]
DENOMINATORS = {name: number for number, name in enumerate(PARTS, start=2)}
DENOMINATORS |= {"halve": 2, "sixteenth": 16, "twentieth": 20, "hundredth": 100, "millionth": 1_000_000}

NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
COUNT = "|".join(COUNTS[1:])
UNIT = (
    r"(?:ms|µs|ns|(?:micro|milli)?seconds?|minutes?|hours?|kB|[KMGT]i?B(?:/s)?|%|per cent|nats?|times|points?"
    r"|bits a byte|instructions a)"
)
FIGURE = re.compile(
    rf"(?<![\w.,-]){NUMBER}(?=(?:,? (?:to|and|or|against|instead of) {NUMBER})?[ -]?{UNIT}(?![\w/]))"  # 3 ms
    r"|(?<![\w.,/-])(?<!arXiv )\d+\.\d+(?!\w|\.\d)"  # 0.45
    r"|(?<![\w.])\d+(?:\.\d+)?e[-+]?\d+(?!\w)"  # 2e-6
    rf"|{NUMBER}(?= ±)|(?<=± ){NUMBER}"  # 73.2 ± 2.1
    rf"|(?<=earned ){NUMBER}|(?<=returns ){NUMBER}"
    rf"|\b(?:{COUNT})(?=(?: (?:to|or) (?:{COUNT}))? {UNIT}(?!\w))"  # two minutes, two to four times
    rf"|\btwice\b|\b(?:{'|'.join(DENOMINATORS)})s?\b(?!-party)"  # a quarter
)


def prose(page: str) -> str:
    """Return a page in one line, without its code, and without README's tables, which have tests below."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    if page.endswith(".toml"):
        text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    else:
        text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"(?<=\n\n)(?: {4}.*\n)+", "", text)
        text = re.sub(r"\]\([^)\s]*\)", "]", text)
    if page == "README.md":
        text = re.sub(r"^\|.*\n", "", text, flags=re.MULTILINE)
    return " ".join(text.split())


def without_code(text: str) -> str:
    """Return text of the same length with code in a line blanked."""
    return re.sub(r"`[^`]*`", lambda match: "`" * len(match.group()), text)


def figures(text: str) -> Iterator[re.Match[str]]:
    return FIGURE.finditer(without_code(text))


def marked(part: str) -> list[tuple[int, int, str]]:
    """Return start, end and text of the figures in braces, as they stand in the part without braces."""
    found, shift = [], 0
    for match in re.finditer(r"\{([^}]+)\}", part):
        start = match.start() - shift
        found.append((start, start + len(match.group(1)), match.group(1)))
        shift += 2
    return found


def plain(part: str) -> str:
    return re.sub(r"[{}]", "", part)


def number(printed: str) -> float:
    """Return the number that a figure names."""
    words = printed.split()
    name = words[-1].removesuffix("s")
    if name in DENOMINATORS:
        over = COUNTS.index(words[0]) if words[0] in COUNTS else 1
        return over / DENOMINATORS[name]
    return float(COUNTS.index(printed)) if printed in COUNTS else float(printed.replace(",", ""))


def written(printed: str, value: Any) -> str:
    """Return a value in the form in which a figure is printed: 0.35, 1,361, 2e-07, two, a sixth."""
    if isinstance(value, str):
        return value
    if isinstance(value, Below):
        return printed if value.value < number(printed) else f"more than {value.value:.3g}"
    if isinstance(value, Above):
        scale = 10 ** len(printed.partition(".")[2])
        return written(printed, floor(round(scale * value.value, 6)) / scale)
    if printed in COUNTS:
        return COUNTS[round(value)] if round(value) < len(COUNTS) else f"{value:.0f}"
    if printed.split()[-1] in DENOMINATORS:
        names = {number: name for name, number in DENOMINATORS.items() if name != "halve"}
        name = names.get(round(1 / value), f"1/{1 / value:.0f} part")
        article = "an" if name[0] == "e" else "a"
        return name if name == "half" else f"{article} {name}"
    if "e" in printed:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.{len(printed.partition('.')[2])}f}"


def values_of(found: Any) -> list[Any]:
    if isinstance(found, Below | Above | str) or not hasattr(found, "__iter__"):
        return [found]
    return list(found)


@cache
def waits(page: str) -> str:
    """Return why a reading is not held to its records yet: minGRU's have settings of another version.

    Timings are held to theirs all the same, which may lack a newer system.
    """
    folder = Path(page).parent
    name, _, scale = folder.name.rpartition("-")
    if folder.parent.name != "results" or (records(name) and "systems" in records(name)[0]["result"]):
        return ""
    experiment, made = EXPERIMENTS[name].load(), ResultsFolder(REPOSITORY / "results", name, scale)
    for trial in experiment.trials(Choice(scale, mixers=("mingru",))):
        try:
            if made.record(trial, experiment) is not None:
                return ""
        except ValueError:  # of other settings
            continue
    return f"{name} has no record of this version's settings"


def skip_if_waiting(page: str) -> None:
    if reason := waits(page):
        pytest.skip(reason)


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_a_record_or_a_reason(page: str) -> None:
    skip_if_waiting(page)
    text = prose(page)
    known = set()
    for part, _ in STATEMENTS.get(page, []):
        at = text.find(plain(part))
        known |= {index for start, end, _ in marked(part) for index in range(at + start, at + end)}
    for part, _ in DEFINITIONS.get(page, []):
        at = text.find(part)
        known |= set(range(at, at + len(part)))
    unknown = [
        f"{page}: ...{text[max(0, match.start() - 40) : match.end() + 20]}...: {match.group()} needs "
        "a record in STATEMENTS, or a reason in DEFINITIONS"
        for match in figures(text)
        if not set(range(*match.span())) <= known
    ]
    assert not unknown, "\n" + "\n".join(unknown)


@pytest.mark.parametrize("page", STATEMENTS)
def test_statements_are_what_was_measured(page: str) -> None:
    skip_if_waiting(page)
    text, wrong = prose(page), []
    for part, measure in STATEMENTS[page]:
        said = plain(part)
        if text.count(said) != 1:
            wrong.append(f"{page}: must say once {said!r}, says it {text.count(said)} times")
            continue
        printed, found = [figure for *_, figure in marked(part)], values_of(measure())
        if not printed:
            wrong += [] if found == [True] else [f"{page}: {said!r} is not what was measured"]
            continue
        assert len(found) == len(printed), f"{page}: {said!r} has {len(printed)} figures, got {len(found)}"
        new = [written(figure, value) for figure, value in zip(printed, found, strict=True)]
        if new != printed:
            fields = iter(new)
            changed = re.sub(r"\{[^}]+\}", lambda _: next(fields), part)  # noqa: B023
            wrong.append(f"{page}: {said!r} must become {changed!r}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", DEFINITIONS)
def test_definitions_are_on_their_pages_and_hold_figures(page: str) -> None:
    skip_if_waiting(page)
    text = prose(page)
    for part, reason in DEFINITIONS[page]:
        at = text.find(part)
        assert at >= 0, f"{page}: no longer says {part!r}"
        assert reason
        inside = [m for m in figures(text) if at <= m.start() and m.end() <= at + len(part)]
        assert inside, f"{page}: {part!r} holds no figure"


def test_pages_of_both_tables_exist() -> None:
    assert {*STATEMENTS, *DEFINITIONS} <= set(PAGES)


def test_readme_speed_is_that_of_the_record() -> None:
    systems = {"`nn.Linear(": "linear", "**`minrnn.MinGRU(": "minrnn", "minGRU-pytorch": "mingru-pytorch"}
    systems["`torch.nn.GRU("] = "gru"
    for start, system in systems.items():
        cells = row_of(start)[1:]
        found = [
            case("layer", system, T=512, D=256, B=16),
            case("layer", system, T=1024, D=512, B=8),
        ]
        assert cells == [
            f"{1e3 * one['seconds']['step']['median']:.0f} ms, {one['peak_bytes'] / 1e6:.0f} MB"
            for one in found
        ], system


@pytest.mark.parametrize("mixer", QUALITY)
def test_readme_quality_is_that_of_the_records(mixer: str) -> None:
    found = short_recipe(mixer)
    windowed = mean(run["val_loss_windowed_64"] for run in found)
    assert row_of(f"{mixer} ")[1:] == [
        f"{found[0]['parameters'] / 1e6:.2f} M",
        f"{short_loss(mixer):.3f}",
        f"{windowed:.3f}",
        f"{minutes(found):.1f}",
    ]


def test_results_print_no_negative_zero_and_no_empty_time() -> None:
    results = (REPOSITORY / "RESULTS.md").read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])-0(?:\.0+)?(?![\w.])", results) == []
    assert re.findall(r"(?<![\d.])(?:1 trials|0(?:\.0)? (?:hours|minutes|seconds))\b", results) == []


def row_of(start: str) -> list[str]:
    """Return the cells of the row of README's tables that begins so."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| {re.escape(start)}.*$", readme, re.MULTILINE)
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("takes 0.35 ms, 1,361 MB and 3 hours", ["0.35", "1,361", "3"]),
        ("99.5 % of 256 symbols", ["99.5"]),
        ("144 ms and 403 MB, 10 to 20 GB/s", ["144", "403", "10", "20"]),
        ("12 against 48 microseconds", ["12", "48"]),
        ("73.2 ± 2.1, 5 ± 4", ["73.2", "2.1", "5", "4"]),
        ("earned 2,975 of 3,288", ["2,975"]),
        ("a sixth, two fifths and half of it, twice", ["sixth", "fifths", "half", "twice"]),
        ("two to four times slower in five minutes", ["two", "four", "five"]),
        ("an error of 2e-6. An accuracy of 0.94.", ["2e-6", "0.94"]),
        ("arXiv 2410.01201, Python 3.11.7, minGRU-pytorch 0.2.1, width 128, T = 4,096", []),
        ("`0.35 ms` third-party D4RL's table 3, layers 2 and 3", []),
    ],
)
def test_figures_are_found(text: str, expected: list[str]) -> None:
    assert [match.group() for match in figures(text)] == expected


@pytest.mark.parametrize(
    ("printed", "value", "expected"),
    [
        ("0.35", 0.3478, "0.35"),
        ("0.35", 0.361, "0.36"),
        ("1,361", 1324.4, "1,324"),
        ("2e-6", 1.2e-6, "1e-6"),
        ("two", 3.6, "four"),
        ("eleven", 40.2, "40"),
        ("a sixth", 0.168, "a sixth"),
        ("a sixth", 0.125, "an eighth"),
        ("half", 0.34, "a third"),
        ("half", Below(0.46), "half"),
        ("half", Below(0.52), "more than 0.52"),
        ("99.5", Above(99.51), "99.5"),
        ("99.5", Above(99.49), "99.4"),
        ("AMD EPYC", "Abacus", "Abacus"),
    ],
)
def test_values_are_written_as_figures_are_printed(printed: str, value: Any, expected: str) -> None:
    assert written(printed, value) == expected


def test_a_figure_that_is_no_longer_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "minGRU takes a third of GRU's time, 0.026 ms, and wins."
    monkeypatch.setitem(globals(), "prose", lambda _: text)
    cases: list[tuple[str, Any, str]] = [
        ("takes {a third} of GRU's", 0.24, 'must become "takes a quarter of GRU\'s"'),
        ("takes {a quarter} of GRU's", 0.24, 'must say once "takes a quarter of GRU\'s", says it 0 times'),
        (", and wins.", False, "', and wins.' is not what was measured"),
    ]
    for part, value, message in cases:
        monkeypatch.setitem(STATEMENTS, "page", [(part, lambda value=value: value)])
        with pytest.raises(AssertionError, match=re.escape(message)):
            test_statements_are_what_was_measured("page")
    monkeypatch.setitem(STATEMENTS, "page", [("takes {a third} of GRU's", lambda: 0.333)])
    test_statements_are_what_was_measured("page")
    with pytest.raises(AssertionError, match=r"0\.026 needs a record in STATEMENTS, or a reason"):
        test_every_figure_has_a_record_or_a_reason("page")
    monkeypatch.setitem(STATEMENTS, "page", [("{a third} of GRU's time, {0.026} ms", lambda: (0.333, 0.026))])
    test_every_figure_has_a_record_or_a_reason("page")
