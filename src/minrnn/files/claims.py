"""Who writes where: locks that end with their process, and directories that nobody else has."""

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
"""In a directory that is claimed; says who has claimed it."""

_POLL = 0.02  # seconds between two tries
_LONGEST_HOLDER = 200  # bytes of a lock file that are read
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Say = Callable[[str], object]


class InUseError(OSError):
    """Another process writes here; the message says which."""


@contextmanager
def claim(directory: Path, say: Say | None = None) -> Iterator[None]:
    """Own a directory while the block runs: another process that claims it is refused.

    The claim is a lock of the operating system, which ends with this process however that ends; the lock
    file that a killed process leaves claims nothing. The directory is made where it is not there, and removed
    again if nothing has been put into it. Reading needs no claim.

    Args:
        directory: what is claimed, as a whole.
        say: told in one line where the file system has no locks, and the directory is used all the same.

    Raises:
        InUseError: another process, or another claim of this one, has it.
        OSError: the directory cannot be made.
    """
    directory = Path(directory)
    made = _missing_directories(directory)
    try:
        for last in (False, False, True):
            with contextlib.ExitStack() as stack:
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock(directory / LOCK_FILE, say=say))
                except FileNotFoundError:  # whoever had it has removed it, empty, since it was made here
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

    Where there can be no lock (a network file system without them, a directory that is read-only), the block
    runs without one.

    Args:
        path: the lock file, made here and removed afterwards; it says who holds it.
        wait: seconds to wait for another holder.
        say: told in one line where there can be no lock.

    Raises:
        InUseError: it is held by somebody else still.
        FileNotFoundError: its directory is not there.
    """
    handle, reason = _acquire(path, wait)
    if handle is None and say is not None:
        say(f"{path.parent} cannot be locked ({reason}): nothing keeps another process from writing there")
    try:
        yield
    finally:
        if handle is not None:
            _release(handle, path)


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """Make a directory that nobody else has, and yield its name: `path`, or one with a number after it.

    It is removed again if nothing has been put into it.
    """
    made = _missing_directories(path.parent)
    for candidate in _numbered(path, ""):
        candidate.parent.mkdir(parents=True, exist_ok=True)
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        except FileNotFoundError:  # a process that failed has removed the parent just now
            candidate.parent.mkdir(parents=True, exist_ok=True)
            candidate.mkdir()
        break
    try:
        yield candidate
    finally:
        _remove_empty([candidate, *made])


def fresh_file(path: Path) -> Path:
    """Make an empty file that nobody else has, and return its name: `path`, or one with a number in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for candidate in _numbered(path, path.suffix):
        try:
            candidate.touch(exist_ok=False)
        except FileExistsError:
            continue
        return candidate
    raise AssertionError  # there is always another number


def _numbered(path: Path, suffix: str) -> Iterator[Path]:
    """Yield `name`, `name-2`, `name-3`, ..., each before the suffix."""
    yield path
    stem = path.name.removesuffix(suffix)
    yield from (path.with_name(f"{stem}-{number}{suffix}") for number in itertools.count(2))


def _acquire(path: Path, wait: float) -> tuple[int | None, str]:
    """Return the locked file, or None and why there can be no lock."""
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
        # The file's last holder may have removed it since it was opened: then the lock is on nothing.
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
            return os.open(path, os.O_RDONLY)  # another user's, or on a disk that is read-only
        except FileNotFoundError:
            raise error from None


def _try_lock(handle: int) -> bool:
    """Lock a file, or return False where somebody else has; raise OSError where there are no locks."""
    if sys.platform == "win32":
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far away: what is locked there, others cannot read
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
    """Write who holds the lock; where that cannot be written, it holds all the same."""
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
    ours = _is_same_file(handle, path)  # and not another's, where the directory was removed and made again
    if sys.platform == "win32":  # where an open file cannot be removed
        os.close(handle)
        handle = -1
    if ours:
        with contextlib.suppress(OSError):
            path.unlink()
    if handle >= 0:
        os.close(handle)


def _missing_directories(directory: Path) -> list[Path]:
    """Return the directory and those above it that are not there, the innermost first."""
    directory = directory.absolute()
    return [place for place in (directory, *directory.parents) if not place.exists()]


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        with contextlib.suppress(OSError):  # it is not empty, or somebody else has removed it
            directory.rmdir()
