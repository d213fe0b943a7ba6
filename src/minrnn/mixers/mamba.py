"""Mamba: a selective state space, whose step size, input and output projections depend on the input."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.arguments import read_size
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.mixer import Mixer, PartForm, State
from minrnn.ops import selective_scan

DT_MIN, DT_MAX = 1e-3, 1e-1
"""The range of the initial step sizes, which are log-uniform."""


class MambaMixer(Mixer):
    """The inside of a Mamba block: convolution, selective state space and gate.

        v, z = W_in x                                       (d_model -> 2 d_hidden)
        u[t] = silu(b + sum_j w_j v[t - j])                 (j = 0 .. d_conv - 1, in each channel)
        dt, B, C = W_x u                                    (d_hidden -> dt_rank + 2 d_state)
        delta = softplus(W_dt dt + b_dt)                    (dt_rank -> d_hidden)
        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]  (d_state numbers in each channel)
        y[t] = (<C[t], h[t]> + D u[t]) silu(z[t])

    d_hidden is the block's inner width, in the source twice d_model (expansion 2); the projection back to
    d_model is the block's. A = -exp(A_log) starts at -1 .. -d_state in every channel (S4D-Real), D at 1, and
    b_dt such that delta starts between DT_MIN and DT_MAX. b_dt is added in float32 at least, also under
    autocast.

    The state is the convolution's last inputs, `(B, d_conv - 1, d_hidden)`, and h, `(B, d_hidden, d_state)`,
    float32 at least.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state space.
        d_state: N of the paper: the size of each channel's state.
        d_conv: steps that the convolution sees, the current one included.
        dt_rank: channels that step sizes are projected from; None is d_model / 16, rounded up.

    Raises:
        ValueError: d_state, d_conv or dt_rank is not positive.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
    section 3; initial values and the order of parts as in the code published with it.
    """

    state_names = ("window", "h")

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__(d_model, d_hidden)
        d_model, d_hidden = self.d_model, self.d_hidden  # Python's: numpy's may overflow
        self.d_state = d_state = read_size("MambaMixer", "d_state", d_state)
        self.d_conv = d_conv = read_size("MambaMixer", "d_conv", d_conv)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        self.dt_rank = read_size("MambaMixer", "dt_rank", dt_rank)
        self.in_proj = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.conv = CausalConv(d_hidden, d_conv)
        self.x_proj = nn.Linear(d_hidden, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_hidden, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(d_hidden))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_hidden, 1))
        self.D = nn.Parameter(torch.ones(d_hidden))
        self._initialize()

    def _initialize(self) -> None:
        for parameter in self.conv.parameters():  # as torch.nn.Conv1d with a group for each channel
            nn.init.uniform_(parameter, -(self.conv.width**-0.5), self.conv.width**-0.5)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        delta = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        with torch.no_grad():
            self.dt_bias.copy_(delta.expm1().log())  # softplus of it is delta

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        # In weights of earlier versions, and of Mamba's own code, the bias belongs to the projection.
        earlier = prefix + "dt_proj.bias"
        if earlier in state_dict and prefix + "dt_bias" not in state_dict:
            state_dict[prefix + "dt_bias"] = state_dict.pop(earlier)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        h: PartForm = ((self.d_hidden, self.d_state), torch.promote_types(dtype, torch.float32))
        return ((self.d_conv - 1, self.d_hidden), dtype), h

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        window, h0 = (None, None) if state is None else state
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, d_hidden) each
        u, window = self.conv(u, window, reset=reset)
        u = functional.silu(u).to(z.dtype)  # under autocast the convolution is float32
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        A = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        inputs = (u, self.dt_proj(dt), A, B, C, self.D)
        y, h = self._scan(inputs, z=z, delta_bias=self.dt_bias, h0=h0, reset=reset)
        return y, (window, h)

    def _scan(
        self, inputs: Sequence[Tensor], *, h0: Tensor | None, reset: Tensor | None, **options: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Call `selective_scan`."""
        return selective_scan(*inputs, h0=h0, reset=reset, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, d_state={self.d_state}"
