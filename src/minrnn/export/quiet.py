"""Silence for exporters, which log and warn about their own inside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOUD = ("torch.onnx", "torch.export", "executorch", "onnxscript", "onnx_ir")
"""Loggers of exporters."""


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and messages of the loggers in LOUD below errors."""
    loggers = [logging.getLogger(name) for name in LOUD]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
