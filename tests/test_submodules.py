"""Whatever can be hooked, parametrized, wrapped, replaced or patched in a model is called in every use of it.

Every submodule of every model is swept, in training, in single steps, and through `generate` and `Policy`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

from minrnn.mixers import MIXERS, MinGRU
from minrnn.models import (
    DecisionConfig,
    DecisionModel,
    Decoder,
    Model,
    ModelConfig,
    Policy,
    SequenceModel,
    Steps,
    generate,
)
from minrnn.models.dropout import Dropout
from minrnn.models.evaluation import evaluation_mode

V, D = 7, 8

CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in MIXERS},
    "bare": {"conv_width": 0, "mlp_ratio": 0, "norm": "none"},
    "tied": {"tie_embeddings": True, "norm": "rms", "mlp_activation": "swiglu"},
}

POLICIES: dict[str, dict[str, Any]] = {
    "joined": {"tokens": "joined"},
    "interleaved": {"tokens": "interleaved", "max_steps": 9},
    "observation": {"tokens": "observation", "discrete": True},
    "window": {"tokens": "joined", "window": 2, "max_steps": 9},
}

NAMES = [*CONFIGS, *(f"policy-{name}" for name in POLICIES)]
every_model = pytest.mark.parametrize("name", NAMES)


def build(name: str, **options: Any) -> Model:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": D, "num_layers": 1, **options}
    if name in CONFIGS:
        return SequenceModel(ModelConfig(vocab_size=V, **{**sizes, **CONFIGS[name]})).eval()
    config = DecisionConfig(ModelConfig(**sizes), 5, 3, target_return=9.0, **POLICIES[name[7:]])
    return DecisionModel(config).eval()


def make_inputs(model: Model, steps: int) -> Tensor | Steps:
    if isinstance(model, SequenceModel):
        return torch.arange(2 * steps).reshape(2, steps) % V
    previous = (
        torch.tensor([0, 2])[:, None].expand(2, steps) if model.config.discrete else torch.ones(2, steps, 3)
    )
    times = torch.arange(steps).expand(2, steps)
    numbers = torch.linspace(-1, 1, 2 * steps * 5).reshape(2, steps, 5)
    return Steps(torch.ones(2, steps), numbers, previous, times)


# --- ways of use: each returns the outputs of three steps --------------------------------------------


def in_training(model: Model) -> Tensor:
    return model(make_inputs(model, 3))[0]


def in_steps(model: Model) -> Tensor:
    inputs, state, outputs = make_inputs(model, 3), None, []
    for t in range(3):
        now = slice(t, t + 1)
        step = Steps(*(part[:, now] for part in inputs)) if isinstance(inputs, Steps) else inputs[:, now]
        y, state = model(step, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def in_steps_without_gradients(model: Model) -> Tensor:
    with torch.no_grad():
        return in_steps(model)


def at_work(model: Model) -> Tensor:
    """Through `generate` or `Policy`: what the model's own calls return there."""
    outputs: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output[0][:, -1]))
    with handle:
        if isinstance(model, SequenceModel):
            tokens = make_inputs(model, 2)
            assert isinstance(tokens, Tensor)
            list(generate(model, tokens, 2, generator=torch.Generator().manual_seed(1)))
        else:
            policy = Policy(model)
            for reward in (0.0, 1.0, 1.0):
                policy.act(torch.linspace(-1, 1, 5), reward)
    return torch.stack(outputs)


def decoded(model: Model) -> Tensor:
    """By a decoder that is made now."""
    decoder, inputs, state, outputs = Decoder(model), make_inputs(model, 3), None, []
    for t in range(3):
        step = Steps(*(part[:, t : t + 1] for part in inputs)) if isinstance(inputs, Steps) else inputs[:, t]
        y, state = decoder.step(step, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1)


USES = (in_training, in_steps_without_gradients, in_steps, at_work, decoded)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The submodules that are called: a list is none."""
    for name, part in model.named_modules():
        if name and not isinstance(part, nn.ModuleList):
            yield name, part


def unchanged(model: Model, before: Sequence[Tensor]) -> list[str]:
    """The ways of use, of the first of them, whose outputs are as before."""
    pairs = zip(USES, before, strict=False)
    return [use.__name__ for use, old in pairs if torch.allclose(use(model), old)]


# --- hooks ------------------------------------------------------------------------------------------------


@every_model
def test_hooks_are_called(name: str) -> None:
    model = build(name)
    for use in USES:
        use(model)  # read before there are hooks
        for path, part in parts_of(model):
            for register in (part.register_forward_pre_hook, part.register_forward_hook):
                seen: list[bool] = []
                with register(lambda *_, seen=seen: seen.append(True)):
                    use(model)
                assert seen, (use.__name__, path)


@every_model
def test_backward_hooks_are_called(name: str) -> None:
    model = build(name)
    for use in (in_training, in_steps):
        for path, part in parts_of(model):
            for register in (part.register_full_backward_pre_hook, part.register_full_backward_hook):
                seen: list[bool] = []
                with register(lambda *_, seen=seen: seen.append(True)):
                    use(model).sum().backward()
                assert seen, (use.__name__, path, register.__name__)


@every_model
def test_global_hooks_see_every_part(name: str) -> None:
    model = build(name)
    for use in USES:
        seen: set[nn.Module] = set()
        with register_module_forward_hook(lambda module, *_, seen=seen: seen.add(module)):
            use(model)
        assert seen >= {part for _, part in parts_of(model)}, use.__name__


# --- replacement ------------------------------------------------------------------------------------------


def added(output: Any, scale: Tensor | float = 0.5) -> Any:
    """A result of a part, and something beside: of several, the first."""
    if isinstance(output, tuple):
        return (added(output[0], scale), *output[1:])
    return output + scale * torch.linspace(-1, 1, output.shape[-1]) * (1 + output)


class Wrapper(nn.Module):
    """Calls what it wraps and adds to the result, as LoRA does; it has no `weight`."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return added(self.wrapped(*inputs, **options), self.scale)


class WeightedWrapper(Wrapper):
    """The same, showing the `weight` and the `bias` of what it wraps."""

    @property
    def weight(self) -> Any:
        return getattr(self.wrapped, "weight", None)

    @property
    def bias(self) -> Any:
        return getattr(self.wrapped, "bias", None)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        *((name, Wrapper) for name in NAMES),
        *((name, WeightedWrapper) for name in ("tied", "aaren", "mamba", "policy-joined")),
    ],
)
def test_wrappers_act_and_learn(name: str, wrapper: type[Wrapper]) -> None:
    model = build(name)
    before = [use(model) for use in USES[:2]]
    for path, part in parts_of(model):
        wrapped = wrapper(part)
        model.set_submodule(path, wrapped)
        assert not unchanged(model, before), path
        for use in (in_training, in_steps):
            wrapped.scale.grad = None
            use(model).square().sum().backward()
            assert wrapped.scale.grad is not None, path
            assert wrapped.scale.grad.abs() > 0, path
        model.set_submodule(path, part)
    assert len(unchanged(model, before)) == 2


def changed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A forward, or a call, that adds to the result of another."""

    def call(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        return added(function(self, *inputs, **options))

    return call


def of_the_instance(part: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(part, "forward", changed(type(part).forward).__get__(part))


def of_a_subclass(part: nn.Module, patch: pytest.MonkeyPatch) -> None:
    kind = type(part)
    patch.setattr(part, "__class__", type(kind.__name__, (kind,), {"forward": changed(kind.forward)}))


def of_the_class(part: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(part), "forward", changed(type(part).forward), raising=False)


def of_all_calls(part: nn.Module, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(part), "__call__", changed(type(part).__call__), raising=False)


@every_model
@pytest.mark.parametrize("replace", [of_the_instance, of_a_subclass, of_the_class, of_all_calls])
def test_another_forward_is_run(name: str, replace: Callable[[nn.Module, pytest.MonkeyPatch], None]) -> None:
    model = build(name)
    before = [use(model) for use in USES[:2]]
    for path, part in parts_of(model):
        with pytest.MonkeyPatch.context() as patch:
            replace(part, patch)
            assert not unchanged(model, before), path
    assert len(unchanged(model, before)) == 2


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "gru", "lstm"])
def test_layers_in_a_layers_place_are_run_whole(mixer: str) -> None:
    """A mixer carries one layer's state: more are run where none is carried, and else refused."""
    model = build(mixer)
    block = model.blocks[0].mixer
    one = block.rnn
    block.rnn = type(one)(D, D, num_layers=2, batch_first=True)
    y, state = block(torch.ones(2, 3, D))
    torch.testing.assert_close(y, block.rnn(torch.ones(2, 3, D))[0])
    with pytest.raises(ValueError, match="state tensor h must be"):
        block(torch.ones(2, 1, D), state)
    block.rnn = one
    one(torch.ones(2, 3, D))


# --- weights ----------------------------------------------------------------------------------------------


class Other(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight + 0.1


def parametrized(part: nn.Module, name: str) -> str:
    parametrize.register_parametrization(part, name, Other())
    return f"parametrizations.{name}.original"


def weight_normed(part: nn.Module, name: str) -> str:
    parametrizations.weight_norm(part, name)
    with torch.no_grad():
        getattr(part.parametrizations, name).original0.mul_(1.5)
    return f"parametrizations.{name}.original1"


def weight_normed_by_hooks(part: nn.Module, name: str) -> str:
    torch.nn.utils.weight_norm(part, name)
    with torch.no_grad():
        getattr(part, f"{name}_g").mul_(1.5)
    return f"{name}_v"


def spectral_normed(part: nn.Module, name: str) -> str:
    parametrizations.spectral_norm(part, name)
    return f"parametrizations.{name}.original"


def spectral_normed_by_hooks(part: nn.Module, name: str) -> str:
    torch.nn.utils.spectral_norm(part, name)
    return f"{name}_orig"


def pruned(part: nn.Module, name: str) -> str:
    prune.l1_unstructured(part, name, amount=0.5)
    return f"{name}_orig"


def matrices_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, part in model.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() > 1:
                yield path, name


@every_model
@pytest.mark.parametrize(
    "change",
    [
        parametrized,
        weight_normed,
        weight_normed_by_hooks,
        spectral_normed,
        spectral_normed_by_hooks,
        pruned,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_other_weights_are_used_and_learn(name: str, change: Callable[[nn.Module, str], str]) -> None:
    model = build(name)
    model.requires_grad_(False)
    before = [use(model) for use in USES[:2]]
    for path, weight in matrices_of(model):
        other = copy.deepcopy(model)
        other.get_submodule(path).requires_grad_()
        original = change(other.get_submodule(path), weight)
        y = in_training(other)
        assert not torch.allclose(y, before[0]), (path, weight)
        assert not torch.allclose(in_steps_without_gradients(other), before[1]), (path, weight)
        y.square().sum().backward()
        gradient = other.get_submodule(path).get_parameter(original).grad
        assert gradient is not None, (path, weight)
        assert gradient.abs().max() > 0, (path, weight)


@every_model
def test_quantized_parts_are_used(name: str) -> None:
    model = build(name)
    before = [use(model) for use in USES]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear, nn.GRU, nn.LSTM})
    kinds = [type(part).__module__ for _, part in parts_of(quantized)]
    assert any("quantized" in kind for kind in kinds)
    assert not unchanged(quantized, before)
    torch.testing.assert_close(in_training(quantized), before[0], rtol=0, atol=0.1)


# --- dropout ----------------------------------------------------------------------------------------------


@every_model
def test_dropouts_in_training_mode_act_in_a_model_in_evaluation_mode(name: str) -> None:
    model = build(name, dropout=0.5)
    before = [use(model) for use in USES]
    assert len(unchanged(model, before)) == len(USES)
    dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
    for dropout in dropouts:
        dropout.train()
        assert not unchanged(model, before)
        assert not model.training
        dropout.eval()
    assert len(unchanged(model, before)) == len(USES)


def test_dropout_between_layers_follows_its_layers_mode_as_torchs() -> None:
    model = nn.Sequential(MinGRU(4, 4, 2, dropout=0.5)).eval()
    x = torch.ones(5, 3, 4)
    assert torch.equal(model(x)[0], model(x)[0])
    model[0].train()
    assert not torch.equal(model(x)[0], model(x)[0])


@every_model
def test_every_part_gets_its_own_mode_back(name: str) -> None:
    model = build(name, dropout=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    at_work(model)
    assert [module.training for module in model.modules()] == modes


def test_a_part_in_two_places_gets_its_own_mode_back() -> None:
    shared = nn.Dropout()
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared), nn.Dropout()).train()
    shared.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [name for name, module in model.named_modules() if not module.training] == ["0.0"]
