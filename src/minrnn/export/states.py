"""A model's nested state as a few named tensors, each of which holds a part of every block's state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from minrnn.models.block import Block
from minrnn.models.sequence import ModelState

CONVOLUTION = "conv"
"""The name of the convolution's window in a block's state; the mixer's parts have the mixer's own names."""


@dataclass(frozen=True)
class Part:
    """A part of every block's state, `(blocks, B, ...)`."""

    name: str
    shape: tuple[int, ...]
    """The sizes after the batch."""
    dtype: torch.dtype
    initial: float
    """The number that fills it before the first step."""


class Layout:
    """How the states of a model's blocks, all of one form, are stacked and separated.

    Args:
        blocks: the model's blocks.
        like: has the dtype and the device of the blocks' inputs.

    Raises:
        ValueError: the blocks' states have different forms.
    """

    def __init__(self, blocks: nn.ModuleList, like: Tensor) -> None:
        self.num_blocks, forms = len(blocks), []
        for block in cast("Iterable[Block]", blocks):
            windows, carried = block.empty_state(1, like)
            names = [CONVOLUTION] * len(windows) + list(block.mixer.state_names)
            forms.append([_part(name, x) for name, x in zip(names, (*windows, *carried), strict=True)])
        if any(form != forms[0] for form in forms):
            raise ValueError("export: the blocks' states must have one form, got blocks of different mixers")
        self.parts = tuple(forms[0])
        self.num_windows = len(windows)

    def separate(self, stacked: Sequence[Tensor]) -> ModelState:
        """Return the model's state from the tensors of all parts."""
        rows = [[part[index] for part in stacked] for index in range(self.num_blocks)]
        return tuple((tuple(row[: self.num_windows]), tuple(row[self.num_windows :])) for row in rows)

    def stack(self, state: ModelState) -> tuple[Tensor, ...]:
        """Return the tensors of all parts from the model's state."""
        rows = [(*windows, *carried) for windows, carried in state]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))

    def empty(self, batch: int) -> tuple[Tensor, ...]:
        """Return the tensors of all parts before the first step."""
        return tuple(
            torch.full((self.num_blocks, batch, *part.shape), part.initial, dtype=part.dtype)
            for part in self.parts
        )


def check_size(before: Sequence[Tensor], after: Sequence[Tensor], block: nn.Module) -> None:
    """Raise unless a call of a block leaves each tensor of a state as large as it was.

    Raises:
        ValueError: one has grown.
    """
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            name = type(block.mixer).__name__
            raise ValueError(
                f"export: the state must keep its size, and {name}'s grows from {tuple(old.shape[2:])} to "
                f"{tuple(new.shape[2:])} in a call; attention needs a window of 2 or more"
            )


def _part(name: str, value: Tensor) -> Part:
    initial = value.flatten()[0].item() if value.numel() else 0
    assert bool((value == initial).all()), "a state starts from one number"
    return Part(name, tuple(value.shape[1:]), value.dtype, initial)
