"""A caching allocator for large outputs on the CPU.

The system allocator returns large blocks to the operating system when they are freed, so that every training
step gets fresh pages and waits until the kernel has cleared them: for an output of 64 MiB as long as the scan
itself takes. Here the storage of a freed output is reused for the next output of the same size. The size must
be equal, because torch saves and shares a tensor's whole storage: a larger one would expose old values.

Storages are torch's own, so that outputs can be resized, shared and saved like any tensor. A storage is free
when only this file holds a reference to it. The cache holds at most LIMIT bytes, including outputs that are
still in use. Storages that stay free for IDLE seconds are released when the next large output is made, and
all free ones when there is no memory for it.
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
"""Seconds after which an unused storage is released."""


def _memory() -> int:
    """Return the machine's memory in bytes; 16 GiB where it is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 16 << 30


LIMIT = _memory() // 16
"""Capacity of the cache in bytes. Where a training step has more outputs than that, part of them are
cached."""


class _Kept:
    """A cached storage, and the time since which it is known to be free."""

    __slots__ = ("free_since", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.free_since: float | None = None

    def held(self) -> tuple[int, int]:
        """The numbers of references to the storage: torch's, and Python's."""
        return storage_use_count(self.storage), sys.getrefcount(self.storage)


_NOT_HELD = _Kept(torch.UntypedStorage(0, device="cpu")).held()


class _Pool:
    """The cached storages, the most recently used one last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.kept: list[_Kept] = []
        self.looked = time.monotonic()  # for free storages

    def find(self, nbytes: int) -> _Kept | None:
        """Remove and return a free storage of this size, the last one used, for the sake of caches."""
        for kept in reversed(self.kept):
            if kept.storage.nbytes() == nbytes and kept.held() == _NOT_HELD and _is_as_made(kept.storage):
                self.kept.remove(kept)
                return kept
        return None

    def make_room(self, nbytes: int) -> None:
        """Drop the oldest storages until `nbytes` more are within LIMIT; outputs in use stay valid."""
        while self.kept and sum(kept.storage.nbytes() for kept in self.kept) + nbytes > LIMIT:
            del self.kept[0]

    def give_back(self, idle: float) -> int:
        """Release the storages that have been free for `idle` seconds; return their size in bytes."""
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
    """Whether the storage was neither moved into shared memory nor made fixed in size, as NumPy does."""
    return storage.resizable() and not storage.is_shared()


_POOL = _Pool()
if hasattr(
    os, "register_at_fork"
):  # a forked child has its parent's storages, but not the thread that may hold the lock
    os.register_at_fork(
        before=_POOL.lock.acquire, after_in_parent=_POOL.lock.release, after_in_child=_POOL.lock.release
    )


def take(nbytes: int, prepare: Callable[[int, int], None]) -> torch.UntypedStorage | None:
    """Take a storage of `nbytes` with arbitrary contents from the cache, or allocate one.

    Args:
        nbytes: size in bytes.
        prepare: called with the address and the size of a newly allocated storage.

    Returns:
        The storage; None if it is too large to be cached, or its allocation failed. In the latter case all
        free storages have been released, so that the caller can allocate through torch.
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
    """Release the memory that the CPU engine caches for its outputs, at most a sixteenth of the machine's.

    Like torch.cuda.empty_cache, it leaves tensors in use untouched.

    Returns:
        The number of bytes released.

    >>> release_memory() >= 0
    True
    """
    with _POOL.lock:
        return _POOL.give_back(0)
