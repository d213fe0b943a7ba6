"""Experiments whose trials are timings: in each setting all systems are measured in turns, in one process."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from minrnn.benchmarks.report import load_averages
from minrnn.benchmarks.timing import Task, interleave, old_objects_set_aside, peak_bytes, summary
from minrnn.experiments.experiment import Choice, Experiment, Record, Scale, Tell, Trial, Workplace
from minrnn.experiments.variants import choose
from minrnn.training import choose_device

__all__ = ["System", "TimedExperiment", "TimedSize", "exponent", "median", "series"]


@dataclass(frozen=True)
class TimedSize:
    """The settings of a scale, and how long it is measured."""

    seconds: float
    """For each system, in each setting; however slow it is, it takes part in three rounds."""
    samples: int
    """Measurements of a system at most."""


@dataclass(frozen=True)
class System:
    """Something that is timed."""

    task: Task
    """One measured call."""
    facts: Mapping[str, Any]
    """What else is known of it, as JSON: its parameters, its state's bytes."""


class TimedExperiment(Experiment):
    """An experiment in which every trial is a setting, and holds the times of all systems.

    Systems are measured in turns, so that what else the machine does meets all of them. A trial's result
    holds `systems`: for each the `seconds` of each phase (median, p10, p90, min and samples), `peak_bytes`
    (memory at the peak beyond inputs and weights) and its facts, or `failed`, why there is nothing; and
    `load`, the machine's load averages before.
    """

    uncounted = "more where a call takes longer than its share"
    sizes: ClassVar[Mapping[Scale, Any]]
    """The settings of each scale, each a `TimedSize`."""

    @abstractmethod
    def systems(self) -> Sequence[str]:
        """Return the names of all that takes part."""

    @abstractmethod
    def settings(self, size: Any) -> Iterator[dict[str, Any]]:
        """Yield what differs between trials, in the order in which they are run."""

    @abstractmethod
    def inputs(self, setting: Mapping[str, Any], device: torch.device) -> Any:
        """Draw what all systems are given, once for a trial: a copy for each would fill the memory."""

    @abstractmethod
    def build(self, system: str, setting: Mapping[str, Any], inputs: Any) -> System:
        """Make what is timed, on the device of its inputs."""

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
                system.task()
            except RuntimeError as error:  # what torch says where memory is short, or a shape is not served
                found[name] = {"failed": (str(error).splitlines() or [""])[0]}
            else:
                ready[name] = system
        with old_objects_set_aside():
            found |= self._times(trial, ready, device, tell)
        return {"systems": {name: found[name] for name in names}, "load": load}

    def _times(
        self, trial: Trial, ready: Mapping[str, System], device: torch.device, tell: Tell
    ) -> dict[str, Any]:
        tasks = {name: system.task for name, system in ready.items()}
        if not tasks:
            return {}
        rounds = _Rounds(tell)
        taken = interleave(tasks, trial.config["seconds"], trial.config["samples"], rounds)
        found = {}
        for index, (name, system) in enumerate(ready.items()):
            tell(0.9 + 0.1 * index / len(ready), f"measuring the memory of {name}")
            phases = {phase: [sample[phase] for sample in taken[name]] for phase in taken[name][0]}
            seconds = {phase: summary(times) for phase, times in phases.items()}
            found[name] = {
                "seconds": seconds,
                "peak_bytes": peak_bytes(system.task, device),
                **system.facts,
            }
        return found

    def estimate(self, trial: Trial, choice: Choice) -> float:
        budget: float = trial.config["seconds"]
        return budget * len(trial.config["systems"])


class _Rounds:
    """Turns what `interleave` says into how much is done."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def __call__(self, text: str) -> None:
        number, of, total = [*text.split(), "", ""][1:4]
        done = int(number) / int(total) if of == "of" else 0.0
        self._tell(0.2 + 0.7 * done, text)


def series(
    records: Sequence[Record], x: str, value: str, **setting: Any
) -> dict[str, list[tuple[float, float]]]:
    """Return for each system its median seconds, or another figure, against an entry of the setting.

    Args:
        records: finished trials.
        x: the entry that runs from left to right.
        value: a phase of the call, or the name of a figure beside the phases.
        setting: what the other entries must be.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in sorted(records, key=lambda record: record["setting"][x]):
        if any(record["setting"][name] != wanted for name, wanted in setting.items()):
            continue
        for name, found in record["result"]["systems"].items():
            figure = median(found, value) if value in found.get("seconds", {}) else found.get(value)
            if figure:  # neither missing nor zero, which a logarithmic axis cannot show
                lines.setdefault(name, []).append((record["setting"][x], figure))
    return lines


def median(found: Mapping[str, Any], phase: str) -> float:
    """Return a system's median seconds of a phase."""
    seconds: float = found["seconds"][phase]["median"]
    return seconds


def exponent(line: Sequence[tuple[float, float]]) -> float | None:
    """Fit y ~ x^p over the upper half of the points, and return p; None for fewer than three points.

    The lower half is where fixed costs still show, which are no growth.

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
