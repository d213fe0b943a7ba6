"""Triton's interpreter: second copies of the GPU engines, whose kernels run on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import Tensor

__all__ = ["checked_addresses", "interpreted_copy"]

PACKAGES = {"minrnn.ops.triton": "minrnn.ops", "minrnn.ops.selective.triton": "minrnn.ops.selective"}
"""The packages that hold kernels, and their parents."""


@contextmanager
def interpreted_copy(name: str) -> Iterator[ModuleType]:
    """Yield a second copy of a module of these packages, which computes as a GPU does.

    The modules that are imported stay as they are.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        before = _loaded()
        for loaded in before:
            del sys.modules[loaded]
        try:
            copy = importlib.import_module(name)
        finally:
            for loaded in _loaded():
                del sys.modules[loaded]
            sys.modules.update(before)
            for package, parent in PACKAGES.items():
                vars(sys.modules[parent]).pop("triton", None)
                if package in before:
                    vars(sys.modules[parent])["triton"] = before[package]
        _round_as_a_gpu(patch)
        yield copy


def _round_as_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Have the interpreter round multiply-adds once, and minima ignore NaN unless asked to keep it."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = type(interpreter.interpreter_builder)

    def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
        a, b, c = (part.data.astype(np.float64) for part in (x, y, z))  # a product of float32 is exact
        with np.errstate(over="ignore", invalid="ignore"):
            return interpreter.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    patch.setattr(builder, "create_fma", fused)
    patch.setattr(builder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin))
    patch.setattr(builder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax))


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Have the interpreter refuse an address outside the tensors of the kernel that it runs."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    given: list[tuple[int, int]] = []

    def note(x: Any) -> None:
        if isinstance(x, Tensor):
            given.append((x.data_ptr(), x.data_ptr() + _extent(x)))
        elif isinstance(x, tuple):
            for part in x:
                note(part)

    def prepare(self: Any, args: Any, kwargs: Any) -> Any:
        given.clear()
        note((*args, *kwargs.values()))
        return to_host(self, args, kwargs)

    def check(pointers: Any, mask: Any, kind: str) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        used = pointers.data[mask.data.astype(bool)].astype(np.uint64)
        inside = np.zeros(used.shape, bool)
        for start, end in given:
            inside |= (used >= start) & (used + np.uint64(size) <= end)
        assert inside.all(), f"a kernel {kind} outside its tensors"

    def checked_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "reads")
        return load(pointers, mask, *rest)

    def checked_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "writes")
        return store(pointers, value, mask, *rest)

    def checked_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "counts")
        return atomic(operation, pointers, value, mask, *rest)

    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    to_host = executor._init_args_hst
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_init_args_hst", prepare)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        patch.setattr(builder, "create_atomic_rmw", checked_atomic)
        yield


def _extent(x: Tensor) -> int:
    """Bytes from the first number to the end of the last."""
    if not x.numel():
        return 0
    return (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))) * x.itemsize


def _loaded() -> dict[str, ModuleType]:
    inside = tuple(f"{package}." for package in PACKAGES)
    return {name: module for name, module in sys.modules.items() if f"{name}.".startswith(inside)}
