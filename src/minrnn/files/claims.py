"""File locks that are released when their process ends, and directories and files with unique names."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".lock"
"""The lock file in a claimed directory; its text names the process that holds the lock."""

_POLL = 0.02  # seconds between two tries
_LONGEST_HOLDER = 200  # bytes read from a lock file
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Say = Callable[[str], object]


class InUseError(OSError):
    """Another process holds the lock; the message names it."""


@contextmanager
def claim(directory: Path, say: Say | None = None) -> Iterator[None]:
    """Lock a directory for writing while the block runs.

    The lock is one of the operating system: it is released when this process ends, however it ends, and a
    lock file left behind by a killed process has no effect. The directory is created if it does not exist,
    and removed again if it is empty afterward. Reading does not need the lock.

    Args:
        directory: the directory to lock.
        say: called with one line if the file system does not support locks; the block then runs unlocked.

    Raises:
        InUseError: the directory is locked, by another process or by this one.
        OSError: the directory cannot be created.
    """
    directory = Path(directory)
    made = _missing_directories(directory)
    try:
        for last in (False, False, True):
            with contextlib.ExitStack() as stack:
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock(directory / LOCK_FILE, say=say))
                except (FileNotFoundError, FileExistsError):  # its previous holder has just removed it
                    if last:
                        raise
                    continue
                except InUseError as error:
                    raise InUseError(error.errno, error.strerror, str(directory)) from None
                yield
                return
    finally:
        _remove_empty(made)


@contextmanager
def lock(path: Path, *, wait: float = 0.0, say: Say | None = None) -> Iterator[None]:
    """Hold a lock file while the block runs.

    Where locking is not possible (a network file system without locks, a read-only directory), the block runs
    without a lock.

    Args:
        path: the lock file; it is created, names its holder, and is removed at the end.
        wait: seconds to wait for another holder.
        say: called with one line if locking is not possible.

    Raises:
        InUseError: another holder still has the lock.
        FileNotFoundError: the directory of the lock file does not exist.
    """
    handle, reason = _acquire(path, wait)
    if handle is None and say is not None:
        say(f"{path.parent} cannot be locked ({reason}): other processes may write to it too")
    try:
        yield
    finally:
        if handle is not None:
            _release(handle, path)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """Create a new directory and yield its path: `path`, or the first free of `path-2`, `path-3`, ...

    The directory is removed again if it is empty afterward.
    """
    made = _missing_directories(path.parent)
    for candidate in _numbered(path, ""):
        candidate.parent.mkdir(parents=True, exist_ok=True)
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        except FileNotFoundError:  # another process has just removed the empty parent
            candidate.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
        break
    try:
        yield candidate
    finally:
        _remove_empty([candidate, *made])


def fresh_file(path: Path) -> Path:
    """Create a new empty file and return its path: `path`, or with a number before the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in _numbered(path, path.suffix):
        try:
            candidate.touch(exist_ok=False)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError  # the numbers do not end


def _numbered(path: Path, suffix: str) -> Iterator[Path]:
    """Yield `path`, then paths with `-2`, `-3`, ... before the suffix."""
    yield path
    stem = path.name.removesuffix(suffix)
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))


def _acquire(path: Path, wait: float) -> tuple[int | None, str]:
    """Return the descriptor of the locked file, or None and the reason why locking is not possible."""
    deadline = time.monotonic() + wait
    while True:
        try:
            handle = _open(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            return None, error.strerror or str(error)
        try:
            held = _try_lock(handle)
        except OSError as error:
            os.close(handle)
            return None, error.strerror or str(error)
        # The previous holder may have removed the file after it was opened here: then the lock is void.
        if held and _is_same_file(handle, path):
            _write_holder(handle)
            return handle, ""
        holder = "" if held else _holder(handle)
        os.close(handle)
        if not held and time.monotonic() >= deadline:
            raise InUseError(errno.EAGAIN, f"in use by {holder}; wait for it, or choose another", str(path))
        time.sleep(0 if held else _POLL)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        try:
            return os.open(path, os.O_RDONLY)  # owned by another user, or on a read-only disk
        except FileNotFoundError:
            raise error from None


def _try_lock(handle: int) -> bool:
    """Lock a file; return False if it is already locked, raise OSError if locks are not supported."""
    if sys.platform == "win32":
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # past the end: other processes cannot read locked bytes
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    """Write the name of this process into the lock file; a failure does not affect the lock."""
    text = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, text.encode(errors="backslashreplace"))


def _holder(handle: int) -> str:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        text = os.read(handle, _LONGEST_HOLDER).decode(errors="replace")
    except OSError:
        text = ""
    return " ".join(text.split()) or "another process"


def _release(handle: int, path: Path) -> None:
    ours = _is_same_file(handle, path)  # False if the directory was removed and created again
    if sys.platform == "win32":  # an open file cannot be removed there
        os.close(handle)
        handle = -1
    if ours:
        with contextlib.suppress(OSError):
            path.unlink()
    if handle >= 0:
        os.close(handle)


def _missing_directories(directory: Path) -> list[Path]:
    """Return the directory and its parents that do not exist, innermost first."""
    directory = directory.absolute()
    return [place for place in (directory, *directory.parents) if not place.exists()]


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # not empty, or already removed
            directory.rmdir()
