"""Files and directories written whole or not at all, whatever ends the process that writes them."""

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
"""Tells a directory that may be replaced from one of other things."""

LONGEST_SWAP = 60.0
"""Seconds to wait for another process that puts a directory in the same place."""


def write_json(path: Path, values: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write values as a JSON file, whole or not at all.

    Args:
        path: the file.
        values: what it holds.
        indent: spaces for each level; None writes one line, which is much smaller where lists are long.

    Raises:
        OSError: when it cannot be written; a file that was there before is still as it was.
    """
    replace_text(path, json.dumps(values, indent=indent) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file beside its place, and then move it there.

    Raises:
        OSError: it cannot be written; the message names it, and a file that was there before is as it was.
    """
    with write_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Fill a new file and put it in place of `path` at once, if and only if the body succeeds.

    Several processes may write one file: each writes one of its own, and the last to be done is read. What a
    killed one leaves, the next clears up.

    Yields:
        The file to write, beside `path`; its suffix is not that of `path`.

    Raises:
        OSError: it cannot be written; the message names `path`, where what was there before is as it was.
    """
    place = behind_link(path)
    clear_left_over(place)
    partial = partial_path(place)
    try:
        yield partial
        partial.replace(place)
    except OSError as error:
        raise OSError(
            error.errno, error.strerror or str(error), str(path)
        ) from error  # a write leaves it out
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def write_directory(directory: Path) -> Iterator[Path]:
    """Fill a new directory and put it in place of `directory` at once, if and only if the body succeeds.

        with write_directory(path) as folder:
            (folder / "a.txt").write_text("...")

    The files are written to disk before the names change. If the body fails, the folder is removed and what
    was there before stays. A process killed at any point leaves `directory` whole, or, between two renames,
    the old one under the name that `find_directory` looks for; the next write clears up. Of several processes
    that write at once, each puts its own there, one after the other.

    Args:
        directory: the final name, or a link to it; its parents are made.

    Yields:
        The folder to write into, beside `directory`.

    Raises:
        OSError: writing failed (the disk is full, say), or `directory` is something else than a checkpoint:
            not a directory, or one that is not empty and has no config.json.
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
            _clear_up(place, aside)  # another process, killed since
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
    """Finish what a killed `write_directory` has left, where no next write may come to do that.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    if directory.absolute().parent.is_dir():
        with _exclusive(directory) as aside:
            _clear_up(directory, aside)


def find_directory(directory: Path) -> Path:
    """Return where the content of `directory` lies: there, or aside where a killed write has left it.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    place = behind_link(directory)
    # The first name once more: between the first two looks, a write that is under way may have finished.
    for candidate in (place, _sibling(place, "previous"), place):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(errno.ENOENT, "no checkpoint directory", str(directory))


def behind_link(path: Path) -> Path:
    """Return where a symbolic link leads, whether something is there or not; of another path, itself.

    A name is replaced there: renamed onto the link itself, what is written would take the link's place.
    """
    path = Path(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _sibling(directory: Path, role: str) -> Path:
    # A fixed name, so that readers and the next write find what a killed one has left.
    return directory.absolute().with_name(f".{directory.absolute().name}.{role}")


def locate(directory: Path) -> tuple[Path, int, int]:
    """Find the directory, with what tells it from another that has taken its name."""
    while True:
        folder = find_directory(directory)
        try:
            status = folder.stat()
        except FileNotFoundError:  # renamed just now
            continue
        return folder, status.st_ino, status.st_mtime_ns


def _check_replaceable(directory: Path) -> None:
    """Refuse to remove what is no checkpoint: a mistyped name must not cost a folder of other things."""
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()}
        replaceable = not names or CONFIG_FILE in names
    else:
        replaceable = not directory.exists()
    if not replaceable:
        raise FileExistsError(errno.EEXIST, "there is something else than a checkpoint", str(directory))


@contextmanager
def _exclusive(directory: Path) -> Iterator[Path]:
    """Keep other processes from moving directories to and from this place; yield where the old one steps."""
    with lock(_sibling(directory, "lock"), wait=LONGEST_SWAP):
        yield _sibling(directory, "previous")


def _clear_up(directory: Path, aside: Path) -> None:
    """Finish what a killed write has left."""
    clear_left_over(directory)
    if aside.exists() and directory.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(directory)


def _swap(directory: Path, folder: Path, aside: Path) -> None:
    """Put the folder in the directory's place; the old steps aside, as nothing is renamed onto a full one."""
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
    shutil.rmtree(
        aside, ignore_errors=True
    )  # the new one is in place; what is left here, the next write clears


def _flush(path: Path) -> None:
    """Have the system write a file, or a directory's names, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
