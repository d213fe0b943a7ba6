"""Requests to stop a run: signals, a closed output, a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from minrnn.distributed import ALONE, Ranks

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C, a request of another program, a closed terminal; Windows has no SIGHUP."""

BROKEN_PIPE = 13
"""Number of SIGPIPE, for an output whose reader has gone (as `head` does); Windows has no such signal."""

_NOTICE = b"\nstopping after this step; a second signal stops immediately, without saving\n"


class Interrupted(Exception):  # noqa: N818 - a completed request, not an error
    """The run was stopped by a signal or a closed output, after its state was saved.

    Args:
        signum: the signal; BROKEN_PIPE for a closed output.
        done: the work that is saved, such as "step 12".
    """

    def __init__(self, signum: int, done: str) -> None:
        name = "SIGPIPE" if signum == BROKEN_PIPE else signal.Signals(signum).name
        super().__init__(f"{name}: stopped and saved after {done}")
        self.signum = signum


@dataclass
class Interruption:
    """A request to stop a run."""

    signum: int = 0
    """Number of the signal; 0 if there was none."""
    failure: OSError | None = None
    """The first error of writing output, if any."""

    @property
    def requested(self) -> bool:
        """Whether a stop is requested."""
        return bool(self.signum) or self.failure is not None

    @property
    def announces(self) -> bool:
        """Whether this process tells the user that it stops."""
        return True

    def agree(self) -> None:
        """Exchange requests with the other ranks, if there are any; called by all of them after each step."""

    @contextmanager
    def guard_output(self) -> Iterator[None]:
        """Treat an OSError of output in the block (a closed reader, a full disk) as a request to stop."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error

    def to_exception(self, done: str) -> Interrupted | OSError:
        """Return the exception to raise after the state is saved.

        Args:
            done: the work that is saved, such as "step 12".
        """
        if self.signum or isinstance(self.failure, BrokenPipeError):
            return Interrupted(self.signum or BROKEN_PIPE, done)
        assert self.failure is not None, "no stop was requested"
        reason = self.failure.strerror or str(self.failure)
        return OSError(self.failure.errno, f"{reason}; stopped and saved after {done}", self.failure.filename)


@dataclass
class SharedInterruption(Interruption):
    """A request to stop a run of several ranks: each sees the requests of all, as of the last exchange."""

    ranks: Ranks = ALONE
    """The ranks of the run."""
    _agreed: bool = False

    @property
    def requested(self) -> bool:
        """Whether a rank had requested a stop when they last exchanged that: the same on all of them."""
        return self._agreed

    @property
    def announces(self) -> bool:
        """Whether this is the first rank."""
        return self.ranks.is_first

    def agree(self) -> None:
        own = 0 if self.failure is None else self.failure.errno or errno.EIO
        signum, code = self.ranks.highest([self.signum, own])
        self._agreed = bool(signum or code)
        self.signum = self.signum or signum
        if code and self.failure is None:
            self.failure = OSError(code, os.strerror(code))  # a BrokenPipeError if that is its number


@contextmanager
def interruptible(interruption: Interruption | None = None) -> Iterator[Interruption]:
    """Turn SIGINT, SIGTERM and SIGHUP into a request to stop after the step; a second one stops at once.

    Signals that are ignored (SIGHUP under nohup, SIGINT in a shell's background) stay ignored. Outside the
    main thread, where Python does not deliver signals, nothing is changed.

    Args:
        interruption: the object that records the request; None for a new one.

    Yields:
        The interruption.
    """
    interruption = interruption or Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in known}
    # None is a handler that was not set from Python and cannot be restored.
    previous = {signum: old for signum, old in previous.items() if old not in (signal.SIG_IGN, None)}
    stderr = _descriptor()

    def ask(signum: int, frame: FrameType | None) -> None:
        interruption.signum = signum
        for each, handler in previous.items():
            signal.signal(each, handler)
        # Not print, which is not reentrant: the signal may interrupt another print.
        with contextlib.suppress(OSError):  # the reader has gone
            if stderr is not None and interruption.announces:
                os.write(stderr, _NOTICE)

    try:
        for signum in previous:
            signal.signal(signum, ask)
        yield interruption
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _descriptor() -> int | None:
    """Return the file descriptor of stderr, or None if it has none."""
    try:
        return None if sys.stderr is None else sys.stderr.fileno()
    except (io.UnsupportedOperation, AttributeError, ValueError):  # in a notebook or a test, or closed
        return None
