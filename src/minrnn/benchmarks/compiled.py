"""Compilation of the GPU engine's kernels for GPUs that need not be present; requires Triton.

The engine is called on tensors without memory, and its kernels are compiled instead of launched.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from minrnn.benchmarks.scan import traffic
from minrnn.ops import GATES

engine: Any = importlib.import_module("minrnn.ops.triton.engine")  # says so where Triton is missing
triton: Any = importlib.import_module("triton")

CAPABILITIES = {80: 108, 90: 132}  # compute capability: multiprocessors of the A100 and the H100


class _Absent(NamedTuple):
    """A driver for a GPU that is not present, sufficient to type a kernel's arguments and to compile it."""

    capability: int

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # the key of compiled kernels, so not the number of a real device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any, built: list[Any]) -> None:
        self.kernel, self.built = kernel, built

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **settings: Any) -> None:
            kernel = self.kernel.warmup(*arguments, grid=grid, **settings)
            self.built.append(kernel.result() if hasattr(kernel, "result") else kernel)

        return compile_only


@contextmanager
def compiling(capability: int, processors: int) -> Iterator[list[Any]]:
    """Context manager in which the engine's calls compile their kernels for such a GPU, and collect them."""
    built: list[Any] = []
    names = ("forward_kernel", "backward_kernel")
    kernels: dict[str, Any] = {name: Compiling(getattr(engine, name), built) for name in names}
    with (
        mock.patch.object(triton.runtime.driver, "_active", _Absent(capability)),
        mock.patch.multiple(engine, _processors=lambda _: processors, **kernels),
    ):
        yield built


def build(
    gate: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    capability: int,
    processors: int,
    *,
    signed: bool = False,
    optional: bool = False,
) -> dict[str, Any]:
    """Compile the kernels of one call forward and one backward on packed pre-activations.

    Args:
        gate: a name in GATES.
        dtype: dtype of the inputs.
        shape: (B, T, D).
        capability: the GPU's compute capability, 90 for 9.0.
        processors: its number of multiprocessors.
        signed: whether decays lie in (-1, 1).
        optional: whether to pass an initial state and resets.

    Returns:
        The compiled kernels "forward" and "backward".
    """
    B, T, D = shape
    with torch.device("meta"):
        pre, h = torch.empty(B, T, GATES[gate].num_pre * D, dtype=dtype), torch.empty(B, T, D, dtype=dtype)
        h0, reset = torch.empty(B, D), torch.empty(B, T, dtype=torch.bool)
    options = (h0, reset) if optional else (None, None)
    with compiling(capability, processors) as built:
        engine.forward([pre], *options, gate, "positive", signed, False)
        engine.backward(h, [pre], h, *options, gate, "positive", signed, False)
    return dict(zip(("forward", "backward"), built, strict=True))


def rows_kept(gate: str, direction: str) -> int:
    """Return the number of values that a program keeps of each step: its inputs, at least a and b."""
    num_pre = GATES[gate].num_pre
    return max(2, num_pre) if direction == "forward" else num_pre + 2


def rows_moved(kernel: Any, steps: int) -> tuple[int, int]:
    """Count the rows of channels read and written for each step, as tensors of all `steps` of a chunk."""
    code = kernel.asm["ttgir"]
    # Each occurs twice: without bounds checks for a full chunk, and with them for others.
    both = [re.findall(rf"tt\.{name} [^\n]*tensor<{steps}x32x!tt\.ptr", code) for name in ("load", "store")]
    return len(both[0]) // 2, len(both[1]) // 2


def assembly(kernel: Any) -> tuple[dict[str, int], Counter[str]]:
    """Return a thread's number of registers and bytes of spilled registers, and count instructions."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return resources, Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w+)", code))


def message_bytes(shape: tuple[int, int, int], rows: int, dtype: torch.dtype, processors: int) -> float:
    """Return the bytes per element that programs write and read to pass on the state."""
    cut = engine._cut(shape, rows, dtype.itemsize, processors)
    if cut.chunks == 1:
        return 0.0
    carries = 2 / cut.GROUP + 2  # a pair, written once a group and read by each chunk
    spans = 3 + 3 * (cut.GROUP - 1) / 2 if cut.GROUP > 1 else 0  # written once, read by the later members
    return 4 * (carries + spans) / (cut.WARPS * cut.STEPS)


def count(
    gate: str, dtype: torch.dtype, shape: tuple[int, int, int], capability: int
) -> list[dict[str, Any]]:
    """Compile a gate's forward and backward kernels, and count their bytes, registers and instructions."""
    processors = CAPABILITIES[capability]
    kernels = build(gate, dtype, shape, capability, processors)
    return [
        _count(kernel, direction, gate, dtype, shape, capability, processors)
        for direction, kernel in kernels.items()
    ]


def _count(
    kernel: Any,
    direction: str,
    gate: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    capability: int,
    processors: int,
) -> dict[str, Any]:
    rows = rows_kept(gate, direction)
    cut = engine._cut(shape, rows, dtype.itemsize, processors)
    reads, writes = rows_moved(kernel, cut.WARPS * cut.STEPS)
    resources, instructions = assembly(kernel)
    return {
        "capability": capability,
        "gate": gate,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
        "direction": direction,
        "steps": cut.WARPS * cut.STEPS,
        "chunks": cut.chunks,
        "group": cut.GROUP,
        "bytes": (reads + writes) * dtype.itemsize,
        "budget": traffic(gate, dtype)[direction],
        "message_bytes": message_bytes(shape, rows, dtype, processors),
        "registers": resources["reg"],
        "stack_bytes": resources["stack"],
        "shared_bytes": kernel.metadata.shared,
        "instructions": sum(instructions.values()),
        "instructions_a_step": sum(instructions.values()) / cut.STEPS,
    }
