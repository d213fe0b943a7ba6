"""What each test costs: processor seconds, and the peak of its process's memory; and a bound on the latter.

MINRNN_COSTS=20 lists the 20 dearest of both at the end of a run. MINRNN_PEAK=2048 fails a test that takes its
process beyond 2048 MiB; `make test` sets it. Memory is read where /proc shows it, as Linux does. What tests
have freed is no cost of those after them: it is returned to the system, as the C library does not by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
SHARE = 1 / 3
"""Of its time limit, a test should take no more: a busy machine is three times as slow."""
KEPT = 64
"""MiB that a process may come to hold in addition before what is freed is returned, which takes a while."""


class Cost(NamedTuple):
    """Of one test, with the fixtures that it was the first to ask for."""

    test: str
    seconds: float
    """Of processors, its ended children's included; the wall's depend on what else runs."""
    peak: int
    """MiB at most that its process held, what it held before included; 0 where that is unknown."""
    own: int
    """MiB of the peak that it did not hold before."""
    limit: float
    """Seconds on the wall after which it is stopped; 0 for none."""


def peak_memory() -> int:
    """Return the most MiB that this process has held since `forget_peak`, or since it began; 0 if unknown."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE):
            return int(found[1]) >> 10
    return 0


def forget_peak() -> None:
    """Let the peak be what is held now; where the system refuses, it stays the whole process's so far."""
    with contextlib.suppress(OSError):
        RESET.write_text("5")


def return_freed_memory() -> None:
    """Return to the system what glibc keeps: once a test has trained, all that it can."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def processor_seconds() -> float:
    return sum(os.times()[:4])


def time_limit(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0] if mark and mark.args else item.config.getini("timeout") or 0)


class Meter:
    """Measures the tests that run in this process."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        """On the peak, in MiB; 0 for none."""
        self.highest = 0
        self.began, self.held = 0.0, 0
        self.returned = 0
        """MiB that it held when it last returned what was freed."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, bool, bool]:
        self.held = self.still_held()
        self.began = processor_seconds()
        return (yield)

    def still_held(self) -> int:
        """Return the MiB that are held before a test, and let the peak begin there."""
        forget_peak()
        if (held := peak_memory()) > self.returned + KEPT:
            return_freed_memory()
            forget_peak()
            held = self.returned = peak_memory()
        return held

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.when == "teardown":
            peak = peak_memory()
            seconds = processor_seconds() - self.began
            cost = Cost(item.nodeid, seconds, peak, peak - self.held, time_limit(item))
            report.user_properties.append(("cost", tuple(cost)))
            # Only the first of equals: those that follow find what it left.
            if report.passed and self.bound and peak > max(self.bound, self.highest):
                report.outcome = "failed"
                report.longrepr = f"its process held {peak} MiB, which MINRNN_PEAK bounds by {self.bound}"
            self.highest = max(self.highest, peak)
        return report


class Bill:
    """Lists what was measured, in this process or in those that ran the tests for it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.costs: list[Cost] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.costs += [Cost(*value) for name, value in report.user_properties if name == "cost"]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        slow = [cost for cost in self.costs if cost.limit and cost.seconds > SHARE * cost.limit]
        for cost in slow:
            share = f"{cost.seconds:.0f} s of {cost.limit:.0f}"
            terminalreporter.write_line(f"more than a third of its time limit: {cost.test}, {share}")
        if not self.length:
            return
        terminalreporter.section("dearest tests")
        for cost in sorted(self.costs, key=lambda cost: -cost.seconds)[: self.length]:
            terminalreporter.write_line(f"{cost.seconds:7.1f} s    {cost.test}")
        for cost in sorted(self.costs, key=lambda cost: -cost.own)[: self.length]:
            terminalreporter.write_line(f"{cost.own:5d} MiB of {cost.peak:5d}  {cost.test}")


def register(config: pytest.Config) -> None:
    """Let a run of pytest measure its tests."""
    config.pluginmanager.register(Meter(int(os.environ.get("MINRNN_PEAK", "0"))), "meter")
    if not hasattr(config, "workerinput"):  # one of xdist's workers sends its reports to the first process
        config.pluginmanager.register(Bill(int(os.environ.get("MINRNN_COSTS", "0"))), "bill")
