"""Models do what their settings say: where dropout acts, how prompts are divided, bounds, widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minrnn.mixers import MIXERS
from minrnn.models import (
    NOTHING_DONE,
    TOKENS,
    DecisionConfig,
    DecisionModel,
    Decoder,
    ModelConfig,
    Policy,
    SequenceModel,
    Steps,
    map_state,
)
from minrnn.models.dropout import Dropout

V, D, B, T = 11, 8, 2, 7
S, A = 3, 2

every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def sequence_model(mixer: str = "mingru", **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(
        ModelConfig(**{"vocab_size": V, "d_model": D, "num_layers": 3, "mixer": mixer, **options})
    )


def policy_model(
    mixer: str = "mingru", *, num_layers: int = 3, dropout: float = 0.0, **options: Any
) -> DecisionModel:
    torch.manual_seed(0)
    trunk = ModelConfig(d_model=D, num_layers=num_layers, mixer=mixer, dropout=dropout)
    return DecisionModel(DecisionConfig(trunk, S, A, **options))


def make_tokens(length: int = T) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(1))


def make_steps(previous: Tensor | None = None) -> Steps:
    draw = torch.Generator().manual_seed(1)
    done = torch.randn(B, T, A, generator=draw) if previous is None else previous
    observations = torch.randn(B, T, S, generator=draw)
    return Steps(torch.randn(B, T, generator=draw), observations, done, torch.arange(T).expand(B, T))


# --- dropout ---------------------------------------------------------------------------------------------


def outputs_of(modules: dict[str, nn.Module]) -> tuple[dict[int, str], list[Tensor]]:
    """Return the names of the modules by the identity of their outputs, filled in by later calls."""
    names: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no identity is used twice

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            names[id(output)] = name
            kept.append(output)

        return note

    for name, module in modules.items():
        module.register_forward_hook(hook(name))
    return names, kept


def spy_on_dropout(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Tensor], Tensor]
) -> list[tuple[float, Tensor]]:
    """Replace what every dropout of a model does; return the probability and the input of each call."""
    calls: list[tuple[float, Tensor]] = []

    def forward(dropout: Dropout, x: Tensor) -> Tensor:
        calls.append((dropout.p, x))
        return act(x)

    monkeypatch.setattr(Dropout, "forward", forward)
    return calls


BRANCHES = [f"{branch} {layer}" for layer in range(3) for branch in ("mixer", "mlp")]


@every_mixer
@pytest.mark.parametrize("mlp_ratio", [2.0, 0.0], ids=["with MLPs", "without"])
@pytest.mark.parametrize("residual", [True, False])
def test_dropout_acts_on_the_embedding_and_every_branch_and_only_there(
    mixer: str, mlp_ratio: float, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy_on_dropout(monkeypatch, lambda x: x)
    model = sequence_model(mixer, dropout=0.3, mlp_ratio=mlp_ratio, residual=residual)
    parts = {"embedding": model.embedding}
    for layer, block in enumerate(model.blocks):
        parts |= {f"mixer {layer}": block.down} | ({f"mlp {layer}": block.mlp} if block.mlp else {})
    names, _ = outputs_of(parts)
    trained = model(make_tokens())[0]
    expected = ["embedding", *(name for name in BRANCHES if mlp_ratio or "mlp" not in name)]
    assert [(p, names[id(x)]) for p, x in calls] == [(0.3, name) for name in expected]
    # No other part is random in training mode.
    assert torch.equal(model.eval()(make_tokens())[0], trained)


@pytest.mark.parametrize("tokens", TOKENS)
def test_dropout_of_policies_acts_on_the_embedding_and_every_branch(
    tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy_on_dropout(monkeypatch, lambda x: x)
    model = policy_model(dropout=0.3, tokens=tokens)
    parts: dict[str, nn.Module] = {"embedding": model.embed_norm}
    for layer, block in enumerate(model.blocks):
        parts |= {f"mixer {layer}": block.down, f"mlp {layer}": block.mlp}
    names, _ = outputs_of(parts)
    model(make_steps())
    assert [(p, names[id(x)]) for p, x in calls] == [(0.3, name) for name in ("embedding", *BRANCHES)]


@every_mixer
def test_what_is_dropped_of_a_branch_is_all_of_it(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything dropped, the residual stream is 0, and the logits are those of the last norm's bias."""
    spy_on_dropout(monkeypatch, torch.zeros_like)
    model = sequence_model(mixer, dropout=0.3)
    nn.init.normal_(model.norm.bias)
    expected = (model.head.weight @ model.norm.bias).expand(B, T, V)
    torch.testing.assert_close(model(make_tokens())[0], expected)


# --- prompts ---------------------------------------------------------------------------------------------

CHUNKS = {1: [1] * 7, 2: [2, 2, 2, 1], 3: [3, 3, 1], 6: [6, 1], 7: [7], 8: [7]}


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("mixer", ["mingru", "lstm", "attention", "mamba"])
@pytest.mark.parametrize("with_reset", [False, True])
def test_a_long_prompt_is_read_with_the_state_carried_between_chunks(
    mixer: str, chunk: int, with_reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = sequence_model(mixer).double().eval()
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(2)) < 0.3 if with_reset else None
    with torch.no_grad():
        _, start = model(make_tokens(3))
        logits, state = model(make_tokens(), start, reset=reset)
        tensors = tensors_of(state)
    decoder, lengths, read = Decoder(model), [], Decoder._read

    def note(one: Decoder, inputs: Tensor, *rest: Any) -> Any:
        lengths.append(inputs.shape[1])
        return read(one, inputs, *rest)

    monkeypatch.setattr(Decoder, "_read", note)
    monkeypatch.setattr("minrnn.models.decoder.PROMPT_CHUNK", chunk)
    found, after = decoder.prefill(make_tokens(), start, reset=reset)
    assert lengths == CHUNKS[chunk]
    torch.testing.assert_close(found, logits[:, -1], rtol=0, atol=1e-12)
    torch.testing.assert_close(tensors_of(after), tensors, rtol=0, atol=1e-12)


def test_no_more_than_4096_tokens_are_read_in_one_call() -> None:
    """Their logits alone are kept at a time: those of a book would not fit into memory."""
    model = sequence_model(num_layers=1).eval()
    lengths: list[int] = []
    model.embedding.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    Decoder(model).prefill(make_tokens(9000))
    assert lengths == [4096, 4096, 808]


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_state(note, state)
    return found


# --- bounds of actions -----------------------------------------------------------------------------------


def with_constant_head(**options: Any) -> DecisionModel:
    """A policy whose head returns 1 and -1 at every step, with bounds 2.5 and 0.5."""
    model = policy_model(num_layers=1, **options).eval()
    nn.init.zeros_(model.head.weight)
    model.head.bias.data.copy_(torch.tensor([1.0, -1.0]))
    model.set_statistics(torch.zeros(S), torch.ones(S), torch.tensor([2.5, 0.5]))
    return model


@pytest.mark.parametrize("tokens", TOKENS)
def test_actions_are_scaled_by_their_bounds(tokens: str) -> None:
    model = with_constant_head(tokens=tokens, target_return=1.0 if tokens != "observation" else None)
    expected = torch.tensor([1.9039853899, -0.3807970780])  # tanh(1) = 0.7615941560, by 2.5 and by -0.5
    torch.testing.assert_close(model(make_steps())[0], expected.expand(B, T, A))
    policy = Policy(model)
    for _ in range(2):
        torch.testing.assert_close(policy.act(torch.ones(S), 0.0), expected)


def test_previous_actions_are_divided_by_their_bounds() -> None:
    model = with_constant_head()
    previous = torch.tensor([5.0, 0.25]).expand(B, T, A)
    found = model.embedding_inputs(make_steps(previous))["embed_previous"]
    assert torch.equal(found, torch.tensor([2.0, 0.5]).expand(B, T, A))


def test_discrete_actions_have_no_bound() -> None:
    model = with_constant_head(discrete=True)
    previous = torch.tensor([NOTHING_DONE, 0, 1, 0, 1, 1, 0]).expand(B, T)
    steps = make_steps(previous)
    assert torch.equal(model(steps)[0], torch.tensor([1.0, -1.0]).expand(B, T, A))
    found = model.embedding_inputs(steps)["embed_previous"][0]
    assert found.tolist() == [[0, 0], [1, 0], [0, 1], [1, 0], [0, 1], [0, 1], [1, 0]]


# --- widths ----------------------------------------------------------------------------------------------

HIDDEN = {
    (10, 1.0): 10,
    (10, 1.26): 13,  # 12.6
    (10, 1.24): 12,  # 12.4
    (10, 1.25): 12,  # 12.5: a half is rounded to the even number
    (10, 0.75): 8,  # 7.5
    (3, 2.5): 8,  # 7.5
    (10, 0.01): 1,  # at least one channel
}
INNER = {
    (10, 2.0): 20,
    (10, 1.26): 13,
    (10, 1.24): 12,
    (10, 1.25): 12,
    (3, 2.5): 8,
    (10, 0.06): 1,  # 0.6
    (10, 0.04): 0,  # no MLP
    (10, 0.0): 0,
}


@pytest.mark.parametrize(("d_model", "expansion"), HIDDEN)
@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "gru"])
def test_hidden_widths(d_model: int, expansion: float, mixer: str) -> None:
    config = ModelConfig(vocab_size=V, d_model=d_model, num_layers=1, expansion=expansion, mixer=mixer)
    width = HIDDEN[d_model, expansion]
    assert config.d_hidden == width
    block = SequenceModel(config).blocks[0]
    assert (block.mixer.d_model, block.mixer.d_hidden) == (d_model, width)
    assert block.down.weight.shape == (d_model, width)


@pytest.mark.parametrize(("d_model", "ratio"), INNER)
@pytest.mark.parametrize(("activation", "inputs"), [("gelu", 1), ("swiglu", 2)])
def test_inner_widths(d_model: int, ratio: float, activation: str, inputs: int) -> None:
    config = ModelConfig(
        vocab_size=V, d_model=d_model, num_layers=1, mlp_ratio=ratio, mlp_activation=activation
    )
    width = INNER[d_model, ratio]
    assert config.d_inner == width
    block = SequenceModel(config).blocks[0]
    if width == 0:
        assert (block.mlp, block.mlp_norm) == (None, None)
        return
    assert block.mlp.up.weight.shape == (inputs * width, d_model)
    assert block.mlp.down.weight.shape == (d_model, width)
