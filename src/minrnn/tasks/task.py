"""The contract that every task meets: batches that are pure functions, a loss, and an evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minrnn.models import Model, ModelConfig, ModelState, SequenceModel, Steps
from minrnn.models.evaluation import evaluation_mode as evaluation_mode

IGNORED = -100
"""The target where nothing is to be predicted; torch's cross_entropy leaves it out by itself."""

Tell = Callable[[float], object]
"""Told how much of something long is done, between 0 and 1."""


@dataclass(frozen=True)
class Batch:
    """Sequences and what is to be predicted at each of their tokens."""

    inputs: Tensor | Steps
    """(B, T) int64, or the steps that a policy reads."""

    targets: Tensor
    """(B, T) int64: the token to predict, or IGNORED; or the action, which may be several numbers."""

    fresh: bool = True
    """Whether these sequences continue nothing, and start from the empty state."""

    reset: Tensor | None = None
    """(B, T) bool: where another sequence starts; None: nowhere."""

    @property
    def num_targets(self) -> int:
        """How many predictions are asked for, ignored ones included: B * T."""
        B, T = self.targets.shape[:2]
        return B * T

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        reset = None if self.reset is None else self.reset.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), self.fresh, reset)

    def first(self, steps: int) -> "Batch":
        """Return the first steps of the same sequences, as a batch that continues nothing."""
        inputs = self.inputs
        if isinstance(inputs, Steps):
            return Batch(Steps(*(part[:, :steps] for part in inputs)), self.targets[:, :steps])
        return Batch(inputs[:, :steps], self.targets[:, :steps])


@dataclass(frozen=True)
class TaskConfig:
    """What a task is made from."""

    task: ClassVar[str]
    """The task's name in TASKS."""
    verb: ClassVar[str] = "evaluate"
    """The command that uses a trained model: `minrnn VERB RUN`."""

    def resolved(self, model: ModelConfig) -> Self:
        """Return the settings, those decided that are left to the model."""
        return self


class Task(ABC):
    """What a model learns, and how well it has."""

    config_type: ClassVar[type[TaskConfig]]
    """What the task is made from: `Task(config)`."""
    unit: ClassVar[str] = "nats a token"
    """What a loss is measured in."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Digest of the data: runs with the same digest learned from the same."""

    @property
    def saved_vocabulary(self) -> dict[str, str] | None:
        """What turns tokens into text, as a checkpoint keeps it; None where tokens are no text."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """Return the data and their size in one line, for a log."""

    @property
    def carries_state(self) -> bool:
        """Whether a batch continues the one before it, so that training carries the state."""
        return False

    @property
    def chosen_by(self) -> str:
        """The metric of `evaluate` by which a run's best weights are chosen: the lower, the better."""
        return "val_loss"

    @abstractmethod
    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with what the task decides.

        Raises:
            ValueError: it sets something that does not go with the task.
        """

    @abstractmethod
    def make_model(self, config: ModelConfig) -> Model:
        """Return a new model of what `model_config` returned."""

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return `batch_size` training sequences, (B, T): a pure function of the arguments, on any machine.

        Args:
            step: which batch, >= 0.
            batch_size: number of sequences B, >= 1.
            seed: which sequence of batches.

        Raises:
            ValueError: an argument is out of range.
        """

    def stream_batch(self, step: int, batch_size: int) -> Batch:
        """Return the next tokens of `batch_size` streams, for training with a carried state.

        Raises:
            ValueError: the task's sequences do not continue one another.
        """
        raise ValueError(
            f"{type(self).__name__}: train.carry_state must be off, for these sequences continue nothing"
        )

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Return the mean loss over the targets that are there, and the state after them.

        Args:
            model: what `make_model` made.
            batch: moved to the model's device where it is not there.
            state: after the batch before; a fresh batch starts from the empty state, whatever is given here.

        Returns:
            The loss, a scalar in at least float32, and the state, not detached.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None
    ) -> dict[str, float]:
        """Measure `model` on what it was not trained on.

        Runs in eval mode without gradients, draws no random numbers, and restores the model's modes.

        Args:
            model: what `make_model` made.
            max_tokens: predict about so many targets only; 0 for all.
            tell: told now and then how much is done, where that may take long.

        Returns:
            val_loss: the loss of a target.
            val_tokens: how many targets were predicted.
            And what else the task measures.

        Raises:
            ValueError: `max_tokens` is negative.
        """


class TokenTask(Task):
    """A task of tokens, which a SequenceModel learns.

    Models are called as `logits, state = model(tokens, state)`: tokens (B, T) int64, logits (B, T, V).
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens V that inputs and targets are of."""

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with the `vocab_size` that this task's tokens need."""
        if config.vocab_size not in (ModelConfig.vocab_size, self.vocab_size):
            raise ValueError(
                f"train: model.vocab_size must be left out, as the task sets it ({self.vocab_size} here), "
                f"got {config.vocab_size}"
            )
        return replace(config, vocab_size=self.vocab_size)

    def make_model(self, config: ModelConfig) -> SequenceModel:
        return SequenceModel(config)

    def loss(
        self, model: nn.Module, batch: Batch, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Return the mean cross-entropy in nats over the targets that are there, and the state after them.

        Args:
            model: maps tokens and state to logits and state.
            batch: moved to the model's device where it is not there.
            state: after the batch before; a fresh batch starts from the empty state, whatever is given here.

        Returns:
            The loss, a scalar in at least float32, and the state, not detached.
        """
        batch = batch.to(device_of(model))
        logits, state = model(batch.inputs, None if batch.fresh else state)
        return nats(logits, batch.targets, "mean"), state


def check_batch(function: str, step: int, batch_size: int, seed: int = 0, *, seeds: int = 1 << 64) -> None:
    """Raise ValueError unless step >= 0, batch_size >= 1 and 0 <= seed < seeds; `function` is named."""
    if step < 0:
        raise ValueError(f"{function}: step must be at least 0, got {step}")
    if batch_size < 1:
        raise ValueError(f"{function}: batch_size must be at least 1, got {batch_size}")
    if not 0 <= seed < seeds:
        raise ValueError(f"{function}: seed must lie in 0 .. 2^{seeds.bit_length() - 1} - 1, got {seed}")


def check_max_tokens(max_tokens: int) -> None:
    """Raise ValueError unless `max_tokens` is 0 (all) or positive."""
    if max_tokens < 0:
        raise ValueError(f"evaluate: max_tokens must be at least 0 (0: all), got {max_tokens}")


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's parameters; the CPU for one that has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def nats(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the cross-entropy of logits (B, T, V), in float32 for logits of half precision."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED)
