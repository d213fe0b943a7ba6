"""Training: the loop, its configuration, and the run directory."""

from minrnn.training.config import (
    MOST_SEEDS,
    MOST_STEPS,
    Precision,
    RunConfig,
    TrainConfig,
    load_recipe,
    read_config,
    recipe_names,
    recipe_summary,
)
from minrnn.training.extras import attempt
from minrnn.training.log import Output, Progress, RunLog, read_metrics
from minrnn.training.loop import NonFiniteLossError, choose_device, train
from minrnn.training.provenance import is_changed, provenance
from minrnn.training.resume import Trained, load_trained
from minrnn.training.stopping import BROKEN_PIPE, Interrupted, Interruption, interruptible
from minrnn.training.threads import MOST_THREADS

__all__ = [
    "BROKEN_PIPE",
    "MOST_SEEDS",
    "MOST_STEPS",
    "MOST_THREADS",
    "Interrupted",
    "Interruption",
    "NonFiniteLossError",
    "Output",
    "Precision",
    "Progress",
    "RunConfig",
    "RunLog",
    "TrainConfig",
    "Trained",
    "attempt",
    "choose_device",
    "interruptible",
    "is_changed",
    "load_recipe",
    "load_trained",
    "provenance",
    "read_config",
    "read_metrics",
    "recipe_names",
    "recipe_summary",
    "train",
]
