"""GRU and LSTM as plain loops over time, the baseline of the paper's runtime figure.

The paper compared its layers with loops in plain PyTorch, not with torch.nn.GRU and LSTM, whose loops are
compiled, so its large speed-ups are relative to such loops. Both baselines are measured here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["LOOPS", "LoopGRU", "LoopLSTM"]


class LoopGRU(nn.Module):
    """One layer of torch.nn.GRU, computed step by step.

        r = sigmoid(W_ir x[t] + b_ir + W_hr h + b_hr)
        z = sigmoid(W_iz x[t] + b_iz + W_hz h + b_hz)
        n = tanh(W_in x[t] + b_in + r * (W_hn h + b_hn))
        h = (1 - z) * n + z * h

    Args:
        d_model: channels of the input.
        d_hidden: channels of the state.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(d_model, d_hidden, batch_first=True)  # holds the parameters

    def forward(self, x: Tensor) -> Tensor:
        """Map x `(B, T, d_model)` to the states `(B, T, d_hidden)`, from an empty one."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.rnn.all_weights[0]
        h = x.new_zeros(x.shape[0], self.rnn.hidden_size)
        states = []
        for x_t in x.unbind(1):
            r_x, z_x, n_x = functional.linear(x_t, weight_ih, bias_ih).chunk(3, dim=-1)
            r_h, z_h, n_h = functional.linear(h, weight_hh, bias_hh).chunk(3, dim=-1)
            r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
            n = (n_x + r * n_h).tanh()
            h = (1 - z) * n + z * h
            states.append(h)
        return torch.stack(states, dim=1)


class LoopLSTM(nn.Module):
    """One layer of torch.nn.LSTM, computed step by step.

        i, f, o = sigmoid(W x[t] + b + U h + b')    each with its own W, b, U, b'
        g = tanh(W_g x[t] + b_g + U_g h + b'_g)
        c = f * c + i * g,   h = o * tanh(c)

    Args:
        d_model: channels of the input.
        d_hidden: channels of the state.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(d_model, d_hidden, batch_first=True)  # holds the parameters

    def forward(self, x: Tensor) -> Tensor:
        """Map x `(B, T, d_model)` to the states `(B, T, d_hidden)`, from an empty one."""
        weight_ih, weight_hh, bias_ih, bias_hh = self.rnn.all_weights[0]
        h = c = x.new_zeros(x.shape[0], self.rnn.hidden_size)
        states = []
        for x_t in x.unbind(1):
            gates = functional.linear(x_t, weight_ih, bias_ih)
            gates = gates + functional.linear(h, weight_hh, bias_hh)
            i, f, g, o = gates.chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            states.append(h)
        return torch.stack(states, dim=1)


LOOPS: dict[str, type[LoopGRU] | type[LoopLSTM]] = {"gru-loop": LoopGRU, "lstm-loop": LoopLSTM}
"""The loops, by their names in tables."""
