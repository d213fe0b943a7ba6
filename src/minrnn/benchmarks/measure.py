"""One case of a benchmark: check every system, refuse the wrong ones, time the rest in turns, compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minrnn.benchmarks.check import TOLERANCE
from minrnn.benchmarks.timing import Phases, Task, interleave, old_objects_set_aside, peak_bytes, summary
from minrnn.training.extras import FOREIGN_ERRORS

__all__ = ["OURS", "Record", "System", "measure"]

OURS = "minrnn"

Record = dict[str, Any]
"""What is known of one system, as JSON: see `measure`."""


@dataclass(frozen=True)
class System:
    """Something that is timed: our engine, a peer, or a limit such as a plain copy."""

    task: Task
    """One measured call."""
    errors: Callable[[], dict[str, float]] | None
    """Compares with the reference; None where it computes something else."""
    inexact: str = ""
    """Why it may differ from the reference; without a reason it has to be equal."""
    traffic: Mapping[str, int] = field(default_factory=dict)
    """Bytes that each phase moves, where that is known."""


def measure(
    systems: Mapping[str, System],
    *,
    limit: str | None,
    dtype: torch.dtype,
    memory_of: torch.device | None,
    seconds: float,
    samples: int,
    show: Callable[[Mapping[str, Record], str], None],
) -> dict[str, Record]:
    """Check and time systems side by side.

    Args:
        systems: by name; ours is called OURS.
        limit: the system whose speed bounds the others', if one does.
        dtype: whose tolerance decides what is equal.
        memory_of: the device whose memory is measured, or None.
        seconds: as `interleave` takes it.
        samples: as `interleave` takes it.
        show: told the records so far, and what goes on.

    Returns:
        A record for each system:
        status: "equal", "inexact" (further off than the tolerance, for a reason that is known), "refused"
            (further off, and no reason for it: not timed), "failed" (raised: not timed), or "other function".
        error: the largest error of h and of gradients relative to the largest value (null: not finite).
        detail: the reason, where there is one.
        seconds: for each phase median, p10, p90, min and number of samples; "step" is the sum of the phases.
        bytes_per_second: for each phase whose traffic is known, in a median time.
        times_ours: median step over ours.
        share: for each phase, the limit's median over this system's: 1 is as fast as the limit.
        peak_bytes: memory that a step needs beside its inputs (null: the system cannot tell).

    Raises:
        RuntimeError: our own result is not the reference's.
    """
    records: dict[str, Record] = {}
    for name, system in systems.items():
        show(records, f"checking {name}")
        records[name] = _check(system, TOLERANCE[dtype])
    if records[OURS]["status"] != "equal":
        found = records[OURS]["detail"] or records[OURS]["error"]
        raise RuntimeError(f"bench: {OURS} differs from the reference ({found}); nothing is timed")
    tasks = {name: systems[name].task for name in records if records[name]["status"] not in NOT_TIMED}
    with old_objects_set_aside():
        taken = interleave(tasks, seconds, samples, lambda text: show(records, text))
        for name, task in tasks.items():
            records[name] |= _times(taken[name], systems[name].traffic)
            if memory_of is not None:
                show(records, f"measuring the memory of {name}")
                records[name]["peak_bytes"] = peak_bytes(task, memory_of)
    for name in tasks:
        _compare(records[name], records[OURS], records[limit] if limit else None)
    show(records, "")
    return records


NOT_TIMED = ("refused", "failed")


def _check(system: System, tolerance: float) -> Record:
    if system.errors is None:
        return {"status": "other function", "error": {}, "detail": ""}
    try:
        found = system.errors()
    except FOREIGN_ERRORS as error:  # the reason is shown in its row
        message = (str(error).splitlines() or [""])[0]
        return {"status": "failed", "error": {}, "detail": f"{type(error).__name__}: {message}"}
    finite = {name: error if math.isfinite(error) else None for name, error in found.items()}
    if max(found.values()) <= tolerance:
        return {"status": "equal", "error": finite, "detail": ""}
    if system.inexact:
        return {"status": "inexact", "error": finite, "detail": system.inexact}
    return {"status": "refused", "error": finite, "detail": "differs from the reference"}


def _times(taken: Sequence[Phases], traffic: Mapping[str, int]) -> Record:
    phases = {phase: [sample[phase] for sample in taken] for phase in taken[0]}
    if len(phases) > 1:
        phases["step"] = [sum(sample.values()) for sample in taken]
    seconds = {phase: summary(times) for phase, times in phases.items()}
    speeds = {phase: size / seconds[phase]["median"] for phase, size in traffic.items()}
    return {"seconds": seconds} | ({"bytes_per_second": speeds} if speeds else {})


def _compare(record: Record, ours: Record, limit: Record | None) -> None:
    medians, our_medians = _medians(record), _medians(ours)
    record["times_ours"] = medians["step"] / our_medians["step"]
    if limit is not None:
        record["share"] = {phase: median / medians[phase] for phase, median in _medians(limit).items()}


def _medians(record: Record) -> dict[str, float]:
    return {phase: times["median"] for phase, times in record["seconds"].items()}
