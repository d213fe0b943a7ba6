"""Threads that are the ranks of a group, in one process: for sweeps, as processes take long to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.testing._internal.distributed import multi_threaded_pg


def on_threads(size: int, job: Callable[[int], Any]) -> list[Any]:
    """Return what `job(rank)` returns on each rank, in the default group of `size` ranks."""
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode
    found, errors = [None] * size, []
    isolate(True)
    multi_threaded_pg._install_threaded_pg()
    store = distributed.HashStore()

    def work(rank: int) -> None:
        distributed.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            found[rank] = job(rank)
        except BaseException as error:
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)  # the others stop waiting
        finally:
            distributed.destroy_process_group()

    try:
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        isolate(False)
    if errors:
        raise next((e for e in errors if not isinstance(e, SystemExit)), errors[0])
    return found


def group_name() -> str:
    """Return the name of this thread's group."""
    name: str = distributed.distributed_c10d._get_default_group().group_name
    return name
