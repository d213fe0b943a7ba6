"""Where the state is cleared: before the first token after padding, and where a document starts."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "MinRNNForCausalLM"
"""The model, at the start of messages."""


def has_padding_at_end(mask: Tensor | None) -> bool:
    """Whether a row of an attention mask `(B, L)` ends in padding after a real token."""
    if mask is None or mask.dim() != 2:
        return False
    return bool((mask.any(dim=1) & (mask[:, -1] == 0)).any())


def find_resets(mask: Tensor | None, positions: Tensor | None, shape: torch.Size, read: int) -> Tensor | None:
    """Return before which steps the state is cleared.

    Args:
        mask: `(B, read + T)`: 0 at padding; or None.
        positions: `(B, T)` or `(1, T)`: 0 where a document starts; or None.
        shape: `(B, T)`, that of the tokens.
        read: steps that were read before.

    Returns:
        `(B, T)`, bool; None where no state is cleared.

    Raises:
        ValueError: a shape is another, or there is padding between the tokens of a row.
    """
    batch, steps = shape
    reset = None
    if mask is not None:
        if mask.shape != (batch, read + steps):
            raise ValueError(
                f"{NAME}: attention_mask must be {(batch, read + steps)}, with the {read} steps that were "
                f"read before, got {tuple(mask.shape)}"
            )
        reset = _starts_after_padding(mask != 0)[:, read:]
    if positions is not None:
        if positions.shape not in ((batch, steps), (1, steps)):
            raise ValueError(f"{NAME}: position_ids must be {(batch, steps)}, got {tuple(positions.shape)}")
        first = (positions == 0).expand(batch, steps)
        reset = first.clone() if reset is None else reset | first
    if reset is None:
        return None
    if read == 0:
        reset[:, 0] = False  # the state is empty anyway, and a call without resets is faster
    return reset if bool(reset.any()) else None


def _starts_after_padding(is_real: Tensor) -> Tensor:
    """Return where a real token follows padding, `(B, L)`."""
    starts = torch.zeros_like(is_real)
    starts[:, 1:] = is_real[:, 1:] & ~is_real[:, :-1]
    has_hole = starts & (is_real.cumsum(dim=1) > 1)
    if bool(has_hole.any()):
        raise ValueError(f"{NAME}: attention_mask must be 0 at one end of a row, got padding between tokens")
    return starts
