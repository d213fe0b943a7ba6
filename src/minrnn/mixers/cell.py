"""One step of a gated recurrence as a module with the surface of `torch.nn.GRUCell`."""

import torch
from torch import Tensor

from minrnn.mixers.gated import GatedModule
from minrnn.ops.recurrence import check_tensor


class MinRNNCell(GatedModule):
    """A cell: a layer's scan over a single step; MinGRUCell and MinLSTMCell name the gate."""

    def __init__(
        self,
        gate: str,
        *,
        input_size: int,
        hidden_size: int,
        bias: bool,
        candidate: str,
        forget_bias: float | None,
        signed: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            gate,
            input_size=input_size,
            hidden_size=hidden_size,
            bias=bias,
            candidate=candidate,
            forget_bias=forget_bias,
            signed=signed,
        )
        self._add_projection("", input_size, device, dtype)
        self.reset_parameters()

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
