"""How a run is asked to stop: by a signal, by a reader that has gone, by a full disk."""

from __future__ import annotations

import contextlib
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

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""A key, another program, a terminal that closes; Windows has no SIGHUP."""

BROKEN_PIPE = 13
"""SIGPIPE, which not every system has a name for: it ends a program whose reader has gone, as `head` does."""

_NOTICE = b"\nstopping after this step; once more stops at once, without saving\n"


class Interrupted(Exception):  # noqa: N818 - a request that was met, not an error
    """A signal, or a reader that has gone, ended the run after its state was saved.

    Args:
        signum: the signal; BROKEN_PIPE for a reader that has gone.
        done: what is done and saved, such as "step 12".
    """

    def __init__(self, signum: int, done: str) -> None:
        name = "SIGPIPE" if signum == BROKEN_PIPE else signal.Signals(signum).name
        super().__init__(f"{name}: stopped and saved after {done}")
        self.signum = signum


@dataclass
class Interruption:
    """Whether something has asked the run to stop."""

    signum: int = 0
    """The signal's number; 0 while there was none."""
    failure: OSError | None = None
    """Why what the run says of itself can be said no more."""

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return bool(self.signum) or self.failure is not None

    @contextmanager
    def guard_output(self) -> Iterator[None]:
        """Take an error of what is said in the block (a reader that has gone, a full disk) for a request."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or error

    def to_exception(self, done: str) -> Interrupted | OSError:
        """Return what is to be raised once all is saved.

        Args:
            done: what is done, such as "step 12".
        """
        if self.signum or isinstance(self.failure, BrokenPipeError):
            return Interrupted(self.signum or BROKEN_PIPE, done)
        assert self.failure is not None, "nothing asked for it"
        reason = self.failure.strerror or str(self.failure)
        return OSError(self.failure.errno, f"{reason}; stopped and saved after {done}", self.failure.filename)


@contextmanager
def interruptible(interruption: Interruption | None = None) -> Iterator[Interruption]:
    """Let SIGINT, SIGTERM and SIGHUP ask for a stop at the end of the step; a second one stops at once.

    A signal that is ignored (SIGHUP under nohup, SIGINT in a shell's background) stays ignored. Outside the
    main thread, where Python delivers no signals, nothing is changed.

    Args:
        interruption: is told; None makes one.
    """
    interruption = interruption or Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    known = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    previous: dict[int, Any] = {signum: signal.getsignal(signum) for signum in known}
    # None is a handler that was not set from Python, and could not be put back.
    previous = {signum: old for signum, old in previous.items() if old not in (signal.SIG_IGN, None)}
    stderr = _descriptor()

    def ask(signum: int, frame: FrameType | None) -> None:
        interruption.signum = signum
        for each, handler in previous.items():
            signal.signal(each, handler)
        # The plain system call: print could be interrupted in the middle of another print.
        with contextlib.suppress(OSError):  # nobody reads it; the request stands
            if stderr is not None:
                os.write(stderr, _NOTICE)

    try:
        for signum in previous:
            signal.signal(signum, ask)
        yield interruption
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _descriptor() -> int | None:
    """Return what stderr writes to, or None where it is no file: 2 may be another one's number."""
    try:
        return None if sys.stderr is None else sys.stderr.fileno()
    except (io.UnsupportedOperation, AttributeError, ValueError):  # of a notebook or a test, or closed
        return None
