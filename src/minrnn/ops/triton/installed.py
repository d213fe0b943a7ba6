"""Triton's version, or the error that says how to install it. Both engines' packages import it first."""

from __future__ import annotations

try:
    import triton
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed; install it with: pip install 'minrnn[gpu]'") from error

__all__ = ["VERSION"]

VERSION: str = triton.__version__
"""Triton's version."""
