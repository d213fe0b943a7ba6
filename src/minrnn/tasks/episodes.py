"""Recorded episodes of an environment as flat arrays.

Episodes are concatenated along time: step t of the arrays is one observation, the action taken, and the
reward that followed; `ends` marks the boundaries. All data are in memory: a step of Hopper takes 60 bytes,
one of HalfCheetah or Walker2d 96, so D4RL's largest locomotion file (two million steps) takes 192 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Episodes:
    """Recorded episodes of one environment: N steps in E episodes.

    Args:
        observations: (N, S) float32, the observation before each action.
        actions: (N, A) float32 for continuous actions, (N,) int64 from 0 for discrete ones.
        rewards: (N,) float32, the reward after each action.
        ends: (E,) int64, strictly increasing to N: the index one past each episode's last step.
        terminated: (E,) bool. True: the environment ended the episode (a fall, a goal); False: it was
            truncated by a time limit or the end of the recording.
        environment: gymnasium's id, if known.
        about: metadata: `source` ("local", "d4rl", "minari" or "file"), `name`, and further entries of the
            file (for local data the quality, the algorithm and its policy's return; for discrete actions
            `num_actions`, and `first_action`, the environment's number of the first action if it is not 0).

    Raises:
        ValueError: shapes, dtypes or lengths are inconsistent, numbers are not finite, or there are no steps.
    """

    observations: NDArray[np.float32]
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    ends: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    environment: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_ends()
        self._check_numbers()

    def __len__(self) -> int:
        """Return the number of steps N."""
        return len(self.observations)

    @property
    def observation_size(self) -> int:
        """Numbers in an observation, S."""
        return self.observations.shape[1]

    @property
    def is_discrete(self) -> bool:
        """Whether actions are discrete."""
        return self.actions.ndim == 1

    @property
    def action_size(self) -> int:
        """Numbers in an action, A.

        Raises:
            ValueError: actions are discrete.
        """
        if self.is_discrete:
            raise ValueError(
                "Episodes: action_size is for continuous actions, got discrete ones; use num_actions"
            )
        return self.actions.shape[1]

    @property
    def num_actions(self) -> int:
        """Number of discrete actions: from the metadata, at least those that occur.

        Raises:
            ValueError: actions are continuous.
        """
        if not self.is_discrete:
            raise ValueError(
                "Episodes: num_actions is for discrete actions, got continuous ones; use action_size"
            )
        return max(int(self.about.get("num_actions", 0)), int(self.actions.max()) + 1)

    @property
    def num_episodes(self) -> int:
        """Number of episodes E."""
        return len(self.ends)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(E,) int64, the index of each episode's first step."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(E,) int64, the number of steps of each episode."""
        return self.ends - self.starts

    @cached_property
    def returns(self) -> NDArray[np.float64]:
        """(E,) float64, the undiscounted return of each episode."""
        return np.add.reduceat(self.rewards, self.starts, dtype=np.float64)

    def returns_to_go(self) -> NDArray[np.float32]:
        """Return the undiscounted return from each step to the end of its episode.

            R[t] = r[t] + R[t+1];    R[t] = r[t] at an episode's last step

        Returns:
            (N,) float32, summed in float64. Truncated episodes count up to their last recorded step.
        """
        to_go = np.empty(len(self), np.float32)
        for start, end in zip(self.starts, self.ends, strict=True):
            to_go[start:end] = np.cumsum(self.rewards[start:end][::-1], dtype=np.float64)[::-1]
        return to_go

    def describe(self) -> str:
        """Return the data and their size in one line, for a log."""
        name = self.about.get("name") or self.environment or "episodes"
        source = f" ({self.about['source']})" if "source" in self.about else ""
        actions = f"one of {self.num_actions}" if self.is_discrete else f"of {self.action_size}"
        return (
            f"{name}{source}: {len(self):,} steps in {self.num_episodes:,} episodes, observations of "
            f"{self.observation_size}, actions {actions}, return {self.returns.mean():,.1f} on average "
            f"({self.returns.min():,.1f} to {self.returns.max():,.1f})"
        )

    @cached_property
    def sha256(self) -> str:
        """Digest of all arrays: equal digests mean equal data."""
        digest = hashlib.sha256()
        for array in (self.observations, self.actions, self.rewards, self.ends, self.terminated):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _check_shapes(self) -> None:
        _check_array("observations", self.observations, np.float32, "(N, S)", (2,))
        is_vector = self.actions.ndim == 2
        _check_array("actions", self.actions, np.float32 if is_vector else np.int64, "(N, A) or (N,)", (1, 2))
        _check_array("rewards", self.rewards, np.float32, "(N,)", (1,))
        _check_array("ends", self.ends, np.int64, "(E,)", (1,))
        _check_array("terminated", self.terminated, np.bool_, "(E,)", (1,))
        lengths = {name: len(getattr(self, name)) for name in ("observations", "actions", "rewards")}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{length} {name}" for name, length in lengths.items())
            raise ValueError(
                f"Episodes: there must be as many actions and rewards as observations, got {said}"
            )
        if not self.observations.size or not self.actions.size:
            raise ValueError(
                f"Episodes: there must be steps with observations and actions, got observations "
                f"{self.observations.shape} and actions {self.actions.shape}"
            )

    def _check_ends(self) -> None:
        if len(self.ends) != len(self.terminated):
            raise ValueError(
                f"Episodes: terminated must have a value for each of the {len(self.ends)} ends of episodes, "
                f"got {len(self.terminated)} values"
            )
        if (
            not len(self.ends)
            or self.ends[0] < 1
            or self.ends[-1] != len(self)
            or np.any(np.diff(self.ends) < 1)
        ):
            raise ValueError(
                f"Episodes: ends must increase from at least 1 to the number of steps, {len(self)}, got "
                f"{np.array2string(self.ends, threshold=6)}"
            )

    def _check_numbers(self) -> None:
        for name in ("observations", "actions", "rewards"):
            array = getattr(self, name)
            is_finite = np.isfinite(array)
            if not is_finite.all():
                first = tuple(np.argwhere(~is_finite)[0])
                raise ValueError(
                    f"Episodes: {name} must be finite, got {array[first]} at step {first[0]}, the first of "
                    f"{np.count_nonzero(~is_finite)} such numbers; leave out their episodes"
                )
        if self.is_discrete and self.actions.min() < 0:
            raise ValueError(f"Episodes: discrete actions must be at least 0, got {self.actions.min()}")


def _check_array(name: str, array: object, dtype: type, shape: str, ranks: tuple[int, ...]) -> None:
    """Raise ValueError unless `array` has this dtype and one of these numbers of axes."""
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim not in ranks:
        got = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"Episodes: {name} must be an array {shape} of {np.dtype(dtype)}, got {got}")
