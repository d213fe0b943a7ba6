"""What moves information along time: the layers MinGRU and MinLSTM, and the table of all mixers."""

from minrnn.mixers.attention import AttentionMixer
from minrnn.mixers.classic import GRUMixer, LSTMMixer, RNNMixer
from minrnn.mixers.mingru import MinGRU, MinGRUMixer
from minrnn.mixers.minlstm import MinLSTM, MinLSTMMixer
from minrnn.mixers.mixer import Mixer, State

MIXERS: dict[str, type[Mixer]] = {
    "mingru": MinGRUMixer,
    "minlstm": MinLSTMMixer,
    "rnn": RNNMixer,
    "gru": GRUMixer,
    "lstm": LSTMMixer,
    "attention": AttentionMixer,
}
"""Every mixer by its name: `MIXERS[name](d_model, d_hidden, **options)`."""

__all__ = ["MIXERS", "MinGRU", "MinLSTM", "Mixer", "State"]
