"""Return-conditioned policies: what acts step by step is the model in one pass, for every mixer."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minrnn.mixers import MIXERS
from minrnn.models import (
    NOTHING_DONE,
    TOKENS,
    DecisionConfig,
    DecisionModel,
    ModelConfig,
    Policy,
    SequenceModel,
    Steps,
    load_checkpoint,
    map_state,
    save_checkpoint,
)

S, A, T, B = 3, 2, 11, 3
WINDOW = 4
TARGET = 7.0

every_mixer = pytest.mark.parametrize("mixer", MIXERS)
every_form = pytest.mark.parametrize("tokens", TOKENS)


def build(mixer: str = "mingru", *, trunk: dict[str, Any] | None = None, **settings: Any) -> DecisionModel:
    """A small model in double precision, with statistics, so that the laws hold to rounding."""
    torch.manual_seed(0)
    blocks = ModelConfig(**{"d_model": 8, "num_layers": 2, "conv_width": 0, "mixer": mixer, **(trunk or {})})
    if settings.get("tokens") != "observation":  # which reads no return
        settings = {"return_scale": 5.0, "target_return": TARGET, **settings}
    model = DecisionModel(DecisionConfig(blocks, S, A, **settings))
    model.set_statistics(torch.randn(S), torch.rand(S) + 0.5, torch.tensor([1.0, 2.5]))
    return model.double().eval()


def observations(seed: int = 1, length: int = T) -> Tensor:
    return torch.randn(B, length, S, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rewards(seed: int = 2, length: int = T) -> Tensor:
    return torch.randn(B, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def act_through(policy: Policy, seen: Tensor, earned: Tensor, starts: Tensor) -> Tensor:
    """Let a policy act at every step; return the actions, (B, T, A) or (B, T)."""
    return torch.stack(
        [
            policy.act(seen[:, t], earned[:, t - 1] if t else None, reset=starts[:, t])
            for t in range(seen.shape[1])
        ],
        dim=1,
    )


def steps_of(model: DecisionModel, seen: Tensor, earned: Tensor, actions: Tensor) -> Steps:
    """What the model would have read in the one episode (T, ...) in which it acted so."""
    spent = torch.cat([earned.new_zeros(1), earned[:-1].cumsum(0)])
    nothing = actions.new_full((1, *actions.shape[1:]), NOTHING_DONE if model.config.discrete else 0)
    parts = (TARGET - spent, seen, torch.cat([nothing, actions[:-1]]), torch.arange(len(seen)))
    return Steps(*(part.unsqueeze(0) for part in parts))


def chosen(model: DecisionModel, steps: Steps) -> Tensor:
    """The actions (T, A) or (T,) of one pass over an episode, or over the last steps before each action."""
    with torch.no_grad():
        if model.config.window:
            T = steps.times.shape[1]
            pieces = [
                Steps(*(part[:, max(0, t + 1 - model.config.window) : t + 1] for part in steps))
                for t in range(T)
            ]
            outputs = torch.stack([model(piece)[0][0, -1] for piece in pieces])
        else:
            outputs = model(steps)[0][0]
    return outputs.argmax(dim=-1) if model.config.discrete else outputs


def assert_acts_as_one_pass(model: DecisionModel, *, length: int = T) -> None:
    """Three rows, whose episodes begin at steps of their own, act as each episode in one pass."""
    seen, earned = observations(length=length), rewards(length=length)
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[:, 0] = True
    starts[1, [3, 4, 9]] = True
    starts[2, 6] = True
    actions = act_through(Policy(model), seen, earned, starts)
    for row in range(B):
        edges = [*starts[row].nonzero().flatten().tolist(), length]
        for first, last in pairwise(edges):
            episode = slice(first, last)
            steps = steps_of(model, seen[row, episode], earned[row, episode], actions[row, episode])
            expected = chosen(model, steps)
            torch.testing.assert_close(actions[row, episode], expected, rtol=0, atol=1e-9)


# --- the law ---------------------------------------------------------------------------------------------


@every_mixer
@every_form
@pytest.mark.parametrize("window", [0, WINDOW])
def test_acting_is_one_pass_over_the_episode_so_far(mixer: str, tokens: str, window: int) -> None:
    """With a window, over so many steps: Decision Transformer's own way, for every mixer."""
    assert_acts_as_one_pass(build(mixer, tokens=tokens, window=window))


@every_mixer
@pytest.mark.parametrize("window", [0, WINDOW])
def test_the_law_holds_with_times_and_a_convolution(mixer: str, window: int) -> None:
    assert_acts_as_one_pass(
        build(mixer, tokens="interleaved", window=window, max_steps=T, trunk={"conv_width": 3})
    )


@every_mixer
@pytest.mark.parametrize("window", [0, WINDOW])
def test_the_law_holds_for_discrete_actions(mixer: str, window: int) -> None:
    assert_acts_as_one_pass(build(mixer, discrete=True, window=window))


def test_the_law_holds_for_attention_with_a_sliding_window() -> None:
    """Whose keys are carried: what it sees through depth reaches further back than its window."""
    assert_acts_as_one_pass(build("attention", tokens="interleaved", trunk={"window": 6}))


@every_mixer
def test_an_environment_alone_acts_as_one_of_a_batch(mixer: str) -> None:
    model, seen, earned = build(mixer), observations(), rewards()
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, 0] = True
    together = act_through(Policy(model), seen, earned, starts)
    policy = Policy(model)
    for t in range(T):
        action = policy.act(seen[0, t].numpy(), float(earned[0, t - 1]) if t else None)
        assert action.shape == (A,)
        torch.testing.assert_close(action, together[0, t], rtol=0, atol=1e-9)
    torch.testing.assert_close(policy.act(seen[0, 0], reset=True), together[0, 0], rtol=0, atol=1e-9)
    assert policy.act(seen[:2, 0], reset=True).shape == (2, A)  # where all start, there may be others


@every_mixer
def test_repeated_calls_with_the_state_carried_are_one_call(mixer: str) -> None:
    model = build(mixer, tokens="interleaved")
    steps = Steps(
        rewards(), observations(), torch.rand(B, T, A, dtype=torch.float64), torch.arange(T).expand(B, T)
    )
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.2
    whole, _ = model(steps, reset=reset)
    state, outputs = None, []
    for piece in (slice(0, 1), slice(1, 6), slice(6, T)):
        output, state = model(Steps(*(part[:, piece] for part in steps)), state, reset=reset[:, piece])
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=0, atol=1e-9)


@every_mixer
def test_no_action_depends_on_what_comes_later(mixer: str) -> None:
    model = build(mixer, tokens="interleaved", max_steps=T)
    steps = Steps(
        rewards(), observations(), torch.rand(B, T, A, dtype=torch.float64), torch.arange(T).expand(B, T)
    )
    leaves = [steps.returns.requires_grad_(), steps.observations.requires_grad_()]
    output, _ = model(steps)
    for gradient in torch.autograd.grad(output[:, 4].sum(), leaves):
        assert gradient[:, 5:].abs().max() < 1e-12  # a convolution by FFT spreads rounding errors
        assert gradient[:, 4].abs().max() > 1e-6


# --- memory ----------------------------------------------------------------------------------------------


def numbers(state: Any) -> int:
    count = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    map_state(add, state)
    return count


@every_mixer
def test_what_is_carried_does_not_grow(mixer: str) -> None:
    sizes = {}
    for window in (0, WINDOW):
        policy = Policy(build(mixer, window=window))
        found = []
        for t in range(3 * WINDOW):
            policy.act(observations()[:, 0], None if t == 0 else 1.0)
            found.append(numbers(policy.state))
        sizes[window] = found
    assert len(set(sizes[WINDOW][WINDOW:])) == 1
    grows = sizes[0][-1] > sizes[0][0]
    assert grows == (mixer == "attention")  # which keeps every key where nothing bounds it


@pytest.mark.parametrize("window", [0, WINDOW])
def test_an_environment_may_write_into_the_same_memory_again(window: int) -> None:
    model, seen = build(window=window), observations()
    policy, other = Policy(model), Policy(model)
    buffer, earned = seen[:, 0].clone().numpy(), rewards()[:, 0].clone().numpy()
    for t in range(WINDOW):
        buffer[:], earned[:] = seen[:, t], t
        action = policy.act(buffer, earned)
        assert torch.equal(action, other.act(seen[:, t], torch.full((B,), float(t))))
        buffer[:], earned[:] = -1.0, -1.0


def test_an_action_is_its_receivers() -> None:
    """It can be written into, without the policy taking that for what it did, and differentiated through."""
    policy, other = Policy(build()), Policy(build())
    policy.act(torch.ones(S)).zero_()
    other.act(torch.ones(S))
    action = policy.act(torch.zeros(S), 1.0)
    assert torch.equal(action, other.act(torch.zeros(S), 1.0))
    action.requires_grad_().square().sum().backward()
    assert action.grad is not None


def test_the_state_holds_no_history_of_gradients() -> None:
    policy = Policy(build().train())
    policy.act(torch.zeros(S))
    map_state(lambda tensor: pytest.fail("differentiable") if tensor.requires_grad else tensor, policy.state)
    assert policy.model.training  # the model's mode is its owner's


def test_dropout_does_not_act() -> None:
    model = build(trunk={"dropout": 0.5}).train()
    assert torch.equal(Policy(model).act(torch.ones(S)), Policy(model).act(torch.ones(S)))


# --- what actions depend on ------------------------------------------------------------------------------


def test_the_return_still_to_come_falls_by_what_is_earned() -> None:
    model, seen = build(), observations()
    one, other = Policy(model, target_return=10.0), Policy(model, target_return=8.0)
    assert not torch.equal(one.act(seen[0, 0]), other.act(seen[0, 0]))
    for policy, first in ((one, 3.0), (other, 1.0)):
        policy.act(seen[0, 1], first)
    assert one._memory is not None
    assert other._memory is not None
    assert float(one._memory.returns) == float(other._memory.returns) == 7.0


@pytest.mark.parametrize("tokens", ["interleaved", "joined"])
def test_behaviour_cloning_knows_neither_return_nor_action(tokens: str) -> None:
    steps = Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))
    others = steps._replace(returns=steps.returns + 1, previous=torch.ones(B, T, A))
    clone, told = build(tokens="observation"), build(tokens=tokens)
    assert torch.equal(clone(steps)[0], clone(others)[0])
    assert not torch.equal(told(steps)[0], told(others)[0])
    assert clone.embed_return is None
    Policy(clone).act(torch.zeros(S))
    with pytest.raises(ValueError, match=r"target_return must be left out .* got 3\.0"):
        Policy(clone, target_return=3.0)


def test_actions_stay_within_their_bound() -> None:
    model = build()
    with torch.no_grad():
        model.head.weight.mul_(1e6)
    found = model(
        Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))
    )
    assert (found[0].abs() <= torch.tensor([1.0, 2.5])).all()
    assert found[0].abs().amax(dim=(0, 1)).tolist() == [1.0, 2.5]


def test_observations_and_returns_are_standardised() -> None:
    """In other units, with the statistics in them, the actions are the same."""
    model, other = build(), build()
    other.observation_mean.mul_(10).add_(3)
    other.observation_std.mul_(10)
    other.config = dataclasses.replace(model.config, return_scale=50.0)
    steps = Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))
    others = steps._replace(observations=10 * steps.observations + 3, returns=10 * steps.returns)
    torch.testing.assert_close(model(steps)[0], other(others)[0], rtol=0, atol=1e-12)


def test_interleaved_tokens_are_as_many_and_in_the_order_of_their_source() -> None:
    model = build("attention", tokens="interleaved")
    steps = Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))

    def embed(steps: Steps) -> torch.Tensor:
        return model._embed(model.embedding_inputs(steps), steps.times)

    x = embed(steps)
    assert x.shape == (B, 3 * T, 8)
    moved = [
        (embed(changed) != x).any(dim=-1)[0].nonzero().flatten()[0].item() % 3
        for changed in (
            steps._replace(previous=torch.ones(B, T, A)),
            steps._replace(returns=steps.returns + 1),
            steps._replace(observations=steps.observations + 1),
        )
    ]
    assert moved == [0, 1, 2]


@every_form
@pytest.mark.parametrize("discrete", [False, True])
def test_a_step_is_embedded_by_its_formula(tokens: str, discrete: bool) -> None:
    """W_a a / bound, W_r R / 5 and W_s (s - mean) / std, each with its bias, and time[t], in every form."""
    model = build(tokens=tokens, discrete=discrete, max_steps=20, trunk={"dropout": 0.5})
    times = torch.arange(7, 7 + T).expand(B, T)
    done = torch.randint(-1, A, (B, T)) if discrete else torch.randn(B, T, A).double()
    steps, given = Steps(rewards(), observations(), done, times), []
    model.embed_norm.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    model(steps)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def embedded(name: str, numbers: Tensor) -> Tensor:
        return numbers @ weights[f"embed_{name}.weight"].T + weights[f"embed_{name}.bias"]

    time = weights["embed_time.weight"][times]
    parts = [embedded("observation", (steps.observations - model.observation_mean) / model.observation_std)]
    if tokens != "observation":
        rows = torch.cat([torch.eye(A), torch.zeros(1, A)]).double()  # the last of nothing done
        actions = rows[done] if discrete else done / torch.tensor([1.0, 2.5])
        parts = [embedded("previous", actions), embedded("return", steps.returns.unsqueeze(-1) / 5), *parts]
    if tokens == "interleaved":
        expected = torch.stack([part + time for part in parts], dim=2).flatten(1, 2)
    else:
        expected = sum(parts) + time
    torch.testing.assert_close(given[0], expected, rtol=0, atol=1e-12)


def test_embeddings_of_times_start_near_zero() -> None:
    times = build(max_steps=1000).embed_time.weight
    assert abs(times.std().item() - 0.02) < 0.002
    assert abs(times.mean().item()) < 0.001


# --- checkpoints -----------------------------------------------------------------------------------------


@every_mixer
@every_form
def test_a_policy_survives_its_checkpoint(mixer: str, tokens: str, tmp_path: Path) -> None:
    model = build(mixer, tokens=tokens, environment="Hopper-v5", max_steps=T)
    save_checkpoint(tmp_path / "best", model, extra={"step": 1})
    loaded, extra = load_checkpoint(tmp_path / "best")
    assert isinstance(loaded, DecisionModel)
    assert loaded.config == model.config
    assert extra == {"step": 1}
    assert torch.equal(loaded.observation_std, model.observation_std)
    assert torch.equal(Policy(loaded).act(torch.ones(S)), Policy(model).act(torch.ones(S)))


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "three"}, "tokens must be one of interleaved, joined, observation, got 'three'"),
        ({"window": -1}, "window must be 0 or more, got -1"),
        ({"max_steps": -1}, "max_steps must be 0 or more"),
        ({"observation_size": 0}, "observation_size must be at least 1"),
        ({"action_size": 0}, "action_size must be at least 1"),
        ({"return_scale": 0.0}, "return_scale must be positive and finite"),
        ({"return_scale": -1.0}, "return_scale must be positive and finite"),
        ({"return_scale": float("inf")}, "return_scale must be positive and finite"),
        ({"target_return": float("nan")}, "target_return must be finite"),
        ({"target_return": float("-inf")}, "target_return must be finite"),
        ({"trunk": ModelConfig(tie_embeddings=True)}, "tie_embeddings must be off"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"DecisionConfig: .*{message}"):
        DecisionConfig(**{"trunk": ModelConfig(), "observation_size": S, "action_size": A, **settings})


def test_a_value_of_another_type_is_refused() -> None:
    for name, value in (("window", "3"), ("discrete", 1), ("trunk", {}), ("target_return", "high")):
        settings = {"trunk": ModelConfig(), "observation_size": S, "action_size": A, name: value}
        with pytest.raises(TypeError, match=f"DecisionConfig: {name} must be .*, got"):
            DecisionConfig(**settings)


def test_a_config_that_does_not_fit_is_named() -> None:
    values = build().config.to_dict()
    assert DecisionConfig.from_dict(values) == build().config
    with pytest.raises(ValueError, match="unknown key 'windw'; did you mean 'window'"):
        DecisionConfig.from_dict({**values, "windw": 3})
    with pytest.raises(ValueError, match="trunk is missing"):
        DecisionConfig.from_dict({"observation_size": 3, "action_size": 2})


@pytest.mark.parametrize(
    ("observation", "reward", "reset", "message"),
    [
        ([1.0, 2.0], 0.0, None, r"observation must be \(3,\) or \(B, 3\), got \(2,\)"),
        ([[[1.0, 2.0, 3.0]]], 0.0, None, r"observation must be .* got \(1, 1, 3\)"),
        ([1.0, float("nan"), 3.0], 0.0, None, "observation must be finite"),
        ([1.0, float("inf"), 3.0], 0.0, None, "observation must be finite"),
        ([1.0, float("inf"), float("-inf")], 0.0, None, "observation must be finite"),
        ([1.0, 2.0, 3.0], None, None, "reward must be given after an episode's first step"),
        ([1.0, 2.0, 3.0], [1.0, 2.0], None, r"reward must be one or \(1,\), got \(2,\)"),
        ([1.0, 2.0, 3.0], float("inf"), None, "reward must be finite"),
        ([1.0, 2.0, 3.0], 0.0, 1, r"reset must be bool, one or \(1,\), got torch.int64"),
        ([[1.0, 2.0, 3.0]] * 2, 0.0, None, "must be of 1 environments until all episodes restart, got 2"),
    ],
)
def test_what_cannot_be_acted_on_is_refused(observation: Any, reward: Any, reset: Any, message: str) -> None:
    policy = Policy(build())
    policy.act(torch.zeros(S))
    with pytest.raises(ValueError, match=message):
        policy.act(observation, reward, reset=reset)
    policy.act(torch.zeros(S), 0.0)  # nothing is broken by it


def test_the_number_of_episodes_changes_only_where_all_start() -> None:
    policy = Policy(build())
    policy.act(torch.zeros(2, S))
    for reset in (False, [True, True, False]):
        with pytest.raises(ValueError, match="must be of 2 environments until all episodes restart, got 3"):
            policy.act(torch.zeros(3, S), 0.0, reset=reset)
    assert policy.act(torch.zeros(3, S), 0.0, reset=[True] * 3).shape == (3, A)


def test_finite_numbers_whose_sum_overflows_are_taken() -> None:
    """The largest float64 as rewards, and as observations half of the largest float32, twice."""
    model = build(tokens="observation", target_return=None).float()
    model.set_statistics(torch.zeros(S), torch.full((S,), 1e38))
    policy, largest = Policy(model), torch.finfo(torch.float64).max
    for earned in (None, [largest, largest]):
        assert policy.act(torch.full((2, S), 2e38), earned).isfinite().all()


@pytest.mark.parametrize("name", ["observation", "reward", "reset"])
@pytest.mark.parametrize("value", ["abc", object(), [None] * S], ids=["str", "object", "list"])
def test_what_is_no_tensor_is_named(name: str, value: Any) -> None:
    policy = Policy(build())
    policy.act(torch.zeros(S))
    with pytest.raises(TypeError, match=f"act: {name} must be convertible to a tensor, got") as caught:
        policy.act(**{"observation": torch.zeros(S), "reward": 0.0, name: value})
    assert "\n" not in str(caught.value)


def test_flipped_views_of_numpys_are_read() -> None:
    flipped = {
        "observation": np.arange(2.0 * S).reshape(2, S)[::-1],
        "reward": np.arange(2.0)[::-1],
        "reset": np.array([True, False])[::-1],
    }
    results = []
    for copied in (False, True):
        policy = Policy(build())
        policy.act(np.zeros((2, S)))
        results.append(policy.act(**{k: v.copy() if copied else v for k, v in flipped.items()}))
    assert torch.equal(*results)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "5", [1.0, 2.0], True])
def test_a_return_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(
        (TypeError, ValueError), match=r"Policy: target_return must be (finite|a number), got"
    ):
        Policy(build(), target_return=value)


def test_only_a_decision_model_acts() -> None:
    for other in (torch.nn.Linear(2, 2), SequenceModel(ModelConfig(d_model=8)), None):
        with pytest.raises(TypeError, match="Policy: model must be a DecisionModel, got"):
            Policy(other)  # type: ignore[arg-type]
    assert Policy(torch.compile(build(), backend="eager")).target_return == TARGET  # type: ignore[arg-type]


STATISTICS = {"mean": torch.zeros(S), "std": torch.ones(S), "bound": torch.ones(A)}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_that_are_none_are_refused_and_nothing_is_lost(name: str) -> None:
    good = STATISTICS[name]
    spoilt: dict[str, Any] = {
        "a tensor": good.tolist(),
        "of shape": good[:1],
        "finite": torch.full_like(good, float("nan")),
        "finite, got infinity": torch.full_like(good.double(), 1e300),  # infinite in the buffer
    }
    if name != "mean":
        spoilt["positive, got 0"] = torch.cat([good[1:], torch.zeros(1)])
        spoilt["positive, got -1"] = -good
    model = build().float()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    for message, value in spoilt.items():
        with pytest.raises((TypeError, ValueError), match=f"set_statistics: {name} must be {message}"):
            model.set_statistics(**{**STATISTICS, name: value})
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    model.set_statistics(**STATISTICS)


@pytest.mark.parametrize("steps", [1, T])
def test_integers_that_are_in_no_table_are_refused(steps: int) -> None:
    model = build(discrete=True, max_steps=steps)
    good = Steps(
        rewards()[:, :steps],
        observations()[:, :steps],
        torch.full((B, steps), A - 1),
        torch.arange(steps).expand(B, -1),
    )
    model(good)
    model(good._replace(previous=torch.full((B, steps), -1)))
    for name, wrong in (("previous", A), ("previous", -2), ("times", -1)):
        spoilt = getattr(good, name).clone()
        spoilt[-1, -1] = wrong
        with pytest.raises(ValueError, match=f"DecisionModel: {name} must .*, got .*{wrong}"):
            model(good._replace(**{name: spoilt}))
    for name in ("previous", "times"):
        with pytest.raises(TypeError, match=f"DecisionModel: {name} must be int64, got torch.float32"):
            model(good._replace(**{name: getattr(good, name).float()}))


def test_a_reward_of_a_row_that_starts_is_not_looked_at() -> None:
    policy = Policy(build())
    policy.act(torch.zeros(2, S))
    policy.act(torch.zeros(2, S), [float("nan"), 1.0], reset=[True, False])
    assert policy._memory is not None
    assert policy._memory.returns.tolist() == [TARGET, TARGET - 1.0]


def test_an_episode_longer_than_the_table_of_times_is_refused() -> None:
    policy = Policy(build(max_steps=2))
    policy.act(torch.zeros(S))
    policy.act(torch.zeros(S), 1.0)
    with pytest.raises(ValueError, match=r"must end within 2 steps, .* got step 3; train with more"):
        policy.act(torch.zeros(S), 1.0)
    policy.act(torch.zeros(S), reset=True)


def test_without_a_return_to_reach_there_is_no_policy() -> None:
    model = build()
    model.config = dataclasses.replace(model.config, target_return=None)
    with pytest.raises(ValueError, match="target_return must be given"):
        Policy(model)


def test_a_diverged_model_is_said() -> None:
    model = build()
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="its training has diverged"):
        Policy(model).act(torch.zeros(S))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": torch.zeros(B, T + 1)}, r"returns must be \(B, T\) with T >= 1, got \(3, 12\)"),
        ({"observations": torch.zeros(B, T, S + 1)}, r"observations must be \(B, T, 3\)"),
        ({"previous": torch.zeros(B, T)}, r"previous must be \(B, T, 2\)"),
        ({"times": torch.zeros(B, 1, dtype=torch.int64)}, r"times must be \(B, T\)"),
    ],
)
def test_steps_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    steps = Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"DecisionModel: {message}"):
        build()(steps._replace(**change))


@every_form
def test_resets_that_do_not_fit_are_refused_as_resets_of_steps(tokens: str) -> None:
    steps = Steps(rewards(), observations(), torch.zeros(B, T, A), torch.zeros(B, T, dtype=torch.int64))
    model = build(tokens=tokens)
    with pytest.raises(TypeError, match=r"DecisionModel: reset must be bool, got torch\.float32"):
        model(steps, reset=torch.zeros(B, T))
    with pytest.raises(ValueError, match=r"DecisionModel: reset must be \(3, 11\), .* got \(3, 12\)"):
        model(steps, reset=torch.zeros(B, T + 1, dtype=torch.bool))
