"""The contract that every mixer meets: `y, state = mixer(x, state, reset=reset)`."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_size
from minrnn.ops.scan import check_tensor

State = tuple[Tensor, ...]


class Mixer(nn.Module):
    """A causal map over time that can be stopped and resumed anywhere.

        y, state = mixer(x, state)          x: (B, T, d_model) -> y: (B, T, d_hidden)

    However the time axis is cut into calls, the outputs are the same as those of one call, so stepping (T =
    1), streaming in chunks and training on whole sequences are one function. A subclass names its state, says
    its shapes and defines `mix`.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output.

    Raises:
        TypeError: a width is no integer.
        ValueError: a width is not positive.
    """

    state_names: ClassVar[tuple[str, ...]]
    """What each tensor of the state holds."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.d_model = read_size(type(self).__name__, "d_model", d_model)
        self.d_hidden = read_size(type(self).__name__, "d_hidden", d_hidden)

    def forward(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance the state over x.

        Args:
            x: `(B, T, d_model)`, floating.
            state: what an earlier call returned: a tuple of tensors whose first axis is B; None is the
                empty state.
            reset: `(B, T)`, bool; where True, everything before step t is forgotten, the state passed in
                included.

        Returns:
            y `(B, T, d_hidden)` and the state after the last step.

        Raises:
            ValueError: a shape is not as above, or T is 0.
            TypeError: x is not a tensor, `state` is not a tuple of tensors, or `reset` is not bool.
        """
        self._check_input(x, reset)
        if state is not None:
            self._check_state(state, x.shape[0])
        return self.mix(x, state, reset)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """Do the work of `forward`, on checked arguments."""
        raise NotImplementedError(f"{type(self).__name__} must define mix")

    def state_shapes(self, state: State) -> tuple[tuple[int, ...], ...]:
        """Say what shape each tensor of a state of so many tensors must have, past the batch.

        A subclass that does not say takes any.
        """
        return tuple(tuple(part.shape[1:]) for part in state)

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.d_hidden}"

    def _check_input(self, x: Tensor, reset: Tensor | None) -> None:
        name = type(self).__name__
        check_tensor(name, "x", x)
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.d_model:
            raise ValueError(
                f"{name}: x must be (B, T, {self.d_model}) with T of at least 1, got {tuple(x.shape)}"
            )
        check_reset(name, reset, tuple(x.shape[:2]))

    def _check_state(self, state: State, batch: int) -> None:
        name, names = type(self).__name__, ", ".join(self.state_names)
        if not isinstance(state, tuple) or not all(isinstance(part, Tensor) for part in state):
            raise TypeError(
                f"{name}: state must be the tuple of tensors ({names}) or None, got {type(state)}"
            )
        if len(state) != len(self.state_names):
            raise ValueError(f"{name}: state must be ({names}), got {len(state)} tensors")
        shapes = self.state_shapes(state)
        for part_name, part, shape in zip(self.state_names, state, shapes, strict=True):
            if part.shape == (batch, *shape):
                continue
            if part.dim() == 0 or part.shape[0] != batch:
                raise ValueError(
                    f"{name}: the first axis of state tensor {part_name} must be the batch, {batch}, "
                    f"got shape {tuple(part.shape)}"
                )
            raise ValueError(
                f"{name}: state tensor {part_name} must be {(batch, *shape)}, got {tuple(part.shape)}"
            )


def check_reset(name: str, reset: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless `reset` is None or a bool tensor of `shape`; `name` starts the message."""
    if reset is None:
        return
    check_tensor(name, "reset", reset)
    if reset.dtype != torch.bool:
        raise TypeError(f"{name}: reset must be bool, got {reset.dtype}; compare or cast it first")
    if reset.shape != shape:
        raise ValueError(
            f"{name}: reset must be {shape}, as the input's leading axes, got {tuple(reset.shape)}"
        )


def sequence_start(reset: Tensor, carried: Tensor, offset: int) -> Tensor:
    """Find the first step of the sequence that each step belongs to.

    Args:
        reset: `(B, T)`, bool: where a sequence starts.
        carried: `(B,)`, int64: where the sequence that a call goes on with started.
        offset: index of the call's first step, on the axis that `carried` counts along.

    Returns:
        `(B, T)`, int64: index of the sequence's first step, on the same axis.
    """
    index = torch.arange(offset, offset + reset.shape[1], device=reset.device)
    return torch.where(reset, index, carried.unsqueeze(1)).cummax(dim=1).values
