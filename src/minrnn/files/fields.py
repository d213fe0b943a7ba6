"""What a configuration checks of its own fields: types and bounds, with one line for what is wrong."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Mapping
from typing import Any

from minrnn.files.schema import shown


def require(config: object, name: str, holds: bool, expected: str) -> None:
    """Raise ValueError unless a condition on a field holds; the class starts the message.

    Args:
        config: a configuration.
        name: the field's.
        holds: the condition.
        expected: what the field must be.
    """
    if not holds:
        raise ValueError(
            f"{type(config).__name__}: {name} must be {expected}, got {shown(getattr(config, name))}"
        )


def check_bounds(config: object, bounds: Mapping[str, tuple[int, int]], unit: str = "") -> None:
    """Raise ValueError unless each of these fields of a configuration lies between its bounds, both allowed.

    The upper ones are far above what anybody trains; what is beyond them is a slip or another's file, and
    would cost memory or minutes before it failed.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        limit = f"at least {low}" if value < low else f"at most {high}"
        require(config, name, low <= value <= high, limit + unit)


def check_types(config: Any) -> None:
    """Raise TypeError unless every field of a dataclass is of its type; the class starts the message.

    Numbers and flags of numpy's become Python's, which can be written to files.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value, allowed = as_python(getattr(config, name)), {kind, *typing.get_args(kind)}
        object.__setattr__(config, name, value)  # configurations are frozen, for all others
        if float in allowed:
            allowed.add(int)  # 1 is a good way to write 1.0
        if type(value) not in allowed:
            wanted = getattr(kind, "__name__", kind)
            raise TypeError(f"{type(config).__name__}: {name} must be {wanted}, got {shown(value)}")


def as_python(value: Any) -> Any:
    """Return a number or a flag of numpy's as Python's, and anything else as it is."""
    is_number = isinstance(value, numbers.Number) and hasattr(value, "item")
    is_flag = str(getattr(value, "dtype", None)) == "bool" and value.shape == ()
    return value.item() if is_number or is_flag else value
