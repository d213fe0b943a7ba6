"""Policies with a MinGRU in place of the LSTM, for RecurrentPPO of sb3-contrib."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers import MinGRU
from minrnn.mixers.arguments import read_size
from minrnn.mixers.convolution import CausalConv
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
        f"minrnn.integrations.sb3 needs the extra rl ({error}): pip install minrnn[rl]"
    ) from error

Pair = tuple[Tensor, Tensor]


class ConvolvedRNN(nn.Module):
    """A causal convolution and a minGRU, with the attributes that sb3-contrib asks an LSTM for.

        y, h = rnn(conv(W x))

    Its state is the library's pair of tensors `(num_layers, B, hidden_size)`. One after the other they have
    rows for the state of each layer and for the convolution's window, and one of zeros if that is an odd
    number. So `num_layers` is half the number of rows.

    Args:
        layer: the class of the recurrent layers.
        sizes: input_size, hidden_size and the number of recurrent layers.
        conv_width: steps that the convolution sees; 0 is none, and no W.
        **options: arguments of the layer.
    """

    def __init__(
        self, layer: type[MinRNN], sizes: tuple[int, int, int], conv_width: int, **options: Any
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, layers = sizes
        self.parts = [layers, max(conv_width - 1, 0), (layers + max(conv_width - 1, 0)) % 2]
        self.num_layers = sum(self.parts) // 2
        self.before = self.conv = None
        read_by_rnn = self.input_size
        if conv_width:
            self.before = nn.Linear(self.input_size, self.hidden_size)
            self.conv = CausalConv(self.hidden_size, conv_width)
            read_by_rnn = self.hidden_size
        self.rnn = layer(read_by_rnn, self.hidden_size, layers, batch_first=True, **options)

    def forward(self, x: Tensor, states: Pair, *, reset: Tensor) -> tuple[Tensor, Pair]:
        """Return the output for x `(B, T, input_size)`, and the states after it."""
        h, window, unused = torch.cat(states).split(self.parts)
        if self.before is not None and self.conv is not None:
            x, past = self.conv(self.before(x), window.transpose(0, 1), reset=reset)
            window = past.transpose(0, 1)
        y, h = self.rnn(x, h, reset=reset)
        first, second = torch.cat([h, window, torch.zeros_like(unused)]).chunk(2)
        return y, (first, second)


class MinGruPolicy(RecurrentActorCriticPolicy):
    """An actor and a critic that read their observations through a minGRU each; for RecurrentPPO.

        from minrnn.integrations import sb3                         # makes the name known
        RecurrentPPO("MinGruPolicy", env, policy_kwargs={"lstm_hidden_size": 64})

    A sequence is one call, episode starts included: the library's LSTM walks through such a sequence step by
    step. The names of arguments and attributes are the library's, so `lstm_actor` is a `ConvolvedRNN`.

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
        self.conv_width = read_size(type(self).__name__, "conv_width", conv_width, least=0)
        if self.lstm_kwargs.get("bidirectional"):
            raise ValueError("lstm_kwargs: bidirectional must be False for a policy, which acts step by step")
        self.lstm_actor = self._in_place_of(self.lstm_actor)
        if self.lstm_critic is not None:
            self.lstm_critic = self._in_place_of(self.lstm_critic)
        self.lstm_hidden_state_shape = (self.lstm_actor.num_layers, 1, self.lstm_actor.hidden_size)
        # The optimizer that was made with the LSTMs, for the parameters there are now.
        defaults, kind = self.optimizer.defaults, self.optimizer_class
        self.optimizer = kind(self.parameters(), lr=defaults["lr"], **self.optimizer_kwargs)

    def _in_place_of(self, lstm: nn.LSTM) -> ConvolvedRNN:
        sizes = (lstm.input_size, lstm.hidden_size, lstm.num_layers)
        return ConvolvedRNN(self.layer, sizes, self.conv_width, **self.lstm_kwargs)

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: Pair, episode_starts: Tensor, lstm: ConvolvedRNN
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
            "n_lstm_layers": self.lstm_actor.rnn.num_layers,
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
