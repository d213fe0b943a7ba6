"""Sequences of different lengths, concatenated along one time axis."""

import torch
from torch import Tensor


class Joined:
    """The boundaries of N sequences that are concatenated along one time axis, `(1, total, ...)`.

    Args:
        offsets: `(N + 1,)`, int64: each sequence's first step, and `total` at the end; sequences may be
            empty.
        total: number of steps of all sequences.
    """

    def __init__(self, offsets: Tensor, total: int) -> None:
        self.offsets, self.total = offsets, total
        edges = offsets.new_zeros(1, total + 1, dtype=torch.bool).index_fill(1, offsets, True)
        self.starts, self.ends = edges[:, :-1], edges[:, 1:]  # (1, total)
        self.filled = (offsets[1:] > offsets[:-1]).unsqueeze(1)  # (N, 1)
        # Clamped, because an empty sequence has neither; `filled` masks what it reads.
        self.first = offsets[:-1].clamp(max=total - 1)
        self.last = (offsets[1:] - 1).clamp(min=0)

    def final(self, h: Tensor, h0: Tensor | None, *, reverse: bool) -> Tensor:
        """Return the state after each sequence's last step, `(N, D)`; for an empty sequence, its row of h0.

        Args:
            h: `(1, total, D)`.
            h0: `(N, D)`: the state before each sequence; zeros when None.
            reverse: whether the recurrence runs from the last step to the first.
        """
        if self.total == 0:  # index_select below needs a step
            return h.new_zeros(self.filled.shape[0], h.shape[2]) if h0 is None else h0.to(h.dtype)
        final = h[0].index_select(0, self.first if reverse else self.last)
        unmoved = final.new_zeros(()) if h0 is None else h0.to(h.dtype)
        return torch.where(self.filled, final, unmoved)
