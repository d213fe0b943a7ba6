"""What the formats share: checks of a file, and errors of exporters in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from minrnn.export.program import Program
from minrnn.export.quiet import quiet

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The largest difference between a file's outputs and the program's, relative to the largest output; in 16
bits, of which a file may round other numbers, it is 0.05."""

Run = Callable[[Sequence[Tensor]], Sequence[Any]]
"""A loaded file: inputs -> outputs, in arrays that torch can convert."""


def require(suffix: str, extra: str, *modules: str) -> None:
    """Raise unless these modules can be imported.

    Raises:
        RuntimeError: one is missing; the message names the extra.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise RuntimeError(
                f"export: {suffix} needs {module} (pip install 'minrnn[{extra}]'): {error}"
            ) from error


@contextmanager
def converting(suffix: str, *others: type[Exception]) -> Iterator[None]:
    """Silence an exporter, and raise its errors as RuntimeError in one line."""
    errors: tuple[type[Exception], ...] = (RuntimeError, *others)
    try:
        with quiet():
            yield
    except errors as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # exporters wrap the reason in advice
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[0] if lines else type(cause).__name__
        raise RuntimeError(f"export: {suffix} cannot hold this program: {reason}") from error


def check(suffix: str, program: Program, run: Run) -> None:
    """Compare a file with its program on the examples.

    Raises:
        RuntimeError: an output differs.
    """
    with torch.no_grad():
        found = [torch.as_tensor(value) for value in run(program.examples)]
    for name, ours, theirs in zip(program.outputs, found, program.call(*program.examples), strict=True):
        wanted = theirs.double()
        scale, limit = wanted.abs().max().clamp(min=1), CLOSE.get(theirs.dtype, 0.05)
        if ours.shape != theirs.shape or not bool(((ours.double() - wanted).abs() <= limit * scale).all()):
            raise RuntimeError(f"export: {suffix}: the file's {name} differs from the program's")
