"""How the sequences of one call lie in memory, and where a scan enters and leaves them."""

import torch
from torch import Tensor
from torch.nn import functional

from minrnn.mixers.projected import Recurrence
from minrnn.ops import CANDIDATES, GATES, gated_scan


class Batch:
    """Sequences of one length side by side, `(B, T, ...)`, or `(T, B, ...)` if time_major.

    Args:
        reset: bool, of the input's leading axes: where a row's next sequence starts; None is nowhere.
        time_major: whether time comes before batch.
    """

    def __init__(self, reset: Tensor | None, *, time_major: bool) -> None:
        self.time_major = time_major
        self.reset = reset.transpose(0, 1) if reset is not None and time_major else reset  # (B, T)

    def scan(
        self, recurrence: Recurrence, x: Tensor, h0: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Run one recurrence over every sequence.

        Args:
            recurrence: what to run.
            x: its input, `(B, T, C)`, or `(T, B, C)` if time_major.
            h0: `(B, D)`: the state that each row starts from; zeros when None.
            reverse: run from the last step to the first.

        Returns:
            h in the form of x, and each row's state after its last step, `(B, D)`.
        """
        reset = self.reset
        if reset is not None and reverse:  # it meets a sequence's last step first, so there it must forget
            reset = functional.pad(reset[:, 1:], (0, 1))
        h = recurrence.scan(x, h0, reset, reverse=reverse, time_major=self.time_major)  # (B, T, D)
        final = h.select(1, 0 if reverse else -1)
        return h.transpose(0, 1) if self.time_major else h, final


class Joined:
    """Sequences of any lengths end to end on one time axis, `(1, total, ...)`: no padding, one scan.

    Args:
        offsets: `(N + 1,)`, int64: where each of N sequences starts, and `total` at the end; a sequence may
            be empty.
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

    def scan(
        self, recurrence: Recurrence, x: Tensor, h0: Tensor | None, *, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Run one recurrence over every sequence by itself.

        Args:
            recurrence: what to run.
            x: its input, `(1, total, C)`.
            h0: `(N, D)`: the state that each sequence starts from; zeros when None.
            reverse: run every sequence from its last step to its first.

        Returns:
            h `(1, total, D)`, and the state after each sequence's own last step, `(N, D)`; an empty one's is
            the state that it starts from.
        """
        if self.total == 0:  # nothing to scan, and no step that could be read
            h = recurrence.project(x)[..., : recurrence.channels]
            return h, h.new_zeros(self.filled.shape[0], recurrence.channels) if h0 is None else h0.to(h.dtype)
        if h0 is None:
            h = recurrence.scan(x, None, self.ends if reverse else self.starts, reverse=reverse)
        elif recurrence.takes_sequences(x, h0):
            h = recurrence.scan_sequences(x, h0, self.offsets.tolist(), reverse=reverse)
        else:
            h = recurrence.keep_inputs_of(self._scan_from, x, h0, reverse)
        final = h[0].index_select(0, self.first if reverse else self.last)
        unmoved = final.new_zeros(()) if h0 is None else h0.to(h.dtype)
        return h, torch.where(self.filled, final, unmoved)

    def _scan_from(self, recurrence: Recurrence, x: Tensor, h0: Tensor, reverse: bool) -> Tensor:
        """Start every sequence from a state of its own: its first step's drive b becomes a * h0 + b.

        So the gates are computed here and not inside the scan. On one core that makes a layer's forward and
        backward 1.5 to 2 times as slow as without h0 (with 32 channels, up to 4), about what padding to the
        longest costs, and takes more memory. It is for short sequences, whose single calls would cost more,
        and for compiled graphs, which serve any lengths.
        """
        pre = recurrence.project(x)
        dtype = torch.promote_types(pre.dtype, torch.float32)
        parts = pre.to(dtype).chunk(GATES[recurrence.gate].num_pre, -1)
        a, b = GATES[recurrence.gate].equations(
            CANDIDATES[recurrence.candidate], *parts, signed=recurrence.signed
        )
        entry, reset = (self.last, self.ends) if reverse else (self.first, self.starts)
        entering = a[0].index_select(0, entry) * h0
        b = b.index_add(1, entry, entering.where(self.filled, 0).unsqueeze(0))
        return gated_scan("identity", a, b, reset=reset, reverse=reverse).to(pre.dtype)
