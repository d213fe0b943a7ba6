"""The measurement of one case: check all systems against the reference, time them in turns, compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from minrnn.benchmarks.bench import OURS, Timings
from minrnn.benchmarks.check import TOLERANCE
from minrnn.benchmarks.timing import Workload, gc_frozen, interleave, peak_bytes, summary
from minrnn.training.extras import FOREIGN_ERRORS

__all__ = ["System", "measure", "time_in_turns"]


@dataclass(frozen=True)
class System:
    """A function to time: our engine, a peer, or a limit such as a plain copy."""

    workload: Workload
    """One measured call."""
    errors: Callable[[], dict[str, float]] | None = None
    """Compares with the reference; None if it computes a different function."""
    inexact: str = ""
    """Why it may differ from the reference; if empty, it has to be equal."""
    traffic: Mapping[str, int] = field(default_factory=dict)
    """Bytes that each phase moves, if known."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further properties, as JSON, such as its number of parameters."""


def measure(
    systems: Mapping[str, System],
    *,
    limit: str | None,
    dtype: torch.dtype,
    memory_of: torch.device | None,
    seconds: float,
    samples: int,
    show: Callable[[Mapping[str, Timings], str], None],
) -> dict[str, Timings]:
    """Check and time systems side by side.

    Args:
        systems: by name; ours is named OURS.
        limit: the system whose speed is an upper bound, if there is one.
        dtype: determines the tolerance of the comparison with the reference.
        memory_of: the device whose peak memory is measured, or None.
        seconds: see `interleave`.
        samples: see `interleave`.
        show: called with the results so far and a line of text.

    Returns:
        For each system:
        status: "equal", "inexact" (beyond the tolerance for a known reason), "refused" (beyond the tolerance
            without a reason: not timed), "failed" (raised: not timed), or "other function".
        error: the largest error of h and of gradients relative to the largest value (null: not finite).
        detail: the reason, if there is one.
        seconds: for each phase median, p10, p90, min and number of samples.
        bytes_per_second: throughput of each phase whose traffic is known, by its median time.
        times_ours: median step over ours.
        share: for each phase, the limit's median over this system's: 1 is as fast as the limit.
        peak_bytes: peak memory of a step beyond its inputs (null: not reported by the system).

    Raises:
        RuntimeError: our own result differs from the reference.
    """
    found: dict[str, Timings] = {}
    for name, system in systems.items():
        show(found, f"checking {name}")
        found[name] = _check(system, TOLERANCE[dtype])
    if found[OURS]["status"] != "equal":
        why = found[OURS]["detail"] or found[OURS]["error"]
        raise RuntimeError(f"bench: {OURS} differs from the reference ({why}); nothing is timed")
    sound = {name: systems[name] for name in found if found[name]["status"] not in NOT_TIMED}
    timed = time_in_turns(sound, memory_of, seconds, samples, lambda text: show(found, text))
    for name, timings in timed.items():
        found[name] |= timings | _compare(timings, timed[OURS], timed.get(limit or ""))
    show(found, "")
    return found


def time_in_turns(
    systems: Mapping[str, System],
    memory_of: torch.device | None,
    seconds: float,
    samples: int,
    progress: Callable[[str], None],
) -> dict[str, Timings]:
    """Time systems in turns, without checking them.

    Args:
        systems: by name; each can be called.
        memory_of: the device whose peak memory is measured, or None.
        seconds: see `interleave`.
        samples: see `interleave`.
        progress: see `interleave`.

    Returns:
        For each system `seconds`, `bytes_per_second` and `peak_bytes` as `measure` describes them, and its
        facts.
    """
    if not systems:
        return {}
    found: dict[str, Timings] = {}
    with gc_frozen():
        workloads = {name: system.workload for name, system in systems.items()}
        taken = interleave(workloads, seconds, samples, progress)
        for name, system in systems.items():
            phases = {phase: [sample[phase] for sample in taken[name]] for phase in taken[name][0]}
            times = {phase: summary(values) for phase, values in phases.items()}
            found[name] = {"seconds": times}
            if system.traffic:
                speeds = {phase: size / times[phase]["median"] for phase, size in system.traffic.items()}
                found[name]["bytes_per_second"] = speeds
            if memory_of is not None:
                progress(f"measuring the memory of {name}")
                found[name]["peak_bytes"] = peak_bytes(system.workload, memory_of)
            found[name] |= system.facts
    return found


NOT_TIMED = ("refused", "failed")


def _check(system: System, tolerance: float) -> Timings:
    try:
        found = system.errors() if system.errors is not None else None
        if found is None:
            system.workload()
    except FOREIGN_ERRORS as error:
        message = (str(error).splitlines() or [""])[0]
        return {"status": "failed", "error": {}, "detail": f"{type(error).__name__}: {message}"}
    if found is None:
        return {"status": "other function", "error": {}, "detail": ""}
    finite = {name: error if math.isfinite(error) else None for name, error in found.items()}
    if max(found.values()) <= tolerance:
        return {"status": "equal", "error": finite, "detail": ""}
    if system.inexact:
        return {"status": "inexact", "error": finite, "detail": system.inexact}
    return {"status": "refused", "error": finite, "detail": "differs from the reference"}


def _compare(timings: Timings, ours: Timings, limit: Timings | None) -> Timings:
    medians = _medians(timings)
    compared: Timings = {"times_ours": medians["step"] / _medians(ours)["step"]}
    if limit is not None:
        compared["share"] = {phase: median / medians[phase] for phase, median in _medians(limit).items()}
    return compared


def _medians(timings: Timings) -> dict[str, float]:
    return {phase: times["median"] for phase, times in timings["seconds"].items()}
