"""The directory of an experiment's results, with a JSON file for each trial."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

from minrnn.experiments.experiment import Experiment, Record, Trial
from minrnn.files import first_difference, lock, read_json, write_json

FORMAT = 1

LONGEST_SUMMARY = 120.0
"""Seconds to wait for another process that writes the shared files: config.json, tables and plots."""

__all__ = ["ResultsFolder"]


class ResultsFolder:
    """The results of an experiment at one scale.

    `cells/NAME.json` is the record of a finished trial: experiment, scale, cell (the trial's name), setting
    and config as in `Trial`, `result` (null if `failed` gives a reason), seconds, command, and what
    `provenance` returns. `config.json` holds the configuration of every requested trial under the key
    `cells`; `tables.md`, `plot.png` and `plot.svg` show the finished trials; an interrupted trial resumes
    from `unfinished/NAME/`.

    Args:
        root: the folder of all experiments' results.
        name: name of the experiment.
        scale: the scale.
    """

    def __init__(self, root: Path, name: str, scale: str) -> None:
        self.path = root / f"{name}-{scale}"
        self.name, self.scale = name, scale

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the folder's shared files against other processes."""
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.path / ".lock", wait=LONGEST_SUMMARY):
            yield

    def begin(self, experiment: Experiment, trials: Sequence[Trial]) -> None:
        """Add trials to config.json."""
        path = self.path / "config.json"
        with self.alone():
            known = read_json(path, _Configs)["cells"] if path.is_file() else {}
            configs = known | {trial.name: dict(trial.config) for trial in trials}
            write_json(path, {"experiment": self.name, "scale": self.scale, "cells": configs}, indent=None)

    def record(self, trial: Trial, experiment: Experiment) -> Record | None:
        """Return the record of an experiment's trial, or None if it is not finished.

        Raises:
            ValueError: the record has another configuration, or is damaged.
        """
        path = self._file(trial.name)
        if not path.is_file():
            return None
        record = _read(path)
        found, wanted = experiment.resolved(record["config"]), experiment.resolved(trial.config)
        if differing := first_difference(found, wanted):
            name, one, other = differing
            raise ValueError(
                f"reproduce: {path} must have this version's settings, got {name} = {one!r} in place of "
                f"{other!r}; remove it, or choose another --output"
            )
        return record

    def records(self) -> list[Record]:
        """Return the records of all finished trials, of any command, sorted by name."""
        return [_read(path) for path in sorted((self.path / "cells").glob("*.json"))]

    def save(self, trial: Trial, record: Mapping[str, Any]) -> None:
        """Write a trial's record atomically, and remove the trial's unfinished files."""
        path = self._file(trial.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "experiment": self.name, "scale": self.scale, "cell": trial.name}
        whole = {**about, "setting": dict(trial.setting), "config": dict(trial.config), **record}
        write_json(path, whole, indent=None)
        shutil.rmtree(self.unfinished(trial), ignore_errors=True)

    def tidy(self) -> None:
        """Remove the folder of unfinished trials if it is empty."""
        with contextlib.suppress(OSError):  # not empty
            (self.path / "unfinished").rmdir()

    def unfinished(self, trial: Trial) -> Path:
        """Return the folder of a trial's files until it is finished."""
        return self.path / "unfinished" / trial.name

    def _file(self, name: str) -> Path:
        return self.path / "cells" / f"{name}.json"


class _Configs(TypedDict):
    """The keys of config.json that are read."""

    cells: dict[str, dict[str, Any]]


class _Record(TypedDict):
    """The keys of every record; see `ResultsFolder`."""

    format: int
    experiment: str
    cell: str
    setting: dict[str, Any]
    config: dict[str, Any]
    result: dict[str, Any] | None
    failed: str | None
    seconds: float
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None


def _read(path: Path) -> Record:
    remove = "remove it to have it made again"
    try:
        record: Record = {**read_json(path, _Record)}
    except ValueError as error:
        raise ValueError(f"reproduce: {error}; {remove}") from error
    if record["format"] != FORMAT:
        raise ValueError(f"reproduce: {path} is no record of this version; {remove}")
    if (record["result"] is None) == (record["failed"] is None):
        raise ValueError(f"reproduce: {path} must hold either a result or why it failed; {remove}")
    return record
