"""Inference of policies: one action at a time, in one environment or a batch of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, Self

import torch
from torch import Tensor

from minrnn.mixers.arguments import read_number
from minrnn.models.decision import NOTHING_DONE, DecisionConfig, DecisionModel, Steps
from minrnn.models.decoder import Decoder
from minrnn.models.sequence import ModelState
from minrnn.ops.devices import widest_float


class Policy:
    """A decision model together with its memory: return-to-go, last action, and state or context.

        action[t] = model(R[0 .. t], s[0 .. t], a[-1 .. t-1]) at t,     R[t] = target - sum(r[0 .. t-1])

    If the model's `window` is 0, the state after the last step is carried, so that with a recurrent mixer
    time and memory of an action do not depend on the episode's length. Otherwise the last `window` steps are
    kept and read again for every action, as Decision Transformer does. Either way the actions equal those of
    one call over the episode so far, or over its last `window` steps.

    The model runs in evaluation mode, as in `generate`, through a `Decoder`, which documents the changes that
    the model may undergo later. Of discrete actions the most likely one is chosen.

    Args:
        model: the policy's model.
        target_return: return to reach from the start of each episode; None is the model's own.

    Raises:
        TypeError: model is not a DecisionModel, or target_return not a number.
        ValueError: no return is given or known, it is not finite, or it is given to a model that is not
            conditioned on a return.

    Example:
        >>> from minrnn.models import DecisionConfig, DecisionModel, ModelConfig
        >>> config = DecisionConfig(ModelConfig(d_model=8), observation_size=3, action_size=2)
        >>> policy = Policy(DecisionModel(config), target_return=100.0)
        >>> policy.act([0.1, 0.2, 0.3]).shape
        torch.Size([2])
        >>> policy.act([0.1, 0.2, 0.3], reward=1.5).shape  # the reward of the previous action
        torch.Size([2])
    """

    def __init__(self, model: DecisionModel, *, target_return: float | None = None) -> None:
        config = getattr(model, "config", None)  # works for wrapped models too, as by torch.compile
        if not isinstance(config, DecisionConfig):
            raise TypeError(f"Policy: model must be a DecisionModel, got {type(model).__name__}")
        if target_return is not None:
            target_return = read_number("Policy", "target_return", target_return)
        if target_return is not None and not config.conditioned:
            raise ValueError(
                f"Policy: target_return must be left out for a policy that is conditioned on no return, got "
                f"{target_return}"
            )
        target = config.target_return if target_return is None else target_return
        if target is None and config.conditioned:
            raise ValueError("Policy: target_return must be given, as the model has none of its own")
        self.model = model
        self.decoder = Decoder(model)
        self.target_return = target
        self._memory: _Memory | None = None

    def act(self, observation: Any, reward: Any = None, *, reset: Any = None) -> Tensor:
        """Choose the next action of one episode, or of a batch of them.

        Args:
            observation: `(S,)`, or `(B, S)` of B environments: a tensor, or anything that torch converts to
                one.
            reward: reward of the previous action, a number or `(B,)`; ignored at an episode's first step, and
                required at later ones by models that are conditioned on a return.
            reset: bool or `(B,)`: True at an episode's first step, which discards all earlier steps. The
                first call starts every episode; B may change when all episodes start.

        Returns:
            Actions `(A,)` or `(B, A)` of the model's dtype; discrete: `()` or `(B,)`, int64. On the CPU.

        Raises:
            TypeError: an argument cannot be converted to a tensor.
            ValueError: a shape does not fit, a number is not finite, a reward is missing, or an episode is
                longer than the model's `max_steps`.
        """
        with torch.inference_mode():  # a tenth faster than without gradients alone
            observations, single = self._read_observation(observation)
            actions = self._act(observations, reward, self._read_reset(reset, len(observations)))
        actions = actions.clone()  # an ordinary tensor, not one of inference mode
        return actions[0].cpu() if single else actions.cpu()

    @property
    def state(self) -> ModelState | Steps | None:
        """The model's state or the last steps, carried to the next action; None before the first action."""
        return None if self._memory is None else self._memory.context

    def _act(self, observations: Tensor, reward: Any, starts: Tensor | None) -> Tensor:
        memory = self._memory
        if memory is None or (starts is not None and bool(starts.all())):
            memory = _Memory.at_start(self.model, observations, self.target_return)
        else:
            memory = memory.after(self._read_reward(reward, starts), starts, self.target_return)
        actions, self._memory = _choose(self.decoder, memory, observations)
        return actions

    def _read_observation(self, observation: Any) -> tuple[Tensor, bool]:
        like = self.model.observation_mean
        # A copy, because it is kept, and the caller may write the next observation into the same memory.
        observations = _as_tensor("observation", observation, like.dtype, like.device, copy=True)
        single = observations.dim() == 1
        rows = observations.unsqueeze(0) if single else observations
        size = self.model.config.observation_size
        if rows.dim() != 2 or rows.shape[1] != size or len(rows) == 0:
            raise ValueError(
                f"act: observation must be ({size},) or (B, {size}), got {tuple(observations.shape)}"
            )
        if not _are_finite(rows):
            raise ValueError("act: observation must be finite, got infinity or NaN")
        return rows, single

    def _read_reset(self, reset: Any, batch: int) -> Tensor | None:
        """Return which rows begin an episode, `(B,)`; None if none does."""
        known = batch if self._memory is None else len(self._memory.times)
        starts = None
        if reset is not None and reset is not False:
            starts = _as_tensor("reset", reset, None, self.model.observation_mean.device)
            if starts.dtype != torch.bool or starts.shape not in ((), (batch,)):
                raise ValueError(
                    f"act: reset must be bool, one or ({batch},), got {starts.dtype} {tuple(starts.shape)}"
                )
            starts = starts.expand(batch) if starts.any() else None
        if known != batch and (starts is None or not starts.all()):
            raise ValueError(
                f"act: observation must be of {known} environments until all episodes restart, got {batch}"
            )
        return starts

    def _read_reward(self, reward: Any, starts: Tensor | None) -> Tensor:
        if reward is None:
            if self.model.config.conditioned:
                raise ValueError("act: reward must be given after an episode's first step")
            reward = 0.0
        assert self._memory is not None
        shape = self._memory.times.shape
        rewards = _as_tensor("reward", reward, self._memory.returns.dtype, self._memory.returns.device)
        if rewards.shape not in ((), shape):
            raise ValueError(f"act: reward must be one or {tuple(shape)}, got {tuple(rewards.shape)}")
        if starts is not None:
            rewards = rewards.expand(shape).masked_fill(starts, 0.0)
        if not _are_finite(rewards):
            raise ValueError("act: reward must be finite, got infinity or NaN")
        return rewards


def _as_tensor(
    name: str, value: Any, dtype: torch.dtype | None, device: torch.device, *, copy: bool | None = None
) -> Tensor:
    """Convert an argument of `act` to a tensor, including NumPy's flipped views, which torch refuses."""
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and min(strides, default=0) < 0:
        value = value.copy()
    try:
        return torch.asarray(value, dtype=dtype, device=device, copy=copy, requires_grad=False)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"act: {name} must be convertible to a tensor, got {type(value).__name__} ({reason})"
        ) from error


@dataclass(frozen=True)
class _Memory:
    """A policy's memory between two observations."""

    returns: Tensor
    """(B,) in the device's widest dtype, as it sums thousands of rewards: the returns-to-go."""
    previous: Tensor
    """(B, A), or (B,) for discrete actions: the last actions."""
    times: Tensor
    """(B,) int64: steps since each episode began."""
    context: ModelState | Steps | None
    """The carried state, or the last steps; None at the start."""
    starts: Tensor | None = None
    """(B,) bool: rows whose context belongs to an earlier episode; None: no row."""

    @classmethod
    def at_start(cls, model: DecisionModel, observations: Tensor, target: float | None) -> Self:
        """Return the memory before the first step of every row."""
        config, B, device = model.config, len(observations), observations.device
        returns = torch.full((B,), target or 0.0, dtype=widest_float(device), device=device)
        if config.discrete:
            previous = torch.full((B,), NOTHING_DONE, device=device)
        else:
            previous = observations.new_zeros(B, config.action_size)
        return cls(returns, previous, torch.zeros(B, dtype=torch.int64, device=device), None)

    def after(self, rewards: Tensor, starts: Tensor | None, target: float | None) -> Self:
        """Return the memory after the rewards; rows in `starts` begin an episode."""
        returns, previous, times = self.returns - rewards, self.previous, self.times + 1
        if starts is not None:
            returns = returns.masked_fill(starts, target or 0.0)
            marked = starts.view(-1, *[1] * (previous.dim() - 1))
            previous = previous.masked_fill(marked, 0 if previous.is_floating_point() else NOTHING_DONE)
            times = times.masked_fill(starts, 0)
        return type(self)(returns, previous, times, self.context, starts)

    def now(self, observations: Tensor) -> Steps:
        """Return the current step of every row, T = 1."""
        parts = (self.returns, observations, self.previous, self.times)
        return Steps(*(part.unsqueeze(1) for part in parts))


def _choose(decoder: Decoder, memory: _Memory, observations: Tensor) -> tuple[Tensor, _Memory]:
    """Return the actions, `(B, A)` or `(B,)`, and the memory after them."""
    now, config = memory.now(observations), decoder.model.config
    assert isinstance(config, DecisionConfig)
    context: ModelState | Steps
    if config.window:
        assert memory.context is None or isinstance(memory.context, Steps)
        context = _recent(memory.context, now, config.window)
        outputs, _ = decoder.prefill(context, reset=_starts_within(context))
    else:
        assert not isinstance(memory.context, Steps)
        if memory.starts is None:
            outputs, context = decoder.step(now, memory.context)
        else:
            outputs, context = decoder.prefill(now, memory.context, reset=memory.starts.unsqueeze(1))
    if not _are_finite(outputs):
        raise RuntimeError("act: the model's actions are not finite; its training has diverged")
    actions = outputs.argmax(dim=-1) if config.discrete else outputs
    return actions, _Memory(memory.returns, actions, memory.times, context)


def _recent(context: Steps | None, now: Steps, window: int) -> Steps:
    """Return the last steps of the longest current episode, at most `window`."""
    if context is None:
        return now
    keep = min(window, int(now.times.max()) + 1)
    return Steps(*(torch.cat([old, new], dim=1)[:, -keep:] for old, new in zip(context, now, strict=True)))


def _starts_within(steps: Steps) -> Tensor | None:
    """Mark the episodes' first steps, `(B, T)`; None if there are none after the first step."""
    starts = steps.times == 0
    starts[:, 0] = False  # there is no earlier state, and a call without resets is faster
    return starts if starts.any() else None


def _are_finite(x: Tensor) -> bool:
    """Whether all numbers are finite. Their sum shows it in a third of the time, unless it overflows."""
    return isfinite(x.sum().item()) or bool(x.isfinite().all())
