"""Models whose sequences are divided over ranks compute what they compute on one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gated import LAYERS, RECURRENCES
from laws import relative_error
from rank_threads import on_threads
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from minrnn import Decoder, ModelConfig, PairedMinLSTM, SequenceModel, load_checkpoint, save_checkpoint
from minrnn.distributed import sequence_parallel, shard_sequence
from minrnn.mixers import MIXERS, Mixer
from minrnn.mixers.sharded import undivided
from minrnn.models import map_state

UNDIVIDED = ("rnn", "gru", "lstm", "attention")
DIVIDED = [name for name in MIXERS if name not in UNDIVIDED]
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in DIVIDED},
    "signed": {"mixer": "mingru", "signed": True},
    "no convolution": {"mixer": "minlstm", "conv_width": 0},
    "a convolution of one step": {"mixer": "mingru", "conv_width": 1},
}

LIMIT, OF_GRADIENTS = 2e-6, 4e-6


def mesh_of(size: int) -> Any:
    return init_device_mesh("cpu", (size,))


def divided(
    size: int, model: nn.Module, job: Callable[[nn.Module, Callable[..., Tensor]], Tensor | Any]
) -> list[list[Any]]:
    """Run `job(model, cut)` on the ranks of a divided copy; return what it does, and its gradients.

    `cut` returns this rank's part of a tensor.
    """

    def on_rank(rank: int) -> list[Any]:
        mesh = mesh_of(size)
        own = sequence_parallel(copy.deepcopy(model), mesh)
        found = job(own, lambda x, dim=1: shard_sequence(x, mesh, dim))
        return [*found, {name: x.grad for name, x in own.named_parameters()}]

    return on_threads(size, on_rank)


def check_gradients(model: nn.Module, parts: list[dict[str, Tensor]]) -> None:
    """Hold the sums over ranks to the gradients of the whole, relative to the largest of all."""
    largest = max(float(x.grad.abs().max()) for x in model.parameters())
    for name, x in model.named_parameters():
        total = sum(part[name] for part in parts)
        assert (total - x.grad).abs().max() < OF_GRADIENTS * largest, name


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", ["plain", "both directions", "time first", "recompute"])
def test_layers(recurrence: str, size: int, form: str) -> None:
    gate, options = RECURRENCES[recurrence]
    torch.manual_seed(0)
    layer = LAYERS[gate](
        3,
        5,
        num_layers=2,
        batch_first=form != "time first",
        bidirectional=form == "both directions",
        recompute=form == "recompute",
        **options,
    )
    T, axis = 19, int(form != "time first")
    x, reset = torch.randn(2, T, 3), torch.rand(2, T) < 0.2
    reset[:, T // size] = True  # where a part begins
    if form == "time first":
        x, reset = x.transpose(0, 1), reset.T
    hx = torch.randn(layer.num_layers * layer.num_directions, 2, 5)
    for forget in (reset, None):
        given = x.clone().requires_grad_()
        output, h_n = layer(given, hx, reset=forget)
        layer.zero_grad()
        weights = torch.randn_like(output)
        ((output * weights).sum() + size * h_n.sum()).backward()

        def job(own: Any, cut: Any, forget: Tensor | None = forget, weights: Tensor = weights) -> list[Any]:
            part = cut(x, axis).clone().requires_grad_()
            output, h_n = own(part, hx, reset=None if forget is None else cut(forget, axis))
            ((output * cut(weights, axis)).sum() + h_n.sum()).backward()
            return [output, h_n, part.grad]

        outputs, states, dx, gradients = zip(*divided(size, layer, job), strict=True)
        assert relative_error(torch.cat(outputs, axis), output) < LIMIT
        assert all(relative_error(state, h_n) < LIMIT for state in states)
        assert relative_error(torch.cat(dx, axis), given.grad) < OF_GRADIENTS
        check_gradients(layer, list(gradients))


def make_model(name: str) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(vocab_size=11, d_model=12, num_layers=3, **MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [2, 4])
def test_models_with_a_carried_state(name: str, size: int) -> None:
    """Two windows, of which the second continues the first, with documents that begin inside."""
    model = make_model(name)
    windows = [torch.randint(11, (2, T)) for T in (29, 18)]
    resets: list[Any] = [torch.rand(2, 29) < 0.1, None]
    resets[0][:, 29 // size] = True
    targets = [torch.randint(11, window.shape) for window in windows]

    def run(model: Any, cut: Any, scale: float) -> list[Any]:
        state, found = None, []
        for window, reset, target in zip(windows, resets, targets, strict=True):
            logits, state = model(cut(window), state, reset=None if reset is None else cut(reset))
            asked = nn.functional.cross_entropy(logits.flatten(0, 1), cut(target).flatten(), reduction="sum")
            (asked + scale * sum(part.square().sum() for part in tensors_of(state))).backward()
            state = map_state(torch.detach, state)
            found += [logits, tensors_of(state)]
        return found

    expected = run(model, lambda x: x, 1.0)
    *found, gradients = zip(*divided(size, model, lambda own, cut: run(own, cut, 1 / size)), strict=True)
    for parts, whole in zip(found, expected, strict=True):
        if isinstance(whole, Tensor):
            assert relative_error(torch.cat(parts, 1), whole) < LIMIT
            continue
        for state in parts:
            for part, exact in zip(state, whole, strict=True):
                assert part.dtype == exact.dtype
                assert relative_error(part, exact) < LIMIT if part.numel() else part.shape == exact.shape
    check_gradients(model, list(gradients))


@pytest.mark.parametrize("name", MODELS)
def test_a_state_that_is_not_used_needs_no_gradient(name: str) -> None:
    """All ranks take part in every exchange of gradients, though the first needs no other's state."""
    model, tokens = make_model(name), torch.randint(11, (2, 16))
    model(tokens)[0].square().sum().backward()

    def job(own: Any, cut: Any) -> list[Any]:
        own(cut(tokens))[0].square().sum().backward()
        return []

    check_gradients(model, [gradients for (gradients,) in divided(2, model, job)])


def tensors_of(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [x for part in state for x in tensors_of(part)]


def test_what_a_rank_keeps_for_backward_falls_with_their_number() -> None:
    model, tokens = make_model("mingru"), torch.randint(11, (1, 4096))

    def kept(own: nn.Module, part: Tensor) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            own(part)[0].sum().backward()
        return sum(sizes.values())

    whole = kept(model, tokens)
    for size in (2, 4):
        found = divided(size, model, lambda own, cut: [kept(own, cut(tokens))])
        assert all(0.9 * whole / size < of_rank < 1.1 * whole / size for of_rank, _ in found)


def test_the_pair_of_states() -> None:
    layer, x = PairedMinLSTM(3, 5, batch_first=True), torch.randn(2, 9, 3)
    output, (h_n, _) = layer(x)

    def job(own: Any, cut: Any) -> list[Any]:
        return [*own(cut(x))]

    outputs, states, _ = zip(*divided(2, layer, job), strict=True)
    assert relative_error(torch.cat(outputs, 1), output) < LIMIT
    assert all(relative_error(x, h_n) < LIMIT for state in states for x in state)


# --- what is refused, and what else is to be done with a divided model -----------------------------------


class Mean(Mixer):
    """A mixer that nothing is known about."""

    state_names = ("h",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (
                lambda mixer=mixer: SequenceModel(ModelConfig(d_model=8, num_layers=1, mixer=mixer)),
                r"blocks\.0\.mixer \(\w+\) cannot be divided over ranks: (a step of it|its state) is",
            )
            for mixer in ("rnn", "gru", "lstm", "attention")
        ),
        (lambda: nn.GRU(2, 2), r"the model \(GRU\) cannot be divided over ranks: a step of it is"),
        (lambda: nn.Sequential(nn.MultiheadAttention(2, 1)), r"0 \(MultiheadAttention\) cannot be divided"),
        (
            lambda: nn.Sequential(LAYERS["mingru"](2, 2), Mean(2, 2)),
            r"1 \(Mean\) cannot .* it has no such form",
        ),
        (lambda: nn.Linear(2, 2), "the model must have a layer over time, got none"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_reason(make: Any, message: str) -> None:
    def on_rank(_: int) -> None:
        model = make()
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=f"^sequence_parallel: {message}"):
            sequence_parallel(model, mesh_of(2))
        assert [type(module) for module in model.modules()] == kinds

    on_threads(2, on_rank)


def test_wrong_calls_are_refused() -> None:
    def on_rank(_: int) -> None:
        mesh = mesh_of(2)
        model = sequence_parallel(make_model("mingru"), mesh)
        with pytest.raises(ValueError, match=r"blocks\.0\.conv \(CausalConv\) is divided over ranks already"):
            sequence_parallel(model, mesh)
        with pytest.raises(ValueError, match=r"each rank must have at least 3 steps, .* 4, got 2"):
            model(torch.zeros(1, 2, dtype=torch.int64))
        with pytest.raises(ValueError, match="x must have at least 2 steps, the number of ranks, got 1"):
            shard_sequence(torch.zeros(1, 1), mesh)
        layer = sequence_parallel(LAYERS["mingru"](2, 3), mesh)
        with pytest.raises(ValueError, match="MinGRU: input must be one plain tensor of a part"):
            layer(torch.zeros(4, 2), cu_seqlens=torch.tensor([0, 2, 4]))
        flat = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "sequence"))
        with pytest.raises(ValueError, match=r"mesh must have one axis.*\('data', 'sequence'\)"):
            shard_sequence(torch.zeros(1, 4), flat)

    on_threads(2, on_rank)


def test_a_divided_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    """And a decoder calls it, as no faster path knows of the ranks."""
    model = make_model("mingru")

    def on_rank(rank: int) -> None:
        own = sequence_parallel(copy.deepcopy(model), mesh_of(2))
        save_checkpoint(tmp_path / str(rank), own)
        assert Decoder(own)._fused is None
        assert Decoder(model)._fused is not None

    on_threads(2, on_rank)
    loaded, _ = load_checkpoint(tmp_path / "1")
    assert type(loaded.blocks[0].mixer.rnn) is LAYERS["mingru"]
    assert all(torch.equal(x, y) for x, y in zip(loaded.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", DIVIDED)
def test_a_divided_model_reads_whole_sequences_in_between(name: str) -> None:
    model = make_model(name)
    tokens = torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(0))

    def on_rank(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        mesh = mesh_of(2)
        own = sequence_parallel(copy.deepcopy(model), mesh)
        before = own(shard_sequence(tokens, mesh))[0]
        with pytest.raises(KeyError), undivided(own):
            raise KeyError
        with undivided(own):
            whole = own(tokens)[0]
        return before, whole, own(shard_sequence(tokens, mesh))[0]

    expected = model(tokens)[0]
    for before, whole, after in on_threads(2, on_rank):
        assert torch.equal(whole, expected)
        assert torch.equal(before, after)
