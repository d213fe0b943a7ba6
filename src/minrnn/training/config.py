"""Configuration of a run: recipes, and the model, task and training settings, with strict validation."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from minrnn.files import (
    NoEffect,
    check_bounds,
    convert,
    naming,
    nearest,
    parse_toml,
    read_json,
    read_toml,
    require,
    shown,
    warn_without_effect,
)
from minrnn.models import ModelConfig
from minrnn.models.pretrained import is_pretrained, run_of
from minrnn.tasks import TASKS, TaskConfig, TextConfig
from minrnn.training.threads import MOST_THREADS

Precision = Literal["float32", "bfloat16-products", "bfloat16"]
"""Arithmetic of training: see `TrainConfig.precision`."""
PRECISIONS: tuple[Precision, ...] = typing.get_args(Precision)

OptimizerName = Literal["adamw", "muon"]
OPTIMIZERS: tuple[OptimizerName, ...] = typing.get_args(OptimizerName)

Weights = Literal["replicated", "sharded"]
"""What each of several ranks holds of the weights: see `TrainConfig.weights`."""
WEIGHTS: tuple[Weights, ...] = typing.get_args(Weights)

MOST_SEEDS = 1 << 64
"""Upper bound of seeds, exclusive: the generators of torch and of the tasks take 64 bits."""

MOST_STEPS = 1 << 40
"""Upper bound of settings in steps or tokens; exact in every number format."""

MOST_SEQUENCES = 1 << 24
"""Upper bound of the sequences in a batch."""

BOUNDS = {
    **dict.fromkeys(("steps", "log_every"), (1, MOST_STEPS)),
    **dict.fromkeys(
        ("warmup_steps", "eval_every", "eval_tokens", "final_eval_tokens", "checkpoint_every"),
        (0, MOST_STEPS),
    ),
    **dict.fromkeys(("batch_size", "accumulate", "sequence_ranks"), (1, MOST_SEQUENCES)),
    "seed": (0, MOST_SEEDS - 1),
    "threads": (0, MOST_THREADS),
    "timeout": (1, 1 << 20),
}
"""Lower and upper bounds of TrainConfig's integers, inclusive."""


@dataclass(frozen=True)
class TrainConfig:
    """Training settings: an optimizer with a cosine schedule and a linear warm-up."""

    steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_size: int = 8
    """Sequences in one forward pass."""
    accumulate: int = 1
    """Forward and backward passes per step, whose gradients are averaged."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw; or muon, which updates the blocks' matrices by orthogonalized momentum, scaled to the
    size of AdamW's updates, and all other parameters by AdamW."""
    learning_rate: float = 1e-3
    """Peak learning rate, at the end of the warm-up."""
    min_learning_rate_ratio: float = 0.1
    """Learning rate at the end of the schedule, as a fraction of the peak (1: constant after the warm-up)."""
    warmup_steps: int = 100
    """Steps of linear warm-up of the learning rate from zero."""
    weight_decay: float = 0.1
    """Weight decay of linear layers (not of embeddings, filters, norms and biases; of gates with muon
    only)."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean of the gradient."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean of the squared gradient."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient over all parameters (0: no clipping)."""
    precision: Precision = "float32"
    """Arithmetic of training; bfloat16-products rounds the factors of matrix products to bfloat16 and keeps
    all else in float32; bfloat16 is autocast, which rounds activations too. Parameters stay in float32."""
    compile: bool = False
    """Compile the model for training steps by torch.compile. That takes seconds to minutes at the start, and
    again for a carried state and for another length; evaluations and checkpoints are not affected."""
    carry_state: bool = False
    """Read the corpus as `batch_size` streams and carry the hidden state from step to step, instead of
    sampling random windows that start from the empty state."""
    fresh_share: float = 0.0
    """With carry_state: fraction of each batch's sequences that are random windows from the empty state, so
    that the model is trained on starting a sequence too."""
    eval_every: int = 250
    """Steps between evaluations (0: only at the end)."""
    eval_tokens: int = 0
    """Validation tokens per evaluation during training (0: all)."""
    final_eval_tokens: int = 0
    """Validation tokens of the final evaluation, which results.json reports (0: all)."""
    checkpoint_every: int = 250
    """Steps between checkpoints (0: only at the end and when interrupted)."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    seed: int = 0
    """Seed of the initial weights, the dropout masks and the order of the data."""
    device: str = "auto"
    """Device for training: auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads, divided among the ranks of a machine (0: torch's default)."""
    sequence_ranks: int = 1
    """Ranks that share each sequence: consecutive parts of its steps. The others share the batch's rows."""
    weights: Weights = "replicated"
    """What each of several ranks holds: replicated, all weights, gradients and moments; sharded, its part of
    them, and of one block after the other the whole weights while the block computes."""
    timeout: int = 600
    """Seconds that a rank waits for the others before the run ends with an error."""

    def __post_init__(self) -> None:
        check_bounds(self, BOUNDS)
        for name in ("weight_decay", "grad_clip"):
            require(self, name, 0 <= getattr(self, name) < float("inf"), "0 or more, and finite")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        require(self, "learning_rate", 0 < self.learning_rate < float("inf"), "more than 0, and finite")
        require(self, "min_learning_rate_ratio", 0 <= self.min_learning_rate_ratio <= 1, "between 0 and 1")
        fresh = 0 <= self.fresh_share < 1 and (self.carry_state or self.fresh_share == 0)
        require(self, "fresh_share", fresh, "at least 0 and less than 1, and 0 without carry_state")
        if self.fresh_share:
            streams = self.batch_size - self.fresh_windows
            require(
                self, "fresh_share", 0 < streams < self.batch_size, "a share that leaves streams and windows"
            )
        require(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        require(self, "weights", self.weights in WEIGHTS, f"one of {', '.join(WEIGHTS)}")
        require(self, "optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")

    @property
    def fresh_windows(self) -> int:
        """Number of sequences of a batch that are random windows, in addition to the streams."""
        return round(self.fresh_share * self.batch_size)


WITHOUT_EFFECT = (
    NoEffect(
        "best_in_windows", "train.eval_every", lambda s: not 0 < s["train.eval_every"] < s["train.steps"]
    ),
)
"""Fields of TextConfig that have no effect in a run that is evaluated once, and so chooses no weights."""


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run: the name of its recipe, and the settings of model, task and training."""

    recipe: str = "custom"
    """Name of the recipe."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    task: TaskConfig = field(default_factory=TextConfig)
    """The task; its table has the task's name (`name = "listops"`), by default that of the text task."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training."""

    def __post_init__(self) -> None:
        if isinstance(self.task, TextConfig):
            train = {f"train.{name}": value for name, value in vars(self.train).items()}
            warn_without_effect(TextConfig, {**vars(self.task), **train}, WITHOUT_EFFECT, stacklevel=4)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Return the configuration of nested tables, as in a recipe or a config.json.

        Args:
            values: `recipe` (a string) and the tables `model`, `task`, `train`; missing keys have their
                defaults.

        Returns:
            The configuration.

        Raises:
            ValueError: a key is unknown (the message suggests the nearest one), or a value has the wrong type
                or is out of range.
        """
        others = {name: value for name, value in values.items() if name != "task"}
        config = convert(others, cls)
        if "task" not in values:
            return config
        return dataclasses.replace(config, task=_convert_task(values["task"], "task"))

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> RunConfig:
        """Return the configuration that a run recorded with `to_dict`, perhaps by an earlier version.

        As `from_dict`, but settings that did not exist yet have the values that keep what the run did.
        """
        table = values.get("task")
        if not isinstance(table, Mapping):
            return cls.from_dict(values)
        name = table.get("name", TextConfig.task)
        known = isinstance(name, str) and name in TASKS  # if not, from_dict says so
        earlier = TASKS[name].config_type.earlier if known else {}
        return cls.from_dict({**values, "task": {**earlier, **table}})

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of JSON values: the inverse of `from_dict`."""
        values = dataclasses.asdict(self)
        return {**values, "task": {"name": self.task.task, **values["task"]}}

    def override(self, **tables: Mapping[str, Any]) -> RunConfig:
        """Return the configuration with changed settings: `config.override(model={"num_layers": 2})`.

        Args:
            tables: model, task or train, each with the fields that change.

        Raises:
            TypeError: a field is unknown.
            ValueError: a value is out of range.
        """
        changed = {table: dataclasses.replace(getattr(self, table), **tables[table]) for table in tables}
        return dataclasses.replace(self, **changed)

    def resolved(self) -> RunConfig:
        """Return the configuration with the task's settings filled in that depend on the mixer."""
        return dataclasses.replace(self, task=self.task.resolved(self.model))


def load_recipe(name: str) -> RunConfig:
    """Read the recipe of this name, or the recipe in this file when the name ends in `.toml`.

    Args:
        name: one of `recipe_names()`, or a path such as `my/recipe.toml`.

    Returns:
        The configuration that it describes.

    Raises:
        ValueError: the name is unknown, the file is not TOML, or a key is unknown.
        OSError: the file cannot be read.
    """
    path, table = Path(name).expanduser(), dict[str, Any]
    if path.suffix == ".toml":
        stem, values = path.stem, read_toml(path, table)
    elif name in recipe_names():
        stem, values = name, parse_toml(_recipe_text(name), table, f"recipe {name}")
    else:
        raise ValueError(
            f"unknown recipe {name!r}{nearest(name, recipe_names())}; the recipes are "
            f"{', '.join(recipe_names())}, and a path that ends in .toml is read as one"
        )
    with naming(f"recipe {name}"):
        return RunConfig.from_dict({"recipe": stem, **values})


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, in alphabetical order."""
    files = resources.files("minrnn").joinpath("recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def recipe_summary(name: str) -> str:
    """Return the summary of a recipe: the first line of its header comment."""
    return _recipe_text(name).splitlines()[0].lstrip("# ").rstrip()


def read_config(run_dir: Path | str) -> RunConfig:
    """Return the resolved configuration in a run's directory, or in one that a run was exported to.

    Raises:
        FileNotFoundError: the directory holds no run.
        ValueError: config.json is damaged, or was written by another version.
    """
    path = Path(run_dir).expanduser() / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run directory: it has no config.json")
    values = read_json(path, dict[str, Any])
    with naming(path):
        return RunConfig.from_record(run_of(values) if is_pretrained(values) else values)


def _recipe_text(name: str) -> str:
    return resources.files("minrnn").joinpath("recipes", f"{name}.toml").read_text(encoding="utf-8")


def _convert_task(value: Any, key: str) -> Any:
    """Return the configuration of a task's table; without a name it is that of the text task."""
    table = convert(value, dict[str, Any], key)
    name = convert(table.pop("name", TextConfig.task), str, f"{key}.name")
    if name not in TASKS:
        raise ValueError(
            f"{key}.name must be one of {', '.join(TASKS)}, got {shown(name)}{nearest(name, TASKS)}"
        )
    return convert(table, TASKS[name].config_type, key)
