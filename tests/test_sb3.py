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
from minrnn.integrations import sb3  # noqa: E402

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
def test_policies_learn_and_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = agent(name, lstm_kwargs={"candidate": "tanh"})
    assert type(model.policy.features_extractor).__name__ == EXTRACTORS[name]
    layers = [model.policy.lstm_actor, model.policy.lstm_critic]
    assert all(isinstance(layer, MinGRU) and layer.candidate == "tanh" for layer in layers)
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
            np.testing.assert_array_equal(state[0], states[0][0])
    assert np.abs(states[0][0]).max() > 0


@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from([MinGRU, MinLSTM]))
def test_a_sequence_is_the_steps_of_the_librarys_loop(
    data: st.DataObject, count: int, steps: int, kind: type[MinGRU]
) -> None:
    """The library walks through a sequence with episode starts, setting states to zero before them."""
    bits = data.draw(st.lists(st.booleans(), min_size=count * steps, max_size=count * steps))
    starts = torch.tensor(bits, dtype=torch.float32)
    torch.manual_seed(count * 10 + steps)
    layer = kind(3, 5, 2, batch_first=True)
    rows = torch.randn(count * steps, 3)
    h0 = torch.randn(2, count, 5).requires_grad_()
    found, (h_n, c_n) = sb3.MinGruPolicy._process_sequence(rows, (h0, torch.zeros(())), starts, layer)

    h, outputs = h0, []
    by_step = zip(rows.view(count, steps, 3).unbind(1), starts.view(count, steps).unbind(1), strict=True)
    for x, start in by_step:
        output, h = layer(x.unsqueeze(1), h * (1 - start).view(1, count, 1))
        outputs.append(output)
    expected = torch.cat(outputs, 1).flatten(0, 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(h_n, h)
    assert c_n.shape == h_n.shape
    assert not c_n.any()
    weights = [h0, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum() + h_n.sum(), weights),
        torch.autograd.grad(expected.square().sum() + h.sum(), weights),
    )


def test_the_critic_may_share_or_do_without() -> None:
    shared = agent("MinGruPolicy", shared_lstm=True, enable_critic_lstm=False)
    without = agent("MinGruPolicy", enable_critic_lstm=False)
    for model in (shared, without):
        assert model.policy.lstm_critic is None
        model.learn(16)


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
