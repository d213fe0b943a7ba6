"""Joining the processes that torchrun has started."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from minrnn.distributed.failures import Failures
from minrnn.distributed.group import RankGroup
from minrnn.distributed.ranks import ALONE, Ranks

REMEDY = (
    "torchrun --max-restarts needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and "
    "--standalone or --rdzv-backend c10d: without them the ranks of a restart look for those that have ended "
    "(pytorch issue 135712)"
)


@dataclass(frozen=True)
class Launch:
    """How torchrun has started this process; the defaults are those of a process without it."""

    rank: int = 0
    """RANK: number of this process."""
    size: int = 1
    """WORLD_SIZE: number of processes."""
    local_rank: int = 0
    """LOCAL_RANK: number of this process among those of its machine."""
    local_size: int = 1
    """LOCAL_WORLD_SIZE: number of processes of its machine."""
    restarts: int = 0
    """TORCHELASTIC_RESTART_COUNT: how often the processes were started before."""
    most_restarts: int = 0
    """TORCHELASTIC_MAX_RESTARTS: how often they may be."""
    shares_store: bool = False
    """TORCHELASTIC_USE_AGENT_STORE: whether the ranks of all restarts share a store."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """Return what the variables of an environment say.

        Raises:
            ValueError: a variable is missing or not a number, though others are there.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()

        def number(name: str, default: str | None = None) -> int:
            text = environment.get(name, default)
            if text is None or not text.isdecimal():
                raise ValueError(f"{name} must be a number, as torchrun sets it, got {text!r}")
            return int(text)

        return cls(
            rank=number("RANK"),
            size=number("WORLD_SIZE"),
            local_rank=number("LOCAL_RANK"),
            local_size=number("LOCAL_WORLD_SIZE"),
            restarts=number("TORCHELASTIC_RESTART_COUNT", "0"),
            most_restarts=number("TORCHELASTIC_MAX_RESTARTS", "0"),
            shares_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def check(self) -> None:
        """Raise ValueError if a restart would fail, with the remedy."""
        if self.size > 1 and self.most_restarts and self.shares_store:
            raise ValueError(REMEDY)


@contextmanager
def join(
    device: str,
    timeout: float,
    launch: Launch | None = None,
    store: distributed.Store | None = None,
) -> Iterator[Ranks]:
    """Join the ranks of a run in a context, and yield this one's `Ranks`.

    In a process that torchrun has not started, and in one that it has started alone, that is `ALONE`.

    An error that all ranks raise is raised on one, and the others end with `Reported`, a SystemExit. So do
    ranks whose exchange failed because of another rank's error; if there is none, one of them raises
    LostRanksError, which names the ranks that have ended or do not answer.

    Args:
        device: the device of training, as in TrainConfig.
        timeout: seconds that a rank waits for the others in an exchange.
        launch: how the process was started; None to read it from the environment.
        store: the store through which ranks find each other; None for the one that torchrun names.

    Raises:
        ValueError: torchrun may restart the processes, and they would not find each other.
        LostRanksError: the other ranks do not join.
    """
    launch = Launch.of(os.environ) if launch is None else launch
    launch.check()
    if launch.size == 1:
        yield ALONE
        return
    limit = timedelta(seconds=timeout)
    if store is None:
        store, _, _ = next(distributed.rendezvous("env://", timeout=limit))
    failures = Failures(distributed.PrefixStore("minrnn", store), launch.rank, launch.size)
    ranks = RankGroup(launch.rank, launch.size, launch.local_rank, launch.local_size, failures)
    kind = ranks.device(device)
    if kind.startswith("cuda"):
        torch.cuda.set_device(kind)
    # Before there is a group: this module's functions hold the one of its import as a default, for good, and
    # torch imports it with the first DistributedDataParallel.
    importlib.import_module("torch.distributed.nn.functional")
    with failures.explained(timeout):
        distributed.init_process_group(
            _backend(kind),
            store=distributed.PrefixStore("group", store),
            rank=launch.rank,
            world_size=launch.size,
            timeout=limit,
        )
        # One that ended while others still connect to it would fail them, and whatever they report.
        failures.meet(limit)
        yield ranks
        ranks.leave()


def _backend(device: str) -> str:
    """Return the backends of a process group: gloo for what is exchanged on the CPU, the device's own."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "gloo"
    return f"cpu:gloo,{kind}:{distributed.get_default_backend_for_device(kind)}"
