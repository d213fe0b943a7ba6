"""The table of file formats, by suffix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minrnn.export import executorch, inductor, onnx
from minrnn.export.converting import Run
from minrnn.export.program import Program
from minrnn.files import nearest


class Format(NamedTuple):
    """A format of files."""

    title: str
    convert: Callable[[Program], bytes]
    """The file's bytes."""
    load: Callable[[bytes, Program], Run]
    """Loads a file to run it."""
    free_batch: tuple[str, ...]
    """The forms of programs that may have any batch."""
    free_length: bool
    """Whether sequences may have any length."""


FORMATS: dict[str, Format] = {
    onnx.SUFFIX: Format("ONNX", onnx.convert, onnx.load, ("step", "sequence"), True),
    executorch.SUFFIX: Format("ExecuTorch", executorch.convert, executorch.load, (), False),
    inductor.SUFFIX: Format("AOTInductor", inductor.convert, inductor.load, ("step",), True),
}
"""The formats of files, by suffix."""


def format_of(path: Path | str) -> Format:
    """Return the format that a path's suffix names.

    Raises:
        ValueError: it names none.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise ValueError(
            f"export: the file must end in {known}, got {str(path)!r}{nearest(path.suffix, FORMATS)}"
        )
    return FORMATS[path.suffix]
