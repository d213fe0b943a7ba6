"""RESULTS.md: a template filled with tables of results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minrnn.benchmarks import BENCHES
from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.experiment import Choice, Experiment, Record, Table
from minrnn.experiments.parameters import parameter_table
from minrnn.experiments.records import bests, by_kind, counted, duration
from minrnn.experiments.results import ResultsFolder
from minrnn.experiments.runner import command_of
from minrnn.experiments.shakespeare import earlier_runs
from minrnn.files import read_json, replace_text
from minrnn.training import is_changed

__all__ = ["write_page"]

REPORTED = ("cpu", "paper")
"""The scales that are reported; tiny is a smoke test."""

SHOWN_ABOVE = ("shakespeare-cpu",)
"""Experiments whose earlier runs have a table in the page's own text."""

READING = "reading.md"
"""File in an experiment's folder: a written interpretation of its tables, if there is one."""


def write_page(page: Path, benchmarks: Path, results: Path, target: Path, *, changed: bool = False) -> None:
    """Write the page of results.

    Args:
        page: the template, with {name[table]} in place of the table of a benchmark's document name.json.
        benchmarks: folder of the results of `minrnn bench`.
        results: folder of the results of `minrnn reproduce`.
        target: the file to write; links to pictures are relative to it.
        changed: also show what was made by code that differs from its commit, marked as such.

    Raises:
        FileNotFoundError: the template or a file that it needs does not exist.
        ValueError: the template names a table that does not exist, a file is damaged, or a result was made by
            changed code, and `changed` is false.
    """
    if not changed:
        _check_unchanged(benchmarks, results)
    text = page.read_text(encoding="utf-8")
    given: dict[str, Any] = {}
    with _of_this_version(benchmarks):
        given["shakespeare"] = _shakespeare(benchmarks / "shakespeare-cpu")
    with _of_this_version(results):
        given["experiments"] = experiments(results, target.parent)
    with _of_this_version(benchmarks):
        written = text.format_map(_Figures(page, benchmarks, given))
    replace_text(target, written)


def _check_unchanged(benchmarks: Path, results: Path) -> None:
    """Raise ValueError if a reported result was made by code that differs from its commit."""
    found: dict[str, list[str]] = {}
    for name in EXPERIMENTS:
        for folder in (ResultsFolder(results, name, scale) for scale in REPORTED):
            cells = [record["cell"] for record in folder.records() if is_changed(record)]
            found |= {str(folder.path): cells} if cells else {}
    documents = [
        path for path in sorted(benchmarks.glob("*.json")) if is_changed(read_json(path, dict[str, Any]))
    ]
    found |= {str(benchmarks): [path.name for path in documents]} if documents else {}
    if found:
        counts = ", ".join(f"{len(names)} in {folder} ({names[0]}, ...)" for folder, names in found.items())
        raise ValueError(
            f"report: results must be made by the code of a commit, got results of changed code: {counts}; "
            "make them again, or show them too with --changed"
        )


@contextmanager
def _of_this_version(folder: Path) -> Iterator[None]:
    """Convert errors about missing entries, which files of other versions may lack, to ValueError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report: the files in {folder} must be this version's, and one lacks an entry of a table "
            f"({type(error).__name__}: {error})"
        ) from error


def experiments(results: Path, beside: Path) -> str:
    """Return a section for each experiment with finished trials, and one on parameters.

    Args:
        results: the folder of all experiments' results.
        beside: the folder to which links to pictures are relative.
    """
    sections = [_parameters()]
    missing = []
    for name, entry in EXPERIMENTS.items():
        folders = [ResultsFolder(results, name, scale) for scale in REPORTED]
        found = {folder: records for folder in folders if (records := folder.records())}
        if not found:
            missing += [f"`{name}` ({entry.shows})"] if name not in SHOWN_ABOVE else []
            continue
        experiment = entry.load()
        parts = [f"## {experiment.title}", experiment.question, f"*Changed:* {experiment.changes}"]
        parts += [
            _scale(experiment, folder, records, beside, len(found) > 1) for folder, records in found.items()
        ]
        sections.append("\n\n".join(parts))
    if missing:
        sections.append(
            f"## Not measured yet\n\nOf the experiments, {', '.join(missing)}: `minrnn reproduce NAME` makes "
            f"them."
        )
    return "\n\n".join(sections)


def _parameters() -> str:
    return f"## Parameters\n\n{parameter_table().markdown()}"


def _scale(
    experiment: Experiment, folder: ResultsFolder, records: Sequence[Record], beside: Path, headed: bool
) -> str:
    """Return an experiment's tables and plot at one scale, with their provenance."""
    parts = [f"### {folder.scale}"] if headed else []
    picture = folder.path / "plot.png"
    if picture.is_file():
        parts.append(f"![{experiment.title}]({os.path.relpath(picture, beside)})")
    reading = folder.path / READING
    if reading.is_file():
        parts.append(f"*Interpretation.* {reading.read_text(encoding='utf-8').strip()}")
    parts += [table.markdown() for table in experiment.tables(records)]
    root = Path(os.path.relpath(folder.path.parent, beside))
    scales: dict[str, Choice] = {"cpu": Choice(), "paper": Choice(scale="paper")}
    command = command_of(experiment.name, scales[folder.scale], root)
    parts.append(f"{_provenance(records)}\n\n    {command}")
    if folder.scale == "cpu":
        paper = command_of(experiment.name, scales["paper"], root)
        parts.append(
            f"At the paper's own setting (add `--estimate` to see how long it would take):\n\n    {paper}"
        )
    return "\n\n".join(parts)


def _provenance(records: Sequence[Record]) -> str:
    """Describe the machines, commits and computing time of trials."""
    commits = sorted({_commit(record) for record in records})
    failed = [record["cell"] for record in records if record["failed"] is not None]
    spent = duration(sum(record["seconds"] for record in records))
    text = (
        f"{counted(len(records), 'trial')}, {spent} of computing in all, on {_machines(records)}; "
        f"commit {', '.join(commits)}."
    )
    return text + (f" Diverged: {', '.join(failed)}." if failed else "")


def _machines(records: Sequence[Record]) -> str:
    """Describe the machines of trials; if there are several, also which mixers ran where."""
    mixers: dict[str, set[str]] = {}
    for record in records:
        mixers.setdefault(_machine(record), set()).add(record["setting"].get("mixer", "all"))
    if len(mixers) == 1:
        return next(iter(mixers))
    found = "; ".join(f"{machine}: {', '.join(sorted(names))}" for machine, names in sorted(mixers.items()))
    return f"several machines, whose times do not compare ({found})"


def _commit(record: Record) -> str:
    if record["commit"] is None:
        return "of an installed package"
    return f"{record['commit'][:12]}{' with changes' if is_changed(record) else ''}"


def _machine(record: Record) -> str:
    machine, torch = record["machine"], record["versions"]["torch"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    if record["device"] == "cpu":
        return f"{machine['processor']} ({threads}), torch {torch}"
    return f"{record['device']}, torch {torch}"


class _Figures(dict[str, Any]):
    """The values of {name} in the template: `given`, or the document name.json of a benchmark.

    The template can use entries of a document, such as {scan[command]}; its `table` is rendered by its
    benchmark.
    """

    def __init__(self, page: Path, folder: Path, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.page, self.folder = page, folder

    def __missing__(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name.replace('_', '-')}.json"
        if not path.is_file():
            known = [*sorted(path.stem.replace("-", "_") for path in self.folder.glob("*.json")), *self]
            raise ValueError(f"report: {self.page} must name tables among {', '.join(known)}, got {name!r}")
        document = read_json(path, dict[str, Any])
        return {**document, "table": BENCHES[document["benchmark"]].load().render(document)}


def _shakespeare(folder: Path) -> dict[str, Any]:
    """Return the table of the earlier runs of shakespeare-cpu, the slowdown of RNN, GRU and LSTM, ..."""
    records = earlier_runs(folder)
    (table,) = EXPERIMENTS["shakespeare-cpu"].load().tables(records)
    runs = by_kind(records, "mixer")
    seconds = {mixer: statistics.mean(bests(found, "seconds")) for (mixer,), found in runs.items()}
    ratios = [seconds[slow] / seconds["mingru"] for slow in ("rnn", "gru", "lstm") if slow in seconds]
    return {
        "table": Table("", table.head, table.rows).markdown(),
        "slowdown": f"{min(ratios):.1f} to {max(ratios):.1f}",
        **{about: records[0]["result"][about] for about in ("machine", "versions")},
    }
