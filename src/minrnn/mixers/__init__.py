"""What moves information along time: layers and cells of gated recurrences, and the mixers of a model."""

from minrnn.mixers.convert import convert_rnns as convert_rnns
from minrnn.mixers.minema import MinEMA as MinEMA
from minrnn.mixers.minema import MinEMACell as MinEMACell
from minrnn.mixers.mingru import MinGRU as MinGRU
from minrnn.mixers.mingru import MinGRUCell as MinGRUCell
from minrnn.mixers.mingru_pytorch import from_mingru_pytorch as from_mingru_pytorch
from minrnn.mixers.minlstm import MinLSTM as MinLSTM
from minrnn.mixers.minlstm import MinLSTMCell as MinLSTMCell
from minrnn.mixers.mixer import Mixer as Mixer
from minrnn.mixers.mixer import State as State
from minrnn.mixers.paired import PairedMinLSTM as PairedMinLSTM
from minrnn.mixers.paired import PairedMinLSTMCell as PairedMinLSTMCell
from minrnn.mixers.registry import GATED_RNNS as GATED_RNNS
from minrnn.mixers.registry import MIXERS as MIXERS
