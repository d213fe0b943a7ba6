"""A linear projection fused with a gated scan, computed in chunks that fit into the cache.

Computed one after the other, the two write k (B, T, D) pre-activations to memory and read them back, and
their gradients likewise. Here a chunk of pre-activations is computed, used and dropped: always in backward,
and in forward when no gradients are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minrnn.ops.chunks import WHOLE, Chunk, cut_batch, cut_sequences, steps_at_once
from minrnn.ops.gated import GATED_SCAN, Mode, new_output
from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.joined import Joined
from minrnn.ops.operators import Composite, needs_gradients
from minrnn.ops.transforms import is_jit_traced, is_plain, is_traced, is_transformed

__all__ = ["project", "projected_scan"]

LARGE_BYTES = 32 << 20
"""Size of pre-activations from which on they are computed in chunks, to save memory. Smaller ones are
computed at once, which is faster: a chunk costs some calls, and the C library reuses blocks of a few MiB in
any case."""

MIN_ELEMENTS = 1 << 14
"""Average number of states per sequence from which on a call for each sequence takes less time than computing
the gates outside the scan."""


def projected_scan(
    gate: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    candidate: str = "positive",
    signed: bool = False,
    time_major: bool = False,
    joined: Joined | None = None,
    recompute: bool = False,
) -> Tensor:
    """Compute a linear projection and a gated scan: h = gated_scan(gate, linear(x, weight, bias), ...).

    Arguments are not checked.

    Args:
        gate: a name in GATES.
        x: (B, T, C), or (T, B, C) if time_major.
        weight: (num_pre * D, C), its rows in the order of the gate's pre-activations.
        bias: (num_pre * D,); none when None.
        h0: (B, D), the state before the first step; zeros when None. With `joined`, (N, D).
        reset: (B, T) bool; where True the state is set to zero before that step.
        reverse: run from the last step to the first.
        candidate: a name in CANDIDATES.
        signed: decays lie in (-1, 1).
        time_major: whether x is (T, B, C).
        joined: the boundaries of N sequences that are concatenated in x (1, total, C); without `reset`.
        recompute: recompute pre-activations and states in backward instead of saving them.

    Returns:
        h, (B, T, D).
    """
    settings = _Settings(Mode(gate, candidate, signed, reverse), time_major, recompute)
    tensors = _Tensors(x, weight, bias, h0, reset)
    return _run_rows(settings, tensors) if joined is None else _run_joined(settings, tensors, joined)


class _Settings(NamedTuple):
    """The arguments of one call other than tensors."""

    mode: Mode
    time_major: bool
    recompute: bool
    sequences: tuple[Chunk, ...] = ()
    """For the fused path, the parts that each start from a row of h0. Elsewhere none: torch.compile of torch
    2.11 cannot trace the slices in them."""
    chunks: tuple[Chunk, ...] = ()
    """The same parts, divided into chunks."""

    def batch_first(self, x: Tensor) -> Tensor:
        """Return x, or a tensor with its order of axes, as (B, T, ...)."""
        return x.transpose(0, 1) if self.time_major else x

    def run(self, chunk: Chunk, pre: Tensor, start: Tensor | None, reset: Tensor | None) -> Tensor:
        """Scan a chunk, given its pre-activations."""
        return GATED_SCAN((pre, start, None if reset is None else _of(reset, chunk)), self.mode)

    def last(self, h: Tensor) -> Tensor:
        """Return the state (B, D) after a chunk."""
        return h.select(1, 0 if self.mode.reverse else -1)


class _Tensors(NamedTuple):
    """The tensor arguments of one call."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None
    reset: Tensor | None

    @property
    def row_bytes(self) -> int:
        """Size of one step's pre-activations in one row."""
        return self.weight.shape[0] * self.weight.element_size()


def _run_rows(settings: _Settings, tensors: _Tensors) -> Tensor:
    if is_traced() or not (settings.recompute or _is_large(tensors)) or not _can_fuse(tensors):
        return _composed(settings, tensors, _compose)
    x = settings.batch_first(tensors.x)
    size, reverse = steps_at_once(tensors.row_bytes), settings.mode.reverse
    chunks = cut_batch(*x.shape[:2], size, by_time=_lies_by_time(x), reverse=reverse)
    return _FUSED(settings._replace(sequences=(WHOLE,), chunks=chunks), *tensors)


def _run_joined(settings: _Settings, tensors: _Tensors, joined: Joined) -> Tensor:
    x, h0, reverse = tensors.x, tensors.h0, settings.mode.reverse
    if joined.total == 0:  # no step to scan
        D = tensors.weight.shape[0] // GATES[settings.mode.gate].num_pre
        return project(x, tensors.weight, tensors.bias)[..., :D]
    if h0 is None:
        return _run_rows(settings, tensors._replace(reset=joined.ends if reverse else joined.starts))
    long = not is_traced() and x.shape[1] * h0.shape[1] >= MIN_ELEMENTS * h0.shape[0]
    if not long or not _can_fuse(tensors):
        return _composed(settings, tensors, partial(_compose_joined, joined))
    offsets = joined.offsets.tolist()
    sequences = chunks = cut_sequences(offsets, x.shape[1], reverse=reverse)
    if settings.recompute or _is_large(tensors):
        chunks = cut_sequences(offsets, steps_at_once(tensors.row_bytes), reverse=reverse)
    return _FUSED(settings._replace(sequences=sequences, chunks=chunks), *tensors)


def _can_fuse(tensors: _Tensors) -> bool:
    """Whether the fused path applies: eager CPU, float32 or float64, no autocast, no torch.func transform.

    In 16 bits, sums of gradients over chunks would be rounded after every chunk. On a GPU, chunks that fit
    into its cache are too small to use all of its multiprocessors.
    """
    x, weight, bias, h0, _ = tensors
    return (
        x.is_cpu
        and x.numel() > 0
        and x.dtype == weight.dtype
        and weight.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and is_plain(x, weight, bias, h0)
    )


def _is_large(tensors: _Tensors) -> bool:
    return tensors.x.shape[0] * tensors.x.shape[1] * tensors.row_bytes >= LARGE_BYTES


# ----------------------------------------------------------------------------------------------------------
# Composition of torch's operations and the scan: differentiable to any order, under any transform


def _composed(
    settings: _Settings, tensors: _Tensors, compose: Callable[[_Settings, _Tensors], Tensor]
) -> Tensor:
    """Call `compose`; with `recompute`, torch recomputes it in backward."""
    # Transforms do not support hooks on saved tensors, and graphs of torch.jit.trace do not keep them.
    if not settings.recompute or is_transformed() or is_jit_traced() or not needs_gradients(*tensors):
        return compose(settings, tensors)

    def again(*tensors: Any) -> Tensor:
        return compose(settings, _Tensors(*tensors))

    return checkpoint(again, *tensors, use_reentrant=False, preserve_rng_state=False)


def _compose(settings: _Settings, tensors: _Tensors) -> Tensor:
    x, weight, bias, h0, reset = tensors
    pre = settings.batch_first(project(x, weight, bias))
    if not settings.sequences:
        return GATED_SCAN((pre, h0, reset), settings.mode)
    parts = [settings.run(part, _of(pre, part), _entering(part, h0), reset) for part in settings.sequences]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _compose_joined(joined: Joined, settings: _Settings, tensors: _Tensors) -> Tensor:
    """Start every sequence from its own initial state: the input term b of its first step becomes a * h0 + b.

    The gates are therefore computed here and not inside the scan. On one core, forward and backward of a
    layer take 1.5 to 2 times as long as without h0 (with 32 channels, up to 4 times), about as long as with
    padding to the longest sequence, and more memory. It is used for short sequences, where a call for each
    takes longer still, and in compiled graphs, which must not depend on the lengths.
    """
    (x, weight, bias, h0, _), mode = tensors, settings.mode
    assert h0 is not None
    gate, pre = GATES[mode.gate], project(x, weight, bias)
    parts = pre.to(torch.promote_types(pre.dtype, torch.float32)).chunk(gate.num_pre, -1)
    a, b = gate.equations(CANDIDATES[mode.candidate], *parts, signed=mode.signed)
    entry, reset = (joined.last, joined.ends) if mode.reverse else (joined.first, joined.starts)
    entering = a[0].index_select(0, entry) * h0
    b = b.index_add(1, entry, entering.where(joined.filled, 0).unsqueeze(0))
    return GATED_SCAN((a, b, None, reset), Mode("identity", "positive", False, mode.reverse)).to(pre.dtype)


# ----------------------------------------------------------------------------------------------------------
# Fused, in chunks


class _Fused(Composite):
    """The operator behind `projected_scan`: (settings, *tensors) -> h (B, T, D)."""

    def compose(self, settings: _Settings, *tensors: Any) -> Tensor:
        return _compose(settings, _Tensors(*tensors))

    def compute(
        self, settings: _Settings, tensors: Sequence[Any], *, record: bool
    ) -> tuple[Tensor, list[Tensor]]:
        if not record or settings.recompute:
            return _compute_chunks(settings, _Tensors(*tensors))
        h, *kept = _compute_whole(settings, _Tensors(*tensors))
        return h, kept

    def gradients(
        self,
        settings: _Settings,
        needs: Sequence[bool],
        gradient: Tensor,
        tensors: Sequence[Any],
        kept: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """Process the chunks from the last to the first, and use each one's gradients at once."""
        inputs = _Tensors(*tensors)
        pieces = (_recompute_pieces if settings.recompute else _kept_pieces)(settings, inputs, kept)
        sums = _Sums(settings, needs, inputs)
        following: Tensor | None = None  # the gradient of the state after the chunk
        for chunk, pre, h, start in pieces:
            dh = _of(gradient, chunk)
            if following is not None:
                dh = dh.clone()
                settings.last(dh).add_(following)
            reset = None if inputs.reset is None else _of(inputs.reset, chunk)
            dpre, dstart = GATED_SCAN.differentiate((dh,), h, (pre, start, reset), settings.mode)
            sums.add(chunk, dpre, dstart)
            following = dstart if chunk.entry is None else None
        return sums.gradients()


_FUSED = _Fused()


def _compute_whole(settings: _Settings, tensors: _Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, and the tensors saved for backward: pre-activations and h.

    The projection is not divided into chunks: all pre-activations have to be written to memory anyway.
    """
    x, weight, bias, h0, reset = tensors
    x = settings.batch_first(x)
    # Not functional.linear, which would allocate fresh memory.
    pre, by_time = new_output(x, len(weight)), _lies_by_time(x)
    _project_into(_matrix(pre, by_time), _matrix(x, by_time), weight, bias)
    pieces = ((sequence, _of(pre, sequence)) for sequence in settings.sequences)
    h, _ = _compute_pieces(settings, pieces, pre, h0, reset)
    return h, pre, h


def _compute_chunks(settings: _Settings, tensors: _Tensors) -> tuple[Tensor, list[Tensor]]:
    """Return h, and the initial states of the chunks that do not start from h0."""
    x, weight, bias, h0, reset = tensors
    x = settings.batch_first(x)
    return _compute_pieces(settings, _project_chunks(settings.chunks, x, weight, bias), x, h0, reset)


def _project_chunks(
    chunks: Iterable[Chunk], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Chunk, Tensor]]:
    """Yield each chunk with its pre-activations, in a buffer that the next chunk overwrites."""
    by_time = _lies_by_time(x)
    room = x.new_empty(0, len(weight))
    for chunk in chunks:
        part = _of(x, chunk)
        rows = _matrix(part, by_time)
        if len(room) < len(rows):
            room = x.new_empty(len(rows), len(weight))
        pre = room.narrow(0, 0, len(rows))
        _project_into(pre, rows, weight, bias)
        B, T = part.shape[:2]
        yield chunk, pre.view(T, B, -1).transpose(0, 1) if by_time else pre.view(B, T, -1)


def _project_into(pre: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(rows, weight.t(), out=pre)
    else:
        torch.addmm(bias, rows, weight.t(), out=pre)


def _compute_pieces(
    settings: _Settings,
    pieces: Iterable[tuple[Chunk, Tensor]],
    like: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Scan one piece after the other; return all states, in the memory layout of `like`, and `borders`."""
    h: Tensor | None = None
    last: Tensor | None = None
    borders: list[Tensor] = []
    for chunk, pre in pieces:
        start = _entering(chunk, h0) if last is None or chunk.entry is not None else last.clone()
        if chunk.entry is None and start is not None:
            borders.append(start)
        piece = settings.run(chunk, pre, start, reset)
        if chunk is WHOLE:
            return piece, borders
        h = new_output(like, piece.shape[2]) if h is None else h
        _of(h, chunk).copy_(piece)
        last = settings.last(piece)
    assert h is not None, "no piece to scan"
    return h, borders


Piece = tuple[Chunk, Tensor, Tensor, Tensor | None]
"""A chunk, its pre-activations, its states, and its initial state."""


def _kept_pieces(settings: _Settings, tensors: _Tensors, kept: Sequence[Tensor]) -> Iterator[Piece]:
    pre, h = kept
    start: Tensor | None
    for chunk in reversed(settings.chunks):
        if chunk.entry is None:
            start = h[chunk.rows, chunk.steps.stop if settings.mode.reverse else chunk.steps.start - 1]
        else:
            start = _entering(chunk, tensors.h0)
        yield chunk, _of(pre, chunk), _of(h, chunk), start


def _recompute_pieces(settings: _Settings, tensors: _Tensors, borders: Sequence[Tensor]) -> Iterator[Piece]:
    x, weight, bias, h0, reset = tensors
    from_last = reversed(borders)
    for chunk, pre in _project_chunks(reversed(settings.chunks), settings.batch_first(x), weight, bias):
        start = next(from_last) if chunk.entry is None else _entering(chunk, h0)
        yield chunk, pre, settings.run(chunk, pre, start, reset), start


class _Sums:
    """The gradients of x, weight, bias and h0, accumulated over chunks."""

    def __init__(self, settings: _Settings, needs: Sequence[bool], tensors: _Tensors) -> None:
        self.settings, self.weight, self.x = settings, tensors.weight, settings.batch_first(tensors.x)
        self.by_time = _lies_by_time(self.x)
        needs_x, self.needs_weight, self.needs_bias, needs_h0, _ = needs
        self.dx = new_output(self.x, self.x.shape[2]) if needs_x else None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        # Zeros, because a sequence without steps has no chunk.
        self.dh0 = torch.zeros_like(tensors.h0) if tensors.h0 is not None and needs_h0 else None

    def add(self, chunk: Chunk, dpre: Tensor, dstart: Tensor) -> None:
        """Add a chunk's part, given the gradients of its pre-activations and of its initial state."""
        rows = _matrix(dpre, self.by_time)
        if self.dx is not None:
            torch.mm(rows, self.weight, out=_matrix(_of(self.dx, chunk), self.by_time))
        if self.needs_weight:
            columns, inputs = rows.t(), _matrix(_of(self.x, chunk), self.by_time)
            self.dweight = columns @ inputs if self.dweight is None else self.dweight.addmm_(columns, inputs)
        if self.needs_bias:
            dbias = rows.sum(0)
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)
        if self.dh0 is not None and chunk.entry is not None:
            self.dh0[chunk.entry] = dstart

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of (x, weight, bias, h0, reset), None where they are not needed."""
        dx = None if self.dx is None else self.settings.batch_first(self.dx)
        return [dx, self.dweight, self.dbias, self.dh0, None]


# ----------------------------------------------------------------------------------------------------------
# Layout in memory


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the packed pre-activations of x (..., C)."""
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():  # linear would copy it
        return functional.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return functional.linear(x, weight, bias)


def _lies_by_time(x: Tensor) -> bool:
    """Whether x (B, T, ...) is time-major in memory."""
    return x.stride(0) < x.stride(1)


def _of(x: Tensor, chunk: Chunk) -> Tensor:
    """Return a chunk of x (B, T, ...) as a view."""
    return x if chunk is WHOLE else x[chunk.rows, chunk.steps]


def _entering(chunk: Chunk, h0: Tensor | None) -> Tensor | None:
    return h0 if h0 is None or chunk is WHOLE else h0[chunk.entry]


def _matrix(x: Tensor, by_time: bool) -> Tensor:
    """Return x (B, T, C) as a matrix of B * T rows, in memory order.

    It is a view where memory is contiguous in that order, as it is for tensors from `new_output`.
    """
    return (x.transpose(0, 1) if by_time else x).flatten(0, 1)
