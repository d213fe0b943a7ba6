"""Validation of a configuration's fields: types and bounds."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Collection, Mapping
from typing import Any

from minrnn.files.schema import nearest, shown


def require(config: object, name: str, holds: bool, expected: str) -> None:
    """Raise ValueError unless `holds`; the message names the class, the field and its value.

    Args:
        config: the configuration.
        name: name of the field.
        holds: the condition.
        expected: what the field must be, for the message.
    """
    if not holds:
        raise ValueError(
            f"{type(config).__name__}: {name} must be {expected}, got {shown(getattr(config, name))}"
        )


def check_kind(function: str, name: str, value: object, kind: type) -> None:
    """Raise TypeError unless an argument is an instance of a class.

    Args:
        function: name of the function or class whose argument it is.
        name: name of the argument.
        value: the argument.
        kind: the class.

    >>> check_kind("SequenceModel", "config", 20, dict)
    Traceback (most recent call last):
    TypeError: SequenceModel: config must be a dict, got 20
    """
    if not isinstance(value, kind):
        raise TypeError(f"{function}: {name} must be a {kind.__name__}, got {shown(value)}")


def check_choice(config: object, name: str, known: Collection[str]) -> None:
    """Raise ValueError unless the field is one of the known names; the message names the nearest."""
    value = getattr(config, name)
    if value not in known:
        raise ValueError(
            f"{type(config).__name__}: {name} must be one of {', '.join(known)}, got {shown(value)}"
            f"{nearest(str(value), known)}"
        )


def check_bounds(config: object, bounds: Mapping[str, tuple[int, int]], unit: str = "") -> None:
    """Raise ValueError unless each of these fields lies between its bounds, inclusive.

    The upper bounds are far above any practical value. A larger one is a typing error or comes from a damaged
    file, and would use up memory or minutes before it failed.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        limit = f"at least {low}" if value < low else f"at most {high}"
        require(config, name, low <= value <= high, limit + unit)


def check_types(config: Any) -> None:
    """Raise TypeError unless every field of a dataclass has its declared type.

    numpy scalars are converted to Python's, which can be serialized.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value, allowed = as_python(getattr(config, name)), {kind, *typing.get_args(kind)}
        object.__setattr__(config, name, value)  # the dataclass is frozen
        if float in allowed:
            allowed.add(int)  # 1 for 1.0
        if type(value) not in allowed:
            wanted = getattr(kind, "__name__", kind)
            raise TypeError(f"{type(config).__name__}: {name} must be {wanted}, got {shown(value)}")


def first_difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the name of the first setting that differs in two nested tables, and its two values.

    Args:
        one: a table of settings or a value.
        other: another one. A setting that only one of two tables has differs; the other's value is None.
        name: the name of both.

    >>> first_difference({"train": {"seed": 1, "steps": 2}}, {"train": {"seed": 1, "steps": 3}})
    ('train.steps', 2, 3)
    """
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        return None if one == other else (name, one, other)
    for key in dict.fromkeys([*one, *other]):
        below = f"{name}.{key}" if name else key
        if (key in one) != (key in other):
            return below, one.get(key), other.get(key)
        if found := first_difference(one.get(key), other.get(key), below):
            return found
    return None


def as_python(value: Any) -> Any:
    """Return a numpy or torch scalar as a Python one, and any other value unchanged."""
    is_number = isinstance(value, numbers.Number) and hasattr(value, "item")
    is_flag = str(getattr(value, "dtype", None)) == "bool" and value.shape == ()
    return value.item() if is_number or is_flag else value
