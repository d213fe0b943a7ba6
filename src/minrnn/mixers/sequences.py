"""How the sequences of one call lie in memory, and where a scan enters and leaves them."""

import torch
from torch import Tensor
from torch.nn import functional

from minrnn.ops import CANDIDATES, GATES, gated_scan


class Batch:
    """Sequences of one length side by side, `(B, T, ...)`.

    Args:
        reset: `(B, T)`, bool: where a row's next sequence starts; None is nowhere.
    """

    def __init__(self, reset: Tensor | None = None) -> None:
        self.reset = reset

    def scan(
        self, gate: str, candidate: str, pre: Tensor, h0: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Run one recurrence over every sequence.

        Args:
            gate: a name in GATES.
            candidate: a name in CANDIDATES.
            pre: packed pre-activations, `(B, T, num_pre * D)`.
            h0: `(B, D)`: the state that each row starts from; zeros when None.
            reverse: run from the last step to the first.

        Returns:
            h `(B, T, D)`, and each row's state after its last step, `(B, D)`.
        """
        reset = self.reset
        if reset is not None and reverse:  # it meets a sequence's last step first, so there it must forget
            reset = functional.pad(reset[:, 1:], (0, 1))
        h = gated_scan(gate, pre, h0=h0, reset=reset, reverse=reverse, candidate=candidate)
        return h, h[:, 0 if reverse else -1]


class Joined:
    """Sequences of any lengths end to end on one time axis, `(1, total, ...)`: no padding, one scan.

    Args:
        offsets: `(N + 1,)`, int64: where each of N sequences starts, and `total` at the end; a sequence may
            be empty.
        total: steps of all sequences, at least 1.
    """

    def __init__(self, offsets: Tensor, total: int) -> None:
        edges = offsets.new_zeros(1, total + 1, dtype=torch.bool).index_fill(1, offsets, True)
        self.starts, self.ends = edges[:, :-1], edges[:, 1:]  # (1, total)
        self.filled = (offsets[1:] > offsets[:-1]).unsqueeze(1)  # (N, 1)
        # An empty sequence has neither; clamped, it reads a step that `filled` then hides.
        self.first = offsets[:-1].clamp(max=total - 1)
        self.last = (offsets[1:] - 1).clamp(min=0)

    def scan(
        self, gate: str, candidate: str, pre: Tensor, h0: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Run one recurrence over every sequence by itself.

        Args:
            gate: a name in GATES.
            candidate: a name in CANDIDATES.
            pre: packed pre-activations, `(1, total, num_pre * D)`.
            h0: `(N, D)`: the state that each sequence starts from; zeros when None.
            reverse: run every sequence from its last step to its first.

        Returns:
            h `(1, total, D)`, and the state after each sequence's own last step, `(N, D)`; an empty one's is
            the state that it starts from.
        """
        if h0 is None:
            reset = self.ends if reverse else self.starts
            h = gated_scan(gate, pre, reset=reset, reverse=reverse, candidate=candidate)
        else:
            h = self._scan_from(h0, gate, candidate, pre, reverse)
        final = h[0].index_select(0, self.first if reverse else self.last)
        unmoved = final.new_zeros(()) if h0 is None else h0.to(h.dtype)
        return h, torch.where(self.filled, final, unmoved)

    def _scan_from(self, h0: Tensor, gate: str, candidate: str, pre: Tensor, reverse: bool) -> Tensor:
        """Start every sequence from a state of its own: its first step's drive b becomes a * h0 + b.

        So the gates are computed here and not inside the scan. On one core that makes a layer's forward and
        backward 1.5 to 2 times as slow as without h0 (with 32 channels, up to 4), about what padding to the
        longest costs, and takes more memory. One scan for each distinct length keeps the gates inside, but
        was no faster on the whole (0.8 to 1.8 times this) and makes hundreds of calls where lengths vary.
        """
        dtype = torch.promote_types(pre.dtype, torch.float32)
        if h0.dtype not in (pre.dtype, dtype):
            raise TypeError(f"hx must be {pre.dtype} or {dtype} to go with the input, got {h0.dtype}")
        parts = pre.to(dtype).chunk(GATES[gate].num_pre, -1)
        a, b = GATES[gate].equations(CANDIDATES[candidate], *parts)
        entry, reset = (self.last, self.ends) if reverse else (self.first, self.starts)
        entering = a[0].index_select(0, entry) * h0
        b = b.index_add(1, entry, entering.where(self.filled, 0).unsqueeze(0))
        return gated_scan("identity", a, b, reset=reset, reverse=reverse).to(pre.dtype)
