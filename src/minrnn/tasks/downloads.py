"""External files: from the user's data folder, from the cache, or downloaded once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import platformdirs
import pooch  # type: ignore[import-untyped]  # it ships no types
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

BLOCK_BYTES = 1 << 20  # pooch's default of 1 KiB is slow for large files


def cache_folder() -> Path:
    """Return the folder of downloads and tokenized text: MINRNN_CACHE, or the user's cache folder."""
    return folder_from("MINRNN_CACHE") or Path(platformdirs.user_cache_dir("minrnn", appauthor=False))


def folder_from(variable: str) -> Path | None:
    """Return the folder that an environment variable names, or None if it is unset or empty."""
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


def supplied_file(name: str) -> Path | None:
    """Return the file of that name in the folder MINRNN_DATA, or None if there is none."""
    data = folder_from("MINRNN_DATA")
    return (data / name).resolve() if data is not None and (data / name).is_file() else None


def download(function: str, url: str, name: str, *, sha256: str) -> Path:
    """Return the path of a file in the cache folder, downloaded on first use with a progress bar on stderr.

    The checksum is verified after a download and for a cached file. An interrupted download is started again.

    Args:
        function: name of the calling function, for error messages.
        url: address of the file; redirections from https to http are refused.
        name: name of the file in the cache folder and in the folder MINRNN_DATA.
        sha256: its SHA-256.

    Raises:
        ValueError: the checksum differs; the file is not kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    pooch.get_logger().setLevel("WARNING")
    try:
        fetch, known = _Download(name), f"sha256:{sha256}"
        return Path(pooch.retrieve(url, known, fname=name, path=cache_folder(), downloader=fetch))
    except OSError as error:  # includes network failures: the exceptions of requests derive from OSError
        raise OSError(
            f"{function}: cannot download {url} into {cache_folder()}: {error}; put the file, named {name}, "
            f"in a folder and name the folder in MINRNN_DATA"
        ) from error


def check_digest(function: str, path: Path, sha256: str, what: str) -> None:
    """Raise ValueError, with `what` the file must be in the message, unless it has this SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{function}: {path} must be {what}, SHA-256 {sha256}, got {digest}; remove it to have it "
            "downloaded, or pass its path instead of the name"
        )


class _Download:
    """pooch's downloader with a progress bar."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, url: str, output_file: str, pooch_instance: Any) -> None:
        with _Bar(self._name) as bar:
            fetch = pooch.HTTPDownloader(
                progressbar=bar,
                chunk_size=BLOCK_BYTES,
                headers={"Accept-Encoding": "identity"},  # otherwise Content-Length is the compressed size
                hooks={"response": _refuse_downgrade},  # called for each redirection too
            )
            fetch(url, output_file, pooch_instance)


def _refuse_downgrade(response: Any, *_: object, **__: object) -> None:
    """Raise OSError for a redirection from https to another scheme."""
    if not response.is_redirect or not response.url.startswith("https:"):
        return
    target = urljoin(response.url, response.headers["location"])
    if not target.startswith("https:"):
        raise OSError(f"{response.url} leads to {target}, which is not encrypted")


class _Bar:
    """A progress bar with the interface that pooch expects: attribute `total`, then calls of `update`."""

    def __init__(self, name: str) -> None:
        self.total = 0
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(f"downloading {name}, whose SHA-256 is known", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def update(self, count: int) -> None:
        """Advance by `count` bytes; pooch reports a full block for the last one too."""
        self._progress.update(self._task, total=self.total or None, advance=count)

    def reset(self) -> None:
        """Restart at 0."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Do nothing: the context manager ends the bar."""
