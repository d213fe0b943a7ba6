"""Optional outputs, such as plots, whose failure does not fail the program."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from minrnn.files import write_file

FOREIGN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions of third-party code that are reported instead of raised."""

NO_MATPLOTLIB = "matplotlib is not installed (pip install 'minrnn[plots]')"


def attempt(extra: Callable[[], object]) -> str | None:
    """Call a function whose result is optional; return None, or the error in one line."""
    try:
        extra()
    except FOREIGN_ERRORS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def draw(picture: Callable[[], object]) -> str | None:
    """Call a function that plots with matplotlib; return None, or the error in one line."""
    try:
        for name in ("matplotlib", "matplotlib.figure"):
            import_module(name)
    except ImportError:
        return NO_MATPLOTLIB
    except FOREIGN_ERRORS as error:  # of matplotlib's settings, such as an unknown MPLBACKEND
        return f"matplotlib: {' '.join(str(error).split())}"
    return attempt(picture)


def save_picture(figure: object, path: Path, **options: object) -> None:
    """Save a matplotlib figure to a file atomically."""
    with write_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), **options)  # type: ignore[attr-defined]
