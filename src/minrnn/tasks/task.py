"""The interface of a task: deterministic batches, a loss and an evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minrnn.mixers.calls import is_plain
from minrnn.models import LossOf, Model, ModelConfig, ModelState, SequenceModel, Steps
from minrnn.models.evaluation import evaluation_mode as evaluation_mode
from minrnn.models.rebuilding import unwrap
from minrnn.models.shards import runs_for

IGNORED = -100
"""Target of positions without a prediction: the default `ignore_index` of torch's cross_entropy."""

LARGE_VOCABULARY = 2048
"""Size of a vocabulary from which on the logits of a batch are not held all at once."""

Tell = Callable[[float], object]
"""A progress callback; it receives the completed fraction, between 0 and 1."""


class Split(Protocol):
    """The division of an evaluation among processes."""

    def mine(self, index: int) -> bool:
        """Whether this process evaluates the batch of this index."""

    def lags(self, count: int) -> bool:
        """Whether this process has to call the model once more after `count` batches, without counting it."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes."""


class Whole:
    """The division of an evaluation that one process does."""

    def mine(self, index: int) -> bool:
        """Return True: it evaluates every batch."""
        return True

    def lags(self, count: int) -> bool:
        """Return False: no other process calls the model."""
        return False

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the values: no other process has any."""
        return list(values)


WHOLE = Whole()


@dataclass(frozen=True)
class Batch:
    """Input sequences and the target of each of their tokens."""

    inputs: Tensor | Steps
    """(B, T) int64 tokens, or the `Steps` that a policy reads."""

    targets: Tensor
    """(B, T) int64 tokens or IGNORED; for a policy the actions, (B, T) int64 or (B, T, A) float32."""

    fresh: bool = True
    """Whether the sequences start from the empty state; otherwise they continue those of the batch before."""

    reset: Tensor | None = None
    """(B, T) bool: True where a new sequence starts within a row; None if there are none."""

    @property
    def num_targets(self) -> int:
        """Number of targets, ignored ones included: B * T."""
        B, T = self.targets.shape[:2]
        return B * T

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`."""
        reset = None if self.reset is None else self.reset.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), self.fresh, reset)

    @property
    def num_asked(self) -> int:
        """Number of targets without ignored ones."""
        if self.targets.is_floating_point():
            return self.num_targets
        return int((self.targets != IGNORED).sum())

    def rows(self, rows: slice) -> "Batch":
        """Return the batch of these rows."""
        inputs, reset = self.inputs, None if self.reset is None else self.reset[rows]
        if isinstance(inputs, Steps):
            return Batch(Steps(*(part[rows] for part in inputs)), self.targets[rows], self.fresh, reset)
        return Batch(inputs[rows], self.targets[rows], self.fresh, reset)

    def steps(self, steps: slice) -> "Batch":
        """Return a part of these sequences' steps; the inputs are tokens."""
        reset = None if self.reset is None else self.reset[:, steps]
        return Batch(cast(Tensor, self.inputs)[:, steps], self.targets[:, steps], self.fresh, reset)

    def first(self, steps: int) -> "Batch":
        """Return a fresh batch of the first `steps` steps of these sequences."""
        inputs = self.inputs
        if isinstance(inputs, Steps):
            return Batch(Steps(*(part[:, :steps] for part in inputs)), self.targets[:, :steps])
        return Batch(inputs[:, :steps], self.targets[:, :steps])


@dataclass(frozen=True)
class TaskConfig:
    """Base class of the tasks' configurations."""

    task: ClassVar[str]
    """The task's name in TASKS."""
    verb: ClassVar[str] = "evaluate"
    """The command that uses a trained model: `minrnn VERB RUN`."""
    earlier: ClassVar[Mapping[str, Any]] = {}
    """Values of settings that runs of earlier versions do not record, where they differ from the defaults."""

    def resolved(self, model: ModelConfig) -> Self:
        """Return the configuration with the settings filled in that depend on the model."""
        return self


class Task(ABC):
    """Base class of the tasks: data, loss and metrics."""

    config_type: ClassVar[type[TaskConfig]]
    """Class of the configuration: `Task(config)`."""
    unit: ClassVar[str] = "nats a token"
    """Unit of the loss."""
    ignores_targets: ClassVar[bool] = False
    """Whether batches hold IGNORED targets."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Digest of the data: equal digests mean equal training data."""

    @property
    def saved_vocabulary(self) -> dict[str, str] | None:
        """The vocabulary that is saved in checkpoints; None if tokens are not text."""
        return None

    @property
    def saved_files(self) -> dict[str, str]:
        """Names and texts of further files that are saved in checkpoints."""
        return {}

    @abstractmethod
    def describe(self) -> str:
        """Return a one-line description of the data and their size, for a log."""

    @property
    def carries_state(self) -> bool:
        """Whether each batch continues the one before, so that training carries the hidden state."""
        return False

    @property
    def chosen_by(self) -> str:
        """Name of the metric of `evaluate` that selects a run's best weights; lower is better."""
        return "val_loss"

    @abstractmethod
    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with the fields set that the task determines.

        Raises:
            ValueError: `config` sets a field to a value that the task does not allow.
        """

    @abstractmethod
    def make_model(self, config: ModelConfig) -> Model:
        """Return a new model built from a configuration returned by `model_config`."""

    @abstractmethod
    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return `batch_size` training sequences, (B, T).

        The batch is a pure function of the arguments, the same on every machine.

        Args:
            step: index of the batch, >= 0.
            batch_size: number of sequences B, >= 1.
            seed: seed of the sequence of batches.

        Raises:
            ValueError: an argument is out of range.
        """

    def batch_rows(self, step: int, batch_size: int, seed: int, rows: slice) -> Batch:
        """Return some rows of `batch(step, batch_size, seed)`; the others are not computed if possible."""
        return self.batch(step, batch_size, seed).rows(rows)

    def stream_batch(self, step: int, batch_size: int) -> Batch:
        """Return the next tokens of `batch_size` streams, for training with a carried state.

        Raises:
            ValueError: the task has no streams.
        """
        raise ValueError(f"{type(self).__name__}: train.carry_state must be off, as this task has no streams")

    def stream_rows(self, step: int, batch_size: int, rows: slice) -> Batch:
        """Return some rows of `stream_batch(step, batch_size)`; the others are not computed if possible."""
        return self.stream_batch(step, batch_size).rows(rows)

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: Batch, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        """Return the mean loss over the targets that are not ignored, and the final hidden state.

        Args:
            model: a model returned by `make_model`.
            batch: the batch; it is moved to the model's device.
            state: hidden state after the batch before; ignored if `batch.fresh`.

        Returns:
            The loss, a scalar in at least float32, and the state, not detached.
        """

    @abstractmethod
    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None, split: Split = WHOLE
    ) -> dict[str, float]:
        """Evaluate `model` on held-out data.

        Runs in eval mode without gradients, draws no random numbers, and restores the modules' modes.

        Args:
            model: a model returned by `make_model`.
            max_tokens: approximate number of targets to predict; 0 for all.
            tell: progress callback.
            split: division among processes that hold the same model; all of them call this function.

        Returns:
            A dict of metrics with at least
            val_loss: the mean loss per target.
            val_tokens: the number of targets.

        Raises:
            ValueError: `max_tokens` is negative.
        """


class TokenTask(Task):
    """Base class of the tasks on tokens, which a SequenceModel learns.

    Models are called as `logits, state = model(tokens, state)`: tokens (B, T) int64, logits (B, T, V); and
    with `reset=`, (B, T) bool, where sequences start within a row.
    """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Size V of the vocabulary of inputs and targets."""

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with the task's `vocab_size`."""
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
        """Return the mean cross-entropy in nats over the targets that are not ignored, and the final state.

        Args:
            model: maps tokens and state to logits and state.
            batch: the batch; it is moved to the model's device.
            state: hidden state after the batch before; ignored if `batch.fresh`.

        Returns:
            The loss, a scalar in at least float32, and the state, not detached.
        """
        batch = batch.to(device_of(model))
        state = None if batch.fresh else state
        return token_nats(model, batch.inputs, batch.targets, state, batch.reset, "mean")


def call(
    model: nn.Module, inputs: Tensor | Steps, state: ModelState | None, reset: Tensor | None
) -> tuple[Tensor, ModelState]:
    """Call a model of tokens; without resets it need not know them."""
    return model(inputs, state) if reset is None else model(inputs, state, reset=reset)


def token_nats(
    model: nn.Module,
    inputs: Tensor | Steps,
    targets: Tensor,
    state: ModelState | None,
    reset: Tensor | None,
    reduction: str,
) -> tuple[Tensor, ModelState]:
    """Return the cross-entropy of a model's predictions of tokens, and its state.

    Where the vocabulary is large, the logits are not held all at once; a wrapped model has to return them.
    """
    options = {"reset": reset, "reduction": reduction, "ignore_index": IGNORED}
    if isinstance(unwrap(model), LossOf):
        found: tuple[Tensor, ModelState] = model(inputs, targets, state, **options)
        return found
    if isinstance(model, SequenceModel) and isinstance(inputs, Tensor) and _is_large(model):
        return model.loss(inputs, targets, state, reset=reset, reduction=reduction, ignore_index=IGNORED)
    logits, state = call(model, inputs, state, reset)
    return nats(logits, targets, reduction), state


def _is_large(model: SequenceModel) -> bool:
    """Whether a model has a large vocabulary, and no hooks that its call alone would run."""
    is_whole = is_plain(model, SequenceModel) or runs_for(model, "loss")
    return model.config.vocab_size >= LARGE_VOCABULARY and is_whole


def check_batch(function: str, step: int, batch_size: int, seed: int = 0, *, seeds: int = 1 << 64) -> None:
    """Raise ValueError, naming `function`, unless step >= 0, batch_size >= 1 and 0 <= seed < seeds."""
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
    """Return the device of a model's parameters, or the CPU if it has none."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def nats(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Return the cross-entropy of logits (B, T, V); half-precision logits are converted to float32."""
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED)
