"""The minGRU of PufferLib 4, with its parameters, on minrnn's scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_size
from minrnn.ops import gated_scan


class MinGRU(nn.Module):
    """Apply minGRU layers with a highway; a replacement for `MinGRU` in PufferLib's models.

        c, z, p = W x[t]
        h[t] = (1 - sigmoid(z)) * h[t-1] + sigmoid(z) * g(c),   g(c) = c + 0.5 for c >= 0, sigmoid(c) below
        y[t] = sigmoid(p) * h[t] + (1 - sigmoid(p)) * x[t]

    `layers.{k}.weight` is W, `(3 * hidden_size, hidden_size)`, with the rows [candidate; gate; highway]: the
    state_dict is PufferLib's, so that each loads the other's. It is the network of PufferLib's
    `Policy(encoder, decoder, network)`.

    Args:
        hidden_size: channels of input, state and output.
        num_layers: number of layers.
        **options: ignored, as there: PufferLib passes all settings of a network.

    Raises:
        TypeError: a size is not an integer.
        ValueError: a size is not positive.

    Source: PufferLib 4, `pufferlib/models.py`, class MinGRU.
    """

    def __init__(self, hidden_size: int, num_layers: int = 1, **options: Any) -> None:
        super().__init__()
        self.hidden_size = read_size("MinGRU", "hidden_size", hidden_size)
        self.num_layers = read_size("MinGRU", "num_layers", num_layers)
        self.layers = nn.ModuleList(
            nn.Linear(hidden_size, 3 * hidden_size, bias=False) for _ in range(num_layers)
        )

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> tuple[Tensor]:
        """Return the state before the first step: zeros `(num_layers, batch_size, hidden_size)`."""
        return (torch.zeros(self.num_layers, batch_size, self.hidden_size, device=device),)

    def forward_eval(self, h: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """Take one step.

        Args:
            h: `(B, hidden_size)`.
            state: from `initial_state` or the step before. It is not changed.

        Returns:
            The output, as h, and the state after the step.
        """
        y, after = self._run(h.unsqueeze(1), state[0], None)
        return y.squeeze(1), (after,)

    def forward_train(self, h: Tensor, reset: Tensor | None = None) -> Tensor:
        """Run over sequences from the initial state.

        Args:
            h: `(B, T, hidden_size)`.
            reset: `(B, T)` bool, True where an episode starts; PufferLib has no such argument.

        Returns:
            The outputs, as h.
        """
        return self._run(h, None, reset)[0]

    def _run(self, x: Tensor, state: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        finals = []
        for k, layer in enumerate(self.layers):
            candidate, gate, highway = layer(x).chunk(3, -1)
            h0 = None if state is None else state[k]
            h = gated_scan("mingru", gate, candidate, h0=h0, reset=reset)
            finals.append(h[:, -1])
            x = torch.lerp(x, h, highway.sigmoid())
        return x, torch.stack(finals)
