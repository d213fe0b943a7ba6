"""AOTInductor files: machine code for this kind of processor, loaded by torch in Python or C++."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minrnn.export.converting import Run, check, converting
from minrnn.export.program import KEY, Program
from minrnn.ops.torch_private import compile_package, load_package

SUFFIX = ".pt2"


def convert(program: Program) -> bytes:
    """Return the file's bytes, run by torch. It needs a C++ compiler.

    Raises:
        RuntimeError: there is no compiler, torch lacks an operation, or the file computes something else.
        ValueError: a sequence has any batch.
    """
    if program.form == "sequence" and "batch" in program.free:
        # torch 2.13 makes a while loop of a scan, whose buffer's size may not depend on a symbol.
        raise ValueError(f"export: {SUFFIX} needs a fixed batch for sequences, as AOTInductor's loops do")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / f"program{SUFFIX}")
        with converting(SUFFIX):
            compile_package(program.program, path, {KEY: program.describe()})
        contents = Path(path).read_bytes()
    check(SUFFIX, program, load(contents, program))
    return contents


def load(contents: bytes, program: Program) -> Run:
    """Load a file in this process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"program{SUFFIX}"
        path.write_bytes(contents)
        loaded = load_package(str(path))

    def run(inputs: Sequence[Tensor]) -> Sequence[Any]:
        # It reads memory as if it were contiguous, and does not check.
        found = loaded(*(value.contiguous() for value in inputs))
        return [found] if isinstance(found, Tensor) else list(found)

    return run
