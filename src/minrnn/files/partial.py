"""Names of partial files, unique to a process, and removal of those left behind by killed processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import secrets
import shutil
import sys
import time
import zlib
from pathlib import Path

OLD = 24 * 3600.0
"""Seconds after which a partial file counts as left behind, even if it was written on another host."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TOKEN = secrets.token_hex(4)  # of this process, as process ids are reused
_NUMBERS = itertools.count()
_FORM = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<token>[0-9a-f]{8})-\d+\.partial")


def partial_path(path: Path) -> Path:
    """Return a unique path next to `path`, to be renamed to `path` once it is complete."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_TOKEN}-{next(_NUMBERS)}.partial")


def clear_left_over(path: Path) -> None:
    """Remove partial files of `path` whose process has ended.

    Files that cannot be removed are skipped: if that is a problem, the following write will report it.
    """
    folder = path.absolute().parent
    try:
        names = [name for name in os.listdir(folder) if name.endswith(".partial")]  # noqa: PTH208  # faster
    except OSError:
        return
    for name in names:
        found = _FORM.fullmatch(name)
        if found is None or found["name"] != path.name or not _is_left_over(folder / name, found):
            continue
        with contextlib.suppress(OSError):
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink()


def _is_left_over(path: Path, found: re.Match[str]) -> bool:
    if found["host"] == _HOST and sys.platform != "win32":  # on Windows os.kill(pid, 0) ends the process
        pid = int(found["pid"])
        if pid == os.getpid():
            return found["token"] != _TOKEN
        if not _is_alive(pid):
            return True
    try:
        return time.time() - path.stat().st_mtime > OLD
    except OSError:  # already removed
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # owned by another user
        return True
    return True
