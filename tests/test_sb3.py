"""Policies for RecurrentPPO: one call for a sequence with episode starts, saved and loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minrnn import MinGRU, MinLSTM

RecurrentPPO = pytest.importorskip("sb3_contrib", reason="needs the extra rl").RecurrentPPO
gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy  # noqa: E402

from minrnn.integrations import sb3  # noqa: E402
from minrnn.integrations.convolved import ConvolvedRNN, convolved  # noqa: E402

POLICIES = {
    "MinGruPolicy": gymnasium.spaces.Box(-1, 1, (3,)),
    "CnnMinGruPolicy": gymnasium.spaces.Box(0, 255, (3, 36, 36), np.uint8),
    "MultiInputMinGruPolicy": gymnasium.spaces.Dict({"a": gymnasium.spaces.Box(-1, 1, (3,))}),
}
EXTRACTORS = {
    "MinGruPolicy": "FlattenExtractor",
    "CnnMinGruPolicy": "NatureCNN",
    "MultiInputMinGruPolicy": "CombinedExtractor",
}
SIZES = {"lstm_hidden_size": 8, "n_lstm_layers": 2}


class Random(gymnasium.Env):
    """Random observations; an episode ends after a random number of steps."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, observation_space: Any) -> None:
        self.observation_space = observation_space
        observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: int) -> Any:
        return self.observation_space.sample(), float(action), bool(self.np_random.random() < 0.2), False, {}


def agent(name: str, **kwargs: Any) -> Any:
    return RecurrentPPO(
        name,
        Random(POLICIES[name]),
        n_steps=16,
        batch_size=8,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs=SIZES | kwargs,
    )


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("width", [0, 4])
def test_policies_learn_and_are_saved_and_loaded(name: str, width: int, tmp_path: Path) -> None:
    model = agent(name, lstm_kwargs={"candidate": "tanh"}, conv_width=width)
    assert type(model.policy.features_extractor).__name__ == EXTRACTORS[name]
    layers = [model.policy.lstm_actor, model.policy.lstm_critic]
    for layer in layers:
        rnn = layer.inner.rnn if width else layer.inner
        assert isinstance(rnn, MinGRU)
        assert (rnn.candidate, rnn.num_layers, layer.hidden_size) == ("tanh", 2, 8)
        assert width == 0 or layer.inner.conv.width == width
    held = {id(x) for group in model.policy.optimizer.param_groups for x in group["params"]}
    assert held == {id(x) for x in model.policy.parameters()}
    before = [x.detach().clone() for layer in layers for x in layer.parameters()]
    model.learn(32)
    after = [x for layer in layers for x in layer.parameters()]
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    model.save(tmp_path / "agent.zip")
    model.policy.save(str(tmp_path / "policy"))
    loaded = RecurrentPPO.load(tmp_path / "agent.zip", device="cpu").policy
    alone = type(model.policy).load(str(tmp_path / "policy"), device="cpu")
    states: list[Any] = [None] * 3
    for start in (True, False, False, True):
        seen = model.observation_space.sample()
        actions = []
        for i, policy in enumerate((model.policy, loaded, alone)):
            action, states[i] = policy.predict(seen, states[i], np.array([start]), deterministic=True)
            actions.append(action)
        assert actions[0] == actions[1] == actions[2]
        for state in states[1:]:
            np.testing.assert_array_equal(state, states[0])
    assert np.abs(states[0]).max() > 0


def paired(*arguments: Any) -> sb3.PairedRNN:
    return sb3.PairedRNN(convolved("test", *arguments))


class StepByStep:
    """A layer as the library calls its LSTM: time first, without episode starts."""

    def __init__(self, lstm: sb3.PairedRNN) -> None:
        self.lstm, self.input_size = lstm, lstm.input_size

    def __call__(self, x: torch.Tensor, states: Any) -> Any:
        x = x.transpose(0, 1)
        output, states = self.lstm(x, states, reset=torch.zeros(x.shape[:2], dtype=torch.bool))
        return output.transpose(0, 1), states


@given(
    st.data(),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([MinGRU, MinLSTM]),
    st.integers(1, 3),
    st.sampled_from([0, 1, 2, 4, 7]),
)
def test_a_sequence_is_the_steps_of_the_librarys_loop(
    data: st.DataObject, count: int, steps: int, kind: type[MinGRU], layers: int, width: int
) -> None:
    """The library walks through a sequence with episode starts, setting states to zero before them."""
    bits = data.draw(st.lists(st.booleans(), min_size=count * steps, max_size=count * steps))
    starts = torch.tensor(bits, dtype=torch.float32)
    torch.manual_seed(count * 10 + steps)
    lstm = paired(kind, (3, 5, layers), width)
    rows = torch.randn(count * steps, 3)
    states = [torch.randn(lstm.num_layers, count, 5).requires_grad_() for _ in range(2)]
    found, after = sb3.MinGruPolicy._process_sequence(rows, tuple(states), starts, lstm)

    theirs = RecurrentActorCriticPolicy._process_sequence
    expected, last = theirs(rows, tuple(states), starts, StepByStep(lstm))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(after, last)
    assert [x.shape for x in after] == [x.shape for x in states]
    weights = [*states, *lstm.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum() + sum(after).square().sum(), weights),
        torch.autograd.grad(expected.square().sum() + sum(last).square().sum(), weights),
    )


@given(st.integers(1, 5), st.integers(0, 9))
def test_the_states_hold_layers_and_window(layers: int, width: int) -> None:
    """A split sequence continues exactly, and nothing of the library's pair is wasted but one row."""
    torch.manual_seed(layers * 10 + width)
    lstm = paired(MinGRU, (3, 4, layers), width)
    assert 2 * lstm.num_layers - (layers + max(width - 1, 0)) in (0, 1)
    x, reset = torch.randn(2, 9, 3), torch.zeros(2, 9, dtype=torch.bool)
    empty = (torch.zeros(lstm.num_layers, 2, 4),) * 2
    whole, after = lstm(x, empty, reset=reset)
    first, states = lstm(x[:, :4], empty, reset=reset[:, :4])
    second, last = lstm(x[:, 4:], states, reset=reset[:, 4:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, after)
    h = torch.cat(after)[:layers]
    torch.testing.assert_close(h[-1], whole[:, -1])
    assert isinstance(lstm.inner, ConvolvedRNN) == (width > 0)


def test_the_convolution_sees_its_width() -> None:
    """The output depends on a step's features and on those of the steps that the convolution sees."""
    torch.manual_seed(0)
    layers = ConvolvedRNN(MinGRU, (3, 4, 1), 4)
    layers.rnn.forward = lambda x, h, reset: (x, torch.zeros(1, 1, 4))  # type: ignore[method-assign,assignment]
    x = torch.randn(1, 8, 3, requires_grad=True)
    y, _ = layers(x)
    (slope,) = torch.autograd.grad(y[0, 5].sum(), x)
    assert slope[0].any(1).tolist() == [False, False, True, True, True, True, False, False]


def test_the_critic_may_share_or_do_without() -> None:
    shared = agent("MinGruPolicy", shared_lstm=True, enable_critic_lstm=False)
    without = agent("MinGruPolicy", enable_critic_lstm=False)
    for model in (shared, without):
        assert model.policy.lstm_critic is None
        model.learn(16)


def test_the_window_is_four_steps_if_nothing_else_is_said() -> None:
    assert agent("MinGruPolicy").policy.lstm_actor.inner.conv.width == 4


@pytest.mark.parametrize(("wrong", "error"), [(-1, ValueError), (2.0, TypeError)])
def test_the_convolutions_width_is_checked(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="MinGruPolicy: conv_width"):
        agent("MinGruPolicy", conv_width=wrong)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"bidirectional": True}, ValueError, "bidirectional must be False"),
        ({"batch_first": True}, TypeError, "batch_first"),
        ({"gates": 3}, TypeError, "gates"),
        ({"candidate": "cubic"}, ValueError, "candidate"),
    ],
)
def test_arguments_of_the_layer_are_checked(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        agent("MinGruPolicy", lstm_kwargs=wrong)
