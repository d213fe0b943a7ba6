"""The GPU engine of the selective scan, in Triton: one lane for each number of the state.

A program holds BLOCK_D channels of one batch row, all N numbers of each, in registers, and walks through
time. STEPS steps are loaded at once, so that one wait serves them all, and decays do not wait for the state.
Time is not cut: the N numbers of each channel make enough lanes. Forward writes the state before every chunk
of CHUNK steps. Backward goes through the chunks from the last to the first. In a chunk it first walks forward
to find the state before every STEPS steps, and then, from the last of these to the first, computes their
states again, keeps them in registers and walks back. So the states of all steps are never in memory.

The recurrence is that of csrc/selective_rows.cpp: decays are 2^n (1 + e) with e of full relative accuracy,
states and adjoints are pairs of floats, and the error does not grow with T.

Sums over channels, for the gradients of B and C, are added up by a program for the tiles of channels that it
serves one after another, and then over programs in a fixed order: equal calls give equal bits. Offsets are
64-bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minrnn.ops.reference import contiguous, contiguous_channels, output_like, state_dtype
from minrnn.ops.selective.reference import CHUNK, Inputs, empty_borders

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    raise ImportError("Triton is not installed; install it with: pip install 'minrnn[gpu]'") from error

__all__ = ["backward", "forward"]


# ----------------------------------------------------------------------------------------------------------
# Elementary functions


@triton.jit
def _decay(x):
    # 2^x = scale (1 + e) for x <= 0: as `Split` and `power_less_one` in csrc/selective_rows.cpp.
    if x.dtype == tl.float64:
        return x * 0.0, tl.exp2(x)
    else:
        x = tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL)
        shifted = x + 12582912.0
        r = x - (shifted - 12582912.0)
        q = 0.0013333539 * r + 0.0096662454
        q = q * r + 0.055505003
        q = q * r + 0.24022351
        q = q * r + 0.69314714
        scale = (shifted.to(tl.int32, bitcast=True) + 127) << 23
        return q * r, scale.to(tl.float32, bitcast=True)


@triton.jit
def _softplus(x):
    # log(1 + exp(x)), of full relative accuracy, and its slope.
    e = tl.exp(-tl.abs(x))
    slope = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    s = e / (2.0 + e)  # log(1 + e) = 2 artanh(s)
    s2 = s * s
    TERMS: tl.constexpr = 16 if x.dtype == tl.float64 else 7
    p = s2 * 0.0 + 2.0 / (2 * TERMS - 1)
    for i in tl.static_range(TERMS - 1):
        p = p * s2 + 2.0 / (2 * (TERMS - 2 - i) + 1)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + s * p, slope


@triton.jit
def _silu(x):
    # x sigmoid(x), and its slope.
    e = tl.exp(-tl.abs(x))
    share = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    complement = tl.where(x >= 0, e, 1.0) / (1.0 + e)
    return x * share, share + x * share * complement


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _sum(x, axis: tl.constexpr):  # tl.sum is interpreted only if all of Triton is
    return tl.reduce(x, axis, _add)


@triton.jit
def _advance(state, e, scale, drive):
    kept = scale * state[0]
    change = (e * kept + drive) + scale * state[1]
    h = kept + change
    finite = tl.abs(h) < float("inf")  # of an infinite state, these terms may cancel
    plain = (e * scale + scale) * state[0] + drive
    return tl.where(finite, h, plain), tl.where(finite, change - (h - kept), 0.0)


# ----------------------------------------------------------------------------------------------------------
# Memory. A sequence is a tuple (pointer, batch stride, time stride), an absent one None.


@triton.jit
def _row(sequence, b, t, column, mask, REAL: tl.constexpr):
    ptr = sequence[0] + b * sequence[1] + t * sequence[2] + column
    return tl.load(ptr, mask=mask, other=0.0).to(REAL)


@triton.jit
def _put(sequence, b, t, column, x, mask):
    ptr = sequence[0] + b * sequence[1] + t * sequence[2] + column
    tl.store(ptr, x.to(sequence[0].dtype.element_ty), mask=mask)


@triton.jit
def _load_rows(sequence, b, first, T, column, inside, REAL: tl.constexpr, STEPS: tl.constexpr):
    # The rows of STEPS steps, zeros where time has ended.
    rows = ()
    for i in tl.static_range(STEPS):
        rows = rows + (_row(sequence, b, first + i, column, inside & (first + i < T), REAL),)
    return rows


@triton.jit
def _load_resets(reset, b, first, T, STEPS: tl.constexpr):
    # Whether each step forgets; None where none does.
    if reset is None:
        return None
    else:
        flags = ()
        for i in tl.static_range(STEPS):
            t = tl.minimum(first + i, T - 1)
            flag = tl.load(reset[0] + b * reset[1] + t * reset[2])
            flags = flags + ((flag != 0) & (first + i < T),)
        return flags


@triton.jit
def _load_bias(bias_ptr, d, in_d, REAL: tl.constexpr):
    if bias_ptr is None:
        return None
    else:
        return tl.load(bias_ptr + d, mask=in_d, other=0.0).to(REAL)


@triton.jit
def _steps(u, delta_pre, bias, first, T, STEPS: tl.constexpr):
    # Step sizes, their slopes and drives without B; all zero where time has ended, which keeps the state.
    deltas, slopes, drives = (), (), ()
    for i in tl.static_range(STEPS):
        pre = delta_pre[i]
        if bias is not None:
            pre += bias
        delta, slope = _softplus(pre)
        delta = tl.where(first + i < T, delta, 0.0)
        deltas = deltas + (delta,)
        slopes = slopes + (slope,)
        drives = drives + (delta * u[i],)
    return deltas, slopes, drives


@triton.jit
def _walk(state, deltas, drives, into, resets, rate, STEPS: tl.constexpr):
    # States before and after each step, and the decays between them.
    before, after, es, scales = (), (), (), ()
    for i in tl.static_range(STEPS):
        if resets is not None:
            state = (tl.where(resets[i], 0.0, state[0]), tl.where(resets[i], 0.0, state[1]))
        e, scale = _decay(deltas[i][:, None] * rate)
        before = before + (state[0],)
        state = _advance(state, e, scale, drives[i][:, None] * into[i][None, :])
        after = after + (state[0],)
        es = es + (e,)
        scales = scales + (scale,)
    return state, before, after, es, scales


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


# ----------------------------------------------------------------------------------------------------------
# Kernels

# One compiled kernel serves every shape.
_SIZES = ["T", "D", "N", "tiles", "tiles_each"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    y, last_ptr, borders_ptr, u, delta_pre, into, source, z, A_ptr, skip_ptr, bias_ptr, h0_ptr, reset, T, D,
    N, tiles,
    REAL: tl.constexpr, SAVE: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y and the final state; `into` and `source` are the paper's B and C."""
    program = tl.program_id(0)
    b = (program // tiles).to(tl.int64)
    d = (program % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    in_d = d < D
    in_n = n < N
    inside = in_d[:, None] & in_n[None, :]
    number = d.to(tl.int64)[:, None] * N + n[None, :]
    rate = tl.load(A_ptr + number, mask=inside, other=0.0).to(REAL) * _LOG2_E
    h = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
    low = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + b * D * N + number, mask=inside, other=0.0).to(REAL)
    if skip_ptr is not None:
        skip = tl.load(skip_ptr + d, mask=in_d, other=0.0).to(REAL)
    bias = _load_bias(bias_ptr, d, in_d, REAL)
    for start in range(0, T, STEPS):
        first = tl.cast(start, tl.int64)
        if SAVE:  # noqa: SIM102  # Triton evaluates both sides of an `and`
            if start % CHUNK == 0:
                chunks = (T + CHUNK - 1) // CHUNK
                border = (b * chunks + start // CHUNK) * N * D + n.to(tl.int64)[None, :] * D + d[:, None]
                tl.store(borders_ptr + border, h, mask=inside)
        us = _load_rows(u, b, first, T, d, in_d, REAL, STEPS)
        pres = _load_rows(delta_pre, b, first, T, d, in_d, REAL, STEPS)
        intos = _load_rows(into, b, first, T, n, in_n, REAL, STEPS)
        sources = _load_rows(source, b, first, T, n, in_n, REAL, STEPS)
        if z is not None:
            zs = _load_rows(z, b, first, T, d, in_d, REAL, STEPS)
        resets = _load_resets(reset, b, first, T, STEPS)
        deltas, _, drives = _steps(us, pres, bias, first, T, STEPS)
        state, _, after, _, _ = _walk((h, low), deltas, drives, intos, resets, rate, STEPS)
        h, low = state
        for i in tl.static_range(STEPS):
            out = _sum(after[i] * sources[i][None, :], 1)
            if skip_ptr is not None:
                out += skip * us[i]
            if z is not None:
                gate, _ = _silu(zs[i])
                out *= gate
            _put(y, b, first + i, d, out, in_d & (first + i < T))
    tl.store(last_ptr + b * D * N + number, h, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    du, ddelta_pre, dz, dinto_ptr, dsource_ptr, dA_ptr, dskip_ptr, dbias_ptr, carry_ptr, scratch_ptr, dy,
    borders_ptr, u, delta_pre, into, source, z, A_ptr, skip_ptr, bias_ptr, reset, T, D, N, tiles, tiles_each,
    REAL: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g[t] = dy[t] C[t] + a[t+1] g[t+1], and the gradients that it gives; what is carried is a[t+1] g[t+1].

    A program serves `tiles_each` tiles, one after another in every chunk. carry: two numbers for each of a
    state, the first of which begins as the gradient of the final state. scratch: states within a chunk.
    """
    program = tl.program_id(0)
    groups = (tiles + tiles_each - 1) // tiles_each
    group = program % groups
    b = (program // groups).to(tl.int64)
    batch = tl.num_programs(0) // groups
    n = tl.arange(0, BLOCK_N)
    in_n = n < N
    chunks = (T + CHUNK - 1) // CHUNK
    slot = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch_ptr += program.to(tl.int64) * (CHUNK // STEPS) * BLOCK_D * BLOCK_N
    sums = (group.to(tl.int64) * batch + b) * T * N + n
    for back in range(chunks):
        chunk = chunks - 1 - back
        for member in range(tiles_each):
            d = (group * tiles_each + member) * BLOCK_D + tl.arange(0, BLOCK_D)
            in_d = d < D
            inside = in_d[:, None] & in_n[None, :]
            number = d.to(tl.int64)[:, None] * N + n[None, :]
            rate = tl.load(A_ptr + number, mask=inside, other=0.0).to(REAL) * _LOG2_E
            if skip_ptr is not None:
                skip = tl.load(skip_ptr + d, mask=in_d, other=0.0).to(REAL)
            bias = _load_bias(bias_ptr, d, in_d, REAL)
            border = (b * chunks + chunk) * N * D + n.to(tl.int64)[None, :] * D + d[:, None]
            h = tl.load(borders_ptr + border, mask=inside, other=0.0).to(REAL)
            low = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
            # A lane reads what it wrote itself: no barrier.
            for block in range(CHUNK // STEPS - 1):
                tl.store(scratch_ptr + block * BLOCK_D * BLOCK_N + slot, h)
                first = tl.cast(chunk * CHUNK + block * STEPS, tl.int64)
                us = _load_rows(u, b, first, T, d, in_d, REAL, STEPS)
                pres = _load_rows(delta_pre, b, first, T, d, in_d, REAL, STEPS)
                intos = _load_rows(into, b, first, T, n, in_n, REAL, STEPS)
                resets = _load_resets(reset, b, first, T, STEPS)
                deltas, _, drives = _steps(us, pres, bias, first, T, STEPS)
                state, _, _, _, _ = _walk((h, low), deltas, drives, intos, resets, rate, STEPS)
                h, low = state
            tl.store(scratch_ptr + (CHUNK // STEPS - 1) * BLOCK_D * BLOCK_N + slot, h)
            carry = carry_ptr + b * D * N + number
            size = tl.cast(batch, tl.int64) * D * N
            g = tl.load(carry, mask=inside, other=0.0).to(REAL)
            g_low = tl.load(carry + size, mask=inside, other=0.0).to(REAL)
            drate = tl.full([BLOCK_D, BLOCK_N], 0.0, REAL)
            dskip = tl.full([BLOCK_D], 0.0, REAL)
            dbias = tl.full([BLOCK_D], 0.0, REAL)
            for block_back in range(CHUNK // STEPS):
                block = CHUNK // STEPS - 1 - block_back
                first = tl.cast(chunk * CHUNK + block * STEPS, tl.int64)
                us = _load_rows(u, b, first, T, d, in_d, REAL, STEPS)
                pres = _load_rows(delta_pre, b, first, T, d, in_d, REAL, STEPS)
                intos = _load_rows(into, b, first, T, n, in_n, REAL, STEPS)
                sources = _load_rows(source, b, first, T, n, in_n, REAL, STEPS)
                dys = _load_rows(dy, b, first, T, d, in_d, REAL, STEPS)
                if z is not None:
                    zs = _load_rows(z, b, first, T, d, in_d, REAL, STEPS)
                resets = _load_resets(reset, b, first, T, STEPS)
                deltas, slopes, drives = _steps(us, pres, bias, first, T, STEPS)
                h = tl.load(scratch_ptr + block * BLOCK_D * BLOCK_N + slot)
                start = (h, tl.full([BLOCK_D, BLOCK_N], 0.0, REAL))
                _, before, after, es, scales = _walk(start, deltas, drives, intos, resets, rate, STEPS)
                for i in tl.static_range(STEPS - 1, -1, -1):
                    t = first + i
                    there = in_d & (t < T)
                    incoming = dys[i]
                    if z is not None:
                        out = _sum(after[i] * sources[i][None, :], 1)
                        if skip_ptr is not None:
                            out += skip * us[i]
                        gate, slope = _silu(zs[i])
                        _put(dz, b, t, d, incoming * out * slope, there)
                        incoming = incoming * gate
                    change = incoming[:, None] * sources[i][None, :] + g_low
                    adjoint = g + change
                    rounded = change - (adjoint - g)
                    kept = scales[i] * adjoint
                    next_g = es[i] * kept + kept
                    finite = tl.abs(adjoint) < float("inf")
                    next_g = tl.where(finite, next_g, (es[i] * scales[i] + scales[i]) * adjoint)
                    to_exponent = next_g * before[i]
                    g = tl.where(finite, kept, next_g)
                    g_low = tl.where(finite, es[i] * kept + scales[i] * rounded, 0.0)
                    if reset is not None:
                        g = tl.where(resets[i], 0.0, g)
                        g_low = tl.where(resets[i], 0.0, g_low)
                    drate += to_exponent * deltas[i][:, None]
                    by_drive = _sum(adjoint * intos[i][None, :], 1)
                    by_rate = _sum(to_exponent * rate, 1) * _LN_2
                    to_u = by_drive * deltas[i]
                    if skip_ptr is not None:
                        to_u += skip * incoming
                        dskip += incoming * us[i]
                    _put(du, b, t, d, to_u, there)
                    to_pre = (by_rate + by_drive * us[i]) * slopes[i]
                    if bias_ptr is not None:
                        dbias += tl.where(t < T, to_pre, 0.0)
                    _put(ddelta_pre, b, t, d, to_pre, there)
                    to_into = _sum(adjoint * drives[i][:, None], 0)
                    to_source = _sum(incoming[:, None] * after[i], 0)
                    row = sums + t * N
                    known = in_n & (t < T)
                    if member > 0:
                        to_into += tl.load(dinto_ptr + row, mask=known, other=0.0)
                        to_source += tl.load(dsource_ptr + row, mask=known, other=0.0)
                    tl.store(dinto_ptr + row, to_into, mask=known)
                    tl.store(dsource_ptr + row, to_source, mask=known)
            tl.store(carry, g, mask=inside)
            tl.store(carry + size, g_low, mask=inside)
            dA = dA_ptr + b * D * N + number
            tl.store(dA, tl.load(dA, mask=inside, other=0.0) + drate.to(tl.float64), mask=inside)
            if skip_ptr is not None:
                dD = dskip_ptr + b * D + d
                tl.store(dD, tl.load(dD, mask=in_d, other=0.0) + dskip.to(tl.float64), mask=in_d)
            if bias_ptr is not None:
                of_bias = dbias_ptr + b * D + d
                sum_of_bias = tl.load(of_bias, mask=in_d, other=0.0) + dbias.to(tl.float64)
                tl.store(of_bias, sum_of_bias, mask=in_d)
            tl.debug_barrier()  # the next tile's lanes add to sums that other lanes have written


# ----------------------------------------------------------------------------------------------------------
# The engine

_REALS = {torch.float32: tl.float32, torch.float64: tl.float64}

_LANES = 128  # of a program: numbers of states, each with a lane of its own
_FORWARD_STEPS, _BACKWARD_STEPS = 8, 4  # loaded at once; more would not fit into registers
_PROGRAMS = (
    4  # of the backward pass for each multiprocessor; more need more parts of the gradients of B and C
)

_Sequence = tuple[Tensor, int, int]


def forward(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`, fused: reads each sequence once, writes y and the borders once."""
    x = _readable(given)
    (batch, T, channels), N = x.u.shape, x.A.shape[1]
    y = output_like(x.u, channels)
    last = x.u.new_empty(batch, channels, N, dtype=state_dtype(x.u.dtype))
    borders = empty_borders(x, save)
    settings, tiles = _settings(x, _FORWARD_STEPS)
    with torch.cuda.device_of(y):
        forward_kernel[(batch * tiles,)](
            _strided(y), last, borders if save else None, *_arguments(x), x.h0, _flags(x.reset), T, channels,
            N, tiles, SAVE=save, **settings,
        )  # fmt: skip
    return y, last, borders


def backward(dy: Tensor, dlast: Tensor, borders: Tensor, given: Inputs) -> list[Tensor]:
    """As `reference.backward`, fused: computes a chunk's states and adjoints in registers."""
    x = _readable(given)
    (batch, T, channels), N = x.u.shape, x.A.shape[1]
    settings, tiles = _settings(x, _BACKWARD_STEPS)
    groups = min(tiles, max(1, -(-_PROGRAMS * _processors(x.u.device) // batch)))
    tiles_each = -(-tiles // groups)
    groups = -(-tiles // tiles_each)
    wide = state_dtype(x.u.dtype)
    du, ddelta_pre = output_like(x.u, channels), output_like(x.u, channels)
    dz = None if x.z is None else output_like(x.u, channels)
    dB, dC = (x.u.new_empty(groups, batch, T, N, dtype=wide) for _ in range(2))
    dA = x.u.new_zeros(batch, channels, N, dtype=torch.float64)
    dD, dbias = (x.u.new_zeros(batch, channels, dtype=torch.float64) for _ in range(2))
    carry = torch.stack([dlast, torch.zeros_like(dlast)])
    blocks = batch * groups * (CHUNK // _BACKWARD_STEPS)
    scratch = x.u.new_empty(blocks, settings["BLOCK_D"], settings["BLOCK_N"], dtype=wide)
    with torch.cuda.device_of(du):
        backward_kernel[(batch * groups,)](
            _strided(du), _strided(ddelta_pre), None if dz is None else _strided(dz), dB, dC, dA, dD, dbias,
            carry, scratch, _strided(contiguous_channels(dy)), borders, *_arguments(x), _flags(x.reset), T,
            channels, N, tiles, tiles_each, **settings,
        )  # fmt: skip
    narrow = x.u.dtype
    return [
        du,
        ddelta_pre,
        dA.sum(0).to(wide),
        dB.sum(0).to(narrow),
        dC.sum(0).to(narrow),
        x.u.new_empty(0, dtype=wide) if x.D is None else dD.sum(0).to(wide),
        x.u.new_empty(0) if dz is None else dz,
        x.u.new_empty(0, dtype=wide) if x.delta_bias is None else dbias.sum(0).to(wide),
        carry[0] + carry[1],
    ]


def _readable(x: Inputs) -> Inputs:
    """The inputs as the kernels read them."""
    rows = [None if s is None else contiguous_channels(s) for s in (x.u, x.delta_pre, x.B, x.C, x.z)]
    whole = [None if s is None else contiguous(s) for s in (x.A, x.D, x.delta_bias, x.h0)]
    (u, delta_pre, B, C, z), (A, D, delta_bias, h0) = rows, whole
    reset = None if x.reset is None else x.reset.resolve_neg()
    return Inputs(u, delta_pre, A, B, C, D, z, delta_bias, h0, reset)  # type: ignore[arg-type]


def _arguments(x: Inputs) -> tuple[Any, ...]:
    z = None if x.z is None else _strided(x.z)
    return _strided(x.u), _strided(x.delta_pre), _strided(x.B), _strided(x.C), z, x.A, x.D, x.delta_bias


def _settings(x: Inputs, STEPS: int) -> tuple[dict[str, Any], int]:
    """A kernel's constants, and how many tiles the channels make."""
    N = x.A.shape[1]
    BLOCK_N = triton.next_power_of_2(N)
    BLOCK_D = max(1, _LANES // BLOCK_N)
    settings = {
        "REAL": _REALS[state_dtype(x.u.dtype)],
        "CHUNK": CHUNK,
        "STEPS": STEPS,
        "BLOCK_D": BLOCK_D,
        "BLOCK_N": BLOCK_N,
        "num_warps": min(8, BLOCK_D * BLOCK_N // 32),
    }
    return settings, -(-x.u.shape[2] // BLOCK_D)


def _processors(device: torch.device) -> int:
    """How many multiprocessors the device has; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strided(x: Tensor) -> _Sequence:
    return x, x.stride(0), x.stride(1)


def _flags(reset: Tensor | None) -> _Sequence | None:
    return None if reset is None else _strided(reset.view(torch.int8))
