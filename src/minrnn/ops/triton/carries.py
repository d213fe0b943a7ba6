"""Carries: how programs pass the state to one another.

*Order.* Programs take chunks from a counter, in the order of time, so a program waits only for programs that
have started. Started programs make progress while others wait (CUDA guarantees this from sm_70), so the first
unfinished chunk always finishes, and by induction all of them, in whatever order and however few at a time
the device starts programs. Where B and D fill the device, a chunk waits for the one before it, which has
usually finished long before. Otherwise that would be a sequence of as many messages as chunks; so GROUP
chunks publish their spans as soon as they have read their input, each joins the earlier ones of its group,
and one carry is passed from group to group. The order of joins depends only on shape and device: equal calls
give equal bits.

*Messages.* Each group has a word of bits. Data is written, a barrier orders the program's writes, then one
lane sets the bit with a release at device scope. One lane of a reader polls the word with acquires until it
holds the bits; a barrier then lets the program's other lanes read the data. Only that lane's value decides
how often the program polls, so all of its warps agree.

*Workspace.* None where one program holds all of time, else a tuple: words (the counter of programs, then one
word for each group and unit), the chunks' spans, and the groups' carries. A unit is a tile of channels of one
batch row.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from minrnn.ops.triton.spans import apply, last_row, prefixes, shifted
from minrnn.ops.triton.states import LEAST, select

__all__ = ["Place", "locate", "publish", "starts"]


class Place(NamedTuple):
    """The part of the work assigned to a program."""

    unit: tl.tensor
    units: tl.tensor
    """The number of units."""
    chunk: tl.tensor
    b: tl.tensor
    """The batch row."""
    d: tl.tensor
    """The channels."""
    begin: tl.tensor
    """The chunk's first step."""
    left: tl.tensor
    """Steps from there to the last step; 0 for channels that do not exist."""


@triton.jit
def locate(workspace, B, T, D, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr):
    """Take the next chunk. It is the slowest index, so that concurrent programs read neighboring rows."""
    if workspace is None:  # noqa: SIM108
        ticket = tl.program_id(0)
    else:
        ticket = tl.atomic_add(workspace[0], 1, sem="relaxed")
    tiles = (D + BLOCK_D - 1) // BLOCK_D
    units = tiles * B
    unit = ticket % units
    chunk = ticket // units
    # Adds a zero that the compiler cannot see: if it knew the alignment of rows, it would assign several
    # channels to a lane and steps of several spans to a warp, to be exchanged through shared memory.
    d = (unit % tiles) * BLOCK_D + tl.arange(0, BLOCK_D) + tl.minimum(B - 1, 0)
    begin = chunk.to(tl.int64) * (WARPS * STEPS)
    left = tl.where((unit % tiles + 1) * BLOCK_D <= D, T - begin, 0)
    return Place(unit, units, chunk, (unit // tiles).to(tl.int64), d.to(tl.int64)[None, :], begin, left)


@triton.jit
def publish(ptr, x, mask):
    """Store x at a pointer, broadcast to its shape."""
    tl.store(tl.broadcast_to(ptr, x.shape), x, mask=mask)


@triton.jit
def _wait(word, seen, bits):
    while (seen & bits) != bits:
        seen = tl.atomic_or(word, 0, sem="acquire")
    return seen


@triton.jit
def _carry(
    workspace, span, start, place, last, at, inside, size, WARPS: tl.constexpr, GROUP: tl.constexpr,
    RESETS: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    # Return the pair at the start of the chunk; publish what later chunks need.
    ends = (tl.arange(0, WARPS)[:, None] == WARPS - 1) & inside
    group = place.chunk // GROUP
    member = place.chunk % GROUP
    word = workspace[0] + 1 + group * place.units + place.unit
    CARRY: tl.constexpr = 1 << GROUP
    seen = member * 0
    before = span
    if GROUP > 1:
        mine = workspace[1] + place.chunk.to(tl.int64) * 3 * size + at
        for part in tl.static_range(3):
            publish(mine + part * size, span[part], ends)
        tl.debug_barrier()
        bit = (member * 0 + 1) << member
        seen = tl.atomic_or(word, bit, sem="acq_rel")
        seen = _wait(word, seen, bit - 1)
        other = tl.arange(0, GROUP)[:, None]
        theirs = workspace[1] + (group.to(tl.int64) * GROUP + other) * 3 * size + at
        there = inside & (other < member)
        nothing: tl.constexpr = -LEAST if SIGNED else 0.0
        complement = tl.load(theirs, mask=there, other=nothing, volatile=True)
        a = tl.load(theirs + size, mask=there, other=1.0, volatile=True)
        b = tl.load(theirs + 2 * size, mask=there, other=0.0, volatile=True)
        complement, a, b = prefixes((complement, a, b), RESETS, SIGNED)
        before = (last_row(complement), last_row(a), last_row(b))
    _wait(word, seen, tl.where(group > 0, CARRY, 0))
    theirs = workspace[2] + group.to(tl.int64) * 2 * size + at
    there = inside & (group > 0)
    high = tl.load(theirs, mask=there, other=start, volatile=True)
    low = tl.load(theirs + size, mask=there, other=0.0, volatile=True)
    carry = (high, low)
    if GROUP > 1:
        carry = apply(before, carry, RESETS, SIGNED)
    if (member == GROUP - 1) & (place.chunk < last):
        end = apply(span, carry, RESETS, SIGNED)
        next_ptr = workspace[2] + (group.to(tl.int64) + 1) * 2 * size + at
        publish(next_ptr, end[0], ends)
        publish(next_ptr + size, end[1], ends)
        tl.debug_barrier()
        tl.atomic_or(word + place.units, CARRY, sem="release")
    return carry


@triton.jit
def starts(
    workspace, span, start, place, last, at, inside, size, WARPS: tl.constexpr, GROUP: tl.constexpr,
    RESETS: tl.constexpr, SIGNED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return the pairs at the start of the spans, given the state at the start of the first chunk.

    `at` holds the offsets of the channels in a (batch, channels) array of `size` numbers, `inside` which
    exist.
    """
    if WARPS > 1:
        span = prefixes(span, RESETS, SIGNED)
    carry = (start, tl.full(start.shape, 0.0, start.dtype))
    if workspace is not None:
        carry = _carry(
            workspace, span, start, place, last, at, inside, size, WARPS, GROUP, RESETS, SIGNED
        )  # fmt: skip
    if WARPS > 1:
        high, low = apply(span, carry, RESETS, SIGNED)
        high = shifted(high)
        if EXACT:
            low = shifted(low)
        carry = select(tl.arange(0, WARPS)[:, None] == 0, carry, (high, low))
    return carry
