"""Division of a layer's steps into chunks whose pre-activations fit into the CPU's cache."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch

CACHED_BYTES = 2 << 20
"""Size of a chunk's pre-activations, per thread. Together with their gradients, the input and the states a
chunk then takes about 7 MiB, which the last-level cache holds. Larger results would be mapped anew at each
call, with a page fault per 4 KiB; smaller chunks have a larger overhead of calls."""

MIN_STEPS = 512
"""Fewest steps of a chunk: enough that a matrix product outweighs the packing of its weights, and that the
state between chunks is rarely rounded to float32."""

MIN_RUN = 32
"""Fewest steps of each row in a chunk of time-major rows, again so that states are rarely rounded."""

ALL = slice(None)


class Chunk(NamedTuple):
    """Some steps of some rows of a batch, which are projected and scanned at once."""

    rows: slice
    """The rows of the batch."""
    steps: slice
    """The steps of each row."""
    entry: slice | None
    """The rows of h0 that it starts from; None if it continues from the chunk before it."""


WHOLE = Chunk(ALL, ALL, ALL)


def steps_at_once(step_bytes: int) -> int:
    """Return the least number of steps of a chunk, over all its rows.

    Args:
        step_bytes: size of one step's pre-activations in one row.
    """
    return torch.get_num_threads() * max(MIN_STEPS, CACHED_BYTES // step_bytes)


@lru_cache
def cut_batch(B: int, T: int, size: int, *, by_time: bool, reverse: bool) -> tuple[Chunk, ...]:
    """Divide a batch of rows of equal length into chunks, each of which is a matrix in memory.

    Rows that are long enough are divided one by one. Otherwise a chunk holds several whole rows, or, in a
    time-major batch, some steps of all rows.

    Args:
        B: number of rows.
        T: number of steps of each row.
        size: least number of steps of a chunk, over all its rows, where there are so many.
        by_time: whether memory is time-major, so that the rows of one step are adjacent.
        reverse: whether the recurrence runs from the last step to the first.

    Returns:
        The chunks; those of the same rows are in the order of the recurrence.
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
    """Divide sequences that are concatenated in a batch of one row, each with an initial state of its own.

    Args:
        offsets: the first step of each of N sequences, and the total at the end.
        size: as in `cut_batch`.
        reverse: as in `cut_batch`.

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
    """Divide a range into parts of nearly equal length."""
    edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
    return (slice(left, right) for left, right in pairwise(edges))
