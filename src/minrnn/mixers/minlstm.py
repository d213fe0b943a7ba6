"""MinLSTM: the LSTM whose gates depend on the input alone, so that it trains in parallel over time."""

from dataclasses import dataclass, field

from minrnn.mixers.cell import MinRNNCell
from minrnn.mixers.layer import MinRNN, MinRNNMixer


@dataclass(eq=False, repr=False)
class MinLSTM(MinRNN):
    """Apply a multi-layer minLSTM to a sequence; a replacement for `torch.nn.LSTM`, without the cell state.

        f[t] = sigmoid(W_f x[t] + b_f),   i[t] = sigmoid(W_i x[t] + b_i)
        h[t] = f'[t] * h[t-1] + i'[t] * g(W_h x[t] + b_h)
        f' = f / (f + i),   i' = i / (f + i)          f' = f,   i' = i   with normalize=False
        h[t] = (f'[t] - i'[t]) * h[t-1] + i'[t] * g(W_h x[t] + b_h)      with signed=True

    Constructor, shapes, unbatched input, defaults and parameter names are torch.nn.LSTM's. `weight_ih_l{k}`
    holds the rows [f; i; candidate], `(3 * hidden_size, input_size)`; there is no `weight_hh`. State in and
    out is h alone, not a pair.

    While gradients are recorded, the output must not be modified in place, for example by a following
    nn.Dropout(inplace=True): backward reads it and would raise. (On the CPU, torch.nn.LSTM's may be.)

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state.
        num_layers: number of layers; each reads the states of the one below.
        bias: whether the projections have biases `bias_ih_l{k}`.
        batch_first: input and output are `(B, T, ...)` instead of `(T, B, ...)`; h_0 and h_n stay as they
            are.
        dropout: probability of zeroing an output of any layer but the last, while training.
        bidirectional: run a second scan backwards in time in each layer and join the outputs.
        candidate: g: "positive" (x + 0.5 for x >= 0, sigmoid(x) below; what the paper trains), "linear"
            (g(x) = x, the paper's plain form) or "tanh".
        forget_bias: added to f's bias at initialization, so that the layer forgets slowly at first; None is
            1.0, or 0 without bias. With signed=True it moves the decay towards +1 likewise, so that the layer
            starts by keeping its state and not by flipping its sign.
        signed: allow decays in (-1, 1), f' - i' = 1 - 2 i'; needs normalize. With decays in (0, 1) no number
            of layers can track parity at every length; with these, one channel can: at i' = 1 and g = 1, h
            becomes 1 - h. The state is then not a mean of the candidates and not bounded by them: near i' =
            1, candidates of alternating sign add up.
        recompute: save only the input and a few states for backward, and recompute the rest there. The layer
            then saves a fifth as much, or two fifths where the next module saves the layer's output; a
            training step takes about a third longer. Under torch.func's transforms everything is saved.
        normalize: make the gates sum to one, so that the scale of the state does not depend on the length.
        device: the parameters' device.
        dtype: the parameters' dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive, dropout is not a probability, the candidate is unknown, or a
            forget_bias is given without bias, or signed is combined with normalize=False.

    Source: "Were RNNs All We Needed?", section 3.2 and appendix B; for signed, Grazzi et al., "Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537).

    Example:
        >>> import torch
        >>> rnn = MinLSTM(10, 20, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    gate = "minlstm"
    normalize: bool = field(default=True, kw_only=True)


@dataclass(eq=False, repr=False)
class MinLSTMCell(MinRNNCell):
    """Apply one step of a minLSTM; a drop-in replacement for `torch.nn.GRUCell`, as there is no cell state.

        h' = f' * h + i' * g(W_h x + b_h),   f = sigmoid(W_f x + b_f),   i = sigmoid(W_i x + b_i)
        f' = f / (f + i),   i' = i / (f + i)          f' = f,   i' = i   with normalize=False
        h' = (f' - i') * h + i' * g(W_h x + b_h)          with signed=True

    Equal to `MinLSTM` on a sequence of one step. `weight_ih` holds the rows [f; i; candidate], `(3 *
    hidden_size, input_size)`, and `bias_ih` likewise.

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state.
        bias: whether the projection has a bias.
        candidate: g, as in `MinLSTM`.
        forget_bias: as in `MinLSTM`.
        normalize: as in `MinLSTM`.
        signed: as in `MinLSTM`.
        device: the parameters' device.
        dtype: the parameters' dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive, the candidate is unknown, a forget_bias is given without bias, or
            signed is combined with normalize=False.

    Source: "Were RNNs All We Needed?", section 3.2 and appendix B; for signed, Grazzi et al., "Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537).

    Example:
        >>> import torch
        >>> cell, h = MinLSTMCell(10, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    gate = "minlstm"
    normalize: bool = field(default=True, kw_only=True)


class MinLSTMMixer(MinRNNMixer):
    """A minLSTM layer as a mixer; the state is h `(B, d_hidden)`.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state.
        candidate: as in `MinLSTM`.
        forget_bias: as in `MinLSTM`.
        normalize: as in `MinLSTM`.
        signed: as in `MinLSTM`.
        bias: as in `MinLSTM`.
    """

    layer = MinLSTM

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        candidate: str = "positive",
        forget_bias: float | None = None,
        normalize: bool = True,
        signed: bool = False,
        bias: bool = True,
    ) -> None:
        self._build(
            d_model,
            d_hidden,
            candidate=candidate,
            forget_bias=forget_bias,
            normalize=normalize,
            signed=signed,
            bias=bias,
        )
