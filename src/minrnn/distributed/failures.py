"""Which rank failed: the others find out from the store, so that one error is printed once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

PATIENCE = 3.0
"""Seconds in which ranks that wait for each other fail, one after another, once an exchange has failed."""

SIGNS = ("gloo", "nccl", "Connection closed", "Connection reset", "Timed out", "Wait timeout", "Broken pipe")
"""Parts of the messages of RuntimeErrors that torch raises where another rank is missing."""

_FIRST, _TOLD, _WAITED = "failures/first", "failures/told", "failures/waited/{}"
_JOINED, _ALL_JOINED = "joined", "joined/all"
_POLL = 0.05


class LostRanksError(RuntimeError):
    """An exchange between ranks failed, because one has ended or did not join it in time."""


class Reported(SystemExit):
    """This rank ends because of an error that another rank reports.

    Args:
        status: the exit status.
    """

    def __init__(self, status: int = 1) -> None:
        super().__init__(status)


@dataclass(frozen=True)
class Failures:
    """The failures of a run's ranks, in the store that they share."""

    store: distributed.Store
    """The store."""
    rank: int
    """This rank."""
    size: int
    """Number of ranks."""

    def meet(self, limit: timedelta) -> None:
        """Return when all ranks have called this.

        Args:
            limit: the time after which it raises RuntimeError.
        """
        if self.store.add(_JOINED, 1) == self.size:
            self.store.set(_ALL_JOINED, "1")
        self.store.wait([_ALL_JOINED], limit)

    @contextmanager
    def explained(self, timeout: float) -> Iterator[None]:
        """A context whose errors are reported by one rank alone, with the ranks that are missing.

        Args:
            timeout: seconds after which an exchange fails.

        Raises:
            Reported: another rank reports the error.
            LostRanksError: an exchange failed, and no rank has recorded an error.
        """
        try:
            yield
        except Exception as error:
            if _is_loss(error):
                told = self.explain(timeout)
                raise (Reported() if told is None else LostRanksError(told)) from error
            if self.is_news(f"{type(error).__name__}: {error}"):
                raise
            raise Reported from error

    def is_news(self, text: str) -> bool:
        """Record an error of this rank; return False if another rank has failed in the same way.

        Args:
            text: the error.
        """
        entry = f"{self.rank}: {text}"
        try:
            first = self.store.compare_set(_FIRST, "", entry).decode()
        except RuntimeError:  # the rank that holds the store has ended
            return True
        return first == entry or first.partition(": ")[2] != text

    def any(self) -> bool:
        """Return whether a rank has recorded an error."""
        return self.store.check([_FIRST])

    def explain(self, timeout: float) -> str | None:
        """Return a description of the ranks that did not join an exchange, or None if another rank does.

        Args:
            timeout: seconds after which an exchange fails.
        """
        try:
            self.store.set(_WAITED.format(self.rank), "1")
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and self._missing():
                if self.any():  # the error that made it end
                    return None
                time.sleep(_POLL)
            lost = self._missing()
            if self.store.compare_set(_TOLD, "", str(self.rank)).decode() != str(self.rank):
                return None
        except RuntimeError:  # rank 0 holds the store, and has ended; the next one says so
            return describe([0], timeout) if self.rank == 1 else None
        return describe(lost, timeout)

    def _missing(self) -> list[int]:
        """Return the ranks that have not noticed a failed exchange."""
        return [rank for rank in range(self.size) if not self.store.check([_WAITED.format(rank)])]


def describe(lost: list[int], timeout: float) -> str:
    """Return a sentence about ranks that do not answer; an empty list if it is not known which.

    >>> describe([2], 60)
    'rank 2 has ended or has not answered for 60 s (train.timeout): see its output, or what torchrun says'
    """
    names = ", ".join(map(str, lost))
    who = f"ranks {names} have" if len(lost) > 1 else f"rank {names} has" if lost else "another rank has"
    verb, whose = who.split()[-1], "their" if len(lost) > 1 else "its"
    return (
        f"{who} ended or {verb} not answered for {timeout:g} s (train.timeout): see {whose} output, or what "
        "torchrun says"
    )


def _is_loss(error: Exception) -> bool:
    """Whether an exchange between ranks failed."""
    if isinstance(error, distributed.DistError):
        return True
    return type(error) is RuntimeError and any(sign.lower() in str(error).lower() for sign in SIGNS)
