"""The gated scan of a sequence whose time axis is divided over ranks.

A rank's part of the sequence does to the state before it h -> P h + E, with the product P of its decays and
its last state E from zero (prefix.py). So

1. every rank finds its P and E, and all ranks gather them: 2 B D numbers of each;
2. the state that enters every part is a scan over ranks, which each rank computes by itself;
3. every rank scans its part from that state, by the ordinary operator.

Backward is the same in the other direction. With G_r, the gradient of the state that enters part r due to the
part's own outputs, and the gradient of the end state, summed over ranks, the gradient of the state after part
r is g_r = G_{r+1} + P_{r+1} g_{r+1}. It is added to that of the part's last output. So there is one exchange
in each direction, whose size does not depend on the number of steps.

Derivatives of higher orders are those of the composition in `_compose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minrnn.ops.devices import widest_float
from minrnn.ops.exchange import before, gather, size_and_rank
from minrnn.ops.gated import GATED_SCAN, Mode, linear_scan
from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.prefix import prefix, prefix_backward
from minrnn.ops.recurrence import read_arguments
from minrnn.ops.reference import split, state_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["carry_over", "sharded_scan"]


def sharded_scan(
    gate: str,
    *pre: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    candidate: str = "positive",
    signed: bool = False,
    group: ProcessGroup | str,
) -> tuple[Tensor, Tensor]:
    """Compute `gated_scan` of a sequence whose consecutive parts are on the ranks of a group.

        h, end = this rank's part of gated_scan(gate, *all parts of pre, h0=h0, reset=all parts of reset, ...)

    All ranks call it together, with the same batch, channels and options; their parts may be of different
    lengths. Forward exchanges 2 B D numbers of each rank, whatever the lengths, and so does backward, which
    all ranks run together too: what they differentiate is the sum of their losses. Beside the scan, an engine
    reads a part's last steps again, as many as determine its prefix: all of them only where gates forget
    less than 2^-64 of the state over the part.

    An infinity or a NaN in a part's states may not reach later parts.

    Args:
        gate: a name in GATES.
        *pre: this rank's part of the pre-activations, as in `gated_scan`.
        h0: the state before the sequence's first step, (B, D); zeros when None. It is read, and has a
            gradient, on the rank of the first part only; with reverse, of the last.
        reset: this rank's part, (B, T) bool, as in `gated_scan`.
        reverse: run from the last step of the last part to the first of the first.
        candidate: as in `gated_scan`.
        signed: as in `gated_scan`.
        group: the ranks, in the order of their parts; a process group or its name.

    Returns:
        h (B, T, D), in the inputs' dtype, and the state after the whole sequence (B, D), on every rank, in at
        least float32.

    Raises:
        TypeError, ValueError: as `gated_scan`.
    """
    mode = read_arguments("sharded_scan", gate, pre, h0, reset, reverse, candidate, signed)
    name = group if isinstance(group, str) else group.group_name
    h, end, _, _ = _scan(list(pre), h0, reset, *mode, name)
    return h, end


_MODE = "str gate, str candidate, bool signed, bool reverse, str group"


@torch.library.custom_op(
    "minrnn::sharded_scan",
    mutates_args=(),
    schema=f"(Tensor[] pre, Tensor? h0, Tensor? reset, {_MODE}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _scan(
    pre: Sequence[Tensor], h0: Tensor | None, reset: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, end, the state that enters this part, and the decays of all parts (ranks, B, D)."""
    mode, group = Mode(*options[:-1]), options[-1]
    decay, end = prefix(pre, reset, mode)
    decays, entering, last = _carry_over(decay, end, h0, group, reverse=mode.reverse)
    h = GATED_SCAN.compute(GATED_SCAN.pack((*pre, entering, reset), mode, True))
    return h, last, entering, decays.contiguous()


@_scan.register_fake
def _(
    pre: Sequence[Tensor], h0: Tensor | None, reset: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mode, group = Mode(*options[:-1]), options[-1]
    h = GATED_SCAN.fake(*GATED_SCAN.pack((*pre, h0, reset), mode, True))
    B, _, D = h.shape
    wide = state_dtype(h.dtype)
    end, entering = h.new_empty(B, D, dtype=wide), h.new_empty(B, D, dtype=wide)
    return h, end, entering, h.new_empty(size_and_rank(group)[0], B, D, dtype=wide)


@torch.library.custom_op(
    "minrnn::sharded_scan_backward",
    mutates_args=(),
    schema="(Tensor dh, Tensor dend, Tensor[] pre, Tensor h, Tensor entering, Tensor decays, Tensor? reset, "
    f"{_MODE}) -> Tensor[]",
)
def _scan_backward(
    dh: Tensor,
    dend: Tensor,
    pre: Sequence[Tensor],
    h: Tensor,
    entering: Tensor,
    decays: Tensor,
    reset: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    """Return the gradients of each pre-activation, and of the state that enters this part."""
    mode, group = Mode(*options[:-1]), options[-1]
    own = prefix_backward(dh, pre, reset, mode)
    owns, dends = gather(torch.stack([own, dend]), group).unbind(1)
    wide = widest_float(dh.device)
    dend = dends.to(wide).sum(0)
    entered = _over_ranks(decays, owns, dend, reverse=not mode.reverse)  # (B, ranks, D)
    following = before(entered.transpose(0, 1), dend, group, reverse=not mode.reverse)
    dh = dh.clone()
    dh[:, 0 if mode.reverse else -1] += following.to(dh.dtype)
    return GATED_SCAN.differentiate((dh,), h, (*pre, entering, reset), mode)


@_scan_backward.register_fake
def _(
    dh: Tensor,
    dend: Tensor,
    pre: Sequence[Tensor],
    h: Tensor,
    entering: Tensor,
    decays: Tensor,
    reset: Tensor | None,
    *options: Any,
) -> list[Tensor]:
    mode = Mode(*options[:-1])
    return GATED_SCAN.fake_backward(*GATED_SCAN.pack_backward((dh,), h, (*pre, entering, reset), mode))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pre, h0, reset, *options = inputs
    h, _, entering, decays = output
    ctx.mark_non_differentiable(entering, decays)
    ctx.options = options
    ctx.save_for_backward(h, entering, decays, h0, reset, *pre)


def _backward(ctx: Any, dh: Tensor, dend: Tensor, *_: Any) -> tuple[Any, ...]:
    h, entering, decays, h0, reset, *pre = ctx.saved_tensors
    options = ctx.options
    rest = (None,) * (1 + len(options))  # of reset and the options
    if torch.is_grad_enabled():  # create_graph=True
        return *_differentiate((dh, dend), pre, h0, reset, options), *rest
    *dpre, dentering = _scan_backward(dh, dend, pre, h, entering, decays, reset, *options)
    if h0 is None:
        return dpre, None, *rest
    *_, reverse, group = options
    return dpre, (dentering if _is_first(group, reverse) else torch.zeros_like(dentering)).to(h0.dtype), *rest


_scan.register_autograd(_backward, setup_context=_keep)


def _differentiate(
    gradients: Sequence[Tensor],
    pre: Sequence[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    options: Sequence[Any],
) -> tuple[list[Tensor], Tensor | None]:
    """Compute the gradients of pre and h0 as torch differentiates the composition."""
    # Aliases, so that no gradient flows from one argument to another that it was computed from.
    parts = [x.view_as(x) for x in pre]
    start = None if h0 is None else h0.view_as(h0)
    outputs = _compose(parts, start, reset, Mode(*options[:-1]), options[-1])
    wanted = [x for x in (*parts, start) if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True, materialize_grads=True))
    dpre = [next(found) if x.requires_grad else torch.zeros_like(x) for x in parts]
    return dpre, next(found) if start is not None and start.requires_grad else None


def _compose(
    pre: Sequence[Tensor], h0: Tensor | None, reset: Tensor | None, mode: Mode, group: str
) -> tuple[Tensor, Tensor]:
    """Compute h and end in operations that torch differentiates to any order; the prefix by two scans."""
    wide = state_dtype(pre[0].dtype)
    parts = [x.to(wide) for x in split(mode.gate, list(pre))]
    a, b = GATES[mode.gate].equations(CANDIDATES[mode.candidate], *parts, signed=mode.signed)
    one, last = torch.ones_like(a[:, 0]), 0 if mode.reverse else -1
    decay = linear_scan(a, torch.zeros_like(b), one, reset, reverse=mode.reverse)[:, last]
    end = linear_scan(a, b, None, reset, reverse=mode.reverse)[:, last]
    entering, after_all = carry_over(decay, end, h0, group, reverse=mode.reverse)
    return GATED_SCAN((*pre, entering, reset), mode), after_all


def carry_over(
    decay: Tensor, end: Tensor, h0: Tensor | None, group: str, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the state that enters this rank's part, and that after all parts, differentiably.

    Args:
        decay: the product of the part's decays, (B, D); zero where a reset is.
        end: its last state from zero, (B, D).
        h0: the state before all parts, (B, D), read on the rank of the first; zeros when None.
        group: the ranks, in the order of the parts.
        reverse: whether the recurrence runs from the last part to the first.
    """
    _, entering, last = _carry_over(decay, end, h0, group, reverse=reverse)
    return entering, last


def _carry_over(
    decay: Tensor, end: Tensor, h0: Tensor | None, group: str, *, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return all parts' decays (ranks, B, D) and what `carry_over` returns."""
    if h0 is not None and _is_first(group, reverse):
        end = torch.where(decay == 0, end, decay * h0 + end)
    decays, ends = gather(torch.stack([decay, end]), group).unbind(1)
    after = _over_ranks(decays, ends, None, reverse=reverse)
    start = torch.zeros_like(end) if h0 is None else h0
    entering = before(after.transpose(0, 1), start.to(after.dtype), group, reverse=reverse)
    last = after[:, 0 if reverse else -1]
    return decays, entering.to(end.dtype, copy=True), last.to(end.dtype, copy=True)


def _over_ranks(decays: Tensor, ends: Tensor, start: Tensor | None, *, reverse: bool) -> Tensor:
    """Return the states (B, ranks, D) after each part, given what parts do, (ranks, B, D), and the start."""
    wide = widest_float(decays.device)
    a, b = decays.transpose(0, 1).to(wide), ends.transpose(0, 1).to(wide)
    forgets = (a == 0).all(-1)  # a part with a reset also forgets what is not finite
    return linear_scan(a, b, start, forgets, reverse=reverse)


def _is_first(group: str, reverse: bool) -> bool:
    """Whether this rank's part is the first in the order of the recurrence."""
    size, rank = size_and_rank(group)
    return rank == (size - 1 if reverse else 0)
