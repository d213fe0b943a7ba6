"""Policies with a MinGRU in place of the LSTM, for RecurrentPPO of sb3-contrib."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.integrations.convolved import ConvolvedRNN, convolved
from minrnn.mixers import MinGRU
from minrnn.mixers.layer import MinRNN

try:
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )
except ImportError as error:
    raise ImportError(
        f"minrnn.integrations.sb3 needs the extra rl ({error}): pip install 'minrnn[rl]'"
    ) from error

Pair = tuple[Tensor, Tensor]


class PairedRNN(nn.Module):
    """Recurrent layers whose state is a pair, with the attributes that sb3-contrib asks an LSTM for.

    Args:
        inner: layers whose state is one tensor `(rows, B, hidden_size)`. The pair holds its rows one after
            the other, and one of zeros if their number is odd; so `num_layers` is half of it.
    """

    def __init__(self, inner: MinRNN | ConvolvedRNN) -> None:
        super().__init__()
        self.inner = inner
        self.input_size, self.hidden_size = inner.input_size, inner.hidden_size
        self.num_layers = (inner.num_layers + 1) // 2

    def forward(self, x: Tensor, states: Pair, *, reset: Tensor) -> tuple[Tensor, Pair]:
        """Return the output for x `(B, T, input_size)`, and the states after it."""
        y, h = self.inner(x, torch.cat(states)[: self.inner.num_layers], reset=reset)
        first, second = functional.pad(h, (0, 0, 0, 0, 0, self.inner.num_layers % 2)).chunk(2)
        return y, (first, second)


class MinGruPolicy(RecurrentActorCriticPolicy):
    """An actor and a critic that read their observations through a minGRU each; for RecurrentPPO.

        from minrnn.integrations import sb3                         # makes the name known
        RecurrentPPO("MinGruPolicy", env, policy_kwargs={"lstm_hidden_size": 64})

    A sequence is one call, episode starts included: the library's LSTM walks through such a sequence step by
    step. The names of arguments and attributes are the library's, so `lstm_actor` is a `PairedRNN`.

    Args:
        *args: as those of RecurrentActorCriticPolicy.
        lstm_kwargs: arguments of `MinGRU`: bias, dropout, candidate, forget_bias, signed or recompute.
        conv_width: steps that a causal convolution before the layers sees, the current one included; 0 is
            none. A minGRU's candidate sees one step alone, and is slow to learn how steps differ.
        **kwargs: as those of RecurrentActorCriticPolicy; `lstm_hidden_size` and `n_lstm_layers` are the
            layer's hidden_size and num_layers.

    Raises:
        TypeError: lstm_kwargs names what is no argument of the layer, or what the policy sets; conv_width is
            not an int.
        ValueError: a value of lstm_kwargs is not allowed; conv_width is negative.
    """

    layer: ClassVar[type[MinRNN]] = MinGRU
    """The layer's class; a subclass may name another one whose state is one tensor."""
    lstm_actor: Any
    lstm_critic: Any
    optimizer: Any

    def __init__(
        self, *args: Any, lstm_kwargs: dict[str, Any] | None = None, conv_width: int = 4, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lstm_kwargs = lstm_kwargs or {}
        self.n_lstm_layers = self.lstm_actor.num_layers
        self.conv_width = conv_width
        if self.lstm_kwargs.get("bidirectional"):
            raise ValueError("lstm_kwargs: bidirectional must be False for a policy, which acts step by step")
        self.lstm_actor = self._in_place_of(self.lstm_actor)
        if self.lstm_critic is not None:
            self.lstm_critic = self._in_place_of(self.lstm_critic)
        self.lstm_hidden_state_shape = (self.lstm_actor.num_layers, 1, self.lstm_actor.hidden_size)
        # The optimizer that was made with the LSTMs, for the parameters there are now.
        defaults, kind = self.optimizer.defaults, self.optimizer_class
        self.optimizer = kind(self.parameters(), lr=defaults["lr"], **self.optimizer_kwargs)

    def _in_place_of(self, lstm: nn.LSTM) -> PairedRNN:
        sizes = (lstm.input_size, lstm.hidden_size, lstm.num_layers)
        name = type(self).__name__
        return PairedRNN(convolved(name, self.layer, sizes, self.conv_width, **self.lstm_kwargs))

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: Pair, episode_starts: Tensor, lstm: PairedRNN
    ) -> tuple[Tensor, Pair]:
        """Return the layer's output for each row of features, and the states after them.

        Args:
            features: `(B * T, input_size)`, the steps of B sequences, one sequence after another.
            lstm_states: the states before, `(num_layers, B, hidden_size)` each.
            episode_starts: `(B * T,)`, not 0 where an episode starts.
            lstm: the layer.
        """
        count = lstm_states[0].shape[1]
        x = features.reshape(count, -1, lstm.input_size)
        output, states = lstm(x, lstm_states, reset=episode_starts.reshape(count, -1) != 0)
        return output.flatten(0, 1), states

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": self.lstm_actor.hidden_size,
            "n_lstm_layers": self.n_lstm_layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
            "conv_width": self.conv_width,
        }


class CnnMinGruPolicy(MinGruPolicy, RecurrentActorCriticCnnPolicy):
    """`MinGruPolicy` for images, which a convolutional network reads first."""


class MultiInputMinGruPolicy(MinGruPolicy, RecurrentMultiInputActorCriticPolicy):
    """`MinGruPolicy` for dictionaries of observations."""


for _kind in (MinGruPolicy, CnnMinGruPolicy, MultiInputMinGruPolicy):
    RecurrentPPO.policy_aliases[_kind.__name__] = _kind
