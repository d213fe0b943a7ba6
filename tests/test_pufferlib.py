"""PufferLib's minGRU: its parameters, its equations, its step."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minrnn.integrations.pufferlib import MinGRU


def in_log_space(weights: list[Tensor], x: Tensor) -> Tensor:
    """PufferLib's training: a scan of logarithms, from the zero state; here in float64."""
    for weight in weights:
        hidden, gate, highway = (x @ weight.T).chunk(3, -1)
        candidate = torch.where(hidden >= 0, hidden + 0.5, hidden.sigmoid())
        decays = (-functional.softplus(gate)).cumsum(1)
        values = functional.logsigmoid(gate) + candidate.log()
        h = (decays + (values - decays).logcumsumexp(1)).exp()
        x = highway.sigmoid() * h + (1 - highway.sigmoid()) * x
    return x


def network(layers: int = 2) -> MinGRU:
    torch.manual_seed(0)
    return MinGRU(6, num_layers=layers, expansion=3)


def test_training_is_theirs_from_their_weights() -> None:
    ours, x = network(), torch.randn(3, 40, 6)
    theirs = {f"layers.{k}.weight": torch.randn(18, 6) for k in range(2)}
    assert ours.load_state_dict(theirs)
    weights = [weight.double().requires_grad_() for weight in theirs.values()]
    found, expected = ours.forward_train(x), in_log_space(weights, x.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    found.square().mean().backward()
    expected.square().mean().backward()
    for parameter, weight in zip(ours.parameters(), weights, strict=True):
        torch.testing.assert_close(parameter.grad, weight.grad.float(), atol=1e-5, rtol=1e-5)


def test_steps_are_the_sequence_with_resets() -> None:
    ours, x = network(), torch.randn(4, 30, 6)
    reset = torch.rand(4, 30) < 0.2
    state, outputs = ours.initial_state(4, "cpu"), []
    for t in range(30):
        before = state[0].clone()
        fresh = torch.where(reset[:, t, None], 0.0, state[0])
        output, state = ours.forward_eval(x[:, t], (fresh,))
        outputs.append(output)
        assert state[0].shape == before.shape == (2, 4, 6)
    torch.testing.assert_close(torch.stack(outputs, 1), ours.forward_train(x, reset=reset))


def test_a_step_leaves_the_state_it_reads() -> None:
    ours = network()
    state = ours.initial_state(2)
    ours.forward_eval(torch.randn(2, 6), state)
    assert not state[0].any()


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="MinGRU: hidden_size must be greater than zero, got 0"):
        MinGRU(0)
    with pytest.raises(TypeError, match="MinGRU: num_layers must be an int, got str"):
        MinGRU(4, "2")  # type: ignore[arg-type]
