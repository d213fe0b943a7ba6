"""Cell after cell: what is finished is left alone, what was interrupted goes on, and the tables follow."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from statistics import mean

import torch

from minrnn.experiments.experiment import Cell, Choice, Experiment, Record, Watch, Workplace
from minrnn.experiments.plots import save_figure
from minrnn.experiments.results import ResultsFolder
from minrnn.training import NonFiniteLossError, choose_device, provenance

__all__ = ["command_of", "forecast", "pick", "reproduce", "write_summary"]


def reproduce(
    experiment: Experiment, choice: Choice, root: Path, watch: Watch, *, only: Sequence[str] = ()
) -> ResultsFolder:
    """Run the cells of an experiment that are not finished yet, one by one, and show what they found.

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
    try:
        for index, cell in enumerate(pending):
            watch.begin(cell.name, len(cells) - len(pending) + index + 1, len(cells))
            _run(experiment, cell, pending[index + 1 :], choice, root, folder, watch)
    finally:  # an interrupted run shows what there is
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
            near = get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"reproduce: cell must be one that --list-cells names with these options, got {name!r}{hint}"
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
    kind = dict(cell.kind)
    tests = (
        lambda record: all(record["setting"].get(name) == value for name, value in kind.items()),
        lambda record: record["setting"].get("mixer") == kind.get("mixer"),
        lambda record: True,
    )
    for test in tests:
        if seconds := [record["seconds"] for record in records if test(record)]:
            return mean(seconds)
    return None


def write_summary(experiment: Experiment, folder: ResultsFolder, watch: Watch) -> None:
    """Write tables.md and the plots of what is finished, if anything is."""
    records = folder.records()
    if not records:
        return
    texts = [table.markdown() for table in experiment.tables(records)]
    (folder.path / "tables.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    why_not = save_figure(lambda: experiment.draw(records), folder.path)
    watch.note(f"results: {folder.path}")
    watch.note(f"no plot: {why_not}" if why_not else f"plot: {folder.path / 'plot.png'}")


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
    place.mkdir(parents=True, exist_ok=True)
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
