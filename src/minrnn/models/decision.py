"""Return-conditioned policies: models that predict an action from return-to-go, observation and last action.

With the mixer attention this is a Decision Transformer, with s4d Decision S4, with mamba Decision Mamba, with
aaren Decision Aaren; other mixers are minGRU, minLSTM, GRU and LSTM. `Policy` in `acting.py` runs one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.files import (
    NoEffect,
    check_choice,
    check_kind,
    check_types,
    convert,
    require,
    warn_without_effect,
)
from minrnn.mixers.mixer import check_reset
from minrnn.models.dropout import Dropout
from minrnn.models.sequence import (
    EMBEDDING_STD,
    ModelConfig,
    ModelState,
    check_state,
    make_blocks,
    make_norm,
    run_blocks,
)
from minrnn.ops.recurrence import check_tensor
from minrnn.ops.transforms import is_plain, is_traced

TOKENS = {"interleaved": 3, "joined": 1, "observation": 1}
"""Encodings of a step, and the number of their tokens: see `DecisionConfig.tokens`."""

LARGEST = {"observation_size": 1 << 24, "action_size": 1 << 16, "window": 1 << 24, "max_steps": 1 << 24}
"""Upper limits of the policy's sizes; see `sequence.LARGEST` for those of its trunk."""

NOTHING_DONE = -1
"""The discrete action before an episode's first step; for continuous actions, it is all zeros."""

WITHOUT_EFFECT = tuple(
    NoEffect(name, "tokens", lambda s: s["tokens"] == "observation")
    for name in ("return_scale", "target_return")
)
"""Fields of DecisionConfig that have no effect in a policy that reads observations alone."""


class Steps(NamedTuple):
    """The inputs of a policy at T steps of B episodes."""

    returns: Tensor
    """(B, T): return-to-go, including this step's reward, not scaled."""
    observations: Tensor
    """(B, T, S): as the environment returns them, not standardized."""
    previous: Tensor
    """(B, T, A): the previous action, zeros at the first step; discrete: (B, T) int64, NOTHING_DONE at the
    first step."""
    times: Tensor
    """(B, T) int64: steps since the episode began."""

    def to(self, device: torch.device) -> Steps:
        """Return the steps on `device`."""
        return Steps(*(part.to(device) for part in self))


@dataclass(frozen=True)
class DecisionConfig:
    """Configuration of a DecisionModel.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range or unknown.
    """

    trunk: ModelConfig
    """The blocks; its vocabulary and head are not used."""
    observation_size: int
    """Size of an observation, S."""
    action_size: int
    """Size of an action, A; for discrete actions, their number."""
    discrete: bool = False
    """Whether an action is one of `action_size` choices or a vector of `action_size` numbers."""
    tokens: str = "joined"
    """Encoding of a step. interleaved: three tokens, the previous action, the return-to-go and the
    observation, whose output is the action; joined: one token, their sum; observation: one token of the
    observation alone, for behavior cloning."""
    window: int = 0
    """Window in steps that is read again for every action; 0: the whole episode, in a carried state."""
    max_steps: int = 0
    """Steps with a learned time embedding, which is also the longest episode; 0: no embedding, no limit."""
    return_scale: float = 1.0
    """Divisor of returns."""
    target_return: float | None = None
    """Default target return of the policy."""
    environment: str | None = None
    """Name of the environment that it was trained for, if known."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("observation_size", "action_size"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("window", "max_steps"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        for name, most in LARGEST.items():
            require(self, name, getattr(self, name) <= most, f"at most {most}")
        check_choice(self, "tokens", TOKENS)
        require(self, "return_scale", 0 < self.return_scale < math.inf, "positive and finite")
        finite = self.target_return is None or math.isfinite(self.target_return)
        require(self, "target_return", finite, "finite")
        if self.trunk.tie_embeddings:
            raise ValueError(
                "DecisionConfig: trunk.tie_embeddings must be off, as there are no tokens to embed"
            )
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)

    @property
    def conditioned(self) -> bool:
        """Whether actions depend on a target return."""
        return self.tokens != "observation"

    def to_dict(self) -> dict[str, Any]:
        """Return every field and its value, as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from the result of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: a key is not a field (the message names the nearest), or a required field is missing.
        """
        return convert(values, cls)


class DecisionModel(nn.Module):
    """A causal model of episodes, which predicts an action at every step.

        embed -> norm -> blocks -> norm -> head
        A, R, S = W_a a[t-1] / bound + b_a, W_r R[t] / scale + b_r, W_s (s[t] - mean) / std + b_s
        tokens  = norm(A + time[t]), norm(R + time[t]), norm(S + time[t])       interleaved
        token   = norm(A + R + S + time[t])                                     joined
        token   = norm(S + time[t])                                             observation
        action  = bound * tanh(W y[t] + b)                                      continuous
        logits  = W y[t] + b                                                    discrete

    R[t] is the return-to-go, a[t-1] the previous action, y the trunk's output at the token of the
    observation; time[t] is present if `max_steps` is positive. The interleaved tokens have the order of
    Decision Transformer, repeated (R, s, a), started one token earlier: each step is three tokens wherever a
    sequence starts, and an episode's start is a reset of the step's first token. Means, deviations and bounds
    are buffers, saved with the weights; a task computes them from its data.

    A step is a call with T = 1. However an episode is divided into calls, its actions equal those of one
    call. Its length is not limited, unless by `max_steps`.

    Args:
        config: the configuration.

    Raises:
        ValueError: an option's value is not valid for the mixer.

    Source: Chen et al., "Decision Transformer" (arXiv 2106.01345), section 3 and appendix A; the norm after
    the embedding and the head as in the code published with it.
    """

    observation_mean: Tensor
    observation_std: Tensor
    action_bound: Tensor

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        check_kind("DecisionModel", "config", config, DecisionConfig)
        self.config = config
        width, conditioned = config.trunk.d_model, config.conditioned
        self.embed_observation = nn.Linear(config.observation_size, width)
        self.embed_return = nn.Linear(1, width) if conditioned else None
        self.embed_previous = nn.Linear(config.action_size, width) if conditioned else None
        self.embed_time = nn.Embedding(config.max_steps, width) if config.max_steps else None
        self.embed_norm = make_norm(config.trunk)
        self.dropout = Dropout(config.trunk.dropout)
        self.blocks = make_blocks(config.trunk)
        self.norm = make_norm(config.trunk)
        self.head = nn.Linear(width, config.action_size)
        if self.embed_time is not None:
            # Near zero, so that times that no episode of the data reaches add little noise.
            nn.init.normal_(self.embed_time.weight, std=EMBEDDING_STD)
        self.register_buffer("observation_mean", torch.zeros(config.observation_size))
        self.register_buffer("observation_std", torch.ones(config.observation_size))
        self.register_buffer("action_bound", torch.ones(config.action_size))

    def forward(
        self, steps: Steps, state: ModelState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Predict the action of each step from that step and those before it.

        Args:
            steps: T >= 1 steps of B episodes.
            state: state returned by an earlier call; None is the empty state.
            reset: `(B, T)`, bool; where True, the state is cleared before the step (an episode starts there).

        Returns:
            Actions `(B, T, A)`, or logits `(B, T, A)` of the A discrete ones, and the state after the last
            step.

        Raises:
            TypeError: reset is not bool, or times or discrete actions are not integers.
            ValueError: a shape is not as above, the state is of another model, a time has no embedding, or
                (on the CPU) a previous discrete action is out of range.
        """
        self.check_steps(steps)
        check_state("DecisionModel", state, len(self.blocks), steps.times.shape[0])
        check_reset("DecisionModel", reset, tuple(steps.times.shape))
        count = TOKENS[self.config.tokens]
        x = self._embed(self.embedding_inputs(steps), steps.times)
        x = self.dropout(self.embed_norm(x))  # (B, count * T, d_model)
        x, state = run_blocks(self.blocks, x, state, reset=_first_of(count, reset))
        return self.to_actions(self.head(self.norm(x[:, count - 1 :: count]))), state

    def set_statistics(self, mean: Tensor, std: Tensor, bound: Tensor | None = None) -> None:
        """Set the statistics of the data.

        Args:
            mean, std: `(S,)`, mean and standard deviation of observations; std positive.
            bound: `(A,)`, positive: continuous actions lie between -bound and bound.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: a shape differs, or a number is not finite or not positive; then nothing is changed.
        """
        given = (
            ("mean", mean, self.observation_mean),
            ("std", std, self.observation_std),
            ("bound", bound, self.action_bound),
        )
        known = [(name, numbers, buffer) for name, numbers, buffer in given if numbers is not None]
        for name, numbers, buffer in known:
            _check_statistic(name, numbers, buffer)
        for _, numbers, buffer in known:
            buffer.copy_(numbers)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """The names of the linear layers that embed a step, in the order of its tokens."""
        if self.config.conditioned:
            return "embed_previous", "embed_return", "embed_observation"
        return ("embed_observation",)

    def embedding_inputs(self, steps: Steps) -> dict[str, Tensor]:
        """Return the input of each of `embeddings`, `(B, T, ...)`: scaled and standardized numbers."""
        observations = steps.observations.to(self.observation_mean.dtype)
        observations = (observations - self.observation_mean) / self.observation_std
        if not self.config.conditioned:
            return {"embed_observation": observations}
        returns = (steps.returns.to(observations.dtype) / self.config.return_scale).unsqueeze(-1)
        found = (self._previous(steps.previous), returns, observations)
        return dict(zip(self.embeddings, found, strict=True))

    def to_actions(self, y: Tensor) -> Tensor:
        """Convert the head's outputs to actions: bounded if continuous, unchanged logits if discrete."""
        return y if self.config.discrete else self.action_bound * y.tanh()

    def _embed(self, inputs: dict[str, Tensor], times: Tensor) -> Tensor:
        """Return the tokens of all steps, `(B, count * T, d_model)`."""
        parts = [getattr(self, name)(numbers) for name, numbers in inputs.items()]
        time = None if self.embed_time is None else self.embed_time(times)
        if self.config.tokens == "interleaved":
            tokens = torch.stack(parts, dim=2)  # (B, T, 3, d_model)
            return (tokens if time is None else tokens + time.unsqueeze(2)).flatten(1, 2)
        token = sum(parts[1:], start=parts[0])
        return token if time is None else token + time

    def _previous(self, previous: Tensor) -> Tensor:
        """Return the previous actions as vectors `(B, T, A)`, one-hot if discrete."""
        if not self.config.discrete:
            return previous.to(self.action_bound.dtype) / self.action_bound
        chosen = functional.one_hot(previous.clamp(min=0), self.config.action_size)
        return (chosen * (previous != NOTHING_DONE).unsqueeze(-1)).to(self.action_bound.dtype)

    def check_steps(self, steps: Steps) -> None:
        """Raise unless `steps` are valid inputs; the errors are those of `forward`."""
        config = self.config
        if not isinstance(steps, Steps):
            raise TypeError(f"DecisionModel: steps must be Steps, got {type(steps).__name__}")
        for name, found in zip(Steps._fields, steps, strict=True):
            check_tensor("DecisionModel", name, found)
        B, T = steps.observations.shape[:2] if steps.observations.dim() == 3 else (0, 0)
        action = () if config.discrete else (config.action_size,)
        shapes = ((B, T), (B, T, config.observation_size), (B, T, *action), (B, T))
        for name, shape, found in zip(Steps._fields, shapes, steps, strict=True):
            if found.shape != shape or T == 0:
                text = ", ".join(("B", "T", *map(str, shape[2:])))
                raise ValueError(
                    f"DecisionModel: {name} must be ({text}) with T >= 1, got {tuple(found.shape)}"
                )
        self._check_integers(steps)

    def _check_integers(self, steps: Steps) -> None:
        """Raise if an index into an embedding table is out of range.

        Times are checked on every device, previous actions where reading them needs no synchronization.
        """
        config = self.config
        for name, used in (("times", config.max_steps), ("previous", config.discrete and config.conditioned)):
            found = getattr(steps, name)
            if used and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
                raise TypeError(f"DecisionModel: {name} must be int64, got {found.dtype}")
        if steps.times.shape[0] == 0 or is_traced() or steps.times.is_meta:  # no values to check
            return
        if config.max_steps:
            first, last = _range(steps.times)
            if first < 0:
                raise ValueError(f"DecisionModel: times must be 0 or more, got {first}")
            if last >= config.max_steps:
                raise ValueError(
                    f"DecisionModel: an episode must end within {config.max_steps} steps, for as many have "
                    f"an embedding of their time, got step {last + 1}; train with more, or with none "
                    "(max_steps = 0)"
                )
        if config.discrete and config.conditioned and steps.previous.is_cpu and is_plain(steps.previous):
            low, high = _range(steps.previous)
            if low < NOTHING_DONE or high >= config.action_size:
                raise ValueError(
                    f"DecisionModel: previous must lie in {NOTHING_DONE} (none) .. {config.action_size - 1}, "
                    f"got {low} .. {high}"
                )


def _check_statistic(name: str, numbers: Tensor, buffer: Tensor) -> None:
    """Raise unless the numbers fit into the buffer: finite in its dtype, deviations and bounds positive."""
    check_tensor("set_statistics", name, numbers)
    if numbers.shape != buffer.shape:
        raise ValueError(
            f"set_statistics: {name} must be of shape {tuple(buffer.shape)}, got {tuple(numbers.shape)}"
        )
    kept = numbers.to(buffer.dtype)
    if not kept.isfinite().all():
        raise ValueError(f"set_statistics: {name} must be finite, got infinity or NaN")
    if name != "mean" and not (kept > 0).all():
        raise ValueError(f"set_statistics: {name} must be positive, got {kept.min().item()}")


def _range(x: Tensor) -> tuple[int, int]:
    """Return the smallest and the largest of some integers."""
    if x.numel() == 1:  # a single step, where aminmax takes a noticeable part of the time
        return (only := int(x)), only
    low, high = x.aminmax()
    return int(low), int(high)


def _first_of(count: int, reset: Tensor | None) -> Tensor | None:
    """Move the resets of steps `(B, T)` to each step's first token, `(B, count * T)`."""
    if reset is None or count == 1:
        return reset
    return functional.pad(reset.unsqueeze(-1), (0, count - 1)).flatten(1)
