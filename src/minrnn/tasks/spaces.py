"""Action spaces of environments, and the conversion of recorded actions to the form that policies learn from.

A policy either chooses one of several actions, numbered from 0, or returns a vector of numbers. Environments
have more variants: discrete actions that do not start at 0 or are wrapped in an array, numbers in a matrix or
without an axis, bounded integers. These are converted when data are read, and back when a policy acts. Spaces
without such a form (several discrete actions at once, dicts) are rejected when the data are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minrnn.files import convert

MOST_CHOICES = 1 << 16
"""Maximum number of discrete actions; larger numbers are not the index of an action."""

OTHERS = (
    "policies support the spaces Discrete and Box; wrap the environment so that it takes one of these, "
    "for example one Discrete for all combinations, and record that"
)


@dataclass(frozen=True)
class ActionSpace:
    """An action space: one of `size` discrete actions, or vectors of `size` numbers.

    Args:
        discrete: whether actions are discrete.
        size: the number of discrete actions, or of numbers in an action.
        start: the environment's number of the first discrete action.

    Raises:
        ValueError: `size` is out of range.
    """

    discrete: bool
    size: int
    start: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or (self.discrete and self.size > MOST_CHOICES):
            most = f" and at most {MOST_CHOICES} choices" if self.discrete else ""
            raise ValueError(f"there must be at least one action{most}, got {self}")

    def __str__(self) -> str:
        if not self.discrete:
            return f"{self.size} numbers"
        last = self.start + self.size - 1
        return f"one of {self.size} choices" + (f", {self.start} to {last}" if self.start else "")

    @classmethod
    def from_gymnasium(cls, space: Any) -> ActionSpace:
        """Return the action space of a gymnasium space.

        Raises:
            ValueError: policies do not support this kind of space.
        """
        kind = type(space).__name__
        for known in ("Discrete", "MultiDiscrete", "MultiBinary", "Box"):
            if any(base.__name__ == known for base in type(space).__mro__):
                kind = known
        described = {name: getattr(space, name, None) for name in ("n", "nvec", "start", "shape")}
        return _space(kind, described, str(space))

    @classmethod
    def from_minari(cls, text: Mapping[str, Any]) -> ActionSpace:
        """Return the action space of Minari's description: `{"type": "Discrete", "n": 3, "start": 0}`.

        Raises:
            ValueError: policies do not support this kind of space, or a value of the description is invalid.
        """
        kind = convert(text.get("type"), str, "type")
        return _space(kind, text, str(dict(text))[:100])

    def from_recorded(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Return actions recorded in this space, (N, ...), as (N,) int64 from 0 or (N, A) float32.

        Raises:
            ValueError: the actions are not in this space.
        """
        numbers = prod(actions.shape[1:])
        if numbers != (1 if self.discrete else self.size):
            raise ValueError(
                f"actions must be {self}, as the environment takes, got {actions.shape} {actions.dtype}"
            )
        if not self.discrete:
            return actions.reshape(len(actions), numbers).astype(np.float32)
        column = actions.reshape(len(actions))
        if actions.dtype.kind == "f" and not np.all(column == np.rint(column)):
            raise ValueError(f"actions must be {self}, as the environment takes, got fractions")
        last = self.start + self.size - 1
        if len(column) and not (self.start <= column.min() and column.max() <= last):
            raise ValueError(
                f"actions must be {self}, as the environment takes, got {column.min()} to {column.max()}"
            )
        return column.astype(np.int64) - self.start

    def to_environment(self, action: NDArray[Any], space: Any) -> Any:
        """Return a policy's action, a discrete one or (A,), in the form of the environment's `space`."""
        if self.discrete:
            choice = int(action) + self.start
            return np.full(space.shape, choice, space.dtype) if space.shape else choice
        numbers = np.clip(action.reshape(space.shape), space.low, space.high)
        return np.asarray(numbers if space.dtype.kind == "f" else np.rint(numbers), space.dtype)


def infer_actions(actions: NDArray[Any]) -> NDArray[Any]:
    """Convert recorded actions of an unknown space; one integer per step is taken as a discrete action.

    Raises:
        ValueError: there are several integers per step, which is ambiguous; or a discrete action is below 0.
    """
    numbers = prod(actions.shape[1:])
    if actions.dtype.kind == "f":
        return actions.reshape(len(actions), numbers).astype(np.float32)
    if numbers != 1:
        raise ValueError(
            f"actions of several whole numbers may be choices or numbers, got {actions.shape} "
            f"{actions.dtype}; write numbers as floats; {OTHERS}"
        )
    column = actions.reshape(len(actions))
    if len(column) and not (column.min() >= 0 and column.max() < MOST_CHOICES):
        raise ValueError(
            f"discrete actions must be numbered from 0 to at most {MOST_CHOICES - 1}, got {column.min()} to "
            f"{column.max()}; where the environment starts elsewhere, name it in the file (the attribute "
            "environment) or as task.environment"
        )
    return column.astype(np.int64)


def _space(kind: str, described: Mapping[str, Any], shown: str) -> ActionSpace:
    """Return the action space of a description with the attribute names that gymnasium and Minari share."""
    if kind == "Discrete":
        return ActionSpace(True, _integer(described, "n"), _integer(described, "start", 0))
    if kind == "Box":
        shape = described.get("shape")
        return ActionSpace(False, prod(convert(shape, list[int], "shape")))
    if kind == "MultiDiscrete" and np.size(described.get("nvec", ())) == 1:
        return ActionSpace(True, _integer(described, "nvec"), _integer(described, "start", 0))
    if kind == "MultiBinary" and np.size(described.get("n", ())) == 1 and _integer(described, "n") == 1:
        return ActionSpace(True, 2)
    raise ValueError(f"actions are of the space {shown}; {OTHERS}")


def _integer(described: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return an integer, which may be wrapped in an array or list of size 1."""
    value = described.get(name)
    if value is None and default is not None:
        return default
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.ndarray | np.integer):
        value = value.item()
    return convert(value, int, name)
