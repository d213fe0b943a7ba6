"""Memory for large outputs, kept for the next one.

A system allocator hands large blocks back to the operating system when they are freed, so that every training
step gets fresh pages and waits while the kernel clears them: for an output of 64 MiB as long as for the scan
itself. Here the storage of an output that is gone serves the next output of its size: exactly its size, for
torch saves and shares a tensor's whole storage, and what is left over would hold former numbers.

Storages are torch's own, so that outputs are as any tensor: they can be resized, shared and saved. One that
is held by nobody but this file is free. What is kept is bounded: LIMIT bytes in all, outputs that are still
in use among them, so that a process which computes nothing more holds no more than that. What stays free for
IDLE seconds is given back when the next large output is made, and all that is free when there is no memory
for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from minrnn.ops.torch_private import storage_use_count

__all__ = ["IDLE", "LIMIT", "release_memory", "take"]

IDLE = 10.0
"""Seconds after which a storage that nobody asked for is given back."""


def _memory() -> int:
    """Bytes of the machine's memory; 16 GiB where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 16 << 30


LIMIT = _memory() // 16
"""Bytes that are kept at most. More outputs than that in a training step are served in part."""


class _Kept:
    """A storage, and since when it is known to be free."""

    __slots__ = ("free_since", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.free_since: float | None = None

    def held(self) -> tuple[int, int]:
        """References to the storage: torch's, and Python's."""
        return storage_use_count(self.storage), sys.getrefcount(self.storage)


_NOT_HELD = _Kept(torch.UntypedStorage(0, device="cpu")).held()


class _Pool:
    """All that is kept, the one that was handed out last at the end."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept: list[_Kept] = []
        self.looked = time.monotonic()  # for what is free

    def find(self, nbytes: int) -> _Kept | None:
        """A free storage of this size, taken out; the youngest, which may still be in a cache."""
        for kept in reversed(self.kept):
            if kept.storage.nbytes() == nbytes and kept.held() == _NOT_HELD and _is_as_made(kept.storage):
                self.kept.remove(kept)
                return kept
        return None

    def make_room(self, nbytes: int) -> None:
        """Let the oldest go until so many bytes more are within LIMIT; those in use stay their users'."""
        while self.kept and sum(kept.storage.nbytes() for kept in self.kept) + nbytes > LIMIT:
            del self.kept[0]

    def give_back(self, idle: float) -> int:
        """Let go what is known to be free for so many seconds; return how many bytes that was."""
        self.looked = now = time.monotonic()
        for kept in self.kept:
            if kept.held() != _NOT_HELD:
                kept.free_since = None
            elif kept.free_since is None:
                kept.free_since = now
        gone = [kept for kept in self.kept if kept.free_since is not None and now - kept.free_since >= idle]
        self.kept = [kept for kept in self.kept if kept not in gone]
        return sum(kept.storage.nbytes() for kept in gone)


def _is_as_made(storage: torch.UntypedStorage) -> bool:
    """Whether it was neither moved into shared memory nor fixed for NumPy."""
    return storage.resizable() and not storage.is_shared()


_POOL = _Pool()
if hasattr(
    os, "register_at_fork"
):  # a child process has its parent's storages, and no thread that holds the lock
    os.register_at_fork(
        before=_POOL.lock.acquire, after_in_parent=_POOL.lock.release, after_in_child=_POOL.lock.release
    )


def take(nbytes: int, prepare: Callable[[int, int], None]) -> torch.UntypedStorage | None:
    """Find or make a storage of `nbytes`, whose contents are arbitrary.

    Args:
        nbytes: its size.
        prepare: called with the address and the size of a new one.

    Returns:
        The storage. None if it would not be kept, or there was no memory for it: then all that was free has
        been given back, and it is torch's turn.
    """
    if nbytes > LIMIT:
        return None
    with _POOL.lock:
        if time.monotonic() - _POOL.looked > IDLE / 10:
            _POOL.give_back(IDLE)
        found = _POOL.find(nbytes)
        if found is None:
            try:
                found = _Kept(torch.UntypedStorage(nbytes, device="cpu"))
            except RuntimeError:
                _POOL.give_back(0)
                return None
            prepare(found.storage.data_ptr(), nbytes)
            _POOL.make_room(nbytes)
        found.free_since = None
        _POOL.kept.append(found)
        return found.storage


def release_memory() -> int:
    """Give back the memory of former outputs that the CPU's engine keeps for the next ones.

    That is at most a sixteenth of the machine's memory. As torch.cuda.empty_cache, it leaves tensors alone.

    Returns:
        How many bytes were given back.

    >>> release_memory() >= 0
    True
    """
    with _POOL.lock:
        return _POOL.give_back(0)
