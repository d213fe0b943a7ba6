"""Files from elsewhere: supplied in a folder, kept in the cache, or downloaded once, whole or not at all."""

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

BLOCK_BYTES = 1 << 20  # pooch's own 1 KiB flushes a file of 200 MB two hundred thousand times


def cache_folder() -> Path:
    """Return the folder for downloads and tokenized text: MINRNN_CACHE, or the user's cache folder."""
    return folder_from("MINRNN_CACHE") or Path(platformdirs.user_cache_dir("minrnn", appauthor=False))


def folder_from(variable: str) -> Path | None:
    """Return the folder that a variable of the environment names; None where it names none."""
    value = os.environ.get(variable)
    return Path(value).expanduser() if value else None


def supplied_file(name: str) -> Path | None:
    """Return the file of that name in the folder that MINRNN_DATA names, or None where there is none."""
    data = folder_from("MINRNN_DATA")
    return (data / name).resolve() if data is not None and (data / name).is_file() else None


def download(function: str, url: str, name: str, *, sha256: str) -> Path:
    """Return the path of a file in the cache folder, downloaded on first use, with its progress on stderr.

    The file gets its name when it is complete and has the checksum, which is also looked at when the file is
    there already. An interrupted download leaves nothing under that name, and is started again.

    Args:
        function: whose errors these are.
        url: where it comes from; from https nothing leads back to http.
        name: what it is called in the cache folder, and in the one that MINRNN_DATA names.
        sha256: its checksum.

    Raises:
        ValueError: the checksum differs; nothing is kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    pooch.get_logger().setLevel("WARNING")
    try:
        fetch, known = _Download(name), f"sha256:{sha256}"
        return Path(pooch.retrieve(url, known, fname=name, path=cache_folder(), downloader=fetch))
    except OSError as error:  # also every network failure: requests derives its exceptions from OSError
        raise OSError(
            f"{function}: cannot download {url} into {cache_folder()}: {error}; put the file, named {name}, "
            f"in a folder and name the folder in MINRNN_DATA"
        ) from error


def check_digest(function: str, path: Path, sha256: str, what: str) -> None:
    """Raise ValueError unless a file that was supplied has this SHA-256; `what` it must be is named."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{function}: {path} must be {what}, SHA-256 {sha256}, got {digest}; remove it to have it "
            "downloaded, or pass its path instead of the name"
        )


class _Download:
    """Pooch's downloader with a bar."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, url: str, output_file: str, pooch_instance: Any) -> None:
        with _Bar(self._name) as bar:
            fetch = pooch.HTTPDownloader(
                progressbar=bar,
                chunk_size=BLOCK_BYTES,
                headers={"Accept-Encoding": "identity"},  # else its length is not the file's
                hooks={
                    "response": _refuse_downgrade
                },  # called for each answer on the way, redirections included
            )
            fetch(url, output_file, pooch_instance)


def _refuse_downgrade(response: Any, *_: object, **__: object) -> None:
    """Raise OSError where an answer that came by https leads to an address without it."""
    if not response.is_redirect or not response.url.startswith("https:"):
        return
    target = urljoin(response.url, response.headers["location"])
    if not target.startswith("https:"):
        raise OSError(f"{response.url} leads to {target}, which is not encrypted")


class _Bar:
    """A bar as pooch wants one: `total` is set, then `update` is told of bytes."""

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
        """Count bytes; a last chunk is said to be as long as the others."""
        self._progress.update(self._task, total=self.total or None, advance=count)

    def reset(self) -> None:
        """Start counting again."""
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Do nothing: the context manager ends the bar."""
