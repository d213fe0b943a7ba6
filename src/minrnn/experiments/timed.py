"""Experiments whose trials are timings: in each setting all systems are timed in turns, in one process."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from minrnn.benchmarks.measure import System, time_in_turns
from minrnn.benchmarks.plots import Line
from minrnn.benchmarks.report import load_averages
from minrnn.experiments.experiment import Choice, Experiment, Record, Scale, Tell, Trial, Workplace
from minrnn.experiments.variants import choose
from minrnn.training import choose_device

__all__ = ["TimedExperiment", "TimedSize", "exponent", "growth", "scaled", "series"]


@dataclass(frozen=True)
class TimedSize:
    """The settings of a scale, and the measuring time."""

    seconds: float
    """Seconds for each system in each setting; at least three rounds are measured, however slow it is."""
    samples: int
    """Most measurements of a system."""


class TimedExperiment(Experiment):
    """An experiment in which a trial measures the times of all systems in one setting.

    Systems are measured in turns, so that noise on the machine affects all alike. A trial's result holds
    `systems`: for each the `seconds` of each phase (median, p10, p90, min and samples), `peak_bytes` (peak
    memory beyond inputs and weights) and its facts, or `failed`, the reason; and `load`, the machine's load
    averages before.
    """

    uncounted = "more where a call takes longer than its share"
    sizes: ClassVar[Mapping[Scale, Any]]
    """The settings of each scale, each a `TimedSize`."""

    @abstractmethod
    def systems(self) -> Sequence[str]:
        """Return the names of all systems."""

    @abstractmethod
    def settings(self, size: Any) -> Iterator[dict[str, Any]]:
        """Yield the settings of the trials, in the order in which they run."""

    @abstractmethod
    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> Any:
        """Draw the inputs of all systems, once per trial: copies for each could exceed the memory."""

    @abstractmethod
    def build(self, system: str, setting: Mapping[str, Any], inputs: Any) -> System:
        """Make a system on the device of its inputs; it is not compared with a reference."""

    def trials(self, choice: Choice) -> list[Trial]:
        size = self.sizes[choice.scale]
        systems = choose(choice.mixers, self.systems())
        budget = {"seconds": size.seconds, "samples": size.samples}
        return [
            Trial(
                "-".join(f"{name}{value}" for name, value in setting.items()),
                setting,
                {**setting, **budget, "systems": systems},
            )
            for setting in self.settings(size)
        ]

    def measure(self, trial: Trial, place: Workplace, tell: Tell) -> dict[str, Any]:
        device = choose_device(place.choice.device)
        load = load_averages()
        names, found = list(trial.config["systems"]), {}
        ready: dict[str, System] = {}
        torch.manual_seed(0)
        inputs = self.inputs(trial.setting, device)
        for index, name in enumerate(names):
            tell(0.2 * index / len(names), f"warming up {name}")
            torch.manual_seed(0)
            try:
                system = self.build(name, trial.setting, inputs)
                system.workload()
            except RuntimeError as error:  # torch's, for lack of memory or an unsupported shape
                found[name] = {"failed": (str(error).splitlines() or [""])[0]}
            else:
                ready[name] = system
        budget = trial.config["seconds"], trial.config["samples"]
        found |= time_in_turns(ready, device, *budget, _Rounds(tell))
        return {"systems": {name: found[name] for name in names}, "load": load}

    def estimate(self, trial: Trial, choice: Choice) -> float:
        budget: float = trial.config["seconds"]
        return budget * len(trial.config["systems"])


class _Rounds:
    """Converts the progress text of `time_in_turns` to a fraction."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._done = tell, 0.0

    def __call__(self, text: str) -> None:
        words = text.split()
        if words[0] == "round":  # N of M
            self._done = int(words[1]) / int(words[3])
        self._tell(0.2 + 0.7 * self._done, text)


def series(
    records: Sequence[Record], x: str, value: str, **setting: Any
) -> dict[str, list[tuple[float, float]]]:
    """Return the median seconds of each system, or another figure, against an entry of the setting.

    Args:
        records: finished trials.
        x: the entry for the x axis.
        value: a phase of the call, or the name of another figure.
        setting: required values of the other entries.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record["setting"][x]):
        if any(record["setting"][name] != wanted for name, wanted in setting.items()):
            continue
        for name, found in record["result"]["systems"].items():
            figure = median(found, value) if value in found.get("seconds", {}) else found.get(value)
            if figure:  # a logarithmic axis cannot show zero
                lines.setdefault(name, []).append((record["setting"][x], figure))
    return lines


def scaled(lines: Mapping[str, Line], factor: float) -> dict[str, Line]:
    """Return lines with their values multiplied by a factor."""
    return {name: [(x, factor * y) for x, y in line] for name, line in lines.items()}


def median(found: Mapping[str, Any], phase: str) -> float:
    """Return a system's median seconds of a phase."""
    seconds: float = found["seconds"][phase]["median"]
    return seconds


def exponent(line: Sequence[tuple[float, float]]) -> float | None:
    """Fit y ~ x^p over the upper half of the points, and return p; None for fewer than three points.

    In the lower half, fixed costs would distort the fit.

    >>> round(exponent([(x, 3 * x**2) for x in (1, 2, 4, 8, 16)]), 6)
    2.0
    """
    if len(line) < 3:
        return None
    upper = sorted(line)[-max(3, math.ceil(len(line) / 2)) :]
    xs, ys = ([math.log(value) for value in column] for column in zip(*upper, strict=True))
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def growth(line: Sequence[tuple[float, float]]) -> str:
    """Return the exponent of a line as text, empty if there is none, and never as a negative zero.

    >>> growth([(1, 1.0), (2, 1.0), (4, 0.999)]), growth([(1, 1.0)])
    ('0.00', '')
    """
    found = exponent(line)
    return "" if found is None else f"{round(found, 2) + 0.0:.2f}"
