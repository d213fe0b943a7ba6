"""What an environment takes for an action, and recorded actions in the one form that policies learn from.

A policy chooses one of some actions, numbered from 0, or answers with a vector of numbers. Environments say
the same in more ways: choices that do not start at 0, alone in an array, numbers in a matrix or without any
axis, integers between bounds. Those are brought into the two forms where data are read, and back where a
policy acts; of what has no such form (several choices at once, parts by name) the reader says so, before
anything is learned.
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
"""Discrete actions that a policy may choose from: a number beyond is none of an action's."""

OTHERS = (
    "policies here choose one action of several (Discrete) or give numbers (Box); wrap the environment so "
    "that it takes one of these, say one Discrete for all combinations, and record that"
)


@dataclass(frozen=True)
class ActionSpace:
    """One of `size` choices, or `size` numbers.

    Args:
        discrete: whether it is a choice.
        size: how many choices there are, or numbers in an action.
        start: what the environment calls the first choice.

    Raises:
        ValueError: there are no actions, or too many.
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
        """Read one of gymnasium's spaces.

        Raises:
            ValueError: it is of a kind that no policy here acts in.
        """
        kind = type(space).__name__
        for known in ("Discrete", "MultiDiscrete", "MultiBinary", "Box"):
            if any(base.__name__ == known for base in type(space).__mro__):
                kind = known
        described = {name: getattr(space, name, None) for name in ("n", "nvec", "start", "shape")}
        return _space(kind, described, str(space))

    @classmethod
    def from_minari(cls, text: Mapping[str, Any]) -> ActionSpace:
        """Read a space as Minari writes it: `{"type": "Discrete", "n": 3, "start": 0}`.

        Raises:
            ValueError: it is of a kind that no policy here acts in, or a value is not what it must be.
        """
        kind = convert(text.get("type"), str, "type")
        return _space(kind, text, str(dict(text))[:100])

    def from_recorded(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Return actions that were recorded in this space, (N, ...), as (N,) int64 from 0 or (N, A) float32.

        Raises:
            ValueError: they are not of this space.
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
        """Return a policy's action, a number of a choice or (A,), as the environment's space takes it."""
        if self.discrete:
            choice = int(action) + self.start
            return np.full(space.shape, choice, space.dtype) if space.shape else choice
        numbers = np.clip(action.reshape(space.shape), space.low, space.high)
        return np.asarray(numbers if space.dtype.kind == "f" else np.rint(numbers), space.dtype)


def infer_actions(actions: NDArray[Any]) -> NDArray[Any]:
    """Return recorded actions of an unknown space: choices from 0 where they are whole numbers, one a step.

    Raises:
        ValueError: there are several whole numbers a step, which may be choices or numbers; or a choice is
            below 0.
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
    """Make a space of what both gymnasium and Minari call its parts."""
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
    """Return a whole number, which may stand alone in an array or list."""
    value = described.get(name)
    if value is None and default is not None:
        return default
    while isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, np.ndarray | np.integer):
        value = value.item()
    return convert(value, int, name)
