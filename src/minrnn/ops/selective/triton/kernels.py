"""The selective scan's two kernels. One compiled kernel runs every shape."""

from __future__ import annotations

import triton
import triton.language as tl

from minrnn.ops.selective.triton.memory import load_steps, load_tile, put
from minrnn.ops.selective.triton.steps import adjoin, silu, walk
from minrnn.ops.triton.elementary import total
from minrnn.ops.triton.states import select

__all__ = ["backward_kernel", "forward_kernel"]

_SIZES = ["T", "D", "N", "tiles", "tiles_each"]
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _border(b, chunk, T, D, N, tile, CHUNK: tl.constexpr):
    # Offsets of the states before a chunk.
    chunks = (T + CHUNK - 1) // CHUNK
    return (b * chunks + chunk) * N * D + tile.n.to(tl.int64)[None, :] * D + tile.d[:, None]


@triton.jit
def _output(after, C, u, x, tile):
    # A step's output, before z multiplies it.
    y = total(after * C[None, :], 1)
    if x.D is not None:
        y += tile.skip * u
    return y


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    y, last_ptr, borders_ptr, x, reset, T, D, N, tiles, REAL: tl.constexpr, SAVE: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute y and the final state."""
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    tile = load_tile(x, b, program % tiles, T, D, N, REAL, BLOCK_D, BLOCK_N)
    h = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
    low = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
    if x.h0 is not None:
        h = tl.load(x.h0 + b * D * N + tile.number, mask=tile.inside, other=0.0).to(REAL)
    for start in range(0, T, STEPS):
        first = tl.cast(start, tl.int64)
        if SAVE:  # noqa: SIM102  # Triton evaluates both sides of an `and`
            if start % CHUNK == 0:
                tl.store(borders_ptr + _border(b, start // CHUNK, T, D, N, tile, CHUNK), h, mask=tile.inside)
        rows = load_steps(x, reset, None, tile, first, True, REAL, STEPS)
        walked = walk((h, low), x, rows, tile, first, STEPS)
        h, low = walked.state
        for i in tl.static_range(STEPS):
            out = _output(walked.after[i], rows.C[i], rows.u[i], x, tile)
            if x.z is not None:
                gate, _ = silu(rows.z[i])
                out *= gate
            put(y, tile, first + i, out)
    tl.store(last_ptr + b * D * N + tile.number, h, mask=tile.inside)


@triton.jit
def _rewalk(
    scratch_ptr, slot, h, x, reset, begin, tile, REAL: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr
):
    # Recompute the chunk that begins with the state h, and store the state before every STEPS steps. A lane
    # later reads only what it wrote itself, so this needs no barrier.
    SIZE: tl.constexpr = h.shape[0] * h.shape[1]
    low = tl.full(h.shape, 0.0, REAL)
    for block in range(CHUNK // STEPS - 1):
        tl.store(scratch_ptr + block * SIZE + slot, h)
        first = tl.cast(begin + block * STEPS, tl.int64)
        rows = load_steps(x, reset, None, tile, first, False, REAL, STEPS)
        h, low = walk((h, low), x, rows, tile, first, STEPS).state
    tl.store(scratch_ptr + (CHUNK // STEPS - 1) * SIZE + slot, h)


@triton.jit
def _walk_back(
    g, g_low, drate, dskip, dbias, dx, dy, h, x, reset, first, tile, row, N, known,
    REAL: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    # Recompute the states of STEPS steps from the state h before them, and compute all gradients from the
    # last step to the first. Return the pair g before these steps, and the sums over time so far.
    rows = load_steps(x, reset, dy, tile, first, True, REAL, STEPS)
    walked = walk((h, tl.full(h.shape, 0.0, REAL)), x, rows, tile, first, STEPS)
    g = (g, g_low)
    for i in tl.static_range(STEPS - 1, -1, -1):
        t = first + i
        incoming = rows.dy[i]
        if x.z is not None:
            out = _output(walked.after[i], rows.C[i], rows.u[i], x, tile)
            gate, slope = silu(rows.z[i])
            put(dx.z, tile, t, incoming * out * slope)
            incoming = incoming * gate
        adjoint, next_g, g = adjoin(g, incoming[:, None] * rows.C[i][None, :], walked.e[i], walked.scale[i])
        to_exponent = next_g * walked.before[i]
        if len(rows.resets) > 0:
            g = select(rows.resets[i], (0.0, 0.0), g)
        drate += to_exponent * walked.delta[i][:, None]
        by_term = total(adjoint * rows.B[i][None, :], 1)
        by_rate = total(to_exponent * tile.rate, 1) * _LN_2
        to_u = by_term * walked.delta[i]
        if x.D is not None:
            to_u += tile.skip * incoming
            dskip += incoming * rows.u[i]
        put(dx.u, tile, t, to_u)
        to_pre = (by_rate + by_term * rows.u[i]) * walked.slope[i]
        if x.delta_bias is not None:
            dbias += tl.where(t < tile.T, to_pre, 0.0)
        put(dx.delta_pre, tile, t, to_pre)
        dB = total(adjoint * walked.term[i][:, None], 0)
        dC = total(incoming[:, None] * walked.after[i], 0)
        at = row + t * N
        _add_rows((dx.B + at, dx.C + at), (dB, dC), tile.in_n & (t < tile.T), known)
    return g[0], g[1], drate, dskip, dbias


@triton.jit
def _add_rows(ptrs, sums, mask, known):
    # Store sums over the tile's channels, added to those of earlier tiles.
    first, second = sums
    if known:
        first += tl.load(ptrs[0], mask=mask, other=0.0)
        second += tl.load(ptrs[1], mask=mask, other=0.0)
    tl.store(ptrs[0], first, mask=mask)
    tl.store(ptrs[1], second, mask=mask)


@triton.jit
def _accumulate(ptr, x, mask):
    # Add to a sum over chunks, in float64.
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + x.to(tl.float64), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    dx, carry_ptr, scratch_ptr, dy, borders_ptr, x, reset, T, D, N, tiles, tiles_each, REAL: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute g[t] = dy[t] C[t] + a[t+1] g[t+1] and the gradients; the carry is a[t+1] g[t+1].

    A program computes `tiles_each` tiles, one after another in every chunk. `carry` holds a pair for each
    number of the state; its first part is initialized to the gradient of the final state. `scratch` holds the
    states within a chunk.
    """
    program = tl.program_id(0)
    groups = (tiles + tiles_each - 1) // tiles_each
    group = program % groups
    b = (program // groups).to(tl.int64)
    batch = tl.num_programs(0) // groups
    n = tl.arange(0, BLOCK_N)
    chunks = (T + CHUNK - 1) // CHUNK
    blocks: tl.constexpr = CHUNK // STEPS
    scratch_ptr += program.to(tl.int64) * blocks * BLOCK_D * BLOCK_N
    slot = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    row = (group.to(tl.int64) * batch + b) * T * N + n
    size = tl.cast(batch, tl.int64) * D * N
    for back in range(chunks):
        chunk = chunks - 1 - back
        for member in range(tiles_each):
            tile = load_tile(x, b, group * tiles_each + member, T, D, N, REAL, BLOCK_D, BLOCK_N)
            border = borders_ptr + _border(b, chunk, T, D, N, tile, CHUNK)
            h = tl.load(border, mask=tile.inside, other=0.0).to(REAL)
            _rewalk(scratch_ptr, slot, h, x, reset, chunk * CHUNK, tile, REAL, CHUNK, STEPS)
            carry = carry_ptr + b * D * N + tile.number
            g = tl.load(carry, mask=tile.inside, other=0.0).to(REAL)
            g_low = tl.load(carry + size, mask=tile.inside, other=0.0).to(REAL)
            drate = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
            dskip = tl.full([BLOCK_D], 0.0, REAL)
            dbias = tl.full([BLOCK_D], 0.0, REAL)
            for block_back in range(blocks):
                block = blocks - 1 - block_back
                first = tl.cast(chunk * CHUNK + block * STEPS, tl.int64)
                h = tl.load(scratch_ptr + block * BLOCK_D * BLOCK_N + slot)
                g, g_low, drate, dskip, dbias = _walk_back(
                    g, g_low, drate, dskip, dbias, dx, dy, h, x, reset, first, tile, row, N, member > 0,
                    REAL, STEPS,
                )  # fmt: skip
            tl.store(carry, g, mask=tile.inside)
            tl.store(carry + size, g_low, mask=tile.inside)
            _accumulate(dx.A + b * D * N + tile.number, drate, tile.inside)
            if x.D is not None:
                _accumulate(dx.D + b * D + tile.d, dskip, tile.in_d)
            if x.delta_bias is not None:
                _accumulate(dx.delta_bias + b * D + tile.d, dbias, tile.in_d)
            tl.debug_barrier()  # the next tile adds to sums that other lanes have written
