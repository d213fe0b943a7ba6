"""Learning to act from recorded episodes: predict each action from what was seen and what it led to.

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

from minrnn.files import check_bounds, require
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
    Batch,
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
"""Of so many episodes one is validated on."""

BEST_FRACTION = 0.1
"""Of all training steps, those of the best episodes, whose return a policy asks for."""

MIN_TIMESTEPS = 1000
"""Steps that a table of embedded times has at least: how long an episode of gymnasium's MuJoCo may last."""

EVAL_ROWS, EVAL_STEPS = 32, 128
"""Rows and steps that are evaluated at once: fixed, so that a loss does not depend on a machine's memory."""

MIN_DEVIATION = 1e-6
"""An observation that varies by less is one that does not vary, and is not magnified."""


@dataclass(frozen=True)
class DecisionsConfig(TaskConfig):
    """Which episodes to learn from, and how a policy reads them."""

    data: str = ""
    """Episodes to learn from: the path of an HDF5 file in D4RL's layout, as `minrnn make-data` writes, or of
    a Minari data set; or the name of a public data set, such as hopper-medium-v2; must be given."""
    environment: str | None = None
    """Environment that the policy is for, by gymnasium's name (None: the one that the data name)."""
    tokens: Tokens | None = None
    """A step is read as: interleaved, three tokens (the action before, the return still to come, the
    observation); joined, one token of all three; observation, one token that knows neither return nor action,
    which is behavior cloning. (None: interleaved for attention, as Decision Transformer has it, and joined,
    in a third of the time, for recurrences.)"""
    carry: bool | None = None
    """Act from a state that is carried since the episode began, and train so, with episodes as streams; if
    not, every action is read anew from the last `window` steps. (None: yes for recurrences, no for
    attention.)"""
    window: int = 20
    """Steps of a training sequence: how far gradients reach back, and, where no state is carried, what a
    policy sees when it acts."""
    timesteps: int | None = None
    """Size of the table of learned embeddings of the time step, which bounds how long an episode may last; 0
    is none, and no bound. (None: for attention the longest episode, or 1,000; none for recurrences.)"""
    target_return: float | None = None
    """Return that the policy asks for when it acts. (None: the mean return of the best training episodes,
    those that hold a tenth of the steps.)"""

    task = "decisions"
    verb = "act"

    def __post_init__(self) -> None:
        require(self, "tokens", self.tokens in (None, *TOKENS), f"one of {', '.join(TOKENS)}")
        check_bounds(self, {"window": (1, 1 << 24)}, " step")
        if self.timesteps is not None:
            check_bounds(self, {"timesteps": (0, 1 << 24)}, " (none)" if self.timesteps < 0 else "")
        require(self, "target_return", self.target_return is None or isfinite(self.target_return), "finite")

    def resolved(self, model: ModelConfig) -> DecisionsConfig:
        """Return the settings with those that are left to the mixer decided."""
        attends = model.mixer == "attention"
        tokens: Tokens = self.tokens or ("interleaved" if attends else "joined")
        return dataclasses.replace(
            self, tokens=tokens, carry=not attends if self.carry is None else self.carry
        )


class DecisionsTask(Task):
    """Imitate recorded actions, told what return they led to.

        loss = mean of (action - recorded)^2 over steps and numbers         continuous
        loss = mean cross-entropy of the recorded action, in nats           discrete

    One episode in ten is held out, always the same ones, and validated on. Every step of the others is met as
    often as any other, whatever the length of its episode. Sequences are cut from the episodes end to end;
    where one begins within a sequence, a reset marks it, so nothing is padded. Without a carried state they
    are windows at random places. With one they are the next `window` steps of streams, each a stretch of the
    episodes in an order that is drawn anew for every pass over them: so training meets states as old as those
    that the policy will act from.

    Args:
        config: the episodes and how they are read, `resolved`.
        episodes: the data, in place of those that `config` names.

    Raises:
        ValueError: no data are named, or they are damaged, or too few.
        OSError: they cannot be downloaded or read.
        ImportError: h5py, which reads them, is not installed.
    """

    config_type = DecisionsConfig

    def __init__(self, config: DecisionsConfig, episodes: Episodes | None = None) -> None:
        if config.tokens is None or config.carry is None:
            raise ValueError("DecisionsTask: config must be resolved: config.resolved(model)")
        self.config = config
        self.episodes = _find(config) if episodes is None else episodes
        data = self.episodes
        if data.num_episodes < 2:
            raise ValueError(
                f"DecisionsTask: there must be at least 2 episodes, one of them to validate on, got "
                f"{data.num_episodes}"
            )
        held_out = Draws(0, "validation", 0).subsets(
            data.num_episodes, max(1, data.num_episodes // EPISODES_PER_VALIDATION_EPISODE), 1
        )
        self.val_episodes: NDArray[np.int64] = held_out[0]
        """Indices of the episodes that are validated on."""
        self.train_episodes: NDArray[np.int64] = np.setdiff1d(np.arange(data.num_episodes), held_out)
        """Indices of the others."""
        self._returns = data.returns_to_go()
        self._times = np.arange(len(data)) - np.repeat(data.starts, data.lengths)
        self._train_steps = self._steps_of(self.train_episodes)
        if len(self._train_steps) < config.window:
            raise ValueError(
                f"DecisionsTask: window must be at most the {len(self._train_steps)} steps to train on, got "
                f"{config.window}"
            )
        # A pass over the streams takes many steps, all of the same order.
        self._order = lru_cache(maxsize=2)(self._draw_order)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """What a loss is measured in."""
        return "nats an action" if self.episodes.is_discrete else "squared error of an action"

    @property
    def sha256(self) -> str:
        """Digest of the data."""
        return self.episodes.sha256

    @property
    def environment(self) -> str | None:
        """The environment that the policy is for."""
        return self.config.environment or self.episodes.environment

    @property
    def target_return(self) -> float:
        """What the policy asks for: what the configuration says, or what the best training episodes have.

        Not their highest return, which may be one episode's alone: a policy that is asked for what it has
        hardly met does worse than one that is asked for less.
        """
        if self.config.target_return is not None:
            return self.config.target_return
        data, train = self.episodes, self.train_episodes
        return best_return(data.returns[train], data.lengths[train], BEST_FRACTION)

    @property
    def carries_state(self) -> bool:
        """Whether the policy acts from a carried state."""
        return bool(self.config.carry)

    def describe(self) -> str:
        """Return the data, their parts, and how they are read, in two lines."""
        config = self.config
        how = f"streams, {config.window} steps at a time" if config.carry else f"windows of {config.window}"
        target = "" if config.tokens == "observation" else f", to reach a return of {self.target_return:,.1f}"
        return (
            f"{self.episodes.describe()}\n"
            f"{len(self.val_episodes):,} of them to validate on; {config.tokens} tokens, {how}{target}"
        )

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with attention bounded where its state is carried.

        Carried attention whose window is unset sees as far as gradients reach, `DecisionsConfig.window`
        steps: without a bound, streams would fill the memory.

        Raises:
            ValueError: it asks for an unbounded window with a carried state, or for what policies lack: a
                vocabulary or a tied embedding.
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
        """Return a new policy for this data, with their statistics.

        Raises:
            ValueError: an episode is longer than the table of times.
        """
        model = DecisionModel(self.decision_config(config))
        steps = self._train_steps
        observations = self.episodes.observations[steps]
        deviation = observations.std(axis=0, dtype=np.float64)
        bound = None
        if not self.episodes.is_discrete:
            # At least 1, the range of most environments, which the data need not reach.
            bound = torch.from_numpy(np.abs(self.episodes.actions[steps]).max(axis=0).clip(min=1))
        model.set_statistics(
            torch.from_numpy(observations.mean(axis=0, dtype=np.float64)),
            torch.from_numpy(np.where(deviation < MIN_DEVIATION, 1.0, deviation)),
            bound,
        )
        return model

    def decision_config(self, config: ModelConfig) -> DecisionConfig:
        """Return what a policy with these blocks is built from.

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
        return DecisionConfig(
            trunk=config,
            observation_size=data.observation_size,
            action_size=data.num_actions if data.is_discrete else data.action_size,
            discrete=data.is_discrete,
            tokens=settings.tokens or "joined",
            window=0 if settings.carry else settings.window,
            max_steps=timesteps,
            return_scale=float(np.abs(self._returns[self._train_steps]).max()) or 1.0,
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
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None
    ) -> dict[str, float]:
        """Measure `model` on the held-out episodes, read as in training, less the streams' odd last steps.

        Args:
            model: what `make_model` made.
            max_tokens: stop after the block of steps that holds this one; 0 for all.
            tell: told how much is done.

        Returns:
            val_loss: squared error of an action's numbers, or nats an action.
            accuracy: of discrete actions, how many are the likeliest.
            val_tokens: how many actions there are.

        Raises:
            ValueError: `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        total, right, count = 0.0, 0, 0
        state: ModelState | None = None
        with evaluation_mode(model), torch.inference_mode():
            for batch in self.evaluation_batches():
                batch = batch.to(device_of(model))
                predicted, state = model(batch.inputs, None if batch.fresh else state, reset=batch.reset)
                total += self._errors(predicted, batch.targets).double().mean().item() * batch.num_targets
                if self.episodes.is_discrete:
                    right += int((predicted.argmax(dim=-1) == batch.targets).sum())
                count += batch.num_targets
                if tell is not None:
                    tell(min(1.0, count / (max_tokens or self._num_evaluated)))
                if max_tokens and count >= max_tokens:
                    break
        accuracy = {"accuracy": right / count} if self.episodes.is_discrete else {}
        return {"val_loss": total / count, **accuracy, "val_tokens": count}

    @property
    def _num_evaluated(self) -> int:
        """Steps of the held-out episodes."""
        return int(self.episodes.lengths[self.val_episodes].sum())

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the held-out episodes' steps, in streams or in windows side by side; always the same."""
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
        """Return each number's squared error, or each action's cross-entropy, in float32 at least."""
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
        """Return the training steps, episode by episode in a random order, for the pass of this number."""
        keys = Draws(seed, "train", number).integers(1 << 62, len(self.train_episodes))
        return self._steps_of(self.train_episodes[np.argsort(keys, kind="stable")])

    def _steps_of(self, episodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices of the steps of these episodes, one episode after the other."""
        starts, ends = self.episodes.starts[episodes], self.episodes.ends[episodes]
        return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])

    def _gather(self, at: NDArray[np.int64], *, fresh: bool) -> Batch:
        """Return the steps at these indices, (B, T)."""
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
            starts[:, 0] = False  # the state is empty, and a call without resets is faster
        reset = torch.from_numpy(starts) if starts.any() else None
        return Batch(inputs, torch.from_numpy(data.actions[at]), fresh, reset)


def best_return(returns: NDArray[np.float64], lengths: NDArray[np.int64], share: float) -> float:
    """Return the mean return of the best episodes, each weighted by its steps.

        sum(w R) / sum(w),   w[k] = how many of the first `share` of all steps are k's, the best episode first

    Args:
        returns, lengths: of each episode.
        share: of all steps, in (0, 1].
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
