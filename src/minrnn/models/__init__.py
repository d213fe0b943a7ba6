"""Mixers stacked into sequence models, how they are sampled, and how they are kept on disk."""

from minrnn.models.checkpoint import load_checkpoint as load_checkpoint
from minrnn.models.checkpoint import save_checkpoint as save_checkpoint
from minrnn.models.generation import generate as generate
from minrnn.models.sequence import ModelConfig as ModelConfig
from minrnn.models.sequence import ModelState as ModelState
from minrnn.models.sequence import SequenceModel as SequenceModel
from minrnn.models.sequence import map_state as map_state
