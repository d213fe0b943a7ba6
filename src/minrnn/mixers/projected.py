"""A projection and a scan as one function, computed in chunks that stay in cache.

One after the other, they write k (B, T, D) pre-activations to memory and read them back, and their gradients
likewise. Here a chunk of them is computed, used and forgotten: forward, where nobody will ask for them again;
backward, always.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minrnn.mixers.chunks import WHOLE, Chunk, cut_batch, cut_sequences, steps_at_once
from minrnn.ops import GATES, gated_scan
from minrnn.ops.gated import new_output
from minrnn.ops.transforms import (
    is_mapped_by_old_vmap,
    is_plain,
    is_traced,
    is_transformed,
    needs_gradients,
)

LARGE_BYTES = 32 << 20
"""Pre-activations from which on they are cut, to save memory. Fewer are computed at once, which is faster: a
chunk costs some calls, and the C library keeps the memory of a few MiB for the next call in any case."""

MIN_ELEMENTS = 1 << 14
"""States of a sequence, on average, from which on calls of its own cost less than gates outside the scan."""

_backward_op = torch.ops.minrnn.gated_scan_backward.default


class Recurrence(NamedTuple):
    """One recurrence of a layer as it is in one call: a gate, and the projection that feeds it.

    h = gated_scan(gate, linear(x, weight, bias))
    """

    gate: str
    """A name in GATES."""
    candidate: str
    """A name in CANDIDATES."""
    signed: bool
    """Whether decays lie in (-1, 1)."""
    weight: Tensor
    """`(num_pre * D, C)`, its rows as `gated_scan` takes the gate's pre-activations."""
    bias: Tensor | None
    """`(num_pre * D,)`."""
    recompute: bool = False
    """Whether backward computes pre-activations and states anew, so that they need not be kept for it."""

    @property
    def channels(self) -> int:
        """D: channels of the state."""
        return self.weight.shape[0] // GATES[self.gate].num_pre

    def project(self, x: Tensor) -> Tensor:
        """Compute the packed pre-activations of x `(..., C)`."""
        return _linear(x, self.weight, self.bias)

    def scan(
        self,
        x: Tensor,
        h0: Tensor | None = None,
        reset: Tensor | None = None,
        *,
        reverse: bool = False,
        time_major: bool = False,
    ) -> Tensor:
        """Project and scan rows of one length.

        Args:
            x: `(B, T, C)`, or `(T, B, C)` if time_major.
            h0: `(B, D)`: the state that each row starts from; zeros when None.
            reset: `(B, T)`, bool: where the state is forgotten before a step; None is nowhere.
            reverse: run from the last step to the first.
            time_major: how the axes of x are ordered.

        Returns:
            h, `(B, T, D)`.

        Raises:
            TypeError: as `gated_scan`.
            ValueError: as `gated_scan`.
        """
        if is_traced():
            return self.compose(x, h0, reset, reverse, time_major)
        if not (self.recompute or self._is_large(x)) or not self._fuses(x, h0):
            return self.compose(x, h0, reset, reverse, time_major)
        plan = _Plan(self.gate, self.candidate, self.signed, reverse, time_major, self.recompute)
        plan = plan._replace(chunks=_cut(plan.batch_first(x), self._steps_at_once(), reverse))
        return _fuse(plan, _Tensors(x, self.weight, self.bias, h0, reset))

    def takes_sequences(self, x: Tensor, h0: Tensor) -> bool:
        """Whether `scan_sequences` can be called, and its calls are outweighed by the work of each."""
        if is_traced():
            return False
        return x.shape[1] * h0.shape[1] >= MIN_ELEMENTS * h0.shape[0] and self._fuses(x, h0)

    def scan_sequences(self, x: Tensor, h0: Tensor, offsets: list[int], *, reverse: bool) -> Tensor:
        """Project and scan sequences that lie end to end, each from a state of its own.

        Args:
            x: `(1, total, C)`, for which `takes_sequences`.
            h0: `(N, D)`.
            offsets: where each of the N sequences starts, and `total` at the end.
            reverse: run each from its last step to its first.

        Returns:
            h, `(1, total, D)`.
        """
        sequences = chunks = cut_sequences(offsets, x.shape[1], reverse=reverse)
        if self.recompute or self._is_large(x):
            chunks = cut_sequences(offsets, self._steps_at_once(), reverse=reverse)
        plan = _Plan(
            self.gate, self.candidate, self.signed, reverse, False, self.recompute, sequences, chunks
        )
        return _fuse(plan, _Tensors(x, self.weight, self.bias, h0, None))

    def compose(
        self, x: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool, time_major: bool
    ) -> Tensor:
        """`scan` as the law has it: operation after operation, differentiable to any order, in any mode."""
        return self.keep_inputs_of(_project_and_scan, x, h0, reset, reverse, time_major)

    def keep_inputs_of(
        self, law: Callable[..., Tensor], x: Tensor, h0: Tensor | None, *arguments: Any
    ) -> Tensor:
        """Call law(recurrence, x, h0, *arguments); if so asked, have torch recompute all of it."""
        asked = self.recompute and needs_gradients(x, self.weight, self.bias, h0)
        if not asked or is_transformed():  # transforms take no hooks on what is saved
            return law(self, x, h0, *arguments)
        again = self._replace(recompute=False)
        return checkpoint(law, again, x, h0, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _fuses(self, x: Tensor, h0: Tensor | None) -> bool:
        """Whether there are numbers, nothing transforms them, and sums over chunks can be exact enough.

        They cannot where they are rounded to 16 bits after each chunk. On a GPU, chunks that its cache keeps
        would not fill it.
        """
        weight = self.weight
        return (
            x.is_cpu
            and x.numel() > 0
            and x.dtype == weight.dtype
            and weight.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled("cpu")
            and is_plain(x, weight, self.bias, h0)
        )

    def _is_large(self, x: Tensor) -> bool:
        return x.shape[0] * x.shape[1] * self.weight.shape[0] * x.element_size() >= LARGE_BYTES

    def _steps_at_once(self) -> int:
        return steps_at_once(self.weight.shape[0] * self.weight.element_size())


class _Plan(NamedTuple):
    """What the passes over one recurrence are told beside tensors."""

    gate: str
    candidate: str
    signed: bool
    reverse: bool
    time_major: bool
    """Whether x is (T, B, C)."""
    recompute: bool
    sequences: tuple[Chunk, ...] = (WHOLE,)
    """What has states of its own to start from."""
    chunks: tuple[Chunk, ...] = (WHOLE,)
    """The same, cut smaller."""

    def batch_first(self, x: Tensor) -> Tensor:
        """x, or pre-activations or gradients in its form, as (B, T, ...)."""
        return x.transpose(0, 1) if self.time_major else x

    def scan(self, chunk: Chunk, pre: Tensor, start: Tensor | None, reset: Tensor | None) -> Tensor:
        """Scan the chunk whose pre-activations are given."""
        reset = None if reset is None else _of(reset, chunk)
        return gated_scan(
            self.gate,
            pre,
            h0=start,
            reset=reset,
            reverse=self.reverse,
            candidate=self.candidate,
            signed=self.signed,
        )

    def last(self, h: Tensor) -> Tensor:
        """The state (B, D) in which the recurrence leaves a chunk."""
        return h.select(1, 0 if self.reverse else -1)


class _Tensors(NamedTuple):
    """What the passes over one recurrence compute with."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    h0: Tensor | None
    reset: Tensor | None


def _project_and_scan(
    recurrence: Recurrence,
    x: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    time_major: bool,
) -> Tensor:
    pre = recurrence.project(x)
    pre = pre.transpose(0, 1) if time_major else pre
    return gated_scan(
        recurrence.gate,
        pre,
        h0=h0,
        reset=reset,
        reverse=reverse,
        candidate=recurrence.candidate,
        signed=recurrence.signed,
    )


def _fuse(plan: _Plan, tensors: _Tensors) -> Tensor:
    if needs_gradients(*tensors):
        return _Projected.apply(plan, *tensors)
    return _scan_chunks(plan, tensors)[0]


class _Projected(torch.autograd.Function):
    """apply(plan, *tensors) -> h (B, T, D)."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *arguments: Any) -> Tensor:
        tensors = _Tensors(*arguments)
        if plan.recompute:
            h, kept = _scan_chunks(plan, tensors)
        else:
            h, *kept = _scan_whole(plan, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*tensors, *kept)
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint hands it out once
        tensors, kept = _Tensors(*saved[:5]), saved[5:]
        needs = ctx.needs_input_grad[1:5]
        # With create_graph=True, and for many gradients at once, there are no buffers to write into.
        if torch.is_grad_enabled() or not is_plain(dh) or is_mapped_by_old_vmap(dh):
            gradients = _differentiate_composition(ctx.plan, needs, dh, tensors)
        else:
            gradients = _differentiate_in_chunks(ctx.plan, needs, dh, tensors, kept)
        return None, *gradients, None


# ----------------------------------------------------------------------------------------------------------
# Forward


def _scan_whole(plan: _Plan, tensors: _Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """h, and what is kept for backward: pre-activations and h.

    Not in chunks: pre-activations that are kept have to be written anyway.
    """
    x, weight, bias, h0, reset = tensors
    x = plan.batch_first(x)
    # Not by linear, which would have fresh memory mapped for as many.
    pre, by_time = new_output(x, len(weight)), _lies_by_time(x)
    _project_into(_matrix(pre, by_time), _matrix(x, by_time), weight, bias)
    pieces = ((sequence, _of(pre, sequence)) for sequence in plan.sequences)
    h, _ = _scan_pieces(plan, pieces, pre, h0, reset)
    return h, pre, h


def _scan_chunks(plan: _Plan, tensors: _Tensors) -> tuple[Tensor, list[Tensor]]:
    """h, and the states from which those chunks go on that do not start from h0."""
    x, weight, bias, h0, reset = tensors
    x = plan.batch_first(x)
    return _scan_pieces(plan, _project_chunks(plan.chunks, x, weight, bias), x, h0, reset)


def _project_chunks(
    chunks: Iterable[Chunk], x: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[Chunk, Tensor]]:
    """Each chunk with its pre-activations, which lie where those of the next will."""
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


def _scan_pieces(
    plan: _Plan,
    pieces: Iterable[tuple[Chunk, Tensor]],
    like: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Scan one piece after the other into states that lie in memory as `like`."""
    h: Tensor | None = None
    last: Tensor | None = None
    borders: list[Tensor] = []
    for chunk, pre in pieces:
        start = _entering(chunk, h0) if last is None or chunk.entry is not None else last.clone()
        if chunk.entry is None and start is not None:
            borders.append(start)
        piece = plan.scan(chunk, pre, start, reset)
        if chunk is WHOLE:
            return piece, borders
        h = new_output(like, piece.shape[2]) if h is None else h
        _of(h, chunk).copy_(piece)
        last = plan.last(piece)
    assert h is not None, "there is no sequence without a step"
    return h, borders


# ----------------------------------------------------------------------------------------------------------
# Backward

Needs = tuple[bool, bool, bool, bool]
"""Whether gradients of x, weight, bias and h0 are asked for."""

Gradients = list[Tensor | None]
"""Those of x, weight, bias and h0; None where they are not asked for."""


def _differentiate_composition(plan: _Plan, needs: Needs, dh: Tensor, tensors: _Tensors) -> Gradients:
    """Differentiate the composition, computed anew, as torch would have."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where one argument is computed from another, no gradient must flow on to that other here.
        aliases = _Tensors._make(x if x is None else x.view_as(x) for x in tensors)
        h = _compose(plan, aliases)
        wanted = [x for x, needed in zip(aliases, needs, strict=False) if needed and x is not None]
        found = iter(torch.autograd.grad(h, wanted, dh, create_graph=create_graph))
    return [next(found) if needed else None for needed in needs]


def _compose(plan: _Plan, tensors: _Tensors) -> Tensor:
    x, weight, bias, h0, reset = tensors
    recurrence = Recurrence(plan.gate, plan.candidate, plan.signed, weight, bias)
    if plan.sequences == (WHOLE,):
        return recurrence.compose(x, h0, reset, plan.reverse, plan.time_major)
    pre = recurrence.project(x)
    parts = [plan.scan(part, _of(pre, part), _entering(part, h0), None) for part in plan.sequences]
    return torch.cat(parts, 1)


def _differentiate_in_chunks(
    plan: _Plan, needs: Needs, dh: Tensor, tensors: _Tensors, kept: Sequence[Tensor]
) -> Gradients:
    """Go through the chunks from the last to the first; pre-activations' gradients are used as they come."""
    pieces = (_recompute_pieces if plan.recompute else _kept_pieces)(plan, tensors, kept)
    sums = _Sums(plan, needs, tensors)
    following: Tensor | None = None  # the gradient of the state in which the recurrence leaves the chunk
    for chunk, pre, h, start in pieces:
        dh_piece = _of(dh, chunk)
        if following is not None:
            dh_piece = dh_piece.clone()
            plan.last(dh_piece).add_(following)
        forget = None if tensors.reset is None else _of(tensors.reset, chunk)
        mode = (plan.gate, plan.candidate, plan.signed, plan.reverse)
        dpre, dstart = _backward_op(dh_piece, [pre], h, start, forget, *mode)
        sums.add(chunk, dpre, dstart)
        following = dstart if chunk.entry is None else None
    return sums.gradients()


Piece = tuple[Chunk, Tensor, Tensor, Tensor | None]
"""A chunk, its pre-activations, its states, and the state that it starts from."""


def _kept_pieces(plan: _Plan, tensors: _Tensors, kept: Sequence[Tensor]) -> Iterator[Piece]:
    pre, h = kept
    start: Tensor | None
    for chunk in reversed(plan.chunks):
        if chunk.entry is None:
            start = h[chunk.rows, chunk.steps.stop if plan.reverse else chunk.steps.start - 1]
        else:
            start = _entering(chunk, tensors.h0)
        yield chunk, _of(pre, chunk), _of(h, chunk), start


def _recompute_pieces(plan: _Plan, tensors: _Tensors, borders: Sequence[Tensor]) -> Iterator[Piece]:
    x, weight, bias, h0, reset = tensors
    from_last = reversed(borders)
    for chunk, pre in _project_chunks(reversed(plan.chunks), plan.batch_first(x), weight, bias):
        start = next(from_last) if chunk.entry is None else _entering(chunk, h0)
        yield chunk, pre, plan.scan(chunk, pre, start, reset), start


class _Sums:
    """The gradients of x, weight, bias and h0, as far as chunks have contributed to them."""

    def __init__(self, plan: _Plan, needs: Needs, tensors: _Tensors) -> None:
        self.plan, self.weight, self.x = plan, tensors.weight, plan.batch_first(tensors.x)
        self.by_time = _lies_by_time(self.x)
        needs_x, self.needs_weight, self.needs_bias, needs_h0 = needs
        self.dx = new_output(self.x, self.x.shape[2]) if needs_x else None
        self.dweight: Tensor | None = None
        self.dbias: Tensor | None = None
        # Zeros: a sequence without steps has no chunk.
        self.dh0 = torch.zeros_like(tensors.h0) if tensors.h0 is not None and needs_h0 else None

    def add(self, chunk: Chunk, dpre: Tensor, dstart: Tensor) -> None:
        """Add what a chunk contributes, given the gradients of its pre-activations and of its first state."""
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

    def gradients(self) -> Gradients:
        """In the forms of what they are the gradients of."""
        dx = None if self.dx is None else self.plan.batch_first(self.dx)
        return [dx, self.dweight, self.dbias, self.dh0]


# ----------------------------------------------------------------------------------------------------------
# Where things lie


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():  # linear would copy it
        return functional.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return functional.linear(x, weight, bias)


def _cut(x: Tensor, size: int, reverse: bool) -> tuple[Chunk, ...]:
    B, T = x.shape[:2]
    return cut_batch(B, T, size, by_time=_lies_by_time(x), reverse=reverse)


def _lies_by_time(x: Tensor) -> bool:
    """Whether the rows of a step lie together in memory, and not the steps of a row."""
    return x.stride(0) < x.stride(1)


def _of(x: Tensor, chunk: Chunk) -> Tensor:
    """A chunk of x (B, T, ...), a view."""
    return x if chunk is WHOLE else x[chunk.rows, chunk.steps]


def _entering(chunk: Chunk, h0: Tensor | None) -> Tensor | None:
    return h0 if h0 is None or chunk is WHOLE else h0[chunk.entry]


def _matrix(x: Tensor, by_time: bool) -> Tensor:
    """(B, T, C) as B * T rows in the order in which they lie in memory: a view.

    Where they lie in no order it is a copy, which memory from `new_output` never needs.
    """
    return (x.transpose(0, 1) if by_time else x).flatten(0, 1)
