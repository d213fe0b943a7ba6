"""`minrnn reproduce`: run the trials of the paper's tables and figures, and write RESULTS.md."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from minrnn.cli.arguments import parse
from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.records import counted, duration
from minrnn.files import NoEffect, nearest, warn_without_effect

if TYPE_CHECKING:
    from minrnn.experiments.experiment import Choice, Experiment, Watch


@dataclass(frozen=True)
class ReproduceCommand:
    """Run the unfinished trials of an experiment, and write its tables and plots to OUTPUT/NAME-SCALE.

    The same command resumes an interrupted one. Trials are independent: --list-trials prints one command per
    trial, for other machines or for running them in parallel; copy their files to one folder to combine them.
    """

    scale: Literal["cpu", "paper", "tiny"] = "cpu"
    """cpu: minutes to hours on two cores; paper: the paper's setting; tiny: seconds, for a test."""
    seeds: int | None = None
    """Number of seeds per mixer (None: three for the main ones, one for the others)."""
    mixers: tuple[str, ...] = ()
    """Mixers, or variants of them; an unknown name lists them all (none: all)."""
    # --cell, the name in earlier versions, occurs in the commands of committed records.
    trial: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--cell"])] = ()
    """Names of the trials to run (none: all unfinished ones)."""
    list_trials: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one command per unfinished trial, and run nothing."""
    estimate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Time a step of each kind of trial, print the estimated total time, and run nothing."""
    output: Path = Path("results")
    """Folder of the results of all experiments."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, ..."""
    threads: int = 0
    """CPU threads (0: torch's default)."""
    envs: tuple[str, ...] = ()
    """Environments, for locomotion only (none: all)."""
    data: str = ""
    """Kind of data: local, d4rl or minari, for locomotion only (empty: local)."""


def _warn(name: str, command: ReproduceCommand, experiment: Experiment, choice: Choice) -> None:
    """Warn of options that have no effect with others, or in this experiment."""
    numbers = [len(experiment.trials(replace(choice, seeds=seeds))) for seeds in (1, 2)]
    rules = (
        NoEffect("estimate", "list_trials", lambda s: s["list_trials"]),
        NoEffect("seeds", "experiment", lambda _: numbers[0] == numbers[1]),
    )
    warn_without_effect(ReproduceCommand, {**vars(command), "experiment": name}, rules)


@dataclass(frozen=True)
class ReportCommand:
    """Write RESULTS.md from the results of all experiments and benchmarks; run it in a checkout."""

    results: Path = Path("results")
    """Folder of the experiments' results."""
    benchmarks: Path = Path("benchmarks", "results")
    """Folder of the benchmarks' results."""
    page: Path = Path("docs", "results.md.template")
    """Template of the page, with names of tables as placeholders."""
    write: Path = Path("RESULTS.md")
    """File to write."""
    changed: tyro.conf.FlagCreatePairsOff[bool] = False
    """Also show results of code that differed from its commit, marked as "with changes"."""


REPORT = "report"


def run(args: Sequence[str]) -> int:
    """Run `minrnn reproduce`; the exit status is 128 + n if signal n stopped it."""
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0)
    name, *rest = args
    if name == "--list":
        return _list(rest)
    if name == REPORT:
        return _report(rest)
    if name.startswith("-"):
        raise ValueError(f"reproduce: the name of an experiment must come first, got {name}")
    if name not in EXPERIMENTS:
        raise ValueError(
            f"reproduce: unknown experiment {name!r}{nearest(name, [*EXPERIMENTS, REPORT])} "
            f"({', '.join(EXPERIMENTS)})"
        )
    return _reproduce(name, rest)


def help_text() -> str:
    """Return what `minrnn reproduce --help` prints."""
    width = max(map(len, EXPERIMENTS))
    lines = [f"  {name:{width}}  {entry.help} ({entry.shows})" for name, entry in EXPERIMENTS.items()]
    return "\n".join(
        [
            "usage: minrnn reproduce EXPERIMENT [OPTIONS]",
            "       minrnn reproduce report [OPTIONS]",
            "       minrnn reproduce --list",
            "",
            "Reproduce the tables and figures of the paper, all with the same data, budget and code.",
            "",
            "experiments:",
            *lines,
            "",
            "`minrnn reproduce EXPERIMENT -h` shows the options; report writes RESULTS.md.",
        ]
    )


def _list(args: Sequence[str]) -> int:
    """Print the number of trials of each experiment at each scale, and of those finished in ./results."""
    from minrnn.experiments.experiment import Choice
    from minrnn.experiments.results import ResultsFolder

    if args:
        raise ValueError(f"reproduce: --list takes no other arguments, got {' '.join(args)}")
    width = max(map(len, EXPERIMENTS))
    for name, entry in EXPERIMENTS.items():
        experiment = entry.load()
        counts = []
        for scale in ("cpu", "paper"):
            trials = experiment.trials(Choice(scale=scale))
            folder = ResultsFolder(ReproduceCommand.output, name, scale)
            done = len(folder.records())
            counts.append(f"{scale}: {len(trials)} trials" + (f", {done} finished" if done else ""))
        print(f"{name:{width}}  {entry.help} ({entry.shows}); {'; '.join(counts)}")
    return 0


def _report(args: Sequence[str]) -> int:
    command = parse(ReportCommand, f"reproduce {REPORT}", args)
    from minrnn.experiments.page import write_page

    paths = command.page, command.benchmarks, command.results, command.write
    write_page(*paths, changed=command.changed)
    print(f"written: {command.write}")
    return 0


def _reproduce(name: str, args: Sequence[str]) -> int:
    entry = EXPERIMENTS[name]
    about = f"{entry.help[0].upper()}{entry.help[1:]} ({entry.shows}).\n\n{ReproduceCommand.__doc__}"
    command = parse(ReproduceCommand, f"reproduce {name}", args, description=about)
    from minrnn.experiments.experiment import Choice
    from minrnn.experiments.runner import reproduce
    from minrnn.training import Interrupted, Output, choose_device

    choice = Choice(
        command.scale,
        command.seeds,
        command.mixers,
        command.device,
        command.threads,
        command.envs,
        command.data,
    )
    choose_device(choice.device)  # raises for an invalid name before anything is run
    experiment = entry.load()
    experiment.check(choice)
    _warn(name, command, experiment, choice)
    if command.list_trials:
        return _list_trials(experiment, choice, command)
    if command.estimate or command.scale == "paper":
        _estimate(experiment, choice, command)
    if command.estimate:
        return 0
    with _watch(Output()) as watch:
        try:
            reproduce(experiment, choice, command.output, watch, only=command.trial)
        except Interrupted as stop:
            with contextlib.suppress(OSError):  # the terminal may be gone
                watch.note(f"{stop}; the same command resumes")
            return 128 + stop.signum
    return 0


def _list_trials(experiment: Experiment, choice: Choice, command: ReproduceCommand) -> int:
    """Print one command per trial, commented out if it is finished, as a shell script."""
    from minrnn.experiments.results import ResultsFolder
    from minrnn.experiments.runner import command_of, pick

    folder = ResultsFolder(command.output, experiment.name, choice.scale)
    for trial in pick(experiment.trials(choice), command.trial):
        done = "# finished: " if folder.record(trial, experiment) is not None else ""
        print(done + command_of(experiment.name, choice, command.output, trial.name))
    return 0


def _estimate(experiment: Experiment, choice: Choice, command: ReproduceCommand) -> None:
    """Print the command and its estimated time on this machine."""
    from minrnn.benchmarks.report import load_averages
    from minrnn.experiments.results import ResultsFolder
    from minrnn.experiments.runner import command_of, estimate, pick
    from minrnn.training import Output, choose_device

    trials = pick(experiment.trials(choice), command.trial)
    records = ResultsFolder(command.output, experiment.name, choice.scale).records()
    device = choose_device(choice.device)
    with Output().status("timing") as status:
        total = estimate(experiment, trials, choice, records, status.update)
    print(command_of(experiment.name, choice, command.output))
    load = load_averages()
    if load and load[0] > (os.cpu_count() or 1):
        print(f"the machine is busy (load {load[0]}): threads wait for each other; --threads 1 may be faster")
    print(
        f"about {duration(total)} on this machine ({device}): {counted(len(trials), 'trial')}, "
        f"{experiment.uncounted}"
    )


class _Bar:
    """A progress bar of the current trial, with the remaining time of all; notes are printed above it."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[said]}"), console=console, expand=True)
        self._task = self._progress.add_task("", total=1.0, said="")

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str, number: int, total: int) -> None:
        self._progress.update(self._task, description=f"{number}/{total} {name}", completed=0.0, said="")

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        said = text if left is None else f"{text}  {duration(left)} left"
        self._progress.update(self._task, completed=fraction, said=said)


class _Lines:
    """Plain lines, one for each trial: for pipes, files and batch systems."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun: str | None = None

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, name: str, number: int, total: int) -> None:
        self._begun = f"{number}/{total} {name}"

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        if self._begun is not None:
            self.note(self._begun + ("" if left is None else f", about {duration(left)} left"))
            self._begun = None


def _watch(console: Console) -> _Bar | _Lines:
    return _Bar(console) if console.is_terminal else _Lines(console)
