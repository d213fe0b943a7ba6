"""The process that plants faults: it has loaded what tests need, except minrnn, and forks for each fault.

Started by run.py, with the scratch folder as its argument; `plan.json` there says what to do. It prints an
outcome a line, as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants.builder import NotBuiltError, build
from mutants.faults import Fault, file_of, related
from mutants.workshop import environment_of, use_extension, work_of

PRELOADED = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.utils.data",
    "hypothesis",
    "matplotlib.pyplot",
    "rich.console",
    "tyro",
    "safetensors.torch",
    "pooch",
    "h5py",
    "gymnasium",
    "mujoco",
    "stable_baselines3",
    "sb3_contrib",
    "tensorboard",
)
"""What tests import, as far as it is installed; Triton reads its settings when it is imported."""

BUILDING = 1800
"""Seconds that a build may take beside the tests' limit."""
UNCHANGED = 3600
"""Seconds that the tests of a file may take without a fault."""
SLOWER = 4
"""How many times as long they may take with one: the machine may have become busier."""

PROCESSES = multiprocessing.get_context("fork")


class Job(NamedTuple):
    """Tests to be run on a copy, with a fault or without."""

    name: str
    tests: list[str]
    fault: Fault | None
    limit: float
    """Seconds for the tests."""
    compiled: bool
    """Whether the extension is built first."""


class Outcome(NamedTuple):
    """What came of a job: `passed`, `failed` (at what), or `error` (which)."""

    name: str
    outcome: str
    by: str
    seconds: float


class Running(NamedTuple):
    """A job in its process, which leads a group of its own."""

    job: Job
    process: BaseProcess
    answer: Connection
    started: float
    limit: float


class Failures:
    """A plugin of pytest that keeps the names of what failed, and why."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.reasons: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.names.append(f"import of {report.nodeid}")
            self.reasons.append(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.names.append(report.nodeid)
            self.reasons.append(report.longreprtext)


def run_job(job: Job, copy: Path, ninja: str, answer: Connection) -> None:
    """Run the tests of a job in this forked process, and answer with the outcome and what failed."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(work_of(copy) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    variables = environment_of(copy)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(copy)
    sys.path[:] = [
        str(copy / "src"),
        *(path for path in sys.path if Path(path) not in Path(__file__).parents),
    ]
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutants"]:
        del sys.modules[name]  # the copy has its own
    if job.compiled:
        try:
            build(copy, ninja)
        except NotBuiltError as error:
            answer.send(("error", f"does not compile: {error}"))
            return
    answer.send(_pytest(job, copy))


def _pytest(job: Job, copy: Path) -> tuple[str, str]:
    """Run tests until one fails; return the outcome and what failed, and without a fault why, too."""
    failures = Failures()
    options = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0", "--timeout=0"]
    status = pytest.main([*options, f"--basetemp={work_of(copy) / 'tmp'}", *job.tests], plugins=[failures])
    imported = getattr(sys.modules.get("minrnn"), "__file__", None)
    if imported is not None and not Path(imported).is_relative_to(copy):
        return "error", f"{imported} was imported, and not the copy"
    if status == pytest.ExitCode.OK:
        return "passed", ""
    if not failures.names:
        return "failed", f"pytest: {pytest.ExitCode(status).name}"
    return "failed", "\n".join(failures.names[:1] + (failures.reasons[:1] if job.fault is None else []))


def run_jobs(jobs: list[Job], copies: list[Path], ninja: str) -> Iterator[Outcome]:
    """Run jobs side by side, one on each copy; what is compiled on the first copy alone."""
    compiled = [job for job in jobs if job.compiled]
    others = [job for job in jobs if not job.compiled]
    running: dict[Path, Running] = {}
    try:
        while compiled or others or running:
            for copy in copies:
                queue = compiled if copy == copies[0] and compiled else others
                if copy not in running and queue:
                    running[copy] = _start(queue.pop(0), copy, ninja)
            first = min(job.started + job.limit for job in running.values())
            ends = [end for job in running.values() for end in (job.answer, job.process.sentinel)]
            ready = wait(ends, max(0.0, first - time.monotonic()))
            for copy, job in list(running.items()):
                late = time.monotonic() > job.started + job.limit
                if late or job.answer in ready or job.process.sentinel in ready:
                    del running[copy]
                    yield _end(job, copy, late)
    finally:
        for copy, job in running.items():
            _end(job, copy, True)


def _start(job: Job, copy: Path, ninja: str) -> Running:
    shutil.rmtree(work_of(copy), ignore_errors=True)
    work_of(copy).mkdir()
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)
    if job.fault is not None:
        _plant(job.fault, copy)
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run_job, args=(job, copy, ninja, sender))
    process.start()
    sender.close()
    return Running(job, process, receiver, time.monotonic(), job.limit + BUILDING * job.compiled)


def _end(running: Running, copy: Path, late: bool) -> Outcome:
    """End what a job has started, take its fault out, and return what came of it."""
    job, process = running.job, running.process
    assert process.pid is not None
    with suppress(ProcessLookupError):  # it is not reaped yet: the number is nobody else's
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # before it has a group
    process.join()
    if job.fault is not None:
        shutil.copy2(_kept(copy), copy / job.fault.file)  # with its time, by which ninja knows it
    if job.compiled:
        use_extension(copy.with_name("extension"), copy)
    seconds = time.monotonic() - running.started
    try:
        outcome, by = running.answer.recv() if running.answer.poll() else ("failed", "")
    except EOFError:  # it ended before it could answer
        outcome, by = "failed", ""
    running.answer.close()
    if outcome == "failed" and not by:
        by = f"the limit of {running.limit:.0f} s" if late else f"exit status {process.exitcode}"
    return Outcome(job.name, outcome, by, round(seconds, 2))


def _plant(fault: Fault, copy: Path) -> None:
    path = copy / fault.file
    shutil.copy2(path, _kept(copy))
    path.write_text(fault.planted(path.read_text(encoding="utf-8")), encoding="utf-8")


def _kept(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}-kept")


def preload() -> None:
    """Import what tests import, and not minrnn."""
    for name in PRELOADED:
        with suppress(ImportError):
            import_module(name)
    found = [name for name in sys.modules if name.partition(".")[0] == "minrnn"]
    assert not found, f"minrnn must not be loaded before a fault is planted, and {found[0]} is"


def unchanged(faults: list[Fault]) -> list[Job]:
    """Return jobs that run the tests of faults without one, file by file; those of csrc with a new build."""
    of_kind = {
        compiled: [fault for fault in faults if fault.is_compiled == compiled] for compiled in (False, True)
    }
    return [
        Job(_name_of(file, compiled), tests, None, UNCHANGED, compiled)
        for compiled, some in of_kind.items()
        for file, tests in related(some).items()
    ]


def planted(fault: Fault, least: float, seconds: Mapping[str, float]) -> Job:
    """Return the job of a fault; it may take long beside what its tests took without one."""
    usual = sum(
        seconds[_name_of(file, fault.is_compiled)] for file in {file_of(test) for test in fault.tests}
    )
    return Job(fault.name, list(fault.tests), fault, least + SLOWER * usual, fault.is_compiled)


def _name_of(file: str, compiled: bool) -> str:
    return f"{file}, built anew" if compiled else file


def main(scratch: Path) -> None:
    plan: dict[str, Any] = json.loads((scratch / "plan.json").read_text(encoding="utf-8"))
    copies = [Path(copy) for copy in plan["copies"]]
    faults = [Fault(*values) for values in plan["faults"]]
    preload()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what was started
    seconds = {}
    for outcome in run_jobs(unchanged(faults), copies, plan["ninja"]):
        print(json.dumps(outcome._asdict()), flush=True)
        if outcome.outcome != "passed":
            return
        seconds[outcome.name] = outcome.seconds
    for outcome in run_jobs(
        [planted(fault, plan["limit"], seconds) for fault in faults], copies, plan["ninja"]
    ):
        print(json.dumps(outcome._asdict()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
