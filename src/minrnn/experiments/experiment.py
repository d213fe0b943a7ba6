"""The interface of an experiment: trials that run one by one, and tables and plots of their results."""

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
SCALES: tuple[Scale, ...] = get_args(Scale)
"""cpu: minutes to hours on two cores; paper: the paper's own setting; tiny: seconds, a smoke test."""

MOST_REPEATS = 10_000
"""Most seeds of each kind of trial."""

Record = dict[str, Any]
"""The result of a finished trial and its provenance, as JSON: see `ResultsFolder`."""


@dataclass(frozen=True)
class Trial:
    """One run of an experiment, independent of the others."""

    name: str
    """Unique in its experiment; the name of its file."""
    setting: Mapping[str, Any]
    """The settings that differ between trials, as JSON: mixer, seed, ..."""
    config: Mapping[str, Any]
    """All settings, as JSON; a result with other settings belongs to another trial."""

    @property
    def kind(self) -> tuple[tuple[str, Any], ...]:
        """The setting without the seed; trials of the same kind take about the same time."""
        return tuple((name, value) for name, value in self.setting.items() if name != "seed")


@dataclass(frozen=True)
class Choice:
    """A selection of an experiment's trials, and the device they run on."""

    scale: Scale = "cpu"
    """Size of models, data and training."""
    seeds: int | None = None
    """Number of seeds of each mixer; None: the experiment's default."""
    mixers: tuple[str, ...] = ()
    """Names of mixers and variants; empty: all."""
    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, ..."""
    threads: int = 0
    """CPU threads; 0: as many as torch chooses."""
    envs: tuple[str, ...] = ()
    """Names of environments, for experiments with several; empty: all."""
    data: str = ""
    """Kind of data, for experiments with several; empty: the default."""

    def __post_init__(self) -> None:
        from minrnn.training.threads import MOST_THREADS  # imports torch

        if self.scale not in SCALES:
            raise ValueError(f"reproduce: scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        if self.seeds is not None and not 1 <= self.seeds <= MOST_REPEATS:
            raise ValueError(f"reproduce: seeds must be 1 to {MOST_REPEATS}, got {self.seeds}")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ValueError(f"reproduce: threads must be 0 to {MOST_THREADS}, got {self.threads}")

    def options(self) -> list[str]:
        """Return the arguments of `minrnn reproduce NAME` that select the same trials."""
        options = ["--scale", self.scale] if self.scale != "cpu" else []
        options += ["--seeds", str(self.seeds)] if self.seeds is not None else []
        options += ["--mixers", *self.mixers] if self.mixers else []
        options += ["--device", self.device] if self.device != "auto" else []
        options += ["--threads", str(self.threads)] if self.threads else []
        options += ["--envs", *self.envs] if self.envs else []
        return options + (["--data", self.data] if self.data else [])


class Watch(Protocol):
    """Receives the progress of an experiment; `minrnn.cli.reproduce` has one that draws a bar."""

    def note(self, text: str) -> None:
        """Show one line."""

    def begin(self, name: str, number: int, total: int) -> None:
        """Show that a trial begins, with its number (from 1) and the number of trials."""

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        """Show the completed fraction of the current trial, its status, and the seconds left for all."""


class Tell(Protocol):
    """Receives the progress of a trial while it is measured."""

    def __call__(self, fraction: float, text: str) -> None:
        """Report the completed fraction, between 0 and 1, and the current status."""


@dataclass(frozen=True)
class Workplace:
    """The folder and device of a trial."""

    folder: Path
    """Folder of a trial's files until it is finished, including those of an interrupted run to resume."""
    choice: Choice = field(default_factory=Choice)
    """The device and threads."""


class Experiment(ABC):
    """A table or a figure of the paper, reproduced."""

    name: ClassVar[str]
    """Its key in EXPERIMENTS."""
    title: ClassVar[str]
    """Heading of its section of RESULTS.md."""
    question: ClassVar[str]
    """The question and the method, in a paragraph."""
    changes: ClassVar[str]
    """How the cpu scale differs from the paper, and what the paper does not state."""
    uncounted: ClassVar[str]
    """What time estimates do not include."""
    threads: ClassVar[int] = 0
    """CPU threads of its trials; 0: those of the choice."""

    def check(self, choice: Choice) -> None:
        """Raise ValueError for a choice that this experiment does not offer."""
        if choice.envs or choice.data:
            raise ValueError(f"reproduce: {self.name} has one set of data; leave --envs and --data out")
        if self.threads and choice.threads not in (0, self.threads):
            raise ValueError(
                f"reproduce: {self.name} is measured with --threads {self.threads}, got {choice.threads}"
            )

    @abstractmethod
    def trials(self, choice: Choice) -> list[Trial]:
        """Return the selected trials.

        Raises:
            ValueError: a mixer is unknown; the message suggests the nearest one.
        """

    def resolved(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a trial's configuration to this version's form, to compare it with another.

        Raises:
            ValueError: this version cannot read it.
        """
        return dict(config)

    @abstractmethod
    def measure(self, trial: Trial, place: Workplace, tell: Tell) -> dict[str, Any]:
        """Run or resume a trial, and return its result as JSON.

        Raises:
            NonFiniteLossError: training diverged.
            Interrupted: a signal requested a stop; the state is saved in the folder.
        """

    @abstractmethod
    def estimate(self, trial: Trial, choice: Choice) -> float:
        """Estimate the seconds that a trial takes on this machine, by timing a small part of it."""

    @abstractmethod
    def tables(self, records: Sequence[Record]) -> list[Table]:
        """Return tables of the finished trials' results, with the published figures."""

    @abstractmethod
    def draw(self, records: Sequence[Record]) -> Figure:
        """Plot the finished trials' results; requires matplotlib."""


class Entry(NamedTuple):
    """An entry of the registry EXPERIMENTS."""

    module: str
    """Module of the experiment; imported on demand, because importing torch is slow."""
    shows: str
    """The paper's table or figure."""
    help: str
    """A one-line description."""
    attribute: str = "EXPERIMENT"
    """Name of the experiment in its module."""

    def load(self) -> Experiment:
        """Import the experiment."""
        experiment: Experiment = getattr(import_module(self.module), self.attribute)
        return experiment
