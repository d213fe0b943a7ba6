"""Sequences of different lengths: torch's three forms of them, joined end to end and repacked."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minrnn.ops.transforms import is_traced


class Ragged(NamedTuple):
    """Sequences of different lengths, one after the other."""

    rows: Tensor
    """`(total, C)`: every sequence's steps."""
    offsets: Tensor
    """`(N + 1,)`, int64: where each sequence starts, and the total at the end."""
    repack: Callable[[Tensor], Any]
    """Converts rows `(total, any)` to the form of the input."""


def read_packed(packed: PackedSequence) -> Ragged:
    """Join the sequences of a PackedSequence, in their order before sorting.

    A PackedSequence holds all sequences' first steps, then all second steps, and so on; sequences that have
    ended drop out at the end of a step.
    """
    data, device = packed.data, packed.data.device
    total = data.shape[0]
    N = int(packed.batch_sizes[0]) if total else 0
    held = packed.batch_sizes.to(device)  # (T,): sequences in each step, falling
    # A sequence's place within the steps: `unsorted_indices`, or its own number if they came sorted.
    place = torch.arange(N, device=device) if packed.unsorted_indices is None else packed.unsorted_indices
    lengths = torch.searchsorted(-held, -place)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    first = held.cumsum(0) - held  # (T,): where each step starts
    step = torch.arange(total, device=device) - _spread(offsets[:-1], lengths, total)
    order = first[step] + _spread(place, lengths, total)  # (total,): where each joined row lies
    back = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=device))

    def repack(rows: Tensor) -> PackedSequence:
        return PackedSequence(
            rows.index_select(0, back), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )

    return Ragged(data.index_select(0, order), offsets, repack)


def read_jagged(name: str, nested: Any, channels: int) -> Ragged:  # Tensor declares no offsets()
    """Read the rows of a jagged nested tensor `(N, *, channels)`; `name` starts the messages.

    Raises:
        TypeError: its layout is not torch.jagged.
        ValueError: its shape is another, or its ragged axis is not the second.
    """
    if nested.layout != torch.jagged:
        raise TypeError(f"{name}: a nested input must have layout torch.jagged, got {nested.layout}")
    if nested.dim() != 3 or nested.shape[2] != channels:  # a ragged axis equals no number
        raise ValueError(f"{name}: a nested input must be (N, *, {channels}), got {tuple(nested.shape)}")
    if nested.lengths() is not None:  # there are holes between the sequences, as after torch.nested.narrow
        nested = nested.contiguous()
    offsets = nested.offsets()

    def repack(rows: Tensor) -> Tensor:
        # With the same offsets: to torch, the output then has the input's shape and may be added to it.
        return torch.nested.nested_tensor_from_jagged(rows, offsets=offsets)

    return Ragged(nested.values(), offsets.to(torch.int64), repack)


def read_documents(name: str, input: Tensor, cu_seqlens: Tensor, batch_axis: int) -> Ragged:
    """Read the sequences that `cu_seqlens` marks in a tensor `(total, C)`, which may have a batch axis of 1.

    The offsets are checked on the CPU only; on an accelerator, reading them would synchronize.

    Raises:
        TypeError: cu_seqlens is not an int32 or int64 tensor.
        ValueError: the batch is not 1, or the offsets do not rise from 0 to total.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name}: cu_seqlens must be an int32 or int64 tensor, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name}: cu_seqlens must be (N + 1,), got {tuple(cu_seqlens.shape)}")
    batched = input.dim() == 3
    if batched and input.shape[batch_axis] != 1:
        raise ValueError(
            f"{name}: with cu_seqlens, input must be (total, C) or a batch of 1, got {tuple(input.shape)}"
        )
    rows = input.squeeze(batch_axis) if batched else input
    if cu_seqlens.device.type == "cpu" and not is_traced():
        total = rows.shape[0]
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != total or (cu_seqlens.diff() < 0).any():
            raise ValueError(
                f"{name}: cu_seqlens must rise from 0 to the input's {total} steps, got {cu_seqlens.tolist()}"
            )

    def repack(rows: Tensor) -> Tensor:
        return rows.unsqueeze(batch_axis) if batched else rows

    return Ragged(rows, cu_seqlens.to(rows.device, torch.int64), repack)


def _spread(values: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Repeat each sequence's value for each of its steps; with the total given, a GPU is not synchronized."""
    return values.repeat_interleave(lengths, output_size=total)
