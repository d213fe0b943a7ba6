"""How the steps of a layer are cut into chunks whose pre-activations stay in cache: slices, no numbers."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

CACHED_BYTES = 2 << 20
"""Pre-activations of a chunk, for each thread. With their gradients, input and states a chunk then holds some
7 MiB, which the last cache keeps. Larger results would be mapped anew at each call, at the price of a page
fault for every 4 KiB; smaller chunks spend more of their time between calls."""

MIN_STEPS = 512
"""Steps of a chunk at least, so that a matrix product outweighs the packing of its weights, and a state that
passes from chunk to chunk is rounded to float32 seldom."""

MIN_RUN = 32
"""Steps of each row in a chunk of time-major rows at least: again, not to round the states too often."""

ALL = slice(None)


class Chunk(NamedTuple):
    """Some steps of some rows of a batch: what is projected and scanned at once."""

    rows: slice
    """Which rows of the batch."""
    steps: slice
    """Which steps of each."""
    entry: slice | None
    """Which rows of h0 it starts from; None where it goes on from the chunk before it."""


WHOLE = Chunk(ALL, ALL, ALL)


def steps_at_once(step_bytes: int) -> int:
    """How many steps, of all rows together, a chunk has at least.

    Args:
        step_bytes: size of one step's pre-activations.
    """
    return torch.get_num_threads() * max(MIN_STEPS, CACHED_BYTES // step_bytes)


@lru_cache
def cut_batch(B: int, T: int, size: int, *, by_time: bool, reverse: bool) -> tuple[Chunk, ...]:
    """Cut rows of one length, so that each chunk is a matrix in memory.

    Rows that are long enough are cut by themselves, wherever they lie. Shorter ones go several to a chunk;
    or, where a step's rows lie together in memory, some steps of all rows do.

    Args:
        B: rows.
        T: steps of each.
        size: steps of a chunk, of all rows together: at least that many where there are so many.
        by_time: whether a step's rows lie together in memory, and not a row's steps.
        reverse: whether the recurrence runs from the last step to the first.

    Returns:
        The chunks; those of the same rows follow each other in the order of the recurrence.
    """
    if size >= B * T:
        return (WHOLE,)
    if size <= T:
        groups, runs = B, T // size
    elif by_time:
        groups, runs = 1, max(1, T // max(size // B, MIN_RUN))
    else:
        groups, runs = -(-B // (size // T)), 1
    if groups == runs == 1:
        return (WHOLE,)
    return tuple(
        chunk for rows in _divide(0, B, groups) for chunk in _cut_time(rows, 0, T, runs, rows, reverse)
    )


def cut_sequences(offsets: Sequence[int], size: int, *, reverse: bool) -> tuple[Chunk, ...]:
    """Cut sequences that lie end to end in a batch of one row, each of which starts from a state of its own.

    Args:
        offsets: where each of N sequences starts, and the total at the end.
        size: as `cut_batch` takes it.
        reverse: as `cut_batch` takes it.

    Returns:
        The chunks; an empty sequence has none.
    """
    return tuple(
        chunk
        for number, (start, stop) in enumerate(pairwise(offsets))
        if start < stop
        for chunk in _cut_time(
            slice(0, 1), start, stop, max(1, (stop - start) // size), slice(number, number + 1), reverse
        )
    )


def _cut_time(rows: slice, start: int, stop: int, runs: int, entry: slice, reverse: bool) -> Iterator[Chunk]:
    runs_in_order = list(_divide(start, stop, runs))
    for number, steps in enumerate(reversed(runs_in_order) if reverse else runs_in_order):
        yield Chunk(rows, steps, entry if number == 0 else None)


def _divide(start: int, stop: int, parts: int) -> Iterator[slice]:
    """Divide a range into parts of nearly one length."""
    edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return (slice(left, right) for left, right in pairwise(edges))
