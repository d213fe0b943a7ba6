"""The tables of mixers, and of the modules of each gate."""

from typing import NamedTuple

from minrnn.mixers.aaren import AarenMixer
from minrnn.mixers.attention import AttentionMixer
from minrnn.mixers.cell import MinRNNCell
from minrnn.mixers.classic import GRUMixer, LSTMMixer, RNNMixer
from minrnn.mixers.layer import MinRNN, MinRNNMixer
from minrnn.mixers.mamba import MambaMixer
from minrnn.mixers.minema import MinEMA, MinEMACell, MinEMAMixer
from minrnn.mixers.mingru import MinGRU, MinGRUCell, MinGRUMixer
from minrnn.mixers.minlstm import MinLSTM, MinLSTMCell, MinLSTMMixer
from minrnn.mixers.mixer import Mixer
from minrnn.mixers.s4d import S4DMixer


class GatedRNN(NamedTuple):
    """The modules of one gate."""

    layer: type[MinRNN]
    """In place of torch.nn.GRU."""
    cell: type[MinRNNCell]
    """In place of torch.nn.GRUCell."""
    mixer: type[MinRNNMixer]
    """For a `SequenceModel`."""


GATED_RNNS: dict[str, GatedRNN] = {
    "mingru": GatedRNN(MinGRU, MinGRUCell, MinGRUMixer),
    "minlstm": GatedRNN(MinLSTM, MinLSTMCell, MinLSTMMixer),
    "minema": GatedRNN(MinEMA, MinEMACell, MinEMAMixer),
}
"""The layer, the cell and the mixer of each gate, by the gate's name."""

MIXERS: dict[str, type[Mixer]] = {
    **{name: modules.mixer for name, modules in GATED_RNNS.items()},
    "rnn": RNNMixer,
    "gru": GRUMixer,
    "lstm": LSTMMixer,
    "attention": AttentionMixer,
    "aaren": AarenMixer,
    "s4d": S4DMixer,
    "mamba": MambaMixer,
}
"""Every mixer by its name: `MIXERS[name](d_model, d_hidden, **options)`."""
