"""What an experiment is: cells that are run one by one, and tables and plots of what they found."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from minrnn.benchmarks.tables import Table as Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["cpu", "paper", "tiny"]
MOST_CELLS = 10_000
"""Seeds of each kind of cell."""

SCALES: tuple[Scale, ...] = get_args(Scale)
"""cpu: two cores, about two hours; paper: the paper's own setting; tiny: seconds, to see that it runs."""

Record = dict[str, Any]
"""What is kept of a finished cell, as JSON: see `ResultsFolder`."""


@dataclass(frozen=True)
class Cell:
    """One run of an experiment, which needs none of the others."""

    name: str
    """Tells it from the others of its experiment, and names its file."""
    setting: Mapping[str, Any]
    """What differs between cells, as JSON: mixer, seed, ..."""
    config: Mapping[str, Any]
    """All that it is computed with, as JSON; a result that was computed with something else is another's."""

    @property
    def kind(self) -> tuple[tuple[str, Any], ...]:
        """The setting but for the seed: cells of a kind take about the same time."""
        return tuple((name, value) for name, value in self.setting.items() if name != "seed")


@dataclass(frozen=True)
class Choice:
    """Which cells of an experiment, and where they are computed."""

    scale: Scale = "cpu"
    """Size of everything."""
    seeds: int | None = None
    """Seeds of each mixer; None is the experiment's own number."""
    mixers: tuple[str, ...] = ()
    """Mixers and their variants by name; none are all."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, ..."""
    threads: int = 0
    """CPU threads; 0 is as many as torch chooses."""
    envs: tuple[str, ...] = ()
    """Environments by name, where an experiment has several; none are all."""
    data: str = ""
    """Kind of data, where an experiment has several; empty is its own choice."""

    def __post_init__(self) -> None:
        from minrnn.training.threads import MOST_THREADS  # here, for it takes torch along

        if self.scale not in SCALES:
            raise ValueError(f"reproduce: scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        if self.seeds is not None and not 1 <= self.seeds <= MOST_CELLS:
            raise ValueError(f"reproduce: seeds must be 1 to {MOST_CELLS}, got {self.seeds}")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ValueError(f"reproduce: threads must be 0 to {MOST_THREADS}, got {self.threads}")

    def options(self) -> list[str]:
        """Return the arguments of `minrnn reproduce NAME` that choose the same cells."""
        options = ["--scale", self.scale] if self.scale != "cpu" else []
        options += ["--seeds", str(self.seeds)] if self.seeds is not None else []
        options += ["--mixers", *self.mixers] if self.mixers else []
        options += ["--device", self.device] if self.device != "auto" else []
        options += ["--threads", str(self.threads)] if self.threads else []
        options += ["--envs", *self.envs] if self.envs else []
        return options + (["--data", self.data] if self.data else [])


class Watch(Protocol):
    """Who is told how far it is: see `minrnn.cli.reproduce` for one that draws a bar."""

    def note(self, text: str) -> None:
        """Say one line."""

    def begin(self, name: str, number: int, total: int) -> None:
        """Say that a cell begins, the how manieth of how many."""

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        """Say how much of the present cell is done, what it is at, and the seconds left of all, if known."""


@dataclass
class Silence:
    """A watch that says nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def begin(self, name: str, number: int, total: int) -> None:
        """Say nothing."""

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        """Say nothing."""


class Tell(Protocol):
    """What a cell tells of itself while it is measured."""

    def __call__(self, fraction: float, text: str) -> None:
        """Say how much is done, between 0 and 1, and what goes on."""


@dataclass(frozen=True)
class Workplace:
    """Where a cell is measured."""

    folder: Path
    """For what it keeps until it is done; what an interrupted measurement has left there may be used."""
    choice: Choice = field(default_factory=Choice)
    """Its device and threads."""


class Experiment(ABC):
    """A table or a figure of the paper, made again."""

    name: ClassVar[str]
    """Its key in EXPERIMENTS."""
    title: ClassVar[str]
    """Heading of its part of RESULTS.md."""
    question: ClassVar[str]
    """What it shows, and how that is measured, in a paragraph."""
    changes: ClassVar[str]
    """What its cpu scale changed, and what the paper leaves open."""
    uncounted: ClassVar[str]
    """What an estimate of its time leaves out."""

    def check(self, choice: Choice) -> None:
        """Raise ValueError for a choice that this experiment does not leave."""
        if choice.envs or choice.data:
            raise ValueError(f"reproduce: {self.name} has one set of data; leave --envs and --data out")

    @abstractmethod
    def cells(self, choice: Choice) -> list[Cell]:
        """Return the cells that are chosen.

        Raises:
            ValueError: a mixer is unknown; the nearest is named.
        """

    def resolved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a cell's configuration as this version would write it, to compare it with another.

        Raises:
            ValueError: this version cannot read it.
        """
        return dict(config)

    @abstractmethod
    def measure(self, cell: Cell, place: Workplace, tell: Tell) -> dict[str, Any]:
        """Run a cell, or go on with it, and return what it found as JSON.

        Raises:
            NonFiniteLossError: training diverged, which is a finding.
            Interrupted: a signal asked for a stop, and what was done is in the folder.
        """

    @abstractmethod
    def estimate(self, cell: Cell, choice: Choice) -> float:
        """Return about how many seconds a cell will take here, from measuring a small part of it."""

    @abstractmethod
    def tables(self, records: Sequence[Record]) -> list[Table]:
        """Return what the finished cells found, beside the published figures."""

    @abstractmethod
    def draw(self, records: Sequence[Record]) -> Figure:
        """Draw what the finished cells found; needs matplotlib."""


class Entry(NamedTuple):
    """A line of the table EXPERIMENTS."""

    module: str
    """Where the experiment is; imported when it is wanted, for torch takes its time."""
    shows: str
    """The paper's table or figure."""
    help: str
    """What is measured, in a line."""

    def load(self) -> Experiment:
        """Import the experiment."""
        experiment: Experiment = import_module(self.module).EXPERIMENT
        return experiment
