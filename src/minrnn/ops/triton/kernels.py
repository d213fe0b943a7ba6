"""The gated scan's two kernels. One compiled kernel runs every shape."""

from __future__ import annotations

import triton
import triton.language as tl

from minrnn.ops.triton.carries import locate, publish, starts
from minrnn.ops.triton.memory import Tile, bit, load, load_pre, load_resets, load_start, of_rows, store, to
from minrnn.ops.triton.spans import forgetting, stack, unstack, whole
from minrnn.ops.triton.states import advance, encode, select, two_sum

__all__ = ["backward_kernel", "forward_kernel"]

_SIZES = ["B", "T", "D", "last"]


@triton.jit
def _tile(place, T, D, AHEAD: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr):
    # The program's tile; it is full if the AHEAD steps after it exist too.
    row = tl.arange(0, STEPS * WARPS)[:, None]
    r = row // WARPS
    inside = place.d < D
    first = place.begin + row % WARPS * STEPS
    rows = tl.minimum(T - first, STEPS + AHEAD).to(tl.int32)
    return Tile(T, place.b, first, r, rows, place.d, inside, place.left >= WARPS * STEPS + AHEAD)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    h, pre, reset, h0, workspace, B, T, D, last,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, NEUTRAL: tl.constexpr, DECAY: tl.constexpr,
    DESCENDING: tl.constexpr, REAL: tl.constexpr, EXACT: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute h[t] = a[t] h[t-1] + b[t]; `last` is the index of the last chunk."""
    RESETS: tl.constexpr = reset is not None
    SIGNED: tl.constexpr = DECAY == "signed"
    place = locate(workspace, B, T, D, BLOCK_D, WARPS, STEPS)
    tile = _tile(place, T, D, 0, WARPS, STEPS)
    x = load_pre(pre, tile, NEUTRAL, DESCENDING)
    start = load_start(h0, tile.b, tile.d, tile.inside, REAL)
    if RESETS:
        resets = load_resets(reset, tile.b, place.begin, T, DESCENDING, WARPS, STEPS)
    tl.debug_barrier()  # else the compiler moves each load down to its use, and the program waits for each
    a, complement, b, _ = GATE(to(x, REAL), 0.0, CANDIDATE, SIGNED, EXACT)
    decays = unstack(encode(a, complement, DECAY, EXACT), WARPS)
    terms = unstack(b, WARPS)
    state = (tl.full([WARPS, BLOCK_D], 0.0, REAL) + start, tl.full([WARPS, BLOCK_D], 0.0, REAL))
    if WARPS > 1 or workspace is not None:
        span = (complement, a, b)
        if RESETS:
            span = forgetting(span, of_rows(resets, tile.r, WARPS))
        state = starts(
            workspace, whole(span, WARPS, RESETS, SIGNED), start, place, last, tile.b * D + tile.d,
            tile.inside, tl.cast(B, tl.int64) * D, WARPS, GROUP, RESETS, SIGNED, EXACT,
        )  # fmt: skip
    states = ()
    for i in tl.static_range(STEPS):
        if RESETS:
            state = select(bit(resets, i), (0.0, 0.0), state)
        state = advance(state, decays[i], terms[i], DECAY, EXACT)
        states = states + (state[0],)
    store(h, tile, stack(states), DESCENDING)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dpre, dh0_ptr, dh, h, pre, reset, h0, workspace, B, T, D, last,
    GATE: tl.constexpr, CANDIDATE: tl.constexpr, NEUTRAL: tl.constexpr, DECAY: tl.constexpr,
    DESCENDING: tl.constexpr, REAL: tl.constexpr, EXACT: tl.constexpr, BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute g[t] = dh[t] + a[t+1] g[t+1] and the gradients; the carry is a[t+1] g[t+1]."""
    RESETS: tl.constexpr = reset is not None
    SIGNED: tl.constexpr = DECAY == "signed"
    place = locate(workspace, B, T, D, BLOCK_D, WARPS, STEPS)
    tile = _tile(place, T, D, 1, WARPS, STEPS)  # with the row after the last one, for h_prev
    x = load_pre(pre, tile, NEUTRAL, DESCENDING)
    incoming = load(dh, tile, 0, 0.0, DESCENDING)
    # The state before a step is the next row in this direction; before the recurrence's first step it is h0.
    h_prev = load(h, tile, 1, 0.0, DESCENDING)
    start = load_start(h0, tile.b, tile.d, tile.inside, REAL)
    if RESETS:
        resets = load_resets(reset, tile.b, place.begin, T, DESCENDING, WARPS, STEPS)
    tl.debug_barrier()
    incoming, h_prev = to((incoming, h_prev), REAL)
    if h0 is not None:
        h_prev = tl.where(tile.r + 1 == tile.rows, start, h_prev)
    if RESETS:
        h_prev = tl.where(of_rows(resets, tile.r, WARPS), 0.0, h_prev)
    a, complement, _, factors = GATE(to(x, REAL), h_prev, CANDIDATE, SIGNED, EXACT)
    decays = unstack(encode(a, complement, DECAY, EXACT), WARPS)
    incomings = unstack(incoming, WARPS)
    zero = tl.full([WARPS, BLOCK_D], 0.0, REAL)
    adjoint = (zero, zero)
    if WARPS > 1 or workspace is not None:
        span = (complement, a, a * incoming)
        if RESETS:
            forgets = of_rows(resets, tile.r, WARPS)
            span = forgetting((complement, a, tl.where(forgets, 0.0, a * incoming)), forgets)
        adjoint = starts(
            workspace, whole(span, WARPS, RESETS, SIGNED), tl.full(tile.d.shape, 0.0, REAL), place, last,
            tile.b * D + tile.d, tile.inside, tl.cast(B, tl.int64) * D, WARPS, GROUP, RESETS, SIGNED, EXACT,
        )  # fmt: skip
    adjoint = two_sum(adjoint[0], adjoint[1] + incomings[0])
    adjoints = (adjoint[0],)
    for i in tl.static_range(STEPS):
        dh_next = incomings[i + 1] if i + 1 < STEPS else zero
        adjoint = advance(adjoint, decays[i], dh_next, DECAY, EXACT)
        if RESETS:
            adjoint = select(bit(resets, i), (dh_next, 0.0), adjoint)
        if i + 1 < STEPS:
            adjoints = adjoints + (adjoint[0],)
    g = stack(adjoints)
    for j in tl.static_range(len(dpre)):
        store(dpre[j], tile, g * factors[j], DESCENDING)
    ends = tl.arange(0, WARPS)[:, None] == WARPS - 1
    publish(dh0_ptr + tile.b * D + tile.d, adjoint[0], tile.inside & ends & (place.chunk == last))
