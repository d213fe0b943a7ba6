"""Names for what is not whole yet, each of its process; and what a killed process has left under one."""

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
"""Seconds; no file takes so long to write: an older partial one is left over, wherever its writer was."""

_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_TOKEN = secrets.token_hex(4)  # of this process: a number may be given to another one after it
_NUMBERS = itertools.count()
_FORM = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<token>[0-9a-f]{8})-\d+\.partial")


def partial_path(path: Path) -> Path:
    """Return a name beside `path` that nothing else has, for what is renamed to `path` once it is whole."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{_TOKEN}-{next(_NUMBERS)}.partial")


def clear_left_over(path: Path) -> None:
    """Remove what processes that are gone have left of `path` under partial names.

    A file that cannot be removed stays: whoever writes in its place will say what is wrong, if anything is.
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
    if found["host"] == _HOST and sys.platform != "win32":  # where asking for a process would end it
        pid = int(found["pid"])
        if pid == os.getpid():
            return found["token"] != _TOKEN
        if not _is_alive(pid):
            return True
    try:
        return time.time() - path.stat().st_mtime > OLD
    except OSError:  # removed just now
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
