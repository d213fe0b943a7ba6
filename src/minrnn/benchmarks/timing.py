"""How time and memory are measured: in turns, in one run, so that all meet the same machine."""

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
    "Task",
    "clock",
    "interleave",
    "old_objects_set_aside",
    "peak_bytes",
    "summary",
]

MIN_ROUNDS = 3
"""However slow a system is, it is measured this often."""

SHORT = 5e-3
"""Seconds; a shorter call is made once unmeasured at each turn, or it would time caches that are cold."""

Phases = dict[str, float]
"""Seconds that each phase of one call took: forward, backward and step, say."""

Task = Callable[[], Phases]
"""One measured call; what it prepares and clears away lies outside of its phases."""


def clock(device: torch.device) -> float:
    """Return the time in seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Let the garbage collector look at new objects only: torch's take it 0.1 s, and all of the caches."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def interleave(
    tasks: Mapping[str, Task], seconds: float, samples: int, progress: Callable[[str], None]
) -> dict[str, list[Phases]]:
    """Warm up, then measure all tasks in turns.

    There are as many rounds as the slowest task can take part in. A faster task is called several times a
    round, so that its measurements spread over the same stretch of time as everybody else's, and whatever
    else happens on the machine meets all of them.

    Args:
        tasks: what to measure, by name.
        seconds: to spend on each task, at least MIN_ROUNDS rounds.
        samples: measurements of a task at most, give or take a part of a round.
        progress: told in one line what goes on, between measurements.

    Returns:
        The measurements of each task.
    """
    costs = {}
    for name, task in tasks.items():
        progress(f"warming up {name}")
        costs[name] = _cost(task, seconds)
    rounds = _between(MIN_ROUNDS, int(seconds / max(costs.values())), samples)
    most = math.ceil(samples / rounds)
    calls = {name: _between(1, int(seconds / rounds / cost), most) for name, cost in costs.items()}
    taken: dict[str, list[Phases]] = {name: [] for name in tasks}
    for number in range(1, rounds + 1):
        progress(f"round {number} of {rounds}")
        gc.collect()
        gc.disable()  # as timeit does: a collection belongs to nobody's call
        try:
            for name, task in tasks.items():
                if costs[name] < SHORT:
                    task()
                taken[name] += [task() for _ in range(calls[name])]
        finally:
            gc.enable()
    return taken


def summary(samples: list[float]) -> dict[str, float]:
    """Return median, spread and number of measurements in seconds.

    >>> summary([3.0, 1.0, 2.0])["median"]
    2.0
    """
    p10, median, p90 = np.percentile(samples, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90, "min": min(samples), "samples": len(samples)}


def peak_bytes(task: Task, device: torch.device) -> int | None:
    """Measure the memory that a call needs at its peak beyond what was held before: all but its inputs.

    On the CPU it is the rise of this process's resident memory, which misses nothing, be it torch's, a
    library's own or Python's, to within some 100 kB: Linux forgets the old peak on request (clear_refs), and
    what the C library and our engine keep of freed memory is handed back first, or the call would find its
    room already there. On a GPU it is what torch's allocator gave out.

    Args:
        task: a call that has been made before, so that libraries are loaded and code is compiled.
        device: where it computes.

    Returns:
        Bytes, or None where the system cannot tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        task()
        return torch.cuda.max_memory_allocated(device) - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    before = _resident("VmRSS")
    task()
    return max(0, _resident("VmHWM") - before)


def _cost(task: Task, seconds: float) -> float:
    """Warm up; return the seconds of a call: that of a later one, where the first leaves time for more."""
    cost = _elapsed(task)
    for _ in range(2):
        if cost < seconds / 10:
            cost = min(cost, _elapsed(task))
    return cost


def _elapsed(task: Task) -> float:
    start = time.perf_counter()
    task()
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
