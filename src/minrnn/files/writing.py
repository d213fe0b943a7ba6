"""Atomic writing of files and directories, even if the process is killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minrnn.files.claims import lock
from minrnn.files.partial import clear_left_over, partial_path

CONFIG_FILE = "config.json"
"""A directory may be replaced only if it is empty or holds this file."""

LONGEST_SWAP = 60.0
"""Seconds to wait for another process that replaces the same directory."""


def write_json(path: Path, values: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write a JSON file atomically.

    Args:
        path: the file.
        values: its content.
        indent: spaces per level; None writes a single line, which is much smaller if lists are long.

    Raises:
        OSError: the file cannot be written; an existing file is unchanged.
    """
    replace_text(path, json.dumps(values, indent=indent) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically.

    Raises:
        OSError: the file cannot be written; the message names it, and an existing file is unchanged.
    """
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Replace `path` atomically with a file written in the block, if the block succeeds.

    Several processes may write the same file: each writes a partial file of its own, and the last rename
    wins. Partial files left behind by killed processes are removed by the next write.

    Yields:
        Path of the partial file to write, next to `path`; its suffix differs from that of `path`.

    Raises:
        OSError: the file cannot be written; the message names `path`, and an existing file is unchanged.
    """
    place = behind_link(path)
    clear_left_over(place)
    partial = partial_path(place)
    try:
        yield partial
        partial.replace(place)
    except OSError as error:
        # The errors of file.write do not name the file.
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def write_directory(directory: Path) -> Iterator[Path]:
    """Replace `directory` with a new directory filled in the block, if the block succeeds.

        with write_directory(path) as folder:
            (folder / "a.txt").write_text("...")

    Files are flushed to disk before the renames. If the block fails, the new folder is removed and
    `directory` is unchanged. If the process is killed, `directory` is complete, or, between the two renames,
    the old one has the name that `find_directory` looks for; the next write restores it. Concurrent writers
    replace the directory one after the other.

    Args:
        directory: the final path, or a link to it; parents are created.

    Yields:
        The folder to write into, next to `directory`.

    Raises:
        OSError: writing failed (the disk is full, for example), or `directory` is not a checkpoint: it is a
            file, or a non-empty directory without config.json.
    """
    place = behind_link(directory)
    folder = partial_path(place)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(place) as aside:
            _check_replaceable(place)
            _clear_up(place, aside)
        folder.mkdir()
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        with _exclusive(place) as aside:
            _clear_up(place, aside)  # of a process killed in the meantime
            _swap(place, folder, aside)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"could not write the checkpoint {directory} ({reason}); nothing that was there before is lost",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover_directory(directory: Path) -> None:
    """Complete the replacement that a killed `write_directory` left unfinished.

    Raises:
        OSError: a directory cannot be renamed or removed.
    """
    if directory.absolute().parent.is_dir():
        with _exclusive(directory) as aside:
            _clear_up(directory, aside)


def find_directory(directory: Path) -> Path:
    """Return `directory`, or the directory set aside by a write that was killed between its two renames.

    Raises:
        FileNotFoundError: neither exists.
    """
    place = behind_link(directory)
    # The first path is tried twice: a concurrent write may finish between the first two checks.
    for candidate in (place, _sibling(place, "previous"), place):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(errno.ENOENT, "no checkpoint directory", str(directory))


def behind_link(path: Path) -> Path:
    """Return the target of a symbolic link, which need not exist, or the path itself if it is not a link.

    Writers replace the target: a rename onto the link would replace the link.
    """
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _sibling(directory: Path, role: str) -> Path:
    # A fixed name: readers and the next write find it after a write was killed.
    return directory.absolute().with_name(f".{directory.absolute().name}.{role}")


def locate(directory: Path) -> tuple[Path, int, int]:
    """Return the directory found by `find_directory`, its inode and its modification time in nanoseconds."""
    while True:
        folder = find_directory(directory)
        try:
            status = folder.stat()
        except FileNotFoundError:  # just renamed
            continue
        return folder, status.st_ino, status.st_mtime_ns


def _check_replaceable(directory: Path) -> None:
    """Raise FileExistsError unless the directory is a checkpoint: a mistyped path must not delete data."""
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()}
        replaceable = not names or CONFIG_FILE in names
    else:
        replaceable = not directory.exists()
    if not replaceable:
        raise FileExistsError(errno.EEXIST, "it exists and is not a checkpoint", str(directory))


@contextmanager
def _exclusive(directory: Path) -> Iterator[Path]:
    """Lock the renames of this directory; yield the path to which the old one is set aside."""
    with lock(_sibling(directory, "lock"), wait=LONGEST_SWAP):
        yield _sibling(directory, "previous")


def _clear_up(directory: Path, aside: Path) -> None:
    """Remove or restore what a killed write left behind."""
    clear_left_over(directory)
    if aside.exists() and directory.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(directory)


def _swap(directory: Path, folder: Path, aside: Path) -> None:
    """Rename the folder to the directory; the old one is set aside first, as it is not empty."""
    had_one = directory.exists()
    if had_one:
        directory.rename(aside)
    try:
        folder.rename(directory)
    except OSError:
        if had_one:
            aside.rename(directory)
        raise
    _flush(directory.absolute().parent)
    shutil.rmtree(aside, ignore_errors=True)  # the next write removes what is left


def _flush(path: Path) -> None:
    """Flush a file or a directory to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
