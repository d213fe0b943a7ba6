"""A minGRU after a causal convolution, with one tensor as its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_size
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.layer import MinRNN


def convolved(
    name: str, layer: type[MinRNN], sizes: tuple[int, int, int], conv_width: int, **options: Any
) -> MinRNN | ConvolvedRNN:
    """Return batch-first recurrent layers, after a causal convolution unless conv_width is 0.

    Raises:
        TypeError: conv_width is not an int; `name` starts the message.
        ValueError: it is negative.
    """
    if read_size(name, "conv_width", conv_width, least=0):
        return ConvolvedRNN(layer, sizes, conv_width, **options)
    return layer(*sizes, batch_first=True, **options)


class ConvolvedRNN(nn.Module):
    """A causal convolution and recurrent layers, with the attributes of a batch-first `torch.nn.GRU`.

        y, h = rnn(conv(W x))

    Its state has a row for each layer and for each step of the convolution's window; `num_layers` is their
    number.

    Args:
        layer: the class of the recurrent layers.
        sizes: input_size, hidden_size and the number of recurrent layers.
        conv_width: steps that the convolution sees, at least 1.
        device: the parameters' device.
        dtype: the parameters' dtype.
        **options: other arguments of the layers.
    """

    batch_first = True
    bidirectional = False

    def __init__(
        self,
        layer: type[MinRNN],
        sizes: tuple[int, int, int],
        conv_width: int,
        *,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, layers = sizes
        self.rows = [layers, conv_width - 1]
        self.num_layers = sum(self.rows)
        placed = {"device": device, "dtype": dtype}
        self.before = nn.Linear(self.input_size, self.hidden_size, **placed)
        self.conv = CausalConv(self.hidden_size, conv_width).to(**placed)
        self.rnn = layer(self.hidden_size, self.hidden_size, layers, batch_first=True, **placed, **options)

    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a batch of sequences; where reset is True, forget everything before that step.

        Args:
            input: `(B, T, input_size)`.
            hx: the state before, `(num_layers, B, hidden_size)`; None is zeros.
            reset: `(B, T)`, bool.

        Returns:
            The output `(B, T, hidden_size)`, and the state after the last step.
        """
        h, window = (None, None) if hx is None else hx.split(self.rows)
        x, past = self.conv(
            self.before(input), None if window is None else window.transpose(0, 1), reset=reset
        )
        y, h = self.rnn(x, h, reset=reset)
        return y, torch.cat([h, past.transpose(0, 1)])
