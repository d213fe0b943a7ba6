"""A pool of processes that are the ranks of one job after another: started once, forked with torch loaded."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

MISSING = "" if "forkserver" in multiprocessing.get_all_start_methods() else "this system forks no processes"
"""Why there can be no pool, or nothing."""

LIMIT = 250
"""Seconds of an exchange between ranks, and of a job: a busy machine may take long."""

Job = Callable[..., Any]
"""A function of a module, called with this rank's Ranks and further arguments."""


class Pool:
    """Processes that are the ranks of jobs.

    Args:
        folder: a folder for the files through which ranks find each other.
        most: the most ranks of a job.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._numbers = folder, count()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["minrnn.training.loop", "torch._dynamo", "torch.distributed.fsdp", "rank_pool"]
        )
        pipes = [context.Pipe() for _ in range(most)]
        self._ends = [end for end, _ in pipes]
        self._processes = [context.Process(target=serve, args=(end,), daemon=True) for _, end in pipes]
        for process, (_, end) in zip(self._processes, pipes, strict=True):
            process.start()
            end.close()  # this process's copy: a rank that is killed then closes the pipe

    def run(self, size: int, job: Job, *arguments: Any) -> list[Any]:
        """Return what the ranks of a job return, in their order; raise AssertionError if one fails."""
        found = self._replies(size, job, arguments, LIMIT)
        failed = [f"rank {rank}: {trace}" for rank, (_, _, trace) in enumerate(found) if trace]
        assert not failed, "\n".join(failed)
        return [result for result, _, _ in found]

    def failures(self, size: int, job: Job, *arguments: Any, timeout: float = LIMIT) -> list[str]:
        """Return what the ranks of a job fail with: type and text; "killed"; or an empty text."""
        return [error for _, error, _ in self._replies(size, job, arguments, timeout)]

    def _replies(self, size: int, job: Job, arguments: tuple[Any, ...], timeout: float) -> list[Any]:
        path = str(self._folder / f"store{next(self._numbers)}")
        for rank in range(size):
            self._ends[rank].send((rank, size, path, timeout, job, arguments))
        found = []
        for rank in range(size):
            # Longer than an exchange waits: its error tells more than that there is none.
            if not self._ends[rank].poll(2 * LIMIT):
                os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
                found.append((None, "hangs", "hangs: its threads are in the output"))
                continue
            try:
                found.append(self._ends[rank].recv())
            except EOFError:
                found.append((None, "killed", "killed"))
        return found

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()


@contextmanager
def pool(folder: Path, most: int = 4) -> Iterator[Pool]:
    """Yield a pool, and end it."""
    made = Pool(folder, most)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def training_pool(factory: pytest.TempPathFactory, most: int = 4) -> Iterator[Pool]:
    """A pool whose ranks train with one thread each and share the tests' cache, as this process then does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MINRNN_CACHE", str(factory.getbasetemp() / "minrnn-cache"))
        with pool(factory.mktemp("stores"), most) as made:
            yield made


def serve(end: Any) -> None:
    """Be a rank of one job after another."""
    import torch

    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR1)
    while True:
        rank, size, path, timeout, job, arguments = end.recv()
        try:
            end.send((call(rank, size, path, timeout, job, arguments), "", ""))
        except BaseException as error:
            end.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))


def call(rank: int, size: int, path: str, timeout: float, job: Job, arguments: tuple[Any, ...]) -> Any:
    """Join the ranks of a job, and do this one's part."""
    from torch import distributed

    from minrnn.distributed import Launch, join

    before = threads_of_groups()
    try:
        with join("cpu", timeout, Launch(rank, size, rank, size), distributed.FileStore(path, size)) as ranks:
            result = job(ranks, *arguments)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    assert threads_of_groups() <= before, "the rank's process group is not freed"
    return result


def threads_of_groups() -> set[str]:
    """Return the threads of gloo's process groups in this process; none where there is no /proc.

    One that frees a tensor while the interpreter ends aborts the process (pytorch issue 190489).
    """
    return {path.parent.name for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()}
