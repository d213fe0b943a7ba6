"""MinEMA: a damped moving average whose rate and damping are gates, so that it trains in parallel."""

from minrnn.mixers.cell import MinRNNCell
from minrnn.mixers.layer import MinRNN, MinRNNMixer


class MinEMA(MinRNN):
    """Apply a multi-layer minEMA to a sequence; a drop-in replacement for `torch.nn.GRU`.

        alpha[t] = sigmoid(W_alpha x[t] + b_alpha),   delta[t] = sigmoid(W_delta x[t] + b_delta)
        h[t] = (1 - alpha[t] delta[t]) * h[t-1] + alpha[t] * g(W_h x[t] + b_h)

    At delta = 1 it is minGRU; a smaller delta keeps the state longer without a weaker input, so that h is a
    sum of candidates rather than their mean. `weight_ih_l{k}` holds the rows [alpha; delta; candidate], `(3 *
    hidden_size, input_size)`. Arguments, shapes and errors are those of `MinGRU`, except that forget_bias is
    subtracted from delta's bias and that there is no signed form.

    Source: Ma et al., "Mega: Moving Average Equipped Gated Attention" (arXiv 2209.10655), section 3.1, where
    alpha and delta are parameters; here they are gates.

    Example:
        >>> import torch
        >>> output, h_n = MinEMA(10, 20)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    gate = "minema"


class MinEMACell(MinRNNCell):
    """Apply one step of a minEMA; a drop-in replacement for `torch.nn.GRUCell`. Arguments as `MinGRUCell`."""

    gate = "minema"


class MinEMAMixer(MinRNNMixer):
    """A minEMA layer as a mixer; the state is h `(B, d_hidden)`. Arguments as `MinGRUMixer`."""

    layer = MinEMA
