"""Progress of long preparations on stderr: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SILENT_SECONDS = 1.0
"""Nothing is shown of what takes less."""

LINE_SECONDS = 30.0
"""Seconds between two lines, where stderr is not a terminal."""


class Bar:
    """The progress of work on a known number of bytes, with the time that is left.

    Args:
        what: what is being done.
        total: number of bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._began = self._shown = time.monotonic()
        self._first: int | None = None  # bytes that were done before, as after a kill
        columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._progress = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self._task = self._progress.add_task(what, total=total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:  # otherwise it prints an empty line
            self._progress.stop()

    def update(self, done: int) -> None:
        """Show that so many bytes are done, those of an earlier session included."""
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if now - self._began < SILENT_SECONDS:
            return
        if self._progress.console.is_terminal:
            self._progress.start()
            self._progress.update(self._task, completed=done)
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            print(self._line(done, now - self._began), file=sys.stderr, flush=True)

    def _line(self, done: int, seconds: float) -> str:
        speed = (done - (self._first or 0)) / seconds
        left = f"{(self._total - done) / speed / 60:.0f} min left" if speed > 0 else "time left unknown"
        return (
            f"{self._what}: {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, {left}"
        )
