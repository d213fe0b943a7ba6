"""The single step in one call: it equals the model in torch's operations, or leaves the step to them."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GATES
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from minrnn.mixers import MIXERS
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel, Steps, map_state
from minrnn.models.block import ACTIVATIONS
from minrnn.models.sequence import NORMS
from minrnn.ops import CANDIDATES, chain
from minrnn.training.threads import cpu_threads

HERE = Path(__file__).parent
V = 11
TOLERANCE = 2e-5  # of float32 through some layers, relative to the largest number

MinCell = dict[str, Any]
CELLS: list[MinCell] = [
    {"mixer": "mingru"},
    {"mixer": "mingru", "signed": True},
    {"mixer": "minlstm"},
    {"mixer": "minlstm", "normalize": False},
    {"mixer": "minlstm", "signed": True},
]

compiled = pytest.mark.skipif(chain._cpu is None, reason="the compiled engine is missing or set aside")


def build(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(**{"vocab_size": V, "d_model": 20, "num_layers": 2, **options})).eval()


def make_tokens(rows: int, steps: int = 1, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, steps), generator=torch.Generator().manual_seed(seed))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the rows of each step that was one call."""
    found: list[int] = []
    step = chain.Chain.step

    def count(self: chain.Chain, inputs: Any, states: Any) -> Any:
        found.append(inputs[0].numel() // inputs[0].shape[-1])
        return step(self, inputs, states)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain.Chain, "step", count)
        yield found


@contextmanager
def in_torch() -> Iterator[None]:
    """Leave every step to torch's operations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain, "_cpu", None)
        yield


def tensors_of(state: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)  # type: ignore[func-returns-value]
    return found


def assert_equal(actual: tuple[Tensor, Any], expected: tuple[Tensor, Any]) -> None:
    pairs = zip((actual[0], *tensors_of(actual[1])), (expected[0], *tensors_of(expected[1])), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * scale)


def check_steps(model: SequenceModel, rows: int = 3, steps: int = 6) -> None:
    """Steps in one call are steps in torch's operations, and those of one pass."""
    tokens = make_tokens(rows, steps)
    ours: Any = None
    theirs: Any = None
    outputs = []
    with torch.no_grad():
        for t in range(steps):
            with counted() as calls:
                logits, ours = model(tokens[:, t : t + 1], ours)
            assert calls == [rows]
            with in_torch():
                expected, theirs = model(tokens[:, t : t + 1], theirs)
            assert_equal((logits, ours), (expected, theirs))
            outputs.append(logits)
        assert_equal((torch.cat(outputs, dim=1), ours), model(tokens))


# --- laws ---------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_steps_of_every_cell(cell: MinCell, candidate: str) -> None:
    check_steps(build(**cell, candidate=candidate))


def test_every_gate_of_a_mixer_is_among_the_cells() -> None:
    layers = [build(**cell).blocks[0].mixer.rnn for cell in CELLS]
    forms = {(form.gate, form.signed) for form in GATES.values()}
    assert {(layer.gate, layer.signed) for layer in layers} == forms - {("identity", False)}


@compiled
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("conv_width", [0, 1, 4])
def test_steps_of_every_block(norm: str, activation: str, conv_width: int) -> None:
    options = {"norm": norm, "mlp_activation": activation, "conv_width": conv_width}
    check_steps(build(**options))
    check_steps(build(**options, residual=False, bias=False, mlp_ratio=1.3, tie_embeddings=True))


@compiled
@settings(max_examples=40)
@given(
    d_model=st.integers(1, 70),
    expansion=st.sampled_from([0.5, 1.0, 2.5]),
    mlp_ratio=st.sampled_from([0.0, 0.5, 2.0]),
    num_layers=st.integers(1, 3),
    rows=st.integers(1, 20),
    cell=st.sampled_from(CELLS),
)
def test_steps_of_every_size(rows: int, cell: MinCell, **options: Any) -> None:
    check_steps(build(**cell, **options), rows, steps=3)


@compiled
def test_threads_change_nothing() -> None:
    model = build(d_model=520, mlp_activation="swiglu", conv_width=4)
    results = []
    for threads in (1, 3):
        with cpu_threads(threads), torch.no_grad():
            logits, state = model(make_tokens(2))
        results.append([logits, *tensors_of(state)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@compiled
def test_rows_do_not_meet() -> None:
    model, tokens = build(), make_tokens(5)
    with torch.no_grad():
        together, _ = model(tokens)
        apart = [model(tokens[row : row + 1])[0] for row in range(5)]
    assert torch.equal(together, torch.cat(apart))


@compiled
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, 1e20, -1e20, 40.0, -40.0, 1e-30, 0.0])
def test_activations_of_extreme_numbers(activation: str, value: float) -> None:
    """NaN comes out where it went in, and nothing overflows on the way."""
    model = build(norm="none", conv_width=0, mlp_activation=activation, num_layers=1, d_model=4)
    block = model.blocks[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
        block.mlp.up.bias.fill_(value)
        block.mlp.down.weight.fill_(1.0)
        assert model.head is not None
        model.head.weight.fill_(1.0)
        model.embedding.weight.zero_()
        with counted() as calls:
            ours, _ = model(make_tokens(1))
        assert len(calls) == 1
        with in_torch():
            theirs, _ = model(make_tokens(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


@compiled
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa: str) -> None:
    from minrnn.ops import cpu

    names = ["baseline", "avx2", "avx512", "avx512_bf16"]
    if names.index(isa) > names.index(cpu.ISA):
        pytest.skip(f"this processor has {cpu.ISA} at most")
    program = "import test_stepping; test_stepping.check_instruction_set()"
    environment = {**os.environ, "MINRNN_ISA": isa, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa


def check_instruction_set() -> None:
    from minrnn.ops import cpu

    for cell, activation, d_model in itertools.product(CELLS, ACTIVATIONS, (5, 36)):
        check_steps(build(**cell, mlp_activation=activation, d_model=d_model), steps=2)
    print(cpu.ISA)


# --- policies -----------------------------------------------------------------------------------------


def policy(**options: Any) -> DecisionModel:
    torch.manual_seed(0)
    model = DecisionModel(
        DecisionConfig(ModelConfig(d_model=20, num_layers=2), 5, 3, **options, return_scale=10.0)
    )
    model.set_statistics(
        torch.randn(5), torch.rand(5) + 0.5, None if model.config.discrete else torch.ones(3) * 2
    )
    return model.eval()


def one_step(model: DecisionModel, seed: int, time: int) -> Steps:
    torch.manual_seed(seed)
    previous = torch.randint(-1, 3, (4, 1)) if model.config.discrete else torch.randn(4, 1, 3)
    return Steps(30 * torch.randn(4, 1), torch.randn(4, 1, 5), previous, torch.full((4, 1), time))


@compiled
@pytest.mark.parametrize("tokens", ["joined", "observation", "interleaved"])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("max_steps", [0, 9])
def test_steps_of_policies(tokens: str, discrete: bool, max_steps: int) -> None:
    model = policy(tokens=tokens, discrete=discrete, max_steps=max_steps)
    ours: Any = None
    theirs: Any = None
    at_once = tokens != "interleaved" and not max_steps
    with torch.no_grad():
        for time in range(4):
            steps = one_step(model, time, time)
            with counted() as calls:
                actions, ours = model(steps, ours)
            assert len(calls) == at_once
            with in_torch():
                expected, theirs = model(steps, theirs)
            assert_equal((actions, ours), (expected, theirs))


# --- what is left to torch ------------------------------------------------------------------------------


def is_served(model: nn.Module, tokens: Tensor | None = None, state: Any = None) -> bool:
    with counted() as calls, torch.no_grad():
        model(make_tokens(2) if tokens is None else tokens, state)
    return bool(calls)


@compiled
@pytest.mark.parametrize("mixer", MIXERS)
def test_it_is_the_step_of_our_cells_alone(mixer: str) -> None:
    assert is_served(build(mixer=mixer, d_model=24)) == (mixer in ("mingru", "minlstm"))


@compiled
def test_it_is_for_single_steps_of_few_rows_and_numbers_alone() -> None:
    model = build()
    assert is_served(model)
    assert not is_served(model, make_tokens(2, 2))
    assert not is_served(model, make_tokens(chain.MOST_NUMBERS // 20 + 1))
    with counted() as calls:
        model(make_tokens(2))  # autograd records
        with torch.no_grad():
            model(make_tokens(2), reset=torch.ones(2, 1, dtype=torch.bool))
    assert not calls
    assert not is_served(build(dropout=0.5).train())
    assert not is_served(build().double())
    assert not is_served(build().bfloat16())


@compiled
@pytest.mark.parametrize(
    "watching",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        lambda: torch.device("cpu"),  # a mode of functions
    ],
    ids=["autocast", "dispatch", "function"],
)
def test_it_hides_nothing_from_those_who_watch(watching: Callable[[], AbstractContextManager[Any]]) -> None:
    model = build()
    assert is_served(model)
    with watching():
        assert not is_served(model)
    assert is_served(model)


@compiled
def test_transforms_and_compilers_see_torchs_operations() -> None:
    model, tokens = build(), make_tokens(2)
    with torch.no_grad(), counted() as calls:
        expected, _ = model(tokens)
        stacked, _ = torch.vmap(lambda row: model(row.unsqueeze(0)))(tokens)
        torch.testing.assert_close(stacked.squeeze(1), expected, rtol=0, atol=TOLERANCE)
        program = torch.export.export(model, (tokens,))
        graph = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(graph(tokens)[0], expected, rtol=0, atol=TOLERANCE)
    assert calls == [2]
    torch.testing.assert_close(program.module()(tokens)[0], expected, rtol=0, atol=TOLERANCE)


PARTS = [
    "norm",
    *(
        f"blocks.1.{name}"
        for name in ("mixer_norm", "conv", "mixer", "down", "mlp_norm", "mlp", "mlp.up", "mlp.down")
    ),
    "blocks.0",
]


@compiled
@pytest.mark.parametrize("part", PARTS)
def test_hooks_are_called(part: str) -> None:
    model = build()
    assert is_served(model)
    seen: list[str] = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model.get_submodule(part), register)(lambda *_: seen.append(part))
        assert not is_served(model)
        handle.remove()
        assert is_served(model)
    assert len(seen) == 2


@compiled
def test_hooks_of_all_modules_are_called() -> None:
    model, seen = build(), []
    handle = register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert not is_served(model)
    finally:
        handle.remove()
    assert "MinGRUMixer" in seen
    assert is_served(model)


@compiled
def test_parts_that_do_something_else_are_called() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for part in ("down", "mlp.up"):
        model = build()
        assert is_served(model)
        before = model.blocks[1].get_submodule(part)
        after = Twice(before.in_features, before.out_features)
        model.blocks[1].set_submodule(part, after)
        assert not is_served(model)
        model.blocks[1].set_submodule(part, before)
        assert is_served(model)
    model = build()
    model.norm.forward = lambda x: 0 * x  # type: ignore[method-assign]
    assert not is_served(model)
    model = build()
    weight_norm(model.blocks[0].mixer.rnn, "weight_ih_l0")
    assert not is_served(model)


@compiled
def test_states_that_lie_otherwise_are_read_all_the_same() -> None:
    model, tokens = build(conv_width=4), make_tokens(2)
    with torch.no_grad():
        _, state = model(tokens)
        expected = model(tokens, state)
        scattered = map_state(lambda x: x.repeat_interleave(2, dim=-1)[..., ::2], state)
        assert not is_served(model, tokens, scattered)
        assert_equal(model(tokens, scattered), expected)


@compiled
def test_wrong_states_are_refused_as_ever() -> None:
    model, tokens = build(), make_tokens(2)
    with torch.no_grad():
        _, state = model(tokens)
        with pytest.raises(ValueError, match="must have 2 blocks, got 1"):
            model(tokens, state[:1])
        with pytest.raises(ValueError, match="must be the batch, 2"):
            model(tokens, map_state(lambda x: x[:1], state))
        with pytest.raises((ValueError, RuntimeError)):
            model(tokens, map_state(lambda x: x[..., :-1], state))
        with pytest.raises(ValueError, match="state must be"):
            model(tokens, tuple((windows, ()) for windows, _ in state))
        with pytest.raises(TypeError, match="state must be the tuple"):
            model(tokens, tuple((windows, list(carried)) for windows, carried in state))


def misshapen(part: Tensor) -> list[Tensor]:
    """What has the batch of a part of a state but not its shape: as many numbers, or more, or fewer."""
    batch, *axes = part.shape
    others = [
        part.reshape(batch, -1, 1),
        part.reshape(batch, 1, -1),
        part.unsqueeze(1),
    ]
    if axes:
        others += [part.flatten(1), part.transpose(1, -1), torch.cat([part, part], dim=-1)]
        others += [part[..., :0], part[:, 1:]]
    return [other for other in others if other.shape != part.shape and other.shape[:1] == (batch,)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_states_of_another_shape_are_refused_by_steps_and_by_longer_calls(mixer: str) -> None:
    model = build(mixer=mixer, d_model=24, conv_width=4, num_layers=1)
    with torch.no_grad():
        _, (((window,), carried),) = model(make_tokens(2, 3))
        others = [((), carried), ((window, window), carried), ((window,), (*carried, carried[0]))]
        others += [((window,), carried[:-1])]
        others += [((other,), carried) for other in misshapen(window)]
        for at, part in enumerate(carried):
            for other in misshapen(part):
                others.append(((window,), (*carried[:at], other, *carried[at + 1 :])))
        for block, steps in itertools.product(others, (1, 2)):
            with pytest.raises(ValueError, match=r"must (be|have)") as refused:
                model(make_tokens(2, steps), (block,))
            assert "\n" not in str(refused.value)
        model.blocks[0].conv = None
        with pytest.raises(ValueError, match="must have 0 windows"):
            model(make_tokens(2), (((window,), carried),))


@compiled
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e4, 1e8, 1e12, 1e16, 1e20, torch.inf, torch.nan])
def test_steps_overflow_where_longer_calls_do(norm: str, activation: str, scale: float) -> None:
    for options, d_model, seed in itertools.product(
        ({"conv_width": 0, "mlp_ratio": 0.0}, {"mlp_ratio": 2.0}), (8, 20), range(2)
    ):
        model = build(norm=norm, mlp_activation=activation, d_model=d_model, num_layers=1, **options)
        for name, parameter in model.named_parameters():
            if seed == 0 or name == "embedding.weight":
                parameter.data.mul_(scale)
        with torch.no_grad():
            tokens = make_tokens(3, 2, seed)
            expected = model(tokens)[0][:, :1]
            ours = model(tokens[:, :1])[0]
        assert torch.equal(ours.isfinite(), expected.isfinite())
        assert torch.equal(ours.isnan(), expected.isnan())


# --- models change --------------------------------------------------------------------------------------


def change_numbers(model: SequenceModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def load_in_place(model: SequenceModel) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})


def load_others(model: SequenceModel) -> None:
    model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()}, assign=True)


def convert_twice(model: SequenceModel) -> None:
    assert not is_served(model.double())
    model.float()


def swap_data(model: SequenceModel) -> None:
    model.blocks[0].down.weight.data = torch.randn(20, 20)


def replace_a_parameter(model: SequenceModel) -> None:
    model.blocks[0].mixer.rnn.weight_ih_l0 = nn.Parameter(torch.randn(40, 20))


def replace_a_part(model: SequenceModel) -> None:
    model.blocks[1].mlp = build(mlp_activation="relu", mlp_ratio=1.0).blocks[0].mlp


def drop_a_part(model: SequenceModel) -> None:
    model.blocks[1].mlp = None


def add_a_block(model: SequenceModel) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def drop_a_block(model: SequenceModel) -> None:
    del model.blocks[1]


def change_settings(model: SequenceModel) -> None:
    model.blocks[0].residual = False
    model.blocks[1].mlp.activation = "silu"
    model.norm.eps = 0.5


@compiled
@pytest.mark.parametrize(
    "change",
    [
        change_numbers,
        load_in_place,
        load_others,
        convert_twice,
        swap_data,
        replace_a_parameter,
        replace_a_part,
        drop_a_part,
        add_a_block,
        drop_a_block,
        change_settings,
    ],
)
def test_it_follows_the_model(change: Callable[[SequenceModel], None]) -> None:
    model, tokens = build(), make_tokens(2)
    with torch.no_grad():
        before, _ = model(tokens)
        change(model)
        with counted() as calls:
            ours = model(tokens)
        assert len(calls) == 1
        with in_torch():
            theirs = model(tokens)
    assert_equal(ours, theirs)
    if change is not convert_twice:
        assert not torch.allclose(ours[0], before, atol=1e-3)


def outcome(model: SequenceModel, tokens: Tensor) -> tuple[Tensor, Any] | type[Exception]:
    with torch.no_grad():
        try:
            return model(tokens)
        except Exception as error:
            return type(error)


def assert_follows(model: SequenceModel) -> None:
    """A step is what torch makes of the model as it is now, be that an error."""
    tokens = make_tokens(2)
    ours = outcome(model, tokens)
    with in_torch():
        theirs = outcome(model, tokens)
    if isinstance(theirs, tuple):
        assert isinstance(ours, tuple)
        assert_equal(ours, theirs)
    else:
        assert ours is theirs


def stepped(**options: Any) -> SequenceModel:
    """Make a model that has taken a step, whose matrices are square."""
    model = build(**{"num_layers": 1, "conv_width": 20, "mlp_ratio": 1.0, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    assert is_served(model)
    return model


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "broadcast": lambda x: x[:1].expand(x.shape),
    "rows": lambda x: x[: len(x) // 2],
    "columns": lambda x: x[..., : x.shape[-1] // 2],
    "flat": lambda x: x.flatten(),
    "column": lambda x: x.unsqueeze(-1),
    "overlapping": lambda x: x.as_strided(x.shape, (1,) * x.dim()),
    "later": lambda x: torch.cat([x, x.flip(0)])[1 : len(x) + 1],
    "negative": torch._neg_view,
    "integers": lambda x: x.view(torch.int32),
    "halves": lambda x: x.view(torch.float16),
}
"""Other readings of the memory where a tensor lies."""


@compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("exchange", [True, False])
def test_it_follows_each_tensor_to_another_layout(
    layout: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:  # of an older torch
        monkeypatch.setattr(chain, "_exchange", None)
    for name in dict(stepped().named_parameters()):
        if name != "embedding.weight":
            model = stepped()
            parameter = model.get_parameter(name)
            kept = parameter.data
            if kept.is_floating_point() and layout == "integers":
                parameter.requires_grad_(False)
            parameter.data = LAYOUTS[layout](kept)
            assert_follows(model)
            parameter.data = kept
            assert is_served(model)
            assert_follows(model)


@compiled
def test_it_follows_each_tensor_changed_in_place() -> None:
    for name in dict(stepped().named_parameters()):
        model = stepped()
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.t_() if parameter.dim() == 2 else parameter.as_strided_(parameter.shape, (0,))
        assert_follows(model)


def others(value: Any) -> list[Any]:
    """Other values of an attribute."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value + 0.5]
    if isinstance(value, str):
        return [*GATES, *CANDIDATES, *ACTIVATIONS, "unknown"]
    if isinstance(value, tuple):
        return [(), (7,), (*value, 1)]
    return []


@compiled
@pytest.mark.parametrize("options", [{}, {"mixer": "minlstm", "norm": "rms", "bias": False}], ids=str)
def test_it_follows_each_attribute(options: dict[str, Any]) -> None:
    model = stepped(**options)
    changed = 0
    for module in model.modules():
        for name, value in list(vars(module).items()):
            for other in others(value) if not name.startswith("_") else []:
                setattr(module, name, other)
                assert_follows(model)
                setattr(module, name, value)
                changed += 1
    assert changed > 50
    assert is_served(model)


@compiled
@pytest.mark.parametrize("options", [{}, {"mixer": "minlstm", "norm": "rms", "bias": False}], ids=str)
def test_it_follows_each_tensor_that_is_deleted_or_becomes_an_attribute(options: dict[str, Any]) -> None:
    for path, part in stepped(**options).named_modules():
        for name in ("weight", "bias", "weight_ih_l0", "bias_ih_l0"):
            found = getattr(part, name, None)
            if path == "embedding" or not (isinstance(found, Tensor) or name in part._parameters):
                continue
            for register in (setattr, nn.Module.register_buffer, None):
                model = stepped(**options)
                module = model.get_submodule(path)
                delattr(module, name)
                assert_follows(model)
                if register is not None:
                    register(module, name, torch.randn(20) if found is None else torch.randn_like(found))
                    assert_follows(model)


PUBLIC = ("forward", "mix", "__call__")


@compiled
@pytest.mark.parametrize("mixer", ["mingru", "minlstm"])
@pytest.mark.parametrize("on", ["instance", "class", "base"])
def test_it_follows_patched_methods(mixer: str, on: str) -> None:
    """Of every part but those that a mixer runs without a call."""
    model = stepped(mixer=mixer)
    tokens, patched = make_tokens(2), 0
    for path, module in model.named_modules():
        for name in PUBLIC:
            if not path or not hasattr(type(module), name) or path.endswith(("rnn", "blocks", "embedding")):
                continue
            method = getattr(type(module), name)
            owner: Any = next(base for base in type(module).__mro__ if name in vars(base))
            place: Any = {"instance": module, "class": type(module), "base": owner}[on]
            with pytest.MonkeyPatch.context() as patch:
                calls: list[str] = []

                def noted(*args: Any, method: Any = method, calls: list[str] = calls, **options: Any) -> Any:
                    calls.append("")
                    return method(*args, **options)

                patch.setattr(
                    place, name, noted.__get__(module) if on == "instance" else noted, raising=False
                )
                with torch.no_grad():
                    model(tokens)
                assert bool(calls) == (on != "instance" or name != "__call__"), (path, name)
            assert is_served(model)
            patched += 1
    assert patched > 15


@compiled
def test_a_mixer_that_overrides_mix_is_called() -> None:
    class Zero(type(build().blocks[0].mixer)):  # type: ignore[misc]
        def mix(self, x: Tensor, state: Any, reset: Any) -> Any:
            y, state = super().mix(x, state, reset)
            return 0 * y, state

    model = stepped()
    model.blocks[0].mixer.__class__ = Zero
    assert not is_served(model)


@compiled
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copied: Callable[[SequenceModel], SequenceModel]) -> None:
    model, tokens = build(), make_tokens(2)
    assert is_served(model)
    other = copied(model)
    change_numbers(other)
    with torch.no_grad():
        assert not torch.allclose(model(tokens)[0], other(tokens)[0])
        with in_torch():
            expected = other(tokens)
        assert is_served(other)
        assert_equal(other(tokens), expected)


def test_without_the_engine_torch_computes() -> None:
    program = (
        "import torch; from minrnn.ops import chain; from minrnn.models import ModelConfig, SequenceModel\n"
        "assert chain._cpu is None\n"
        "model = SequenceModel(ModelConfig(vocab_size=5, d_model=8)).eval()\n"
        "with torch.no_grad(): print(tuple(model(torch.zeros(1, 1, dtype=torch.int64))[0].shape))\n"
    )
    environment = {**os.environ, "MINRNN_ENGINE": "reference"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 1, 5)", done.stderr


@compiled
def test_what_is_no_chain_is_refused() -> None:
    scale = chain.Norm("none", 0.0, chain.Affine())
    square = chain.Affine(torch.zeros(4, 4), torch.zeros(4))
    good = chain.Branch(scale, None, square, "relu", "positive", square, True)
    chain.Chain(chain.Links([good]))
    for links in (
        chain.Links([]),
        chain.Links([good._replace(function="sine")]),
        chain.Links([good._replace(function="mingru")]),  # takes two inputs for each output
        chain.Links([good._replace(down=chain.Affine())]),
        chain.Links([good._replace(down=square._replace(bias=torch.zeros(3)))]),
        chain.Links([good._replace(up=square._replace(weight=torch.zeros(4, 4).double()))]),
        chain.Links([good._replace(up=square._replace(weight=torch.zeros(4, 8)[:, ::2]))]),
        chain.Links([good], end=chain.End(scale, chain.Affine(torch.zeros(3, 5)))),
        chain.Links([good], start=chain.Start([chain.Affine(torch.zeros(3, 5))], scale)),
    ):
        with pytest.raises(chain.NoChainError, match="Chain: "):
            chain.Chain(links)
    assert not chain.Chain(chain.Links([good])).takes([torch.zeros(1, 5)], [chain.BranchState()])
