"""The options of all timed benchmarks: shapes, dtypes, threads, peers, and measuring time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, TypeVar

import torch

from minrnn.benchmarks.timing import MIN_ROUNDS
from minrnn.files import NoEffect, nearest, warn_without_effect
from minrnn.training import MOST_SEEDS, MOST_THREADS

__all__ = ["DTYPES", "Dtype", "TimedBench", "lengths", "parse_shapes", "require", "require_seed", "select"]

Dtype = Literal["float32", "float64", "bfloat16", "float16"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

EXAMPLE = {"B": "8", "T": "64..1024", "D": "512", "N": "16", "L": "4"}
"""A size of each axis; N: states per channel, L: layers."""

V = TypeVar("V")

WITHOUT_EFFECT = (NoEffect("threads", "device", lambda s: s["device"] != "cpu"),)
"""Options of a timed benchmark that have no effect with some values of another."""


@dataclass(frozen=True)
class TimedBench:
    """The options that all timed benchmarks share."""

    shapes: tuple[str, ...]
    """Sizes separated by x; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Dtypes of inputs and weights."""
    threads: tuple[int, ...] = (0,)
    """CPU threads (0: as many as torch chooses)."""
    peers: tuple[str, ...] = ("all",)
    """Peers to compare with: names (an unknown one lists them all), all that are installed, or none."""
    seconds: float = 5.0
    """Seconds to spend on a system; at least three rounds are measured, however slow it is."""
    samples: int = 30
    """Most measurements of a system within those seconds."""
    seed: int = 0
    """Seed of the inputs and weights."""
    device: str = "cpu"
    """Device to compute on: cpu, cuda, ..."""
    output: Path | None = None
    """JSON file to write, with a plot of the same name beside it (None: runs/bench-NAME-TIME.json)."""

    def __post_init__(self) -> None:
        require("shapes", bool(self.shapes), "at least one", self.shapes)
        require("dtypes", bool(self.dtypes), "at least one", self.dtypes)
        inside = bool(self.threads) and min(self.threads) >= 0 and max(self.threads) <= MOST_THREADS
        require("threads", inside, f"0 to {MOST_THREADS}", self.threads)
        require_seed(self.seed)
        require("seconds", 0 < self.seconds < float("inf"), "more than 0, and finite", self.seconds)
        require("samples", self.samples >= MIN_ROUNDS, f"{MIN_ROUNDS} or more", self.samples)
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)


def require(name: str, holds: bool, expected: str, got: object) -> None:
    """Check an option.

    Raises:
        ValueError: `holds` is False; the message says what was expected.
    """
    if not holds:
        raise ValueError(f"bench: {name} must be {expected}, got {got!r}")


def require_seed(seed: int) -> None:
    """Raise if a seed is negative or has more than 64 bits."""
    require("seed", 0 <= seed < MOST_SEEDS, f"0 to {MOST_SEEDS - 1}", seed)


def lengths(text: str) -> list[int]:
    """Parse a number, or a range whose numbers double.

    Raises:
        ValueError: the text is neither, or a number is not positive.

    >>> lengths("100"), lengths("64..300")
    ([100], [64, 128, 256])
    """
    match = re.fullmatch(r"([1-9]\d*)(?:\.\.([1-9]\d*))?", text)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise ValueError(f"bench: a size must be a number such as 512 or a range 64..1024, got {text!r}")
    first, last = int(match[1]), int(match[2] or match[1])
    return [first << doublings for doublings in range((last // first).bit_length())]


def parse_shapes(texts: Sequence[str], axes: str) -> list[tuple[int, ...]]:
    """Parse shapes such as "8x1024x512" or "8x64..1024x512", and remove duplicates.

    Args:
        texts: the shapes.
        axes: a letter for each axis, such as "BTD".

    Returns:
        A tuple of sizes for each shape; a range gives a shape for each of its sizes.

    Raises:
        ValueError: the number of axes differs, or a size is not positive.

    >>> parse_shapes(["8x64..128x32"], "BTD")
    [(8, 64, 32), (8, 128, 32)]
    """
    shapes: dict[tuple[int, ...], None] = {}
    for text in texts:
        sizes = text.split("x")
        if len(sizes) != len(axes):
            example = "x".join(EXAMPLE[axis] for axis in axes)
            raise ValueError(f"bench: shapes must be {'x'.join(axes)} such as {example}, got {text!r}")
        shapes |= dict.fromkeys(product(*map(lengths, sizes)))
    return list(shapes)


def select(names: Sequence[str], table: dict[str, V]) -> dict[str, V]:
    """Return the selected peers, in the table's order.

    Args:
        names: keys of the table, or "all", or "none".
        table: the peers.

    Raises:
        ValueError: a name is unknown; the message suggests the nearest one.
    """
    for name in names:
        if name not in table and name not in ("all", "none"):
            raise ValueError(
                f"bench: peers must be all, none or among {', '.join(table)}; got {name!r}"
                f"{nearest(name, table)}"
            )
    return {name: peer for name, peer in table.items() if name in names or "all" in names}
