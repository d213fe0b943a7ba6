"""MinGRU: the GRU whose gate depends on the input alone, so that it trains in parallel over time."""

from minrnn.mixers.cell import MinRNNCell
from minrnn.mixers.layer import MinRNN, MinRNNMixer


class MinGRU(MinRNN):
    """Apply a multi-layer minGRU to a sequence; a drop-in replacement for `torch.nn.GRU`.

        z[t] = sigmoid(W_z x[t] + b_z)
        h[t] = (1 - z[t]) * h[t-1] + z[t] * g(W_h x[t] + b_h)
        h[t] = (1 - 2 z[t]) * h[t-1] + z[t] * g(W_h x[t] + b_h)          with signed=True

    Constructor, shapes, unbatched input, defaults and parameter names are torch.nn.GRU's. `weight_ih_l{k}`
    holds the rows [z; candidate], `(2 * hidden_size, input_size)`; there is no `weight_hh`.

    While gradients are recorded, the output must not be modified in place, for example by a following
    nn.Dropout(inplace=True): backward reads it and would raise. (On the CPU, torch.nn.GRU's may be.)

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
        forget_bias: subtracted from z's bias at initialization, so that the layer forgets slowly at first;
            None is 1.0, or 0 without bias. With signed=True it moves the decay towards +1 likewise, so that
            the layer starts by keeping its state and not by flipping its sign.
        signed: allow decays in (-1, 1), 1 - 2 z. With decays in (0, 1) no number of layers can track parity
            at every length; with these, one channel can: at z = 1 and g = 1, h becomes 1 - h. The state is
            then not a mean of the candidates and not bounded by them: near z = 1, candidates of alternating
            sign add up.
        recompute: save only the input and a few states for backward, and recompute the rest there. The layer
            then saves a quarter as much, or half as much where the next module saves the layer's output; a
            training step takes about a third longer. Under torch.func's transforms everything is saved.
        device: the parameters' device.
        dtype: the parameters' dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive, dropout is not a probability, the candidate is unknown, or a
            forget_bias is given without bias.

    Source: "Were RNNs All We Needed?", section 3.1 and appendix B; for signed, Grazzi et al., "Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537).

    Example:
        >>> import torch
        >>> rnn = MinGRU(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    gate = "mingru"


class MinGRUCell(MinRNNCell):
    """Apply one step of a minGRU; a drop-in replacement for `torch.nn.GRUCell`.

        h' = (1 - z) * h + z * g(W_h x + b_h),   z = sigmoid(W_z x + b_z)
        h' = (1 - 2 z) * h + z * g(W_h x + b_h)          with signed=True

    Equal to `MinGRU` on a sequence of one step. `weight_ih` holds the rows [z; candidate], `(2 *
    hidden_size, input_size)`, and `bias_ih` likewise.

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state.
        bias: whether the projection has a bias.
        candidate: g, as in `MinGRU`.
        forget_bias: as in `MinGRU`.
        signed: as in `MinGRU`.
        device: the parameters' device.
        dtype: the parameters' dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a size is not positive, the candidate is unknown, or a forget_bias is given without bias.

    Source: "Were RNNs All We Needed?", section 3.1 and appendix B; for signed, Grazzi et al., "Unlocking
    State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537).

    Example:
        >>> import torch
        >>> cell, h = MinGRUCell(10, 20), torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    gate = "mingru"


class MinGRUMixer(MinRNNMixer):
    """A minGRU layer as a mixer; the state is h `(B, d_hidden)`.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output and of the state.
        candidate: as in `MinGRU`.
        forget_bias: as in `MinGRU`.
        signed: as in `MinGRU`.
        bias: as in `MinGRU`.
    """

    layer = MinGRU
