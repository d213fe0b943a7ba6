"""Recordings of an episode: a GIF, an MP4, or a few frames side by side in one PNG."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minrnn.tasks.environments import INSTALL

FORMATS = (".gif", ".mp4", ".png")

FPS = 25
"""Maximum frames per second."""

STRIP = 6
"""Frames in a PNG."""


class Film:
    """The frames of one episode, written to a file at its end.

    Args:
        path: the file; its suffix, one of FORMATS, selects the format.
        rate: the environment's steps per second.

    Raises:
        ValueError: the suffix is not one of FORMATS.
        ImportError: a package that writes this format is not installed.
    """

    def __init__(self, path: Path, rate: float) -> None:
        if path.suffix not in FORMATS:
            raise ValueError(f"act: --record must end in one of {', '.join(FORMATS)}, got {path}")
        _check_writer(path.suffix)
        self.path = path
        self.every = max(1, round(rate / FPS))
        """Steps between two frames."""
        self._fps = rate / self.every
        self._pictures: list[NDArray[np.uint8]] = []

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append a frame, (height, width, 3) uint8."""
        self._pictures.append(picture)

    def write(self) -> None:
        """Write the file.

        Raises:
            OSError: the file cannot be written.
        """
        import imageio

        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix == ".png":
            imageio.imwrite(self.path, _strip(self._pictures))
        elif self.path.suffix == ".gif":
            imageio.mimwrite(self.path, self._pictures, duration=1000 / self._fps, loop=0)
        else:
            imageio.mimwrite(self.path, self._pictures, fps=self._fps)


def _check_writer(suffix: str) -> None:
    if find_spec("imageio") is None:
        raise ImportError(f"act: --record needs imageio, which is not installed; {INSTALL}")
    if suffix == ".mp4" and find_spec("imageio_ffmpeg") is None:
        raise ImportError(
            "act: --record needs ffmpeg for .mp4, which is not installed; install it with pip install "
            "'minrnn[video]', or record a .gif"
        )


def _strip(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return STRIP evenly spaced frames side by side."""
    chosen = np.linspace(0, len(pictures) - 1, min(STRIP, len(pictures))).round().astype(int)
    return np.concatenate([pictures[index] for index in chosen], axis=1)
