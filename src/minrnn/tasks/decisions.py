"""Offline reinforcement learning as sequence modeling: predict recorded actions, conditioned on returns.

Source: Chen et al., "Decision Transformer" (arXiv 2106.01345).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from minrnn.files import NoEffect, check_bounds, check_kind, require, warn_without_effect
from minrnn.models import (
    NOTHING_DONE,
    TOKENS,
    DecisionConfig,
    DecisionModel,
    ModelConfig,
    ModelState,
    Steps,
)
from minrnn.tasks.draws import Draws
from minrnn.tasks.episodes import Episodes
from minrnn.tasks.task import (
    WHOLE,
    Batch,
    Split,
    Task,
    TaskConfig,
    Tell,
    check_batch,
    check_max_tokens,
    device_of,
    evaluation_mode,
)

Tokens = Literal["interleaved", "joined", "observation"]

EPISODES_PER_VALIDATION_EPISODE = 10
"""One in this number of episodes is used for validation."""

BEST_FRACTION = 0.1
"""Fraction of the training steps, those of the best episodes, that determines the target return."""

MIN_TIMESTEPS = 1000
"""Minimum size of the table of time steps: the time limit of gymnasium's MuJoCo environments."""

EVAL_ROWS, EVAL_STEPS = 32, 128
"""Rows and steps per batch of an evaluation; fixed, so that the loss is the same on every machine."""

MIN_DEVIATION = 1e-6
"""Observations with a smaller standard deviation are constant, and are not scaled."""

WITHOUT_EFFECT = (NoEffect("target_return", "tokens", lambda s: s["tokens"] == "observation"),)
"""Fields of DecisionsConfig that have no effect with some values of another."""


@dataclass(frozen=True)
class DecisionsConfig(TaskConfig):
    """The training episodes, and how a policy reads them."""

    data: str = ""
    """Training episodes: the path of an HDF5 file in D4RL's layout, as written by `minrnn make-data`, or of a
    Minari data set; or the name of a public data set, such as hopper-medium-v2; required."""
    environment: str | None = None
    """Environment of the policy, by gymnasium's name (None: the one named in the data)."""
    tokens: Tokens | None = None
    """Tokens of a step: interleaved, three tokens (previous action, return-to-go, observation); joined, one
    token of all three; observation, one token of the observation alone, which is behavior cloning. (None:
    interleaved for attention, as in Decision Transformer; joined, a third as long, for recurrences.)"""
    carry: bool | None = None
    """Carry the hidden state through an episode, in training (with episodes as streams) and when acting;
    otherwise each action is computed from the last `window` steps. (None: yes for recurrences, no for
    attention.)"""
    window: int = 20
    """Steps of a training sequence: the length of backpropagation through time and, without a carried state,
    the context of a policy."""
    timesteps: int | None = None
    """Size of the table of learned time-step embeddings, which limits the length of an episode; 0: no table
    and no limit. (None: for attention the longest episode, at least 1,000; for recurrences no table.)"""
    target_return: float | None = None
    """Return that the policy is conditioned on when it acts. (None: the mean return of the best training
    episodes, those with a tenth of the steps.)"""

    task = "decisions"
    verb = "act"

    def __post_init__(self) -> None:
        require(self, "tokens", self.tokens in (None, *TOKENS), f"one of {', '.join(TOKENS)}")
        check_bounds(self, {"window": (1, 1 << 24)}, " step")
        if self.timesteps is not None:
            check_bounds(self, {"timesteps": (0, 1 << 24)}, " (none)" if self.timesteps < 0 else "")
        require(self, "target_return", self.target_return is None or isfinite(self.target_return), "finite")
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)

    def resolved(self, model: ModelConfig) -> DecisionsConfig:
        """Return the configuration with the defaults filled in that depend on the mixer."""
        attends = model.mixer == "attention"
        tokens: Tokens = self.tokens or ("interleaved" if attends else "joined")
        return dataclasses.replace(
            self, tokens=tokens, carry=not attends if self.carry is None else self.carry
        )


class DecisionsTask(Task):
    """Predict recorded actions, conditioned on the return that followed.

        loss = mean of (action - recorded)^2 over steps and numbers         continuous
        loss = mean cross-entropy of the recorded action, in nats           discrete

    One episode in ten, always the same ones, is held out for validation. The steps of the others are sampled
    uniformly, whatever the lengths of the episodes. Sequences are cut from the concatenated episodes; resets
    mark where an episode starts within a sequence, so nothing is padded. Without a carried state, sequences
    are random windows. With one, they are the next `window` steps of streams over the episodes, whose order
    is shuffled for every pass: training thus sees states as old as those of a policy that acts.

    Args:
        config: the configuration, `resolved`.
        episodes: the data, instead of those named in `config`.

    Raises:
        ValueError: no data are named, or they are damaged or too small.
        OSError: the data cannot be downloaded or read.
        ImportError: h5py is not installed.
    """

    config_type = DecisionsConfig

    def __init__(self, config: DecisionsConfig, episodes: Episodes | None = None) -> None:
        check_kind("DecisionsTask", "config", config, DecisionsConfig)
        if config.tokens is None or config.carry is None:
            raise ValueError("DecisionsTask: config must be resolved: config.resolved(model)")
        self.config = config
        self.episodes = _find(config) if episodes is None else episodes
        data = self.episodes
        if data.num_episodes < 2:
            raise ValueError(
                f"DecisionsTask: there must be at least 2 episodes, one of them for validation, got "
                f"{data.num_episodes}"
            )
        held_out = Draws(0, "validation", 0).subsets(
            data.num_episodes, max(1, data.num_episodes // EPISODES_PER_VALIDATION_EPISODE), 1
        )
        self.val_episodes: NDArray[np.int64] = held_out[0]
        """Indices of the validation episodes."""
        self.train_episodes: NDArray[np.int64] = np.setdiff1d(np.arange(data.num_episodes), held_out)
        """Indices of the training episodes."""
        self._returns = data.returns_to_go()
        self._times = np.arange(len(data)) - np.repeat(data.starts, data.lengths)
        self._train_steps = self._steps_of(self.train_episodes)
        if len(self._train_steps) < config.window:
            raise ValueError(
                f"DecisionsTask: window must be at most the {len(self._train_steps)} steps to train on, got "
                f"{config.window}"
            )
        # All steps of a pass over the streams use the same order.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Unit of the loss."""
        return "nats an action" if self.episodes.is_discrete else "squared error of an action"

    @property
    def sha256(self) -> str:
        """Digest of the data."""
        return self.episodes.sha256

    @property
    def environment(self) -> str | None:
        """The environment of the policy."""
        return self.config.environment or self.episodes.environment

    @property
    def target_return(self) -> float:
        """The target return: that of the configuration, or the mean return of the best training episodes.

        The highest return may occur in one episode only: policies do worse on a target return that is rare in
        the training data than on a lower one.
        """
        if self.config.target_return is not None:
            return self.config.target_return
        data, train = self.episodes, self.train_episodes
        return best_return(data.returns[train], data.lengths[train], BEST_FRACTION)

    @property
    def carries_state(self) -> bool:
        """Whether the policy carries its hidden state."""
        return bool(self.config.carry)

    def describe(self) -> str:
        """Return the data, the split, and how they are read, in two lines."""
        config = self.config
        how = f"streams, {config.window} steps at a time" if config.carry else f"windows of {config.window}"
        target = "" if config.tokens == "observation" else f", to reach a return of {self.target_return:,.1f}"
        return (
            f"{self.episodes.describe()}\n"
            f"{len(self.val_episodes):,} of them to validate on; {config.tokens} tokens, {how}{target}"
        )

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with a bounded window for attention with a carried state.

        The window defaults to `DecisionsConfig.window` steps, the length of training sequences: without a
        bound, the state of a stream would grow with it.

        Raises:
            ValueError: the window is unbounded though the state is carried, or `config` sets a vocabulary
                size or tied embeddings, which policies do not have.
        """
        if config.vocab_size != ModelConfig.vocab_size or config.tie_embeddings:
            raise ValueError(
                "train: model.vocab_size and model.tie_embeddings must be left out, as a policy has no "
                "vocabulary"
            )
        if config.mixer != "attention" or not self.config.carry:
            return config
        if config.window == 0:
            raise ValueError(
                "train: model.window must be bounded where attention carries its state (task.carry), got 0"
            )
        tokens = self.config.window * TOKENS[self.config.tokens or "joined"]
        return dataclasses.replace(config, window=tokens) if config.window is None else config

    def make_model(self, config: ModelConfig) -> DecisionModel:
        """Return a new policy with the statistics of the data.

        Raises:
            ValueError: an episode is longer than the table of times.
        """
        model = DecisionModel(self.decision_config(config))
        steps = self._train_steps
        observations = self.episodes.observations[steps]
        deviation = observations.std(axis=0, dtype=np.float64)
        bound = None
        if not self.episodes.is_discrete:
            # At least 1, the range of most environments, which the data may not cover.
            bound = torch.from_numpy(np.abs(self.episodes.actions[steps]).max(axis=0).clip(min=1))
        model.set_statistics(
            torch.from_numpy(observations.mean(axis=0, dtype=np.float64)),
            torch.from_numpy(np.where(deviation < MIN_DEVIATION, 1.0, deviation)),
            bound,
        )
        return model

    def decision_config(self, config: ModelConfig) -> DecisionConfig:
        """Return the configuration of a policy with these blocks.

        Raises:
            ValueError: an episode is longer than the table of times.
        """
        data, settings = self.episodes, self.config
        longest = int(data.lengths.max())
        timesteps = settings.timesteps
        if timesteps is None:
            timesteps = max(longest, MIN_TIMESTEPS) if config.mixer == "attention" else 0
        if 0 < timesteps < longest:
            raise ValueError(
                f"DecisionsTask: timesteps must be 0 (none) or at least {longest}, the steps of the longest "
                f"episode, got {timesteps}"
            )
        conditioned = settings.tokens != "observation"
        scale = float(np.abs(self._returns[self._train_steps]).max())
        return DecisionConfig(
            trunk=config,
            observation_size=data.observation_size,
            action_size=data.num_actions if data.is_discrete else data.action_size,
            discrete=data.is_discrete,
            tokens=settings.tokens or "joined",
            window=0 if settings.carry else settings.window,
            max_steps=timesteps,
            return_scale=scale if conditioned and scale else 1.0,
            target_return=self.target_return if conditioned else None,
            environment=self.environment,
        )

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return training sequences of `window` steps, (B, T): a pure function of the arguments.

        Raises:
            ValueError: an argument is out of range, or there are fewer steps than the streams need.
        """
        check_batch("batch", step, batch_size, seed)
        return (self._stream if self.config.carry else self._windows)(step, batch_size, seed)

    def stream_batch(self, step: int, batch_size: int) -> Batch:
        raise ValueError(
            "DecisionsTask: train.carry_state must be off: task.carry says whether a policy carries its state"
        )

    def loss(
        self, model: nn.Module, batch: Batch, state: ModelState | None = None
    ) -> tuple[Tensor, ModelState]:
        batch = batch.to(device_of(model))
        predicted, state = model(batch.inputs, None if batch.fresh else state, reset=batch.reset)
        return self._errors(predicted, batch.targets).mean(), state

    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None, split: Split = WHOLE
    ) -> dict[str, float]:
        """Evaluate `model` on the validation episodes, read as in training.

        Streams are cut to equal length, so a few steps are left out.

        Args:
            model: a model returned by `make_model`.
            max_tokens: stop after the batch that reaches this number of steps; 0 for all.
            tell: progress callback.
            split: division of the batches among processes; streams are read by each.

        Returns:
            val_loss: mean squared error of the numbers of an action, or nats per action.
            accuracy: for discrete actions, the fraction that have the highest logit.
            val_tokens: number of actions.

        Raises:
            ValueError: `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        total, right, count, index = 0.0, 0, 0, -1
        state: ModelState | None = None
        divided = WHOLE if self.config.carry else split
        with evaluation_mode(model), torch.no_grad():
            for index, batch in enumerate(self.evaluation_batches()):
                if divided.mine(index):
                    batch = batch.to(device_of(model))
                    predicted, state = model(batch.inputs, None if batch.fresh else state, reset=batch.reset)
                    errors = self._errors(predicted, batch.targets).double()
                    total += errors.mean().item() * batch.num_targets
                    if self.episodes.is_discrete:
                        right += int((predicted.argmax(dim=-1) == batch.targets).sum())
                count += batch.num_targets
                if tell is not None:
                    tell(min(1.0, count / (max_tokens or self._num_evaluated)))
                if max_tokens and count >= max_tokens:
                    break
            if divided.lags(index + 1):
                model(batch.to(device_of(model)).inputs, None)
        errors_of_all, right_of_all = divided.sums([total, right])
        accuracy = {"accuracy": right_of_all / count} if self.episodes.is_discrete else {}
        return {"val_loss": errors_of_all / count, **accuracy, "val_tokens": count}

    @property
    def _num_evaluated(self) -> int:
        """Number of steps of the validation episodes."""
        return int(self.episodes.lengths[self.val_episodes].sum())

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the steps of the validation episodes, in streams or in windows; always the same ones."""
        steps = self._steps_of(self.val_episodes)
        if self.config.carry:
            rows = min(EVAL_ROWS, len(self.val_episodes))
            streams = steps[: len(steps) // rows * rows].reshape(rows, -1)
            for start in range(0, streams.shape[1], EVAL_STEPS):
                yield self._gather(streams[:, start : start + EVAL_STEPS], fresh=start == 0)
            return
        T = self.config.window
        whole = len(steps) // T * T
        windows = steps[:whole].reshape(-1, T)
        many = max(1, EVAL_ROWS * EVAL_STEPS // T)
        for start in range(0, len(windows), many):
            yield self._gather(windows[start : start + many], fresh=True)
        if whole < len(steps):
            yield self._gather(steps[None, whole:], fresh=True)

    def _errors(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Return the squared errors of numbers or the cross-entropies of actions, in at least float32."""
        if predicted.dtype.itemsize < 4:
            predicted = predicted.float()
        if self.episodes.is_discrete:
            return functional.cross_entropy(predicted.flatten(0, 1), targets.flatten(), reduction="none")
        return (predicted - targets.to(predicted.dtype)).square()

    def _windows(self, step: int, batch_size: int, seed: int) -> Batch:
        steps, T = self._train_steps, self.config.window
        starts = Draws(seed, "train", step).integers(len(steps) - T + 1, batch_size)
        return self._gather(steps[starts[:, None] + np.arange(T)], fresh=True)

    def _stream(self, step: int, batch_size: int, seed: int) -> Batch:
        T = self.config.window
        length = len(self._train_steps) // batch_size
        if length < T:
            raise ValueError(
                f"batch: batch_size must leave each stream task.window = {T} steps, got {batch_size} streams "
                f"of {length}; use at most {len(self._train_steps) // T}"
            )
        number, position = divmod(step, length // T)
        starts = np.arange(batch_size) * length + position * T
        return self._gather(self._order(seed, number)[starts[:, None] + np.arange(T)], fresh=position == 0)

    def _draw_order(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the indices of the training steps for pass `number`, with the episodes shuffled."""
        keys = Draws(seed, "train", number).integers(1 << 62, len(self.train_episodes))
        return self._steps_of(self.train_episodes[np.argsort(keys, kind="stable")])

    def _steps_of(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of the steps of these episodes, in order."""
        starts, ends = self.episodes.starts[episodes], self.episodes.ends[episodes]
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])

    def _gather(self, at: NDArray[np.int64], *, fresh: bool) -> Batch:
        """Return the batch of the steps at these indices, (B, T)."""
        data, times = self.episodes, self._times[at]
        starts = times == 0
        previous = data.actions[np.maximum(at - 1, 0)]
        previous[starts] = NOTHING_DONE if data.is_discrete else 0
        inputs = Steps(
            torch.from_numpy(self._returns[at]),
            torch.from_numpy(data.observations[at]),
            torch.from_numpy(previous),
            torch.from_numpy(times),
        )
        if fresh:
            starts[:, 0] = False  # the state is empty anyway, and a call without resets is faster
        reset = torch.from_numpy(starts) if starts.any() else None
        return Batch(inputs, torch.from_numpy(data.actions[at]), fresh, reset)


def best_return(returns: NDArray[np.float64], lengths: NDArray[np.int64], share: float) -> float:
    """Return the mean return of the best episodes, each weighted by its steps.

        sum(w R) / sum(w),   w[k] = steps of episode k among the first `share` of all, best episodes first

    Args:
        returns: the return of each episode.
        lengths: the number of steps of each episode.
        share: fraction of all steps, in (0, 1].
    """
    order = np.argsort(-returns, kind="stable")
    returns, lengths = returns[order], lengths[order]
    before = np.cumsum(lengths) - lengths
    weights = np.clip(share * lengths.sum() - before, 0, lengths)
    return float(np.average(returns, weights=weights))


def _find(config: DecisionsConfig) -> Episodes:
    if not config.data:
        raise ValueError(
            "decisions: task.data must name the episodes to learn from, got none; minrnn make-data makes some"
        )
    from minrnn.tasks.locomotion import find_episodes

    return find_episodes(config.data, config.environment)
