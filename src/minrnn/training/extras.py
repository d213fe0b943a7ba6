"""What a result can do without: pictures, copies for other programs. Where they fail, that is all."""

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
"""What foreign code may raise where it cannot do what it is asked."""

NO_MATPLOTLIB = "matplotlib is not installed (pip install 'minrnn[plots]')"


def attempt(extra: Callable[[], object]) -> str | None:
    """Do something that a result can do without; return None, or why it failed in one line."""
    try:
        extra()
    except FOREIGN_ERRORS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def draw(picture: Callable[[], object]) -> str | None:
    """Draw with matplotlib; return None, or why there is no picture in one line."""
    try:
        for name in ("matplotlib", "matplotlib.figure"):
            import_module(name)
    except ImportError:
        return NO_MATPLOTLIB
    except FOREIGN_ERRORS as error:  # of its own settings: a backend that MPLBACKEND misspells
        return f"matplotlib: {' '.join(str(error).split())}"
    return attempt(picture)


def save_picture(figure: object, path: Path, **options: object) -> None:
    """Write a figure of matplotlib's as a file, whole or not at all."""
    with write_file(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), **options)  # type: ignore[attr-defined]
