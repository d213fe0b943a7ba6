"""Triton's interpreter: second copies of the GPU engines, whose kernels run on the CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

__all__ = ["interpreted_copy"]

PACKAGES = {"minrnn.ops.triton": "minrnn.ops", "minrnn.ops.selective.triton": "minrnn.ops.selective"}
"""The packages that hold kernels, and their parents."""


@contextmanager
def interpreted_copy(name: str) -> Iterator[ModuleType]:
    """Yield a second copy of a module of these packages; the modules that are imported stay as they are."""
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
        yield copy


def _loaded() -> dict[str, ModuleType]:
    inside = tuple(f"{package}." for package in PACKAGES)
    return {name: module for name, module in sys.modules.items() if f"{name}.".startswith(inside)}
