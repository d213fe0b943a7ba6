"""Policies with a MinGRU in place of the LSTM, for RecurrentPPO of sb3-contrib."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
        f"minrnn.integrations.sb3 needs the extra rl ({error}): pip install minrnn[rl]"
    ) from error

Pair = tuple[Tensor, Tensor]


class MinGruPolicy(RecurrentActorCriticPolicy):
    """An actor and a critic that read their observations through a minGRU each; for RecurrentPPO.

        from minrnn.integrations import sb3                         # makes the name known
        RecurrentPPO("MinGruPolicy", env, policy_kwargs={"lstm_hidden_size": 64})

    A sequence is one call, episode starts included: the library's LSTM walks through such a sequence step by
    step. The names of arguments and attributes are the library's, so `lstm_actor` is a `MinGRU`. Where the
    library keeps a pair (h, c) of states, h is the layer's state and c zeros.

    Args:
        *args: as those of RecurrentActorCriticPolicy.
        lstm_kwargs: arguments of `MinGRU`: bias, dropout, candidate, forget_bias, signed or recompute.
        **kwargs: as those of RecurrentActorCriticPolicy; `lstm_hidden_size` and `n_lstm_layers` are the
            layer's hidden_size and num_layers.

    Raises:
        TypeError: lstm_kwargs names what is no argument of the layer, or what the policy sets.
        ValueError: a value of lstm_kwargs is not allowed.
    """

    layer: ClassVar[type[MinRNN]] = MinGRU
    """The layer's class; a subclass may name another one whose state is one tensor."""
    lstm_actor: Any
    lstm_critic: Any
    optimizer: Any

    def __init__(self, *args: Any, lstm_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lstm_kwargs = lstm_kwargs or {}
        if self.lstm_kwargs.get("bidirectional"):
            raise ValueError("lstm_kwargs: bidirectional must be False for a policy, which acts step by step")
        self.lstm_actor = self._in_place_of(self.lstm_actor)
        if self.lstm_critic is not None:
            self.lstm_critic = self._in_place_of(self.lstm_critic)
        # The optimizer that was made with the LSTMs, for the parameters there are now.
        defaults, kind = self.optimizer.defaults, self.optimizer_class
        self.optimizer = kind(self.parameters(), lr=defaults["lr"], **self.optimizer_kwargs)

    def _in_place_of(self, lstm: nn.LSTM) -> MinRNN:
        return self.layer(
            lstm.input_size, lstm.hidden_size, lstm.num_layers, batch_first=True, **self.lstm_kwargs
        )

    @staticmethod
    def _process_sequence(
        features: Tensor, lstm_states: Pair, episode_starts: Tensor, lstm: MinRNN
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
        output, h_n = lstm(x, lstm_states[0], reset=episode_starts.reshape(count, -1) != 0)
        return output.flatten(0, 1), (h_n, torch.zeros_like(h_n))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        layers, _, hidden_size = self.lstm_hidden_state_shape
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": hidden_size,
            "n_lstm_layers": layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "lstm_kwargs": self.lstm_kwargs,
        }


class CnnMinGruPolicy(MinGruPolicy, RecurrentActorCriticCnnPolicy):
    """`MinGruPolicy` for images, which a convolutional network reads first."""


class MultiInputMinGruPolicy(MinGruPolicy, RecurrentMultiInputActorCriticPolicy):
    """`MinGruPolicy` for dictionaries of observations."""


for _kind in (MinGruPolicy, CnnMinGruPolicy, MultiInputMinGruPolicy):
    RecurrentPPO.policy_aliases[_kind.__name__] = _kind
