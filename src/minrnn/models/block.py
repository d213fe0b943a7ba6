"""One layer of a model: norm -> convolution -> mixer -> residual -> MLP, each part but the mixer optional."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers import Mixer, State
from minrnn.mixers.convolution import CausalConv
from minrnn.models.dropout import Dropout


def _swiglu(x: Tensor) -> Tensor:
    """Gate one half of the channels by the other: (..., 2 d) -> (..., d)."""
    gate, value = x.chunk(2, dim=-1)
    return functional.silu(gate) * value


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "swiglu": _swiglu,
}

GATED = ("swiglu",)
"""Activations whose input has twice as many channels as their output (Shazeer, arXiv 2002.05202)."""

BlockState = tuple[State, State]
"""The convolution's window (in a tuple, which is empty without a convolution) and the mixer's state."""


class MLP(nn.Module):
    """Two linear layers around an activation: y = W_out act(W_in x).

        swiglu: y = W_out (silu(W_gate x) * W_value x),   W_in = [W_gate; W_value]

    Args:
        d_model: input and output channels.
        d_inner: hidden channels.
        activation: a name in ACTIVATIONS.
        bias: whether the linear layers have biases.
    """

    def __init__(self, d_model: int, d_inner: int, *, activation: str, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * d_inner if activation in GATED else d_inner
        self.up = nn.Linear(d_model, width, bias=bias)
        self.down = nn.Linear(d_inner, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class Block(nn.Module):
    """Two residual branches, the first along the time axis and the second within a step.

        x = x + dropout(down(mixer(conv(norm(x)))))
        x = x + dropout(mlp(norm(x)))

    Args:
        mixer: the module that mixes steps; its d_model is the block's width.
        make_norm: returns a norm over the block's channels.
        conv: convolution before the mixer, or None.
        mlp: the second branch, or None.
        residual: whether a branch is added to its input or replaces it.
        dropout: probability of zeroing a channel of a branch's output during training.
        bias: whether the projection from the mixer back to the block's width has a bias.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        make_norm: Callable[[], nn.Module],
        conv: CausalConv | None,
        mlp: MLP | None,
        residual: bool,
        dropout: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.mixer_norm = make_norm()
        self.conv = conv
        self.mixer = mixer
        self.down = nn.Linear(mixer.d_hidden, mixer.d_model, bias=bias)
        self.mlp_norm = make_norm() if mlp is not None else None
        self.mlp = mlp
        self.residual = residual
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, state: BlockState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """Advance the state over x `(B, T, d_model)`; where reset `(B, T)` is True, clear it first.

        Raises:
            ValueError: the state has a window although there is no convolution, or lacks one.
        """
        windows, carried = ((), None) if state is None else state
        # Look up each part once: torch takes half a microsecond to find a module.
        conv, mlp, mlp_norm, dropout = self.conv, self.mlp, self.mlp_norm, self.dropout
        if state is not None and len(windows) != (conv is not None):
            raise ValueError(
                f"Block: state must have {int(conv is not None)} windows of a convolution, got {len(windows)}"
            )
        y = self.mixer_norm(x)
        if conv is not None:
            y, window = conv(y, windows[0] if windows else None, reset=reset)
            windows = (window,)
        y, carried = self.mixer(y, carried, reset=reset)
        x = self._join(x, dropout(self.down(y)))
        if mlp is not None and mlp_norm is not None:
            x = self._join(x, dropout(mlp(mlp_norm(x))))
        return x, (windows, carried)

    def empty_state(self, batch: int, like: Tensor) -> BlockState:
        """Return the state before a sequence's first step, for inputs of the dtype and device of `like`."""
        conv = self.conv
        windows = () if conv is None else (like.new_zeros(batch, conv.width - 1, conv.weight.shape[1]),)
        return windows, self.mixer.empty_state(batch, like)

    def _join(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch if self.residual else branch
