"""Exchanges between the ranks that share a sequence, as operators with derivatives of every order.

All ranks of a group call an operator together, and differentiate it together: its gradient is an exchange
too. What is differentiated is the sum of the ranks' losses. A group is given by its name, as graphs hold it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from minrnn.ops.torch_private import process_group

__all__ = ["before", "gather", "size_and_rank"]


def size_and_rank(group: str) -> tuple[int, int]:
    """Return the number of ranks of a group, and this one's."""
    ranks = process_group(group)
    return ranks.size(), ranks.rank()


def gather(x: Tensor, group: str) -> Tensor:
    """Return every rank's x, of one shape on all of them, `(ranks, *shape)`, differentiably."""
    found: Tensor = _gather(x, group)
    return found


def before(parts: Tensor, start: Tensor, group: str, *, reverse: bool = False) -> Tensor:
    """Return what `parts` (ranks, ...), from `gather`, holds of the rank before; `start` on the first rank.

    With reverse, the rank before is the next one. The result depends on `parts` on every rank, so that each
    takes part in the exchange of its gradient.
    """
    size, rank = size_and_rank(group)
    index = rank + 1 if reverse else rank - 1
    if 0 <= index < size:
        return parts[index]
    return torch.where(torch.zeros((), dtype=torch.bool, device=start.device), parts[0], start)


@torch.library.custom_op(
    "minrnn::gather_over_ranks", mutates_args=(), schema="(Tensor x, str group) -> Tensor"
)
def _gather(x: Tensor, group: str) -> Tensor:
    ranks = process_group(group)
    found = x.new_empty(ranks.size(), *x.shape)
    if x.numel():  # gloo takes only the form in which ranks' numbers are joined end to end
        _all_gather(found.view(-1), x.contiguous().view(-1), ranks)
    return found


def _all_gather(found: Tensor, x: Tensor, ranks: Any) -> None:
    # torch 2.13 has renamed it
    name = "all_gather_single" if hasattr(distributed, "all_gather_single") else "all_gather_into_tensor"
    getattr(distributed, name)(found, x, ranks)


@_gather.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(process_group(group).size(), *x.shape)


@torch.library.custom_op("minrnn::sum_over_ranks", mutates_args=(), schema="(Tensor x, str group) -> Tensor")
def _sum(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    if x.numel():
        distributed.all_reduce(total, group=process_group(group))
    return total


@_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    total: Tensor = _sum(gradient, ctx.group)
    return total[size_and_rank(ctx.group)[1]].clone(), None


def _sum_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return _sum(gradient, ctx.group), None


_gather.register_autograd(_gather_backward, setup_context=_keep_group)
_sum.register_autograd(_sum_backward, setup_context=_keep_group)
