"""Compilation of a model for training steps, by torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minrnn.ops.torch_private import compile_errors, timing_compilation

BACKEND = "inductor"
"""torch.compile's backend: C++ on a CPU, Triton on a GPU."""


class Compilation:
    """A model's compiled form, which shares its parameters, and the time that compiling took.

    The model is compiled as one graph when it is first called, and again for inputs of another form: a
    carried state after an empty one, another length.

    Args:
        model: the model; it stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        compiled = torch.compile(model, fullgraph=True, backend=BACKEND)
        assert isinstance(compiled, nn.Module)  # torch annotates a function
        self.model: nn.Module = compiled
        self._seconds = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Time what is compiled within the block.

        Raises:
            RuntimeError: the model cannot be compiled; the message says why.
        """
        try:
            with timing_compilation(self._add):
                yield
        except compile_errors() as error:
            raise RuntimeError(
                f"train.compile: the model cannot be compiled: {_reason(error)}; train it with "
                "--train.no-compile"
            ) from error

    def take_seconds(self) -> float:
        """Return the seconds of compiling since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self, seconds: float) -> None:
        self._seconds += seconds


def _reason(error: BaseException) -> str:
    """Return what a compiler's long message begins with, and its explanation if it has one.

    >>> _reason(RuntimeError("Unsupported call\\n  Explanation: It is an RNN.\\n  Hint: wait\\n"))
    'Unsupported call: It is an RNN.'
    >>> _reason(RuntimeError("backend raised:\\nOSError: disk full\\n\\nSet TORCHDYNAMO_VERBOSE=1\\n"))
    'backend raised: OSError: disk full'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    explained = (line.partition(":")[2].strip() for line in lines if line.startswith("Explanation:"))
    head = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return ": ".join([head, *explained])
