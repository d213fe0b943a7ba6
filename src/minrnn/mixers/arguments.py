"""Validation of constructor arguments; numpy's numbers and bools are converted to Python's."""

import math
import numbers
from collections.abc import Collection
from typing import Any

import torch

from minrnn.files import as_python, nearest
from minrnn.ops.recurrence import FLOATS


def read_size(name: str, key: str, value: Any, least: int = 1) -> int:
    """Return a size as an int.

    Raises:
        TypeError: it is not an integer, or is a bool. `name`, the class's, and `key` start the message.
        ValueError: it is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: {key} must be an int, got {type(value).__name__}")
    if value < least:
        what = "greater than zero" if least == 1 else f"at least {least}"
        raise ValueError(f"{name}: {key} must be {what}, got {value}")
    return int(value)


def read_flag(name: str, key: str, value: Any) -> bool:
    """Return a flag as a bool.

    Raises:
        TypeError: it is not a bool of Python or numpy.
    """
    flag = as_python(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name}: {key} must be a bool, got {type(value).__name__}")
    return flag


def read_number(name: str, key: str, value: Any) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is not a real number, or is a bool.
        ValueError: it is not finite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {key} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: {key} must be finite, got {value}")
    return float(value)


def read_probability(name: str, key: str, value: Any) -> float:
    """Return a probability as a float.

    Raises:
        ValueError: it is not a number in [0, 1]; torch.nn raises the same.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: {key} must be a probability in [0, 1], got {value!r}")
    return float(value)


def read_choice(name: str, key: str, value: Any, known: Collection[str]) -> str:
    """Return one of the known names.

    Raises:
        ValueError: it is not one of them; the message names the nearest.
    """
    if not isinstance(value, str) or value not in known:
        hint = nearest(str(value), known)
        raise ValueError(f"{name}: {key} must be one of {', '.join(known)}, got {value!r}{hint}")
    return value


def read_dtype(name: str, key: str, value: Any) -> torch.dtype | None:
    """Return the dtype of parameters; None is the default dtype.

    Raises:
        TypeError: the scans do not support it.
    """
    if value is not None and value not in FLOATS:
        raise TypeError(f"{name}: {key} must be float32, float64, bfloat16 or float16, got {value}")
    return value
