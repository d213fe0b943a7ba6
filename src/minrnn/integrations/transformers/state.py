"""The state of a model between two calls of transformers, in the place of its cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

from minrnn.models.sequence import ModelState, map_state


class MinRNNState:
    """A model's state, and the number of steps that it has read.

    Its methods are those of transformers' caches. The model changes it in place, as it does a cache;
    `copy.deepcopy` keeps one to continue from it twice.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)
    """transformers slices inputs by `get_seq_length` only where a layer is not called linear."""

    def __init__(self) -> None:
        self.state: ModelState | None = None
        """What SequenceModel takes and returns; None before the first call."""
        self.steps = 0
        """Tokens that each row has read, padding included."""

    def update(self, state: ModelState, steps: int) -> None:
        """Replace the state by that after `steps` more steps."""
        self.state = state
        self.steps += steps

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of steps that were read."""
        return self.steps

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Return -1: a sequence may have any length."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those of these indices, `(B,)`, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, in their order."""
        self._change(lambda part: part.index_select(0, indices.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row so many times."""
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def reset(self) -> None:
        """Return to the empty state."""
        self.state, self.steps = None, 0

    def crop(self, max_length: int) -> NoReturn:
        """Raise ValueError: a recurrence does not go back to an earlier step."""
        raise ValueError(
            f"MinRNNState: the state cannot go back to an earlier step, got crop({max_length}); keep a "
            "copy.deepcopy of it from before"
        )

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = map_state(function, self.state)
