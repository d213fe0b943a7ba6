"""A module of torchrl around a minGRU, as its GRUModule is around torch.nn.GRU."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.nn import functional

from minrnn.integrations.convolved import ConvolvedRNN, convolved
from minrnn.mixers import MinGRU
from minrnn.mixers.layer import MinRNN

try:
    from tensordict import TensorDictBase
    from tensordict.nn import dispatch
    from tensordict.utils import set_lazy_legacy
    from torchrl.modules import GRUModule
except ImportError as error:
    raise ImportError(
        f"minrnn.integrations.torchrl needs the extra torchrl ({error}): pip install 'minrnn[torchrl]'"
    ) from error


NOT_GIVEN: tuple[Any, ...] = (None, None, 1, True, 0.0, 0, {})
"""The layer's arguments where a layer is given instead."""


class MinGRUModule(GRUModule):
    """Run a minGRU on a TensorDict; a replacement for `torchrl.modules.GRUModule`.

    Outside the recurrent mode an entry is one step, in it the last batch dimension is time. In both,
    `is_init` is the layer's `reset`: True where an episode starts, also inside a rollout, which is one call
    then; GRUModule cuts such a rollout into episodes and pads them.

    In the recurrent mode the state that is written is that after the last step; at the steps before it is
    zeros.

    Args:
        input_size: channels of the input.
        hidden_size: channels of the state.
        num_layers: number of layers.
        bias: whether the projections have biases.
        dropout: probability of zeroing an output of any layer but the last, while training.
        in_key: the input's key; the state's is then "recurrent_state".
        in_keys: the keys of input and state, and optionally "is_init"; instead of in_key.
        out_key: the output's key; the state's is then ("next", "recurrent_state").
        out_keys: the keys of output and state, instead of out_key. The state's should be ("next", key), with
            the key that it is read by.
        device: the parameters' device.
        conv_width: steps that a causal convolution before the layers sees, the current one included; 0 is
            none. The state then has a row more for each of the steps before, beside those of the layers.
        gru: a `MinGRU` or another layer of minrnn whose state is one tensor, with batch_first=True, instead
            of the arguments above.
        default_recurrent_mode: the mode where `torchrl.modules.set_recurrent_mode` does not set it; None is
            False.
        **options: other arguments of `MinGRU`: candidate, forget_bias, signed, recompute, dtype.

    Raises:
        TypeError: gru is not such a layer, or sizes are missing.
        ValueError: gru is given with arguments of its own, or is not batch_first.

    Source: torchrl, `torchrl.modules.GRUModule`.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        num_layers: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        in_key: Any = None,
        in_keys: Any = None,
        out_key: Any = None,
        out_keys: Any = None,
        device: Any = None,
        conv_width: int = 0,
        gru: MinRNN | ConvolvedRNN | None = None,
        default_recurrent_mode: bool | None = None,
        **options: Any,
    ) -> None:
        if gru is None:
            if input_size is None or hidden_size is None:
                raise TypeError("MinGRUModule: input_size and hidden_size, or gru, must be given")
            sizes = (input_size, hidden_size, num_layers)
            options |= {"bias": bias, "dropout": dropout, "device": device}
            gru = convolved("MinGRUModule", MinGRU, sizes, conv_width, **options)
        elif (input_size, hidden_size, num_layers, bias, dropout, conv_width, options) != NOT_GIVEN:
            raise ValueError("MinGRUModule: gru must be given without arguments of a layer")
        elif not isinstance(gru, MinRNN | ConvolvedRNN):
            raise TypeError(f"MinGRUModule: gru must be a MinGRU or MinLSTM, got {type(gru).__name__}")
        super().__init__(
            in_key=in_key,
            in_keys=in_keys,
            out_key=out_key,
            out_keys=out_keys,
            gru=gru,
            default_recurrent_mode=default_recurrent_mode,
        )

    @dispatch
    @set_lazy_legacy(False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the layer's output and state to a TensorDict, and return it."""
        rows = self._rows(tensordict)
        x, state = rows.get(self.in_keys[0]), rows.get(self.in_keys[1], None)
        if x is None:
            raise KeyError(f"MinGRUModule: the TensorDict must have the key {self.in_keys[0]!r}")
        hx = None if state is None else state[:, 0].transpose(0, 1)
        y, h_n = self.gru(x, hx, reset=rows.get("is_init").squeeze(-1))
        last = h_n.transpose(0, 1).unsqueeze(1)  # (B, 1, layers, hidden_size)
        rows.set(self.out_keys[0], y)
        rows.set(self.out_keys[1], functional.pad(last, (0, 0, 0, 0, x.shape[1] - 1, 0)))
        return tensordict.update(rows.reshape(tensordict.shape))

    def _rows(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return a TensorDict of batch size (B, T); T is 1 outside the recurrent mode."""
        if not self.recurrent_mode:
            return tensordict.reshape(-1).unsqueeze(-1)
        if not tensordict.ndim:
            raise ValueError(
                "MinGRUModule: in the recurrent mode, the last batch dimension must be time, got none"
            )
        return tensordict.unsqueeze(0) if tensordict.ndim == 1 else tensordict.flatten(0, -2)

    def make_python_based(self) -> NoReturn:
        """Raise TypeError: the layer is not torch.nn.GRU."""
        raise TypeError("MinGRUModule has one form for every device, not one in Python and one of cuDNN")

    make_cudnn_based = make_python_based
