"""Sequences of any lengths that lie end to end on one time axis."""

import torch
from torch import Tensor


class Joined:
    """Where each of N sequences starts and ends on a time axis that they share, `(1, total, ...)`.

    Args:
        offsets: `(N + 1,)`, int64: where each sequence starts, and `total` at the end; a sequence may be
            empty.
        total: steps of all sequences.
    """

    def __init__(self, offsets: Tensor, total: int) -> None:
        self.offsets, self.total = offsets, total
        edges = offsets.new_zeros(1, total + 1, dtype=torch.bool).index_fill(1, offsets, True)
        self.starts, self.ends = edges[:, :-1], edges[:, 1:]  # (1, total)
        self.filled = (offsets[1:] > offsets[:-1]).unsqueeze(1)  # (N, 1)
        # An empty sequence has neither; clamped, it reads a step that `filled` then hides.
        self.first = offsets[:-1].clamp(max=total - 1)
        self.last = (offsets[1:] - 1).clamp(min=0)

    def final(self, h: Tensor, h0: Tensor | None, *, reverse: bool) -> Tensor:
        """Return the state after each sequence's own last step, `(N, D)`; an empty one's is its state in h0.

        Args:
            h: `(1, total, D)`.
            h0: `(N, D)`: the state before each sequence; zeros when None.
            reverse: whether the sequences were run from the last step to the first.
        """
        if self.total == 0:  # no step that could be read
            return h.new_zeros(self.filled.shape[0], h.shape[2]) if h0 is None else h0.to(h.dtype)
        final = h[0].index_select(0, self.first if reverse else self.last)
        unmoved = final.new_zeros(()) if h0 is None else h0.to(h.dtype)
        return torch.where(self.filled, final, unmoved)
