"""The loss of a large vocabulary is that of all logits, and holds no more than a chunk of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.models import ModelConfig, SequenceModel, losses
from minrnn.tasks import task as task_module
from minrnn.tasks.task import IGNORED, nats, token_nats

V, B, T = 3000, 3, 50


class Adapter(nn.Module):
    """A head with a part of its own, as adapters have."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.added = head, nn.Linear(head.in_features, V, bias=True, dtype=torch.float64)

    def forward(self, y: Tensor) -> Tensor:
        return self.head(y) + self.added(y)


def hooked(model: SequenceModel) -> None:
    assert model.head is not None
    model.head.register_forward_hook(lambda module, inputs, output: output * 0.5)


def adapted(model: SequenceModel) -> None:
    model.head = Adapter(model.head)  # type: ignore[assignment, arg-type]


def biased(model: SequenceModel) -> None:
    model.head = nn.Linear(8, V, dtype=torch.float64)


CHANGES = {"plain": lambda model: None, "hooked": hooked, "adapted": adapted, "biased": biased, "tied": None}


def model_of(change: str = "plain") -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=V, d_model=8, num_layers=1, tie_embeddings=change == "tied")
    model = SequenceModel(config).double()
    if (make := CHANGES[change]) is not None:
        make(model)
    return model


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(V, (2, B, T), generator=generator)
    targets[torch.rand(B, T, generator=generator) < 0.3] = IGNORED
    return tokens, targets, torch.rand(B, T, generator=generator) < 0.1


def gradients(model: SequenceModel, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("has_fused", [True, False])
def test_the_loss_is_that_of_all_logits(
    change: str, reduction: str, has_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 7 * V)
    if not has_fused:
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    model, (tokens, targets, reset) = model_of(change), example()
    with torch.no_grad():
        state = model(tokens)[1]
    logits, expected_state = model(tokens, state, reset=reset)
    expected = nats(logits, targets, reduction)
    loss, after = model.loss(tokens, targets, state, reset=reset, reduction=reduction)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(after, expected_state, rtol=0, atol=0)
    torch.testing.assert_close(
        gradients(model, 3 * loss), gradients(model, 3 * expected), rtol=1e-9, atol=1e-12
    )
    with torch.inference_mode():
        assert model.loss(tokens, targets, state, reset=reset, reduction=reduction)[
            0
        ].item() == pytest.approx(expected.item(), abs=1e-9)


def largest_allocation(call: Callable[[], object]) -> int:
    """Return the bytes of the largest tensor that an operation makes, inside torch's own functions too."""
    only_here = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=only_here, profile_memory=True) as found:
        call()
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("change", ["plain", "adapted", "tied"])
@pytest.mark.parametrize("has_fused", [True, False])
def test_no_more_than_a_chunk_of_logits_is_held(
    change: str, has_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 16 * V)
    if not has_fused:
        monkeypatch.delattr(nn, "LinearCrossEntropyOptions", raising=False)
    model, tokens = model_of(change), torch.randint(V, (4, 32))
    row = 8 * V  # bytes of a step's logits

    def train() -> None:
        model.loss(tokens, tokens)[0].backward()

    def evaluate() -> None:
        with torch.inference_mode():
            model.loss(tokens, tokens)

    assert 4 * row <= largest_allocation(train) < 4 * 32 * row / 4
    assert largest_allocation(evaluate) < 4 * 32 * row / 4
    assert 4 * 32 * row <= largest_allocation(lambda: model(tokens)) < 4 * 32 * row * 1.1


def test_half_precision_keeps_a_loss_in_float32() -> None:
    model, (tokens, targets, _) = model_of().float(), example()
    expected = nats(model(tokens)[0], targets, "mean").item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    loss, _ = model.bfloat16().loss(tokens, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-2)


def test_tasks_take_it_where_the_vocabulary_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (tokens, targets, reset) = model_of(), example()
    expected = token_nats(nn.ModuleList([model])[0], tokens, targets, None, reset, "sum")[0].item()
    calls: list[int] = []
    whole = SequenceModel.loss
    monkeypatch.setattr(SequenceModel, "loss", lambda self, *a, **k: calls.append(1) or whole(self, *a, **k))
    for large, count in ((V, 1), (V + 1, 0)):
        calls.clear()
        monkeypatch.setattr(task_module, "LARGE_VOCABULARY", large)
        found, _ = token_nats(model, tokens, targets, None, reset, "sum")
        assert len(calls) == count
        assert found.item() == pytest.approx(expected)
    monkeypatch.setattr(task_module, "LARGE_VOCABULARY", 1)
    model.register_forward_hook(lambda module, inputs, output: (output[0] * 0, output[1]))
    assert token_nats(model, tokens, targets, None, None, "mean")[0].item() == pytest.approx(
        torch.tensor(float(V)).log().item()
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.zeros(B, T + 1, dtype=torch.int64)}, r"targets must be \(3, 50\), as tokens, got"),
        ({"reduction": "none"}, "reduction must be mean or sum, got 'none'"),
        ({"tokens": torch.zeros(B, dtype=torch.int64)}, r"tokens must be \(B, T\)"),
    ],
)
def test_wrong_arguments_are_named(changed: dict[str, Any], message: str) -> None:
    tokens, targets, _ = example()
    with pytest.raises(ValueError, match=message):
        model_of().loss(**{"tokens": tokens, "targets": targets, **changed})


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch is older than 2.13"
)
def test_torchs_own_function_is_there() -> None:
    """Where it goes, or changes its arguments, chunks are computed twice, and nobody would notice."""
    assert "options" in inspect.signature(functional.linear_cross_entropy).parameters
    assert (
        losses.linear_loss(torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2).long(), "mean", -1) is not None
    )
