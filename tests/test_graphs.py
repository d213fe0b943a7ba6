"""One exported program, or one compiled graph, of a model serves any batch and any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from minrnn.mixers import GATED_RNNS, MIXERS
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel, Steps
from minrnn.models.decision import TOKENS

V = 7
SIZES = ((1, 1), (5, 9), (10, 4), (5, 70))  # of no size that the model has: torch would take them for one

OF_ANY_LENGTH = (*GATED_RNNS, "attention", "aaren", "s4d", "mamba")
"""The others are torch's own, which torch unrolls over time."""

WITH_RESET = (*GATED_RNNS, "attention", "aaren", "mamba")
"""The others cut time where reset says."""


def build(mixer: str) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=V, d_model=8, num_layers=1, mixer=mixer, mlp_ratio=0)
    return SequenceModel(config).double().eval()


def policy(**options: Any) -> DecisionModel:
    torch.manual_seed(0)
    return (
        DecisionModel(DecisionConfig(ModelConfig(d_model=8, num_layers=1, mlp_ratio=0), 5, 3, **options))
        .double()
        .eval()
    )


def make_tokens(B: int, T: int) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(B + T))


def make_reset(B: int, T: int) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(B * T)) < 0.3


def make_state(model: SequenceModel, B: int) -> Any:
    with torch.no_grad():
        return model(make_tokens(B, 6))[1]


def make_steps(model: DecisionModel, B: int, T: int) -> Steps:
    previous = torch.zeros(B, T, dtype=torch.int64) if model.config.discrete else torch.ones(B, T, 3).double()
    numbers = torch.linspace(-1, 1, B * T * 5).double().reshape(B, T, 5)
    return Steps(torch.ones(B, T).double(), numbers, previous, torch.arange(T).expand(B, T).clone())


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def state_dims(mixer: str, state: Any) -> Any:
    """Every tensor's batch is free, and of attention the number of tokens remembered."""
    B, S = Dim("B"), Dim("S")
    windows, carried = state[0]
    free = [{0: B, 1: S} if mixer == "attention" and x.dim() == 3 else {0: B} for x in carried]
    return ((tuple({0: B} for _ in windows), tuple(free)),)


def export(model: SequenceModel, *, with_state: bool, with_reset: bool) -> nn.Module:
    B, T = Dim("B"), Dim("T")
    state = make_state(model, 3) if with_state else None
    reset = make_reset(3, 5) if with_reset else None
    shapes = {
        "tokens": {0: B, 1: T},
        "state": None if state is None else state_dims(model.config.mixer, state),
        "reset": {0: B, 1: T} if with_reset else None,
    }
    program = torch.export.export(model, (make_tokens(3, 5), state), {"reset": reset}, dynamic_shapes=shapes)
    return program.module()


# --- export -----------------------------------------------------------------------------------------------


def test_every_mixer_is_told_of() -> None:
    assert set(OF_ANY_LENGTH) | {"rnn", "gru", "lstm"} == set(MIXERS)


@pytest.mark.parametrize(
    ("mixer", "with_state"),
    [*((mixer, True) for mixer in OF_ANY_LENGTH), ("mingru", False), ("attention", False)],
)
def test_an_exported_model_serves_any_batch_and_length(mixer: str, with_state: bool) -> None:
    model, with_reset = build(mixer), mixer in WITH_RESET and with_state
    program = export(model, with_state=with_state, with_reset=with_reset)
    for B, T in SIZES:
        tokens, state = make_tokens(B, T), make_state(model, B) if with_state else None
        reset = make_reset(B, T) if with_reset else None
        assert_close(program(tokens, state, reset=reset), model(tokens, state, reset=reset))


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - set(OF_ANY_LENGTH)))
def test_what_torch_unrolls_is_exported_for_one_length(mixer: str) -> None:
    model = build(mixer)
    with pytest.raises(NotImplementedError, match="Mixer: T must be fixed in an exported program"):
        export(model, with_state=False, with_reset=False)
    shapes = {"tokens": {0: Dim("B")}}
    program = torch.export.export(model, (make_tokens(3, 5),), dynamic_shapes=shapes).module()
    for B in (1, 2, 7):
        assert_close(program(make_tokens(B, 5)), model(make_tokens(B, 5)))


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - set(WITH_RESET)))
def test_resets_that_cut_time_are_not_exported(mixer: str) -> None:
    model = build(mixer)
    with pytest.raises(NotImplementedError, match="Mixer: reset must be None in an exported program"):
        torch.export.export(model, (make_tokens(3, 5),), {"reset": make_reset(3, 5)})


@pytest.mark.parametrize("tokens", TOKENS)
def test_an_exported_policy_serves_any_batch_and_length(tokens: str) -> None:
    model = policy(tokens=tokens, discrete=tokens == "joined", max_steps=99)
    free = {0: Dim("B"), 1: Dim("T")}
    shapes = {"steps": Steps(free, free, free, free)}  # type: ignore[arg-type]
    program = torch.export.export(model, (make_steps(model, 3, 5),), dynamic_shapes=shapes).module()
    for B, T in SIZES:
        assert_close(program(make_steps(model, B, T)), model(make_steps(model, B, T)))


# --- compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", OF_ANY_LENGTH)
def test_a_compiled_model_is_one_graph_for_all_sizes(mixer: str) -> None:
    model, graphs = build(mixer), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    calls = [
        (make_tokens(B, T), make_state(model, B), make_reset(B, T) if mixer in WITH_RESET else None)
        for B, T in SIZES[1:]
    ]
    for tokens, state, reset in calls:
        assert_close(compiled(tokens, state, reset=reset), model(tokens, state, reset=reset))
    assert len(graphs) == 1


# --- sizes of nothing, and no tensors ---------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("T", [1, 3])
def test_an_empty_batch_gives_an_empty_output(mixer: str, T: int) -> None:
    model, tokens = build(mixer), make_tokens(0, T)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits, state = model(tokens, reset=torch.zeros(0, T, dtype=torch.bool))
            logits, state = model(tokens, state)
        assert logits.shape == (0, T, V)
        assert not any(len(x) for windows, carried in state for x in (*windows, *carried))


@pytest.mark.parametrize("tokens", TOKENS)
def test_an_empty_batch_of_episodes_gives_no_actions(tokens: str) -> None:
    model = policy(tokens=tokens, max_steps=9)
    for T in (1, 3):
        actions, state = model(make_steps(model, 0, T))
        assert actions.shape == (0, T, 3)
        assert model(make_steps(model, 0, T), state)[0].shape == (0, T, 3)


@pytest.mark.parametrize("wrong", [None, [[1, 2]], 3, "text"])
def test_what_is_no_tensor_is_refused_by_one_line(wrong: Any) -> None:
    model, tokens = build("mingru"), make_tokens(2, 3)
    with pytest.raises(TypeError, match=r"SequenceModel: tokens must be a tensor, got \w+$"):
        model(wrong)
    with pytest.raises(TypeError, match=r"DecisionModel: steps must be Steps, got \w+$"):
        policy()(wrong)
    with pytest.raises(TypeError, match=r"DecisionModel: returns must be a tensor, got \w+$"):
        policy()(make_steps(policy(), 2, 3)._replace(returns=wrong))
    if wrong is not None:
        with pytest.raises(TypeError, match=r"SequenceModel: reset must be a tensor, got \w+$"):
            model(tokens, reset=wrong)
        with pytest.raises(
            TypeError, match=r"SequenceModel: state must be the tuple that a call returned, got"
        ):
            model(tokens, wrong)
    with pytest.raises(TypeError, match="SequenceModel: a block's state must be the tuple of two tuples"):
        model(tokens, (wrong,))
    with pytest.raises(TypeError, match="SequenceModel: each part of the state must be a tensor"):
        model(tokens, (((), (wrong,)),))
