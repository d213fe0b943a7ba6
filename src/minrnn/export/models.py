"""minrnn's models as modules of tensors with names, as exported programs need them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minrnn.export.program import FREE, Axes, Carried, Port
from minrnn.export.states import Layout, check_size
from minrnn.models.acting import Policy
from minrnn.models.decision import NOTHING_DONE, DecisionModel, Steps
from minrnn.models.evaluation import call_in_evaluation
from minrnn.models.sequence import SequenceModel


class Interface(NamedTuple):
    """A module of tensors, its inputs, and the names of its outputs."""

    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    metadata: dict[str, Any]


def interface_of(model: nn.Module | Policy, form: str, batch: int | None) -> Interface:
    """Return the interface of a model of minrnn's.

    Args:
        model: a SequenceModel, a DecisionModel or a Policy.
        form: "step" or "sequence".
        batch: the batch; None: any.

    Raises:
        TypeError: the model is another module.
        ValueError: it cannot be exported.
    """
    axis = "batch" if batch is None else batch
    if isinstance(model, SequenceModel):
        return _language_model(model, form, axis)
    if isinstance(model, DecisionModel):
        model = Policy(model)
    if isinstance(model, Policy):
        return _policy(model, form, axis)
    raise TypeError(
        f"export_{form}: inputs must be given for a module that is no model of minrnn's, got "
        f"{type(model).__name__} without"
    )


def _language_model(model: SequenceModel, form: str, batch: int | str) -> Interface:
    layout = Layout(model.blocks, next(model.parameters()))
    axes: Axes = (batch,) if form == "step" else (batch, "time")
    count = model.config.vocab_size
    tokens = Port("tokens", _ids(count, axes), axes)
    module = _LanguageModel(model, layout, form)
    return _with_state(module, model, layout, [tokens], ["logits"], batch, {"kind": "language model"})


class _LanguageModel(nn.Module):
    """(tokens, *state) -> (logits, *state)."""

    def __init__(self, model: SequenceModel, layout: Layout, form: str) -> None:
        super().__init__()
        self.model, self.layout, self.is_step = model, layout, form == "step"

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        tokens = tokens.unsqueeze(1) if self.is_step else tokens
        logits, after = self.model(tokens, self.layout.separate(state))
        return logits.squeeze(1) if self.is_step else logits, *self.layout.stack(after)


def _policy(policy: Policy, form: str, batch: int | str) -> Interface:
    model, config = policy.model, policy.model.config
    if config.window:
        raise ValueError(
            f"export: a policy must carry a state, got one that reads its last {config.window} steps again "
            "for every action"
        )
    layout = Layout(model.blocks, next(model.parameters()))
    metadata = {
        "kind": "policy",
        "actions": {"discrete": config.discrete, "size": config.action_size},
        "environment": config.environment,
        "target_return": policy.target_return,
        "longest_episode": config.max_steps or None,
    }
    if form == "step":
        inputs = _step_inputs(model, policy.target_return or 0.0, batch)
        outputs = ["actions", *(port.carried.output for port in inputs if port.carried is not None)]
        return _with_state(_PolicyStep(model, layout), model, layout, inputs, outputs, batch, metadata)
    inputs = _sequence_inputs(model, batch)
    return _with_state(_PolicySequence(model, layout), model, layout, inputs, ["actions"], batch, metadata)


class _PolicyStep(nn.Module):
    """(obs, reward, return, previous, time, *state) -> (actions, return, previous, time, *state).

    A policy without a return or without times has no such inputs and outputs.
    """

    def __init__(self, model: DecisionModel, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.conditioned, self.timed = model.config.conditioned, bool(model.config.max_steps)

    def forward(self, obs: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        config, rest, memory = self.model.config, list(others), []
        returns, previous = obs.new_zeros(obs.shape[0]), _nothing_done(self.model, obs)
        times = torch.zeros_like(returns, dtype=torch.int64)
        if self.conditioned:
            reward, returns, previous = rest.pop(0), rest.pop(0), rest.pop(0)
            returns = returns - reward
        if self.timed:
            times = rest.pop(0)
            memory = [times + 1]
        steps = Steps(*(part.unsqueeze(1) for part in (returns, obs, previous, times)))
        outputs, after = self.model(steps, self.layout.separate(rest))
        actions = outputs.squeeze(1)
        if config.discrete:
            actions = actions.argmax(dim=-1)
        if self.conditioned:
            memory = [returns, actions.clone(), *memory]
        return actions, *memory, *self.layout.stack(after)


class _PolicySequence(nn.Module):
    """(obs, returns, previous, times, *state) -> (actions, *state), of T steps whose inputs are known."""

    def __init__(self, model: DecisionModel, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.conditioned, self.timed = model.config.conditioned, bool(model.config.max_steps)

    def forward(self, obs: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        rest = list(others)
        returns, previous = obs[..., 0], _nothing_done(self.model, obs)
        if self.conditioned:
            returns, previous = rest.pop(0), rest.pop(0)
        times = rest.pop(0) if self.timed else torch.zeros_like(obs[..., 0], dtype=torch.int64)
        outputs, after = self.model(Steps(returns, obs, previous, times), self.layout.separate(rest))
        actions = outputs.argmax(dim=-1) if self.model.config.discrete else outputs
        return actions, *self.layout.stack(after)


def _nothing_done(model: DecisionModel, obs: Tensor) -> Tensor:
    """Return previous actions of a policy that does not read them."""
    shape = obs.shape[:-1]
    if model.config.discrete:
        return obs.new_full(shape, NOTHING_DONE, dtype=torch.int64)
    return obs.new_zeros(*shape, model.config.action_size)


def _step_inputs(model: DecisionModel, target: float, batch: int | str) -> list[Port]:
    config, dtype = model.config, model.observation_mean.dtype
    inputs = [
        Port("obs", _numbers((batch, config.observation_size), dtype), (batch, config.observation_size))
    ]
    if config.conditioned:
        inputs.append(Port("reward", _numbers((batch,), dtype), (batch,)))
        # In float64, as it sums thousands of rewards.
        returns = _numbers((batch,), torch.float64)
        inputs.append(Port("return_in", returns, (batch,), Carried(target, "return_out", 0)))
        axes: Axes = (batch,) if config.discrete else (batch, config.action_size)
        first = NOTHING_DONE if config.discrete else 0.0
        previous = _ids(config.action_size, axes) if config.discrete else _numbers(axes, dtype)
        inputs.append(Port("previous_in", previous, axes, Carried(first, "previous_out", 0)))
    if config.max_steps:
        inputs.append(Port("time_in", _ids(config.max_steps, (batch,)), (batch,), Carried(0, "time_out", 0)))
    return inputs


def _sequence_inputs(model: DecisionModel, batch: int | str) -> list[Port]:
    config, dtype = model.config, model.observation_mean.dtype
    axes: Axes = (batch, "time")
    inputs = [
        Port("obs", _numbers((*axes, config.observation_size), dtype), (*axes, config.observation_size))
    ]
    if config.conditioned:
        inputs.append(Port("returns", _numbers(axes, torch.float64), axes))
        wide: Axes = axes if config.discrete else (*axes, config.action_size)
        previous = _ids(config.action_size, wide) if config.discrete else _numbers(wide, dtype)
        inputs.append(Port("previous", previous, wide))
    if config.max_steps:
        inputs.append(Port("times", _ids(config.max_steps, axes), axes))
    return inputs


def _with_state(
    module: nn.Module,
    model: SequenceModel | DecisionModel,
    layout: Layout,
    inputs: Sequence[Port],
    outputs: Sequence[str],
    batch: int | str,
    metadata: dict[str, Any],
) -> Interface:
    """Append the state's inputs and outputs, after a look at whether a step keeps its size."""
    examples = tuple(port.example for port in inputs)
    empty = layout.empty(examples[0].shape[0])
    with torch.no_grad():
        found = call_in_evaluation(module, *examples, *empty)
    after = found[len(outputs) :]
    check_size(empty, after, model.blocks[0])
    states = [
        Port(
            f"{part.name}_in",
            value.clone(),
            (layout.num_blocks, batch, *part.shape),
            Carried(part.initial, f"{part.name}_out", 1),
        )
        for part, value in zip(layout.parts, after, strict=True)
    ]
    names = (*outputs, *(f"{part.name}_out" for part in layout.parts))
    trunk = model.config.trunk if isinstance(model, DecisionModel) else model.config
    return Interface(module, (*inputs, *states), names, {**metadata, "mixer": trunk.mixer})


def _sizes(axes: Axes) -> tuple[int, ...]:
    return tuple(FREE[axis] if isinstance(axis, str) else axis for axis in axes)


def _numbers(axes: Axes, dtype: torch.dtype) -> Tensor:
    """Return numbers to trace with, each another one."""
    return torch.randn(_sizes(axes), generator=torch.Generator().manual_seed(0), dtype=dtype)


def _ids(count: int, axes: Axes) -> Tensor:
    """Return indices below `count` to trace with."""
    return torch.randint(count, _sizes(axes), generator=torch.Generator().manual_seed(0))
