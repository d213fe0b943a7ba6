"""Import Triton, or raise an error that says how to install it. Both GPU engines import this module first."""

from __future__ import annotations

try:
    import triton
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed; install it with: pip install 'minrnn[gpu]'") from error

__all__ = ["VERSION"]

VERSION: str = triton.__version__
"""Triton's version."""
