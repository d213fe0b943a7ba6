"""ExecuTorch files, for phones and microcontrollers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minrnn.export.converting import Run, check, converting, require
from minrnn.export.program import KEY, Program

SUFFIX = ".pte"
EXTRA = "executorch"


def convert(program: Program) -> bytes:
    """Return the file's bytes, run by ExecuTorch's runtime.

    Linear layers run in XNNPACK, everything else in ExecuTorch's portable kernels.

    Raises:
        RuntimeError: the extra is missing, ExecuTorch lacks an operation, or the file computes something
            else.
        ValueError: an axis may have any size: memory is planned in advance.
    """
    _check_bounded(program)
    require(SUFFIX, EXTRA, "executorch.exir", "executorch.runtime")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.error import ExportError, InternalError

    methods = {KEY: program.describe()}
    with converting(SUFFIX, ExportError, InternalError, AssertionError, KeyError):
        lowered = to_edge_transform_and_lower(
            program.program, partitioner=[XnnpackPartitioner()], constant_methods=methods
        )
        contents = bytes(lowered.to_executorch().buffer)
    check(SUFFIX, program, load(contents, program))
    return contents


def load(contents: bytes, program: Program) -> Run:
    """Load a file in ExecuTorch's runtime; its state, if it has one, is empty."""
    from executorch.runtime import Runtime

    loaded = Runtime.get().load_program(contents)
    method = loaded.load_method("forward")
    assert method is not None

    def run(inputs: Sequence[Tensor]) -> Sequence[Any]:
        _ = loaded  # its memory is the method's
        return [value.clone() for value in method.execute([each.contiguous() for each in inputs])]

    return run


def _check_bounded(program: Program) -> None:
    if "batch" in program.free:
        raise ValueError(f"export: {SUFFIX} needs a fixed batch, as its memory is planned in advance")
    if "time" in program.free and program.longest is None:
        raise ValueError(f"export: {SUFFIX} needs a longest sequence, as its memory is planned in advance")
