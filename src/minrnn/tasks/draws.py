"""Counter-based random numbers: a pure function of seed, part and step, the same on every machine."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

PARTS = {"train": 0, "validation": 1, "test": 2}
"""Parts of the data; no two share a random number."""

Part = Literal["validation", "test"]


class Draws:
    """A source of integers for one batch.

    Philox maps (key, counter) to numbers without any history. numpy guarantees that its raw output stays the
    same, but not the output of Generator's methods; so everything here is computed from raw numbers.

    Args:
        seed: seed of the sequence of batches, 0 <= seed < 2^64; larger seeds share numbers between parts.
        part: a key of PARTS.
        step: index of the batch, >= 0.

    Example:
        >>> Draws(0, "train", 3).integers(10, 4).tolist() == Draws(0, "train", 3).integers(10, 4).tolist()
        True
    """

    def __init__(self, seed: int, part: str, step: int) -> None:
        # 2^64 numbers per step; one key per seed and part.
        self._philox = np.random.Philox(key=PARTS[part] << 64 | seed, counter=step << 64)

    def integers(self, high: int, *shape: int) -> NDArray[np.int64]:
        """Return integers in 0 .. high - 1 of this shape; the bias of the modulo is below high / 2^64."""
        return (self._raw(*shape) % np.uint64(high)).astype(np.int64)

    def subsets(self, size: int, count: int, num: int) -> NDArray[np.int64]:
        """Return `num` sorted sets of `count` different integers in 0 .. size - 1, (num, count)."""
        order = np.argpartition(self._raw(num, size), count - 1, axis=1)  # (num, size)
        return np.sort(order[:, :count], axis=1)

    def _raw(self, *shape: int) -> NDArray[np.uint64]:
        return self._philox.random_raw(int(np.prod(shape))).reshape(shape)
