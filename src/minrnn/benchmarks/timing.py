"""Timing and memory of workloads, measured in turns, so that noise on the machine affects all alike."""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minrnn.ops import release_memory

__all__ = [
    "MIN_ROUNDS",
    "Phases",
    "Workload",
    "clock",
    "gc_frozen",
    "interleave",
    "peak_bytes",
    "summary",
]

MIN_ROUNDS = 3
"""Fewest measurements of a workload, however slow it is."""

SHORT = 5e-3
"""Seconds; a shorter workload gets one unmeasured call at each turn, to warm the caches."""

Phases = dict[str, float]
"""Seconds of each phase of one call, for example forward, backward and step (the whole)."""

Workload = Callable[[], Phases]
"""One measured call; its setup and cleanup are not part of a phase."""


def clock(device: torch.device) -> float:
    """Return the time in seconds, after synchronizing the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def gc_frozen() -> Iterator[None]:
    """Hide existing objects from the garbage collector, which takes 0.1 s to scan torch's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleave(
    workloads: Mapping[str, Workload], seconds: float, samples: int, progress: Callable[[str], None]
) -> dict[str, list[Phases]]:
    """Warm up, then measure all workloads in turns.

    The slowest workload determines the number of rounds. Faster ones are called several times per round, so
    that their samples cover the same time, and noise on the machine affects all alike.

    Args:
        workloads: the workloads, by name.
        seconds: time to spend on each workload; at least MIN_ROUNDS rounds are measured.
        samples: maximum number of samples of a workload, rounded up to whole rounds.
        progress: called with a line of text between measurements.

    Returns:
        The samples of each workload.
    """
    costs = {}
    for name, workload in workloads.items():
        progress(f"warming up {name}")
        costs[name] = _cost(workload, seconds)
    rounds = _between(MIN_ROUNDS, int(seconds / max(costs.values())), samples)
    most = math.ceil(samples / rounds)
    calls = {name: _between(1, int(seconds / rounds / cost), most) for name, cost in costs.items()}
    taken: dict[str, list[Phases]] = {name: [] for name in workloads}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        gc.collect()
        gc.disable()  # as in timeit
        try:
            for name, workload in workloads.items():
                if costs[name] < SHORT:
                    workload()
                taken[name] += [workload() for _ in range(calls[name])]
        finally:
            gc.enable()
    return taken


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median, percentiles and number of samples in seconds.

    >>> summary([3.0, 1.0, 2.0])["median"]
    2.0
    """
    p10, median, p90 = np.percentile(samples, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90, "min": min(samples), "samples": len(samples)}


def peak_bytes(workload: Workload, device: torch.device) -> int | None:
    """Measure the peak memory of a call beyond the memory allocated before it, such as its inputs.

    On the CPU this is the increase of the process's resident set size, including torch, other libraries and
    Python, to within 100 kB or so. Linux resets the recorded peak on request (clear_refs). Memory cached by
    the C library and our engine is released first, because the call would reuse it. On a GPU it is the figure
    of torch's allocator.

    Args:
        workload: a call that has run before, so that libraries are loaded and code is compiled.
        device: device of the computations.

    Returns:
        Bytes, or None if the system does not report them.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        workload()
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _resident("VmRSS")
    workload()
    return max(0, _resident("VmHWM") - before)


def _cost(workload: Workload, seconds: float) -> float:
    """Warm up, and return the seconds of a call: of a later one if time allows, else of the first."""
    cost = _elapsed(workload)
    for _ in range(2):
        if cost < seconds / 10:
            cost = min(cost, _elapsed(workload))
    return cost


def _elapsed(workload: Workload) -> float:
    start = time.perf_counter()
    workload()
    return time.perf_counter() - start


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


def _return_freed_memory() -> None:
    release_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10  # kB
    raise RuntimeError(f"/proc/self/status has no {field}")
