"""Runs trials one by one: skips finished ones, resumes interrupted ones, writes tables and plots."""

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
from minrnn.experiments.experiment import Choice, Experiment, Record, Trial, Watch, Workplace
from minrnn.experiments.results import ResultsFolder
from minrnn.files import InUseError, claim, nearest, replace_text
from minrnn.training import NonFiniteLossError, attempt, choose_device, provenance
from minrnn.training.threads import cpu_threads

__all__ = ["command_of", "estimate", "forecast", "interleaved", "pick", "reproduce", "write_summary"]

ROUNDS = 5
"""Number of estimates of each kind of trial; the kinds take turns, because load varies."""

ROUND_SECONDS = 30.0
"""Seconds after which no further round begins."""

K = TypeVar("K")


def reproduce(
    experiment: Experiment, choice: Choice, root: Path, watch: Watch, *, only: Sequence[str] = ()
) -> ResultsFolder:
    """Run the trials of an experiment that are not finished yet, and write its tables and plots.

    Several processes may work in one folder: each claims the trial that it runs, and skips those that others
    have claimed.

    Args:
        experiment: the experiment.
        choice: the selection of trials, and the device they run on.
        root: the folder of all experiments' results.
        watch: receives the progress.
        only: names of trials; empty: all selected ones.

    Returns:
        The folder of the experiment's results.

    Raises:
        ValueError: a mixer, a trial or another choice is unknown, or a finished trial has other settings.
        Interrupted: a signal requested a stop, and the trial's state is saved; the same call resumes it.
        OSError: a file cannot be written.
    """
    experiment.check(choice)
    folder = ResultsFolder(root, experiment.name, choice.scale)
    trials = pick(experiment.trials(choice), only)
    pending = [trial for trial in trials if folder.record(trial, experiment) is None]
    folder.begin(experiment, trials)
    if choice.threads:
        torch.set_num_threads(choice.threads)
    watch.note(f"{experiment.name}: {len(trials) - len(pending)} of {len(trials)} trials are finished")
    number = len(trials) - len(pending)
    left: list[Trial] = []  # claimed by other processes
    try:
        for again in (False, True):  # another process may have abandoned a trial
            for index, trial in enumerate(pending):
                number += not again
                try:
                    with claim(folder.unfinished(trial), watch.note):
                        if folder.record(trial, experiment) is None:  # not finished by another process
                            watch.begin(trial.name, number, len(trials))
                            _run(experiment, trial, pending[index + 1 :], choice, root, folder, watch)
                except InUseError as error:
                    left.append(trial)
                    if again:
                        watch.note(f"{trial.name}: left to others ({error.strerror})")
            pending, left = left, []
    finally:  # after an interruption too
        folder.tidy()
        write_summary(experiment, folder, watch)
    return folder


def pick(trials: Sequence[Trial], only: Sequence[str]) -> list[Trial]:
    """Return the trials of these names, or all.

    Raises:
        ValueError: there is no such trial; the message suggests the nearest one.
    """
    names = [trial.name for trial in trials]
    for name in only:
        if name not in names:
            raise ValueError(
                f"reproduce: trial must be one that --list-trials names with these options, got {name!r}"
                f"{nearest(name, names)}"
            )
    return [trial for trial in trials if not only or trial.name in only]


def command_of(experiment: str, choice: Choice, root: Path, trial: str | None = None) -> str:
    """Return the command line that runs these trials, or this one."""
    output = [] if root == Path("results") else ["--output", str(root)]
    only = [] if trial is None else ["--trial", trial]
    return shlex.join(["minrnn", "reproduce", experiment, *choice.options(), *only, *output])


def forecast(trial: Trial, records: Sequence[Record]) -> float | None:
    """Return the mean seconds of the finished trials that are most similar to a trial, or None without any.

    Trials of the same kind (all but the seed equal) come first, then those of the same mixer, then all.
    """
    mixer = dict(trial.kind).get("mixer")
    tests = (
        lambda record: _is_of_kind(record, trial),
        lambda record: record["setting"].get("mixer") == mixer,
        lambda record: True,
    )
    for test in tests:
        if seconds := [record["seconds"] for record in records if test(record)]:
            return mean(seconds)
    return None


def _is_of_kind(record: Record, trial: Trial) -> bool:
    return all(record["setting"].get(name) == value for name, value in trial.kind)


def estimate(
    experiment: Experiment,
    trials: Sequence[Trial],
    choice: Choice,
    records: Sequence[Record],
    tell: Callable[[str], object],
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Estimate the seconds that trials take on this machine.

    Args:
        experiment: the experiment.
        trials: the trials.
        choice: the device they run on.
        records: finished trials; if one of the same kind ran on this machine, its time is the estimate.
        tell: receives the name of the trial that is timed.
        now: returns the time in seconds.
    """
    with cpu_threads(experiment.threads or choice.threads):
        here = provenance(choose_device(choice.device))
        ours = [record for record in records if _computed_on(record) == _computed_on(here)]
        kinds: dict[object, list[Trial]] = {}
        for trial in trials:
            kinds.setdefault(trial.kind, []).append(trial)
        known: dict[object, float] = {}
        estimates: dict[object, Callable[[], float]] = {}
        for kind, (trial, *_) in kinds.items():
            if seconds := [record["seconds"] for record in ours if _is_of_kind(record, trial)]:
                known[kind] = median(seconds)
            else:
                estimates[kind] = partial(_time, experiment, trial, choice, tell)
        known |= interleaved(estimates, now)
    return sum(len(kinds[kind]) * seconds for kind, seconds in known.items())


def _time(experiment: Experiment, trial: Trial, choice: Choice, tell: Callable[[str], object]) -> float:
    tell(f"timing {trial.name}")
    return experiment.estimate(trial, choice)


def _computed_on(about: Mapping[str, Any]) -> tuple[object, ...]:
    machine = about["machine"]
    return about["device"], machine.get("processor"), machine.get("cores"), machine.get("threads")


def interleaved(estimates: Mapping[K, Callable[[], float]], now: Callable[[], float]) -> dict[K, float]:
    """Make each estimate several times, in turns, and return the lowest of each.

    On a busy machine a single estimate may be far too high; the lowest of several is more reliable.

    Args:
        estimates: functions that return an estimate in seconds, by name.
        now: returns the time in seconds, which limits the rounds after the first.
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
    """Write tables.md and the plots of the finished trials; report files that cannot be written."""
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
    """Estimates the time left: for the current trial by its own pace, for later ones from finished trials."""

    def __init__(self, trial: Trial, later: Sequence[Trial], records: Sequence[Record], watch: Watch) -> None:
        self._expected = forecast(trial, records)
        self._later = [forecast(other, records) for other in later]
        self._watch = watch
        self._first: tuple[float, float] | None = None  # time and fraction at the first progress

    def __call__(self, fraction: float, text: str) -> None:
        whole = self._whole(fraction)
        left = None
        if whole is not None:
            left = whole * (1 - fraction) + sum(whole if later is None else later for later in self._later)
        self._watch.progress(fraction, text, left)

    def _whole(self, fraction: float) -> float | None:
        """Estimate the seconds of the whole trial; a resumed one does not begin at a fraction of 0."""
        now = time.perf_counter()
        if fraction > 0 and self._first is None:
            self._first = now, fraction
        if self._first is None or fraction <= self._first[1]:
            return self._expected
        return (now - self._first[0]) / (fraction - self._first[1])


def _run(
    experiment: Experiment,
    trial: Trial,
    later: Sequence[Trial],
    choice: Choice,
    root: Path,
    folder: ResultsFolder,
    watch: Watch,
) -> None:
    """Measure a trial and save its record; one that diverges is recorded as failed."""
    tell = _Clock(trial, later, folder.records(), watch)
    tell(0.0, "")
    place = folder.unfinished(trial)
    with cpu_threads(experiment.threads):
        about = provenance(choose_device(choice.device))  # before the trial: the code that runs
        began = time.perf_counter()
        result, failed = None, None
        try:
            result = experiment.measure(trial, Workplace(place, choice), tell)
        except NonFiniteLossError as error:
            failed = str(error)
            watch.note(f"{trial.name} failed: {failed}")
    record = {
        "result": result,
        "failed": failed,
        "seconds": round(time.perf_counter() - began, 2),
        "command": command_of(experiment.name, choice, root, trial.name),
    }
    folder.save(trial, {**record, **about})
