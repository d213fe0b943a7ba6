"""The base classes of cells, with the interface of `torch.nn.GRUCell` around one step of a gated scan."""

from dataclasses import KW_ONLY, InitVar, dataclass

import torch
from torch import Tensor

from minrnn.mixers.gated import GatedModule
from minrnn.ops.recurrence import check_tensor


@dataclass(eq=False, repr=False)
class MinRNNCellBase(GatedModule):
    """One step of a gated scan, without a `forward`, which depends on the form of the state."""

    input_size: int
    hidden_size: int
    bias: bool = True
    _: KW_ONLY
    candidate: str = "positive"
    forget_bias: float | None = None
    signed: bool = False
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None

    def __post_init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__(device, dtype)

    def _columns(self) -> dict[str, int]:
        return {"": self.input_size}

    def _advance(self, input: Tensor, hx: Tensor | None) -> Tensor:
        """Compute `MinRNNCell.forward`."""
        check_tensor(type(self).__name__, "input", input)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"{type(self).__name__}: input must be (B, {self.input_size}) or ({self.input_size},), "
                f"got {tuple(input.shape)}"
            )
        self._check_hx(hx, (*input.shape[:-1], self.hidden_size), input.dtype)
        if input.dim() == 1:
            return self._step(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0)).squeeze(0)
        return self._step(input, hx)

    def _step(self, x: Tensor, h0: Tensor | None) -> Tensor:
        x = x.unsqueeze(1)  # (B, 1, input_size)
        return self._project_and_scan(x, "", h0=h0).squeeze(1)


for _argument in ("device", "dtype"):  # arguments, not attributes, which their defaults would become
    delattr(MinRNNCellBase, _argument)


class MinRNNCell(MinRNNCellBase):
    """One step of a gated scan whose state is one tensor; a subclass names the gate."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Advance the state by one step.

        Args:
            input: `(B, input_size)`, or `(input_size,)` unbatched.
            hx: h before the step, `(B, hidden_size)`, without B when unbatched; None is zeros.

        Returns:
            h after the step, as `hx`.

        Raises:
            TypeError: input or hx is not a tensor.
            ValueError: a shape or the dtype does not fit.
        """
        return self._advance(input, hx)
