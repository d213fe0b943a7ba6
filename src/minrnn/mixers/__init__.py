"""What moves information along time: MinGRU and MinLSTM as layers and cells, and the table of all mixers."""

from minrnn.mixers.aaren import AarenMixer
from minrnn.mixers.attention import AttentionMixer
from minrnn.mixers.classic import GRUMixer, LSTMMixer, RNNMixer
from minrnn.mixers.convert import PairedMinLSTM, PairedMinLSTMCell, convert_rnns
from minrnn.mixers.mamba import MambaMixer
from minrnn.mixers.mingru import MinGRU, MinGRUCell, MinGRUMixer
from minrnn.mixers.minlstm import MinLSTM, MinLSTMCell, MinLSTMMixer
from minrnn.mixers.mixer import Mixer, State
from minrnn.mixers.s4d import S4DMixer

MIXERS: dict[str, type[Mixer]] = {
    "mingru": MinGRUMixer,
    "minlstm": MinLSTMMixer,
    "rnn": RNNMixer,
    "gru": GRUMixer,
    "lstm": LSTMMixer,
    "attention": AttentionMixer,
    "aaren": AarenMixer,
    "s4d": S4DMixer,
    "mamba": MambaMixer,
}
"""Every mixer by its name: `MIXERS[name](d_model, d_hidden, **options)`."""

__all__ = [
    "MIXERS",
    "MinGRU",
    "MinGRUCell",
    "MinLSTM",
    "MinLSTMCell",
    "Mixer",
    "PairedMinLSTM",
    "PairedMinLSTMCell",
    "State",
    "convert_rnns",
]
