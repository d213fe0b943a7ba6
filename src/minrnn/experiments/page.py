"""RESULTS.md: the text of a page with every table in its place, from what was measured."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.experiment import Choice, Experiment, Record, Table
from minrnn.experiments.parameters import parameter_table
from minrnn.experiments.records import bests, by_kind
from minrnn.experiments.results import ResultsFolder
from minrnn.experiments.runner import command_of
from minrnn.experiments.shakespeare import earlier_runs
from minrnn.files import read_json, replace_text

__all__ = ["write_page"]

REPORTED = ("cpu", "paper")
"""Scales that mean something; tiny is not reported."""

SHOWN_ABOVE = ("shakespeare-cpu",)
"""Experiments whose earlier runs have a table in the page's own text."""

READING = "reading.md"
"""In an experiment's folder: what somebody read in its tables, if anybody did."""


def write_page(page: Path, benchmarks: Path, results: Path, target: Path) -> None:
    """Write the page of results.

    Args:
        page: its text, with {names} where tables go.
        benchmarks: the folder of what `minrnn bench` and benchmarks/ wrote.
        results: the folder of what `minrnn reproduce` wrote.
        target: the file to write; pictures are linked from where it lies.

    Raises:
        FileNotFoundError: the text or a file that it needs is not there.
        ValueError: it names a table that there is not, or a file is damaged.
    """
    text = page.read_text(encoding="utf-8")
    with _of_this_version(benchmarks):
        figures = _Benchmarks(benchmarks).figures()
    with _of_this_version(results):
        figures["experiments"] = experiments(results, target.parent)
    try:
        written = text.format(**figures)
    except KeyError as error:
        raise ValueError(
            f"report: {page} must name tables among {', '.join(figures)}, got {error}"
        ) from error
    replace_text(target, written)


@contextmanager
def _of_this_version(folder: Path) -> Iterator[None]:
    """Say where figures are missing: what the tables ask for, other versions may not have written."""
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"report: the files in {folder} must be this version's, and one lacks what a table asks for "
            f"({type(error).__name__}: {error})"
        ) from error


def experiments(results: Path, beside: Path) -> str:
    """Return a section for each experiment that has finished cells, and one on parameters.

    Args:
        results: the folder of all experiments' results.
        beside: the folder that links to pictures start from.
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
    """Return an experiment's tables and plot at one scale, with what they were made by."""
    parts = [f"### {folder.scale}"] if headed else []
    picture = folder.path / "plot.png"
    if picture.is_file():
        parts.append(f"![{experiment.title}]({os.path.relpath(picture, beside)})")
    reading = folder.path / READING
    if reading.is_file():
        parts.append(f"*What it says.* {reading.read_text(encoding='utf-8').strip()}")
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
    """Say on what, with what and for how long the cells were computed."""
    commits = sorted({_commit(record["commit"]) for record in records})
    failed = [record["cell"] for record in records if record["failed"] is not None]
    hours = sum(record["seconds"] for record in records) / 3600
    text = (
        f"{len(records)} cells, {hours:.1f} hours of computing in all, on {_machines(records)}; "
        f"commit {', '.join(commits)}."
    )
    return text + (f" Diverged: {', '.join(failed)}." if failed else "")


def _machines(records: Sequence[Record]) -> str:
    """Say where cells were computed; of several machines, also which mixers where."""
    mixers: dict[str, set[str]] = {}
    for record in records:
        mixers.setdefault(_machine(record), set()).add(record["setting"].get("mixer", "all"))
    if len(mixers) == 1:
        return next(iter(mixers))
    found = "; ".join(f"{machine}: {', '.join(sorted(names))}" for machine, names in sorted(mixers.items()))
    return f"several machines, whose times do not compare ({found})"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "of an installed package"
    return commit[:12] + (" with changes" if commit.endswith("-dirty") else "")


def _machine(record: Record) -> str:
    machine, torch = record["machine"], record["versions"]["torch"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    if record["device"] == "cpu":
        return f"{machine['processor']} ({threads}), torch {torch}"
    return f"{record['device']}, torch {torch}"


class _Benchmarks:
    """The tables of what was measured by `minrnn bench` and by the scripts in benchmarks/."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def figures(self) -> dict[str, str]:
        return self._shakespeare() | self._speed() | self._model_step() | self._accuracy()

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / f"{name}.json", dict[str, Any])

    def _shakespeare(self) -> dict[str, str]:
        records = earlier_runs(self.folder / "shakespeare-cpu")
        (table,) = EXPERIMENTS["shakespeare-cpu"].load().tables(records)
        runs = by_kind(records, "mixer")
        seconds = {mixer: statistics.mean(bests(found, "seconds")) for (mixer,), found in runs.items()}
        ratios = [seconds[slow] / seconds["mingru"] for slow in ("rnn", "gru", "lstm") if slow in seconds]
        return {
            "shakespeare": _markdown(table.head, table.rows),
            "slowdown": f"{min(ratios):.1f} to {max(ratios):.1f}",
        }

    def _speed(self) -> dict[str, str]:
        reports = {
            name: self._read(name.replace("_", "-"))
            for name in ("scan", "layer", "layer_sensors", "layer_lengths", "shares")
        }
        scan = reports["scan"]
        cores = f"{scan['machine']['processor']} ({scan['machine']['cores']} cores)"
        return {
            "machine": f"{cores}, torch {scan['versions']['torch']}",
            "threads": str(scan["results"][0]["threads"]),
            "scan": _systems(scan),
            "layer": _systems(reports["layer"]),
            "layer_sensors": _systems(reports["layer_sensors"]),
            "layer_lengths": _lengths(reports["layer_lengths"]),
            "shares": _shares(reports["shares"]),
            **{f"{name}_command": report["command"] for name, report in reports.items()},
        }

    def _model_step(self) -> dict[str, str]:
        report = self._read("model-step")
        machine = report["machine"]
        rows = []
        for case in report["cases"]:
            times = {name: 1e3 * system["seconds"]["median"] for name, system in case["systems"].items()}
            rows.append(
                [
                    *(f"{size:,}" for size in case["shape"].values()),
                    *(f"{time:.3g}" for time in times.values()),
                    f"{times['torch'] / times['one call']:.1f}",
                ]
            )
        head = ["rows", "width", "layers", "in one call, ms", "in torch's operations, ms"]
        head += ["a GRU in torch, ms", "torch's operations, times the call"]
        return {
            "model_step": _markdown(head, rows),
            "model_step_machine": f"{machine['processor']} ({machine['threads']} thread)",
        }

    def _accuracy(self) -> dict[str, str]:
        report = self._read("accuracy")
        errors = {
            (result["system"], result["dtype"], result["forgetting"], result["T"]): result["error"]["h"]
            for result in report["results"]
        }
        lines = dict.fromkeys((system, dtype, forgetting) for system, dtype, forgetting, _ in errors)
        lengths = (2**8, 2**12, 2**16, 2**20)
        rows = [
            [
                f"{system} {dtype}",
                forgetting,
                *(f"{errors[system, dtype, forgetting, T]:.1e}" for T in lengths),
            ]
            for system, dtype, forgetting in lines
        ]
        head = ["system", "forgetting", *(f"T = {T:,}" for T in lengths)]
        return {"accuracy": _markdown(head, rows), "accuracy_command": report["command"]}


def _systems(report: Mapping[str, Any]) -> str:
    """One line for each shape and system: milliseconds, and how many times ours."""
    rows = []
    for result in report["results"]:
        for name, record in result["systems"].items():
            if "seconds" not in record:
                continue
            times = record["seconds"]
            rows.append(
                [
                    ", ".join(str(size) for size in result["shape"].values()),
                    name,
                    *(f"{times[phase]['median'] * 1e3:.2f}" for phase in ("forward", "backward", "step")),
                    f"{record['times_ours']:.2f}",
                    f"{record['peak_bytes'] / 1e6:.0f}",
                ]
            )
    head = ["B, T, D", "system", "forward, ms", "backward, ms", "step, ms", "times ours"]
    return _markdown([*head, "memory at the peak, MB"], rows)


def _lengths(report: Mapping[str, Any]) -> str:
    """One line for each length: our step, how many times that the others take, and everyone's memory."""
    names = [name for name in report["results"][0]["systems"] if name != "minrnn"]
    rows = []
    for result in report["results"]:
        systems = result["systems"]
        rows.append(
            [
                f"{result['shape']['T']:,}",
                f"{systems['minrnn']['seconds']['step']['median'] * 1e3:.1f}",
                *(f"{systems[name]['times_ours']:.2f}" if name in systems else "" for name in names),
                *(
                    f"{systems[name]['peak_bytes'] / 1e6:.0f}" if name in systems else ""
                    for name in ("minrnn", *names)
                ),
            ]
        )
    head = ["T", "minrnn, ms", *(f"{name}, times ours" for name in names)]
    return _markdown([*head, *(f"{name}, MB" for name in ("minrnn", *names))], rows)


def _shares(report: Mapping[str, Any]) -> str:
    alone = {
        (str(result["shape"]), result["gate"], result["dtype"]): result["systems"]["minrnn"]["seconds"][
            "step"
        ]["median"]
        for result in report["results"]
        if result["threads"] == 1
    }
    rows = []
    for result in report["results"]:
        if result["threads"] == 1:
            continue
        ours, copy = result["systems"]["minrnn"], result["systems"]["copy"]
        one_thread = alone[str(result["shape"]), result["gate"], result["dtype"]]
        rows.append(
            [
                ", ".join(str(size) for size in result["shape"].values()),
                result["gate"],
                result["dtype"],
                f"{ours['seconds']['forward']['median'] * 1e3:.2f}",
                f"{ours['seconds']['backward']['median'] * 1e3:.2f}",
                f"{copy['bytes_per_second']['backward'] / 1e9:.0f}",
                f"{ours['share']['forward']:.0%}",
                f"{ours['share']['backward']:.0%}",
                f"{ours['seconds']['step']['median'] / one_thread:.0%}",
            ]
        )
    head = [
        "B, T, D",
        "gate",
        "dtype",
        "forward, ms",
        "backward, ms",
        "copy, GB/s",
        "share forward",
        "backward",
        "speed of one thread",
    ]
    return _markdown(head, rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return Table("", head, rows).markdown()
