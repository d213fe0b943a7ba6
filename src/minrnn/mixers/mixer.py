"""The interface of every mixer: `y, state = mixer(x, state, reset=reset)`."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_size
from minrnn.ops.devices import widest_float
from minrnn.ops.recurrence import check_tensor
from minrnn.ops.transforms import in_autocast

State = tuple[Tensor, ...]
"""A mixer's state: tensors whose first axis is the batch."""

PartForm = tuple[tuple[int | None, ...], torch.dtype]
"""The form of one tensor of a state: its sizes after the batch, None where any size is allowed, and the dtype
that it is computed in, where the device has it. A tensor of a wider dtype is refused: it would be rounded."""


class Mixer(nn.Module):
    """A causal sequence-to-sequence map with an explicit state.

        y, state = mixer(x, state)          x: (B, T, d_model) -> y: (B, T, d_hidden)

    The outputs do not depend on how the time axis is split into calls: stepping (T = 1), streaming and
    training on whole sequences compute one function. A subclass sets `state_names` and defines `state_form`
    and `mix`.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output.

    Raises:
        TypeError: a width is not an integer.
        ValueError: a width is not positive.
    """

    state_names: ClassVar[tuple[str, ...]]
    """A name for each tensor of the state."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.d_model = read_size(type(self).__name__, "d_model", d_model)
        self.d_hidden = read_size(type(self).__name__, "d_hidden", d_hidden)

    def forward(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Compute the outputs and the next state.

        Args:
            x: `(B, T, d_model)`, floating.
            state: what an earlier call returned, a tuple of tensors whose first axis is B; None is the
                empty state. Narrower dtypes than the mixer computes in are accepted; under autocast, so is
                float32.
            reset: `(B, T)`, bool; where True, everything before step t is forgotten, the state passed in
                included.

        Returns:
            y `(B, T, d_hidden)` and the state after the last step.

        Raises:
            ValueError: a shape is not as above or not of this mixer's state, or T is 0.
            TypeError: x is not a tensor, `state` is not a tuple of tensors or has a wider dtype than the
                mixer computes in, or `reset` is not bool.
        """
        self._check_input(x, reset)
        if state is not None:
            state = self._read_state(state, x)
        return self.mix(x, state, reset)

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        """Return the form of the state's tensors for inputs of a dtype; by default, of h `(B, d_hidden)`."""
        return (((self.d_hidden,), torch.promote_types(dtype, torch.float32)),)

    def empty_state(self, batch: int, like: Tensor) -> State:
        """Make the state before a sequence's first step: a call with it is a call with None.

        Args:
            batch: rows of the state.
            like: has the dtype of the mixer's inputs and the state's device.

        Returns:
            Tensors of the shapes in `state_form`. Where a size is not fixed there it is the largest that a
            call returns, or 0 where nothing bounds it.
        """
        form = self.state_form(like.dtype)
        return tuple(
            like.new_zeros(batch, *(size or 0 for size in shape), dtype=widest_float(like.device, dtype))
            for shape, dtype in form
        )

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """Compute `forward` on checked arguments."""
        raise NotImplementedError(f"{type(self).__name__} must define mix")

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

    def _read_state(self, state: State, x: Tensor) -> State:
        name, names = type(self).__name__, ", ".join(self.state_names)
        if not isinstance(state, tuple) or not all(isinstance(part, Tensor) for part in state):
            raise TypeError(
                f"{name}: state must be the tuple of tensors ({names}) or None, got {type(state)}"
            )
        if len(state) != len(self.state_names):
            raise ValueError(f"{name}: state must be ({names}), got {len(state)} tensors")
        batch, form = x.shape[0], self.state_form(x.dtype)
        return tuple(
            read_part(f"{name}: state tensor {part_name}", part, batch, part_form)
            for part_name, part, part_form in zip(self.state_names, state, form, strict=True)
        )


def read_part(what: str, part: Tensor, batch: int, form: PartForm) -> Tensor:
    """Return a tensor of a state in the dtype that it is computed in; `what` starts the messages.

    Raises:
        ValueError: its first axis is not the batch, or its other sizes are not those of its form.
        TypeError: its dtype is wider; under autocast, which rounds its inputs anyway, float32 is accepted.
    """
    shape, dtype = form[0], widest_float(part.device, form[1])
    if part.dim() == 0 or part.shape[0] != batch:
        raise ValueError(
            f"{what} must have the batch, {batch}, as its first axis, got shape {tuple(part.shape)}"
        )
    if not _fits(part.shape[1:], shape):
        text = ", ".join(("B", *("S" if size is None else str(size) for size in shape)))
        raise ValueError(f"{what} must be ({text}), got {tuple(part.shape)}")
    if part.dtype == dtype:
        return part
    if dtype.is_floating_point and in_autocast(part):
        dtype = torch.promote_types(dtype, torch.float32)
    if (
        part.dtype.is_floating_point != dtype.is_floating_point
        or torch.promote_types(part.dtype, dtype) != dtype
    ):
        raise TypeError(f"{what} must be {dtype} or narrower to go with the input, got {part.dtype}")
    return part.to(dtype)


def _fits(sizes: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(sizes) == len(shape) and all(
        size is None or size == found for size, found in zip(shape, sizes, strict=True)
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
        carried: `(B,)`, int64: where the sequence that the call continues started.
        offset: index of the call's first step, on the axis that `carried` counts along.

    Returns:
        `(B, T)`, int64: index of the sequence's first step, on the same axis.
    """
    index = torch.arange(offset, offset + reset.shape[1], device=reset.device)
    return torch.where(reset, index, carried.unsqueeze(1)).cummax(dim=1).values
