"""Cell after cell: what is finished is left alone, what was interrupted goes on, and the tables follow."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, TypeVar

import torch

from minrnn.benchmarks.plots import save_figure
from minrnn.experiments.experiment import Cell, Choice, Experiment, Record, Watch, Workplace
from minrnn.experiments.results import ResultsFolder
from minrnn.files import InUseError, claim, nearest, replace_text
from minrnn.training import NonFiniteLossError, attempt, choose_device, provenance
from minrnn.training.threads import cpu_threads

__all__ = ["command_of", "estimate", "forecast", "interleaved", "pick", "reproduce", "write_summary"]

ROUNDS = 5
"""How often each kind of cell is timed for an estimate, in turns: what else runs meets all of them."""

ROUND_SECONDS = 30.0
"""No further round begins after so many seconds."""

K = TypeVar("K")


def reproduce(
    experiment: Experiment, choice: Choice, root: Path, watch: Watch, *, only: Sequence[str] = ()
) -> ResultsFolder:
    """Run the cells of an experiment that are not finished yet, one by one, and show what they found.

    Several processes may do so in one folder: each cell is claimed by who computes it, and left to it.

    Args:
        experiment: what is made again.
        choice: which cells, and where they are computed.
        root: the folder of all experiments' results.
        watch: told how far it is.
        only: names of cells; none are all that are chosen.

    Returns:
        The experiment's results, tables and plot written.

    Raises:
        ValueError: a mixer, a cell or another choice is unknown, or a finished cell has other settings.
        Interrupted: a signal asked for a stop, and the cell's state is saved; the same call goes on with it.
        OSError: a file cannot be written.
    """
    experiment.check(choice)
    folder = ResultsFolder(root, experiment.name, choice.scale)
    cells = pick(experiment.cells(choice), only)
    pending = [cell for cell in cells if folder.record(cell, experiment) is None]
    folder.begin(experiment, cells)
    if choice.threads:
        torch.set_num_threads(choice.threads)
    watch.note(f"{experiment.name}: {len(cells) - len(pending)} of {len(cells)} cells are finished")
    number = len(cells) - len(pending)
    left: list[Cell] = []  # to other processes
    try:
        for again in (False, True):  # one of those may have ended since
            for index, cell in enumerate(pending):
                number += not again
                try:
                    with claim(folder.unfinished(cell), watch.note):
                        if folder.record(cell, experiment) is None:  # nobody has finished it since
                            watch.begin(cell.name, number, len(cells))
                            _run(experiment, cell, pending[index + 1 :], choice, root, folder, watch)
                except InUseError as error:
                    left.append(cell)
                    if again:
                        watch.note(f"{cell.name}: left to others ({error.strerror})")
            pending, left = left, []
    finally:  # an interrupted run shows what there is
        folder.tidy()
        write_summary(experiment, folder, watch)
    return folder


def pick(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """Return the cells of these names, or all.

    Raises:
        ValueError: there is no such cell; the nearest is named.
    """
    names = [cell.name for cell in cells]
    for name in only:
        if name not in names:
            raise ValueError(
                f"reproduce: cell must be one that --list-cells names with these options, got {name!r}"
                f"{nearest(name, names)}"
            )
    return [cell for cell in cells if not only or cell.name in only]


def command_of(experiment: str, choice: Choice, root: Path, cell: str | None = None) -> str:
    """Return the command line that runs these cells, or this one."""
    output = [] if root == Path("results") else ["--output", str(root)]
    only = [] if cell is None else ["--cell", cell]
    return shlex.join(["minrnn", "reproduce", experiment, *choice.options(), *only, *output])


def forecast(cell: Cell, records: Sequence[Record]) -> float | None:
    """Return the seconds that a cell is likely to take, from the finished ones that are most like it.

    Those of the same kind first (all but the seed the same), then of the same mixer, then all; None where
    nothing is finished.
    """
    mixer = dict(cell.kind).get("mixer")
    tests = (
        lambda record: _is_of_kind(record, cell),
        lambda record: record["setting"].get("mixer") == mixer,
        lambda record: True,
    )
    for test in tests:
        if seconds := [record["seconds"] for record in records if test(record)]:
            return mean(seconds)
    return None


def _is_of_kind(record: Record, cell: Cell) -> bool:
    return all(record["setting"].get(name) == value for name, value in cell.kind)


def estimate(
    experiment: Experiment,
    cells: Sequence[Cell],
    choice: Choice,
    records: Sequence[Record],
    tell: Callable[[str], object],
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Return about how many seconds cells take here.

    Args:
        experiment: theirs.
        cells: all that are meant.
        choice: where they are computed.
        records: of finished cells; those of a kind that this machine has finished say it best.
        tell: told which kind of cell is timed.
        now: the time in seconds.
    """
    with cpu_threads(choice.threads):
        here = provenance(choose_device(choice.device))
        ours = [record for record in records if _computed_on(record) == _computed_on(here)]
        kinds: dict[object, list[Cell]] = {}
        for cell in cells:
            kinds.setdefault(cell.kind, []).append(cell)
        known: dict[object, float] = {}
        asked: dict[object, Callable[[], float]] = {}
        for kind, (cell, *_) in kinds.items():
            if seconds := [record["seconds"] for record in ours if _is_of_kind(record, cell)]:
                known[kind] = median(seconds)
            else:
                asked[kind] = partial(_time, experiment, cell, choice, tell)
        known |= interleaved(asked, now)
    return sum(len(kinds[kind]) * seconds for kind, seconds in known.items())


def _time(experiment: Experiment, cell: Cell, choice: Choice, tell: Callable[[str], object]) -> float:
    tell(f"timing {cell.name}")
    return experiment.estimate(cell, choice)


def _computed_on(about: Mapping[str, Any]) -> tuple[object, ...]:
    machine = about["machine"]
    return about["device"], machine.get("processor"), machine.get("cores"), machine.get("threads")


def interleaved(estimates: Mapping[K, Callable[[], float]], now: Callable[[], float]) -> dict[K, float]:
    """Ask for each estimate several times, in turns, and return the lowest of each.

    One look at a busy machine may see anything; of several, spread over the time, one may be undisturbed.

    Args:
        estimates: what to ask, by name.
        now: the time in seconds, which bounds the rounds after the first.
    """
    began = now()
    found: dict[K, list[float]] = {name: [] for name in estimates}
    for number in range(ROUNDS):
        if number and now() - began > ROUND_SECONDS:
            break
        for name, estimate in estimates.items():
            found[name].append(estimate())
    return {name: min(values) for name, values in found.items()}


def write_summary(experiment: Experiment, folder: ResultsFolder, watch: Watch) -> None:
    """Write tables.md and the plots of what is finished, if anything is; what fails is said alone."""
    if not (folder.path / "cells").is_dir():
        return
    no_tables = no_plot = None

    def write() -> None:
        nonlocal no_tables, no_plot
        with folder.alone():
            records = folder.records()
            no_tables = attempt(lambda: _write_tables(experiment, records, folder.path))
            no_plot = save_figure(lambda: experiment.draw(records), folder.path)

    no_summary = attempt(write)
    watch.note(f"results: {folder.path}")
    if why_not := no_summary or no_tables:
        watch.note(f"no tables: {why_not}")
    why_not = no_summary or no_plot
    watch.note(f"no plot: {why_not}" if why_not else f"plot: {folder.path / 'plot.png'}")


def _write_tables(experiment: Experiment, records: Sequence[Record], path: Path) -> None:
    texts = [table.markdown() for table in experiment.tables(records)]
    replace_text(path / "tables.md", "\n\n".join(texts) + "\n")


class _Clock:
    """Tells a watch how long it still takes: the present cell by its own pace, later ones by others."""

    def __init__(self, cell: Cell, later: Sequence[Cell], records: Sequence[Record], watch: Watch) -> None:
        self._expected = forecast(cell, records)
        self._later = [forecast(other, records) for other in later]
        self._watch = watch
        self._first: tuple[float, float] | None = None  # time and fraction when it was first under way

    def __call__(self, fraction: float, text: str) -> None:
        whole = self._whole(fraction)
        left = None
        if whole is not None:
            left = whole * (1 - fraction) + sum(whole if later is None else later for later in self._later)
        self._watch.progress(fraction, text, left)

    def _whole(self, fraction: float) -> float | None:
        """Return the seconds of the whole cell; one that goes on does not begin at 0."""
        now = time.perf_counter()
        if fraction > 0 and self._first is None:
            self._first = now, fraction
        if self._first is None or fraction <= self._first[1]:
            return self._expected
        return (now - self._first[0]) / (fraction - self._first[1])


def _run(
    experiment: Experiment,
    cell: Cell,
    later: Sequence[Cell],
    choice: Choice,
    root: Path,
    folder: ResultsFolder,
    watch: Watch,
) -> None:
    """Measure a cell and save its record; a training that diverges is a finding too."""
    tell = _Clock(cell, later, folder.records(), watch)
    tell(0.0, "")
    place = folder.unfinished(cell)
    began = time.perf_counter()
    result, failed = None, None
    try:
        result = experiment.measure(cell, Workplace(place, choice), tell)
    except NonFiniteLossError as error:
        failed = str(error)
        watch.note(f"{cell.name} failed: {failed}")
    about = provenance(choose_device(choice.device))
    record = {
        "result": result,
        "failed": failed,
        "seconds": round(time.perf_counter() - began, 2),
        "command": command_of(experiment.name, choice, root, cell.name),
    }
    folder.save(cell, {**record, **about})
