"""Files from elsewhere: supplied in a folder, kept in the cache, or downloaded once, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pooch  # type: ignore[import-untyped]  # it ships no types
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

CHUNK_BYTES = 1 << 20  # pooch's own 1 KiB flushes a file of 200 MB two hundred thousand times


def cache_folder() -> Path:
    """Return the folder for downloads and tokenised text: MINRNN_CACHE, or the user's cache folder."""
    return Path(os.environ.get("MINRNN_CACHE") or platformdirs.user_cache_dir("minrnn", appauthor=False))


def supplied_file(name: str) -> Path | None:
    """Return the file of that name in the folder that MINRNN_DATA names, or None where there is none."""
    data = os.environ.get("MINRNN_DATA")
    path = Path(data, name) if data else None
    return path.resolve() if path is not None and path.is_file() else None


def download(
    function: str,
    url: str,
    name: str,
    *,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Return the path of a file in the cache folder, downloaded on first use, with its progress on stderr.

    The file gets its name when it is complete: as long as the server said, with the checksum or past the
    check. An interrupted download leaves nothing under that name, and is started again.

    Args:
        function: whose errors these are.
        url: where it comes from.
        name: what it is called in the cache folder, and in the one that MINRNN_DATA names.
        sha256: its checksum, where that is known: also a file that is there already must have it.
        check: raises ValueError for a download that is not what it should be; for files without a checksum.

    Raises:
        ValueError: the checksum differs, or `check` refused; nothing is kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    known_hash = None if sha256 is None else f"sha256:{sha256}"
    pooch.get_logger().setLevel("WARNING")  # it would advise to pin the checksum of what has none
    try:
        downloader = _Download(name, check)
        return Path(pooch.retrieve(url, known_hash, fname=name, path=cache_folder(), downloader=downloader))
    except OSError as error:  # also every network failure: requests derives its exceptions from OSError
        raise OSError(
            f"{function}: cannot download {url} into {cache_folder()}: {error}; put the file, named {name}, "
            f"in a folder and name the folder in MINRNN_DATA"
        ) from error


class _Download:
    """Pooch's downloader with a bar, and a check while the file has no name yet."""

    def __init__(self, name: str, check: Callable[[Path], None] | None) -> None:
        self._name = name
        self._check = check

    def __call__(self, url: str, output_file: str, pooch_instance: Any) -> None:
        with _Bar(self._name) as bar:
            headers = {"Accept-Encoding": "identity"}  # else its length is not the file's
            fetch = pooch.HTTPDownloader(progressbar=bar, chunk_size=CHUNK_BYTES, headers=headers)
            fetch(url, output_file, pooch_instance)
        if self._check is not None:
            self._check(Path(output_file))


class _Bar:
    """A bar as pooch wants one: `total` is set, then `update` is told of bytes."""

    def __init__(self, name: str) -> None:
        self.total = 0
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(f"downloading {name}", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, count: int) -> None:
        """Count bytes; a last chunk is said to be as long as the others."""
        self._progress.update(self._task, total=self.total or None, advance=count)

    def reset(self) -> None:
        """Start counting again."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Do nothing: the context manager ends the bar."""
