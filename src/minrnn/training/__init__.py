"""Training: the one loop, its configuration, and the directory that a run leaves."""

from minrnn.training.config import (
    Precision,
    RunConfig,
    TrainConfig,
    load_recipe,
    read_config,
    recipe_names,
    recipe_summary,
)
from minrnn.training.log import RunLog, read_metrics
from minrnn.training.loop import NonFiniteLossError, choose_device, train
from minrnn.training.provenance import provenance
from minrnn.training.resume import Interrupted, Trained, load_trained

__all__ = [
    "Interrupted",
    "NonFiniteLossError",
    "Precision",
    "RunConfig",
    "RunLog",
    "TrainConfig",
    "Trained",
    "choose_device",
    "load_recipe",
    "load_trained",
    "provenance",
    "read_config",
    "read_metrics",
    "recipe_names",
    "recipe_summary",
    "train",
]
