"""Joining the processes that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
from torch import distributed

from minrnn.distributed.failures import Failures, LostRanksError, Reported
from minrnn.distributed.group import RankGroup
from minrnn.distributed.ranks import ALONE, Ranks

REMEDY = (
    "torchrun --max-restarts needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and "
    "--standalone or --rdzv-backend c10d: without them the ranks of a restart look for those that have ended "
    "(pytorch issue 135712)"
)

SIGNS = ("gloo", "nccl", "Connection closed", "Connection reset", "Timed out", "Wait timeout", "Broken pipe")
"""Parts of the messages of RuntimeErrors that torch raises where another rank is missing."""


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


class join:  # noqa: N801  # called like a function
    """A context manager that joins the ranks of a run, and yields this one's `Ranks`.

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

    def __init__(
        self,
        device: str,
        timeout: float,
        launch: Launch | None = None,
        store: distributed.Store | None = None,
    ) -> None:
        self.device, self.timeout, self.store = device, timeout, store
        self.launch = Launch.of(os.environ) if launch is None else launch

    def __enter__(self) -> Ranks:
        launch, limit = self.launch, timedelta(seconds=self.timeout)
        launch.check()
        if launch.size == 1:
            return ALONE
        if self.store is None:
            self.store, _, _ = next(distributed.rendezvous("env://", timeout=limit))
        store = distributed.PrefixStore("minrnn", self.store)
        self.failures = Failures(store, launch.rank, launch.size)
        self.ranks = RankGroup(launch.rank, launch.size, launch.local_rank, launch.local_size, store)
        kind = self.ranks.device(self.device)
        if kind.startswith("cuda"):
            torch.cuda.set_device(kind)
        try:
            distributed.init_process_group(
                _backend(kind),
                store=distributed.PrefixStore("group", self.store),
                rank=launch.rank,
                world_size=launch.size,
                timeout=limit,
            )
        except RuntimeError as error:
            if _is_loss(error):
                raise LostRanksError(
                    f"not all of the {launch.size} ranks have joined within {self.timeout:g} s "
                    "(train.timeout): see their output, or what torchrun says"
                ) from error
            raise
        return self.ranks

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.launch.size == 1:
            return
        if error is None:
            error = self._leave()
        if isinstance(error, RuntimeError) and _is_loss(error):
            told = self.failures.explain(self.timeout)
            if told is None:
                raise Reported from error
            raise LostRanksError(told) from error
        if isinstance(error, Exception) and not self.failures.is_news(f"{type(error).__name__}: {error}"):
            raise Reported from error

    def _leave(self) -> RuntimeError | None:
        """Leave the group together: if one ends before another has, torchrun ends that.

        Returns:
            The error of this exchange if one of the others has ended.
        """
        try:
            self.ranks.highest([0])
        except RuntimeError as error:
            if _is_loss(error):
                return error
            raise
        distributed.destroy_process_group()
        return None


def _backend(device: str) -> str:
    """Return the backends of a process group: gloo for what is exchanged on the CPU, the device's own."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "gloo"
    return f"cpu:gloo,{kind}:{distributed.get_default_backend_for_device(kind)}"


def _is_loss(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed."""
    if isinstance(error, distributed.DistError):
        return True
    return type(error) is RuntimeError and any(sign.lower() in str(error).lower() for sign in SIGNS)
