"""A policy at work: one action after the other, in one environment or a batch of them."""

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


class Policy:
    """A decision model with what it has to remember: the return still to come, its last action, its state.

        action[t] = model(R[0 .. t], s[0 .. t], a[-1 .. t-1]) at t,     R[t] = target - sum(r[0 .. t-1])

    Where the model's `window` is 0, the state after the last step is carried, so that with a recurrent mixer
    an action takes the same time and memory however long the episode lasts. Otherwise the last `window` steps
    are kept and read anew for every action, as Decision Transformer does. Either way the actions are those of
    one call over the episode so far, or over its last `window` steps.

    The model runs in evaluation mode, as in `generate`, and is read once, by a `Decoder`: see there what may
    change in it later. Of discrete actions the likeliest is taken.

    Args:
        model: what chooses.
        target_return: return to reach from each episode's start on; None is the model's own.

    Raises:
        TypeError: model is no DecisionModel, or target_return no number.
        ValueError: no return is known, it is not finite, or one is given to a model that is conditioned on
            none.

    Example:
        >>> from minrnn.models import DecisionConfig, DecisionModel, ModelConfig
        >>> config = DecisionConfig(ModelConfig(d_model=8), observation_size=3, action_size=2)
        >>> policy = Policy(DecisionModel(config), target_return=100.0)
        >>> policy.act([0.1, 0.2, 0.3]).shape
        torch.Size([2])
        >>> policy.act([0.1, 0.2, 0.3], reward=1.5).shape  # what the action before has earned
        torch.Size([2])
    """

    def __init__(self, model: DecisionModel, *, target_return: float | None = None) -> None:
        config = getattr(model, "config", None)  # also where the model is wrapped, as by torch.compile
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
            observation: `(S,)`, or `(B, S)` of B environments: anything that torch makes a tensor of.
            reward: what the action before has earned, a number or `(B,)`; of an episode's first step it is
                not looked at. Needed after that by models that are conditioned on a return.
            reset: bool or `(B,)`: where True, this is an episode's first step, and what came before is
                forgotten. The first call of all starts every episode; B may change where all start.

        Returns:
            Actions `(A,)` or `(B, A)` of the model's dtype; discrete: `()` or `(B,)`, int64. On the CPU.

        Raises:
            TypeError: an argument is none that torch makes a tensor of.
            ValueError: a shape does not fit, a number is not finite, a reward is missing, or an episode lasts
                longer than the model's `max_steps`.
        """
        with torch.inference_mode():  # a tenth faster than without gradients alone
            observations, single = self._read_observation(observation)
            actions = self._act(observations, reward, self._read_reset(reset, len(observations)))
        actions = actions.clone()  # one that may be computed with as any other
        return actions[0].cpu() if single else actions.cpu()

    @property
    def state(self) -> ModelState | Steps | None:
        """What is carried to the next action: the model's state, or the last steps; None before the first."""
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
        # A copy: it is remembered, and its owner may write the next observation into the same memory.
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
        """Return which rows begin an episode, `(B,)`; None is none of them."""
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
                f"act: observation must be of {known} environments until all start anew, got {batch}"
            )
        return starts

    def _read_reward(self, reward: Any, starts: Tensor | None) -> Tensor:
        if reward is None:
            if self.model.config.conditioned:
                raise ValueError("act: reward must be given after an episode's first step")
            reward = 0.0
        assert self._memory is not None
        shape = self._memory.times.shape
        rewards = _as_tensor("reward", reward, torch.float64, self._memory.times.device)
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
    """Make a tensor of an argument of `act`, of whatever torch makes one of, and of NumPy's flipped views."""
    strides = getattr(value, "strides", None)
    if isinstance(strides, tuple) and min(strides, default=0) < 0:
        value = value.copy()
    try:
        return torch.asarray(value, dtype=dtype, device=device, copy=copy, requires_grad=False)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"act: {name} must be what torch makes a tensor of, got {type(value).__name__} ({reason})"
        ) from error


@dataclass(frozen=True)
class _Memory:
    """What is known before an observation comes."""

    returns: Tensor
    """(B,) float64, a sum of thousands of rewards: the returns still to come."""
    previous: Tensor
    """(B, A), or (B,) of discrete actions: the last."""
    times: Tensor
    """(B,) int64: steps since each episode began."""
    context: ModelState | Steps | None
    """The carried state, or the steps that are read anew; None where there is none."""
    starts: Tensor | None = None
    """(B,) bool: rows whose context is another episode's; None: no row's is."""

    @classmethod
    def at_start(cls, model: DecisionModel, observations: Tensor, target: float | None) -> Self:
        """Every row begins an episode."""
        config, B, device = model.config, len(observations), observations.device
        returns = torch.full((B,), target or 0.0, dtype=torch.float64, device=device)
        if config.discrete:
            previous = torch.full((B,), NOTHING_DONE, device=device)
        else:
            previous = observations.new_zeros(B, config.action_size)
        return cls(returns, previous, torch.zeros(B, dtype=torch.int64, device=device), None)

    def after(self, rewards: Tensor, starts: Tensor | None, target: float | None) -> Self:
        """The rewards are in; the rows that are marked begin an episode."""
        returns, previous, times = self.returns - rewards, self.previous, self.times + 1
        if starts is not None:
            returns = returns.masked_fill(starts, target or 0.0)
            marked = starts.view(-1, *[1] * (previous.dim() - 1))
            previous = previous.masked_fill(marked, 0 if previous.is_floating_point() else NOTHING_DONE)
            times = times.masked_fill(starts, 0)
        return type(self)(returns, previous, times, self.context, starts)

    def now(self, observations: Tensor) -> Steps:
        """Return the present step of every row, T = 1."""
        parts = (self.returns, observations, self.previous, self.times)
        return Steps(*(part.unsqueeze(1) for part in parts))


def _choose(decoder: Decoder, memory: _Memory, observations: Tensor) -> tuple[Tensor, _Memory]:
    """Return the actions, `(B, A)` or `(B,)`, and what is remembered after them."""
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
    """Return the last steps of the longest of the present episodes, `window` at most."""
    if context is None:
        return now
    keep = min(window, int(now.times.max()) + 1)
    return Steps(*(torch.cat([old, new], dim=1)[:, -keep:] for old, new in zip(context, now, strict=True)))


def _starts_within(steps: Steps) -> Tensor | None:
    """Mark the episodes' first steps, `(B, T)`; None where there are none but at the very start."""
    starts = steps.times == 0
    starts[:, 0] = False  # nothing is there to forget, and a call without resets is faster
    return starts if starts.any() else None


def _are_finite(x: Tensor) -> bool:
    """Whether all numbers are; their sum tells so in a third of the time, unless it overflows itself."""
    return isfinite(x.sum().item()) or bool(x.isfinite().all())
