"""Sequence models and policies made of mixers: their decoding, sampling, acting and checkpoints."""

from minrnn.models.acting import Policy as Policy
from minrnn.models.checkpoint import Model as Model
from minrnn.models.checkpoint import load_checkpoint as load_checkpoint
from minrnn.models.checkpoint import save_checkpoint as save_checkpoint
from minrnn.models.decision import NOTHING_DONE as NOTHING_DONE
from minrnn.models.decision import TOKENS as TOKENS
from minrnn.models.decision import DecisionConfig as DecisionConfig
from minrnn.models.decision import DecisionModel as DecisionModel
from minrnn.models.decision import Steps as Steps
from minrnn.models.decoder import Decoder as Decoder
from minrnn.models.generation import generate as generate
from minrnn.models.sequence import LossOf as LossOf
from minrnn.models.sequence import ModelConfig as ModelConfig
from minrnn.models.sequence import ModelState as ModelState
from minrnn.models.sequence import SequenceModel as SequenceModel
from minrnn.models.sequence import map_state as map_state
