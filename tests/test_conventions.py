"""At the edges ours do what torch.nn's own do: empty batches, numpy's numbers, narrow states, programs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import gated
import numpy as np
import pytest
import torch
from laws import GATES, gated_scan
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import minrnn
from minrnn.mixers import MIXERS, MinGRU, MinLSTMCell, PairedMinLSTM, PairedMinLSTMCell
from minrnn.mixers.convolution import CausalConv
from minrnn.models import DecisionConfig, ModelConfig
from minrnn.ops import scan, selective_scan
from minrnn.ops.selective.operator import MODULES as SELECTIVE_ENGINES

I, H = 4, 8  # noqa: E741

LAYER_CLASSES: dict[str, Any] = {kind.__name__: kind for kind in (*gated.LAYERS.values(), PairedMinLSTM)}
CELLS: dict[str, Any] = {kind.__name__: kind for kind in (*gated.CELLS.values(), PairedMinLSTMCell)}
LAYERS: dict[str, Callable[..., Any]] = {
    f"{kind.__name__}, recompute={recompute}": lambda *args, kind=kind, recompute=recompute, **options: kind(
        *args, recompute=recompute, **options
    )
    for kind in LAYER_CLASSES.values()
    for recompute in (False, True)
}
CONSTRUCTORS: dict[str, Callable[..., Any]] = {**LAYERS, **CELLS, **MIXERS}

every_layer = pytest.mark.parametrize("name", LAYERS)
every_cell = pytest.mark.parametrize("name", CELLS)
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_constructor = pytest.mark.parametrize("name", CONSTRUCTORS)


def tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, PackedSequence):
        yield outputs.data
    elif isinstance(outputs, Tensor):
        yield outputs
    else:
        for part in outputs:
            yield from tensors(part)


def shapes(outputs: Any) -> list[tuple[int, ...]]:
    return [tuple(x.shape) for x in tensors(outputs)]


def assert_gradients_are_zero(module: nn.Module, outputs: Any, *inputs: Tensor) -> None:
    sum(x.sum() for x in tensors(outputs) if x.is_floating_point()).backward()  # type: ignore[union-attr]
    for leaf in (*module.parameters(), *inputs):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


# --- batches without rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empty_batch_of_the_gated_scan(gate: str, packed: bool, reverse: bool, device: str) -> None:
    pre = [torch.zeros(0, 5, 3, device=device) for _ in GATES[gate].pre]
    pre = [x.requires_grad_() for x in ([torch.cat(pre, -1)] if packed else pre)]
    h0 = torch.zeros(0, 3, device=device, requires_grad=True)
    reset = torch.zeros(0, 5, dtype=torch.bool, device=device)
    h = gated_scan(gate, *pre, h0=h0, reset=reset, reverse=reverse)
    assert h.shape == (0, 5, 3)
    gradients = torch.autograd.grad(h.sum(), [h0, *pre], create_graph=True)
    assert [d.shape for d in gradients] == [h0.shape, *(x.shape for x in pre)]


def selective_inputs(batch: int) -> list[Tensor]:
    B = C = torch.zeros(batch, 40, 2)
    u = delta_pre = torch.zeros(batch, 40, 3)
    return [x.clone().requires_grad_() for x in (u, delta_pre, -torch.ones(3, 2), B, C, torch.ones(3))]


@pytest.mark.parametrize("engine", SELECTIVE_ENGINES)
def test_empty_batch_of_the_selective_scan(engine: str) -> None:
    leaves = selective_inputs(0)
    y, h = selective_scan(*leaves, z=torch.zeros(0, 40, 3), h0=torch.zeros(0, 3, 2))
    assert (y.shape, h.shape) == ((0, 40, 3), (0, 3, 2))
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum() + h.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_empty_batches_are_mapped_over() -> None:
    """Within a mapped dimension, and the mapped dimension itself."""
    for shape in ((3, 0, 5, 2), (0, 2, 5, 2)):
        x = torch.zeros(shape)
        assert torch.vmap(lambda x: scan(x, x))(x).shape == shape
        assert torch.vmap(torch.func.grad(lambda x: scan(x, x).sum()))(x).shape == shape
    _, _, *rest = selective_inputs(0)
    with torch.no_grad():
        u = torch.zeros(3, 0, 40, 3)
        assert shapes(torch.vmap(lambda u: selective_scan(u, u, *rest))(u)) == [(3, 0, 40, 3), (3, 0, 3, 2)]
        u, delta_pre, _, B, C, D = selective_inputs(2)
        A = torch.zeros(0, 3, 2)
        assert shapes(torch.vmap(lambda A: selective_scan(u, delta_pre, A, B, C, D))(A)) == [
            (0, 2, 40, 3),
            (0, 2, 3, 2),
        ]


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch_of_a_layer(name: str, batch_first: bool) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    layer, theirs = LAYERS[name](I, H, **options), nn.GRU(I, H, **options)
    x = torch.zeros(*((0, 5) if batch_first else (5, 0)), I, requires_grad=True)
    expected = shapes(theirs(x))
    for reset in (None, torch.zeros(x.shape[:2], dtype=torch.bool)):
        output, state = layer(x, reset=reset)
        assert [tuple(output.shape), *{*shapes(state)}] == expected
        again, _ = layer(x, state)
        assert again.shape == output.shape
        layer.zero_grad()
        x.grad = None
        assert_gradients_are_zero(layer, output, x)
    with pytest.raises(ValueError, match="T of at least 1"):  # nn.GRU raises as well
        layer(torch.zeros(*((2, 0) if batch_first else (0, 2)), I))


@every_layer
def test_ragged_batches_without_sequences_and_without_steps(name: str) -> None:
    options = {"num_layers": 2, "bidirectional": True}
    layer, theirs = LAYERS[name](I, H, **options), nn.GRU(I, H, **options)
    packed = PackedSequence(torch.zeros(0, I, requires_grad=True), torch.tensor([0]))
    outputs = layer(packed)
    assert [*dict.fromkeys(shapes(outputs))] == shapes(theirs(packed))
    assert_gradients_are_zero(layer, outputs[0], packed.data)
    assert shapes(layer(torch.zeros(0, I), cu_seqlens=torch.tensor([0])))[:2] == [(0, 2 * H), (4, 0, H)]
    # An empty sequence ends in the state that it starts from, be there others or not.
    start = torch.rand(4, 2, H)
    hx = (start, start) if name.startswith("Paired") else start
    output, state = layer(torch.zeros(0, I), hx, cu_seqlens=torch.tensor([0, 0, 0]))
    assert output.shape == (0, 2 * H)
    assert all(torch.equal(x, start) for x in tensors(state))


@every_cell
def test_empty_batch_of_a_cell(name: str) -> None:
    cell, x = CELLS[name](I, H), torch.zeros(0, I, requires_grad=True)
    state = cell(x)
    assert {*shapes(cell(x, state))} == {(0, H)}
    assert_gradients_are_zero(cell, state, x)


@every_mixer
@pytest.mark.parametrize("with_reset", [False, True])
def test_empty_batch_of_a_mixer(name: str, with_reset: bool) -> None:
    mixer = MIXERS[name](I, H)
    for T in (1, 5):
        x, one = torch.zeros(0, T, I, requires_grad=True), torch.zeros(1, T, I)
        reset = torch.zeros(0, T, dtype=torch.bool) if with_reset else None
        outputs = mixer(x, reset=reset)
        expected = mixer(one, reset=None if reset is None else torch.zeros(1, T, dtype=torch.bool))
        assert shapes(outputs) == [(0, *shape[1:]) for shape in shapes(expected)]
        assert [y.dtype for y in tensors(outputs)] == [y.dtype for y in tensors(expected)]
        mixer.zero_grad()
        if T > 1 or name != "aaren":  # whose only step weighs one, whatever the query and the key
            assert_gradients_are_zero(mixer, outputs[0], x)
        mixer(x, outputs[1], reset=reset)


@pytest.mark.parametrize("name", ["PairedMinLSTM, recompute=True", *MIXERS])
def test_empty_batches_compile(name: str) -> None:
    torch._dynamo.reset()
    module = CONSTRUCTORS[name](I, H, **({"batch_first": True} if name in LAYERS else {}))
    outputs = torch.compile(module, backend="aot_eager")(torch.zeros(0, 5, I))
    assert shapes(outputs) == shapes(module(torch.zeros(0, 5, I)))
    assert_gradients_are_zero(module, outputs[0])


# --- states that autocast left ---------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_a_state_in_a_dtype_that_loses_nothing_is_taken(
    name: str, dtype: torch.dtype, autocast: bool
) -> None:
    """All that torch.nn's take, and more: they take 16 bits under autocast only."""
    module = CONSTRUCTORS[name](I, H)
    x, state = (
        (torch.randn(3, I), torch.randn(3, H))
        if name in CELLS
        else (torch.randn(5, 3, I), torch.randn(1, 3, H))
    )
    state = state.to(dtype).requires_grad_()

    def call(state: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return next(tensors(module(x, (state, state) if name.startswith("Paired") else state)))

    if dtype == torch.float64:
        with pytest.raises(TypeError, match=r"got torch\.float64"):
            call(state)
        return
    output = call(state)
    assert torch.equal(output, call(state.float()))
    (gradient,) = torch.autograd.grad(output.sum(), state)
    assert gradient.dtype == dtype


@every_mixer
def test_mixers_take_states_across_autocast(name: str) -> None:
    mixer, x = MIXERS[name](I, H), torch.randn(2, 5, I)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x)
    y, state = mixer(x, state)
    assert y.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        mixer(x, state)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.int64]


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_mixer
def test_mixers_take_states_of_which_nothing_is_lost(name: str, inputs: torch.dtype) -> None:
    """Of each tensor: any dtype that fits into the one that the mixer computes in, and no other."""
    torch.manual_seed(0)
    mixer, x = MIXERS[name](I, H).to(inputs), torch.randn(2, 3, I, dtype=inputs)
    _, state = mixer(x)
    for index, (part, (_, dtype)) in enumerate(zip(state, mixer.state_form(inputs), strict=True)):
        for other in DTYPES:
            given = (*state[:index], part.to(other), *state[index + 1 :])
            fits = torch.promote_types(other, dtype) == dtype
            if not fits or other.is_floating_point != dtype.is_floating_point:
                message = f"{mixer.state_names[index]} must be {dtype} or narrower .*, got {other}"
                with pytest.raises(TypeError, match=message):
                    mixer(x, given)
                continue
            y, after = mixer(x, given)
            widened = (*state[:index], given[index].to(dtype), *state[index + 1 :])
            assert torch.equal(y, mixer(x, widened)[0])
            assert [x.dtype for x in after] == [x.dtype for x in state]


@every_mixer
def test_mixers_name_what_of_a_state_has_another_shape(name: str) -> None:
    mixer, x = MIXERS[name](I, H), torch.randn(2, 3, I)
    _, state = mixer(x)
    for index, part in enumerate(state):
        for spoilt in (part.unsqueeze(-1), part[:1], part.repeat(*[1] * (part.dim() - 1), 2)):
            with pytest.raises(ValueError, match=f"state tensor {mixer.state_names[index]} must"):
                mixer(x, (*state[:index], spoilt, *state[index + 1 :]))


def test_windows_of_another_convolution_are_named() -> None:
    conv, x = CausalConv(I, 4), torch.randn(2, 3, I)
    for window in (torch.zeros(2, 3, H), torch.zeros(2, 4, I), torch.zeros(2, I, 3), torch.zeros(1, 3, I)):
        with pytest.raises(ValueError, match="CausalConv: window must"):
            conv(x, window)
    with pytest.raises(TypeError, match=r"CausalConv: window must be .* got torch\.float64"):
        conv(x, torch.zeros(2, 3, I).double())


@every_mixer
def test_mixers_run_on_the_meta_device(name: str) -> None:
    mixer = MIXERS[name](I, H).to("meta")
    y, state = mixer(torch.empty(2, 5, I, device="meta"))
    assert y.shape == (2, 5, H)
    y, again = mixer(torch.empty(2, 1, I, device="meta"), state)
    assert y.shape == (2, 1, H)
    assert {x.device.type for x in again} == {"meta"}


# --- arguments -------------------------------------------------------------------------------------------

SIZES = {"num_layers", "num_heads", "window", "d_state", "d_conv", "dt_rank"}
FLAGS = {"bias", "batch_first", "bidirectional", "signed", "normalize", "recompute"}
NUMBERS = {"forget_bias", "dt_min", "dt_max"}
VALUES = {"window": 4, "dropout": 0.25, "dt_min": 0.01, "dt_max": 0.5, "num_layers": 2, "normalize": True}


def options_of(name: str) -> list[str]:
    kind = MIXERS.get(name) or CELLS.get(name) or LAYER_CLASSES[name.split(",")[0]]
    known = SIZES | FLAGS | NUMBERS | {"dropout"}
    gate = getattr(getattr(kind, "layer", kind), "gate", None)
    if gate is not None and not minrnn.GATES[gate].can_be_signed:
        known = known - {"signed"}
    return [option for option in signature(kind.__init__).parameters if option in known]


@pytest.mark.parametrize("gate", [None, *GATES])
def test_a_direction_is_a_bool(gate: str | None) -> None:
    pre = [torch.ones(1, 3, 2) for _ in (GATES[gate].pre if gate else "ab")]

    def run(reverse: Any) -> Tensor:
        return gated_scan(gate, *pre, reverse=reverse) if gate else scan(*pre, reverse=reverse)

    for wrong in ("no", "backward", None, 1, torch.tensor(True)):
        with pytest.raises(TypeError, match="reverse must be a bool, got"):
            run(wrong)
    assert torch.equal(run(np.True_), run(True))


@pytest.mark.parametrize("value", [["tanh"], {}, None, 1, "nonsense"], ids=str)
def test_a_name_is_one_of_its_table(value: Any) -> None:
    x = torch.ones(1, 3, 2)
    readers: list[tuple[str, Callable[[], Any]]] = [
        ("gate", lambda: minrnn.gated_scan(value, x, x)),
        ("candidate", lambda: gated_scan("mingru", x, x, candidate=value)),
        ("candidate", lambda: MinGRU(I, H, candidate=value)),
        ("candidate", lambda: MinLSTMCell(I, H, candidate=value)),
        ("initialization", lambda: MIXERS["s4d"](I, H, initialization=value)),
    ]
    for key, call in readers:
        with pytest.raises(ValueError, match=f"{key} must be one of .*, got"):
            call()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, "float32", float], ids=str)
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_parameters_are_of_a_dtype_that_scans_take(name: str, dtype: Any) -> None:
    with pytest.raises(TypeError, match="dtype must be float32, float64, bfloat16 or float16, got"):
        CONSTRUCTORS[name](I, H, dtype=dtype)


@every_constructor
def test_numpys_numbers_are_taken_as_pythons(name: str) -> None:
    make = CONSTRUCTORS[name]
    for size, hidden in (
        (np.int64, H),
        (np.int32, H),
        (np.uint8, 96),
    ):  # of which 3 are more than 8 bits hold
        module = make(size(I), size(hidden))
        assert repr(module) == repr(make(I, hidden))
        assert [p.shape for p in module.parameters()] == [p.shape for p in make(I, hidden).parameters()]
        assert all(
            type(value) is int
            for value in vars(module).values()
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        )
    for option in options_of(name):
        if option == "recompute" and name in LAYERS:
            continue
        plain = VALUES.get(option, 2 if option in SIZES else True if option in FLAGS else 0.5)
        kind = np.int64 if option in SIZES else np.bool_ if option in FLAGS else np.float32
        others = {"num_layers": 2} if option == "dropout" else {}
        theirs = make(I, H, **others, **{option: kind(plain)})
        ours = make(I, H, **others, **{option: type(plain)(kind(plain))})
        assert repr(theirs) == repr(ours), option
        assert list(theirs.state_dict()) == list(ours.state_dict()), option


def test_configurations_hold_pythons_numbers() -> None:
    config = ModelConfig(
        d_model=np.int64(I),
        num_layers=np.int32(1),
        dropout=np.float64(0.25),
        mlp_ratio=np.float32(1),
        bias=np.bool_(True),
    )
    assert config == ModelConfig(d_model=I, num_layers=1, dropout=0.25, mlp_ratio=1.0, bias=True)
    assert json.dumps(config.to_dict()) == json.dumps(dataclasses.asdict(config))
    assert all(type(value) in (int, float, bool, str, type(None)) for value in config.to_dict().values())
    policy = DecisionConfig(
        config, observation_size=np.int64(3), action_size=np.int64(2), return_scale=np.float32(0.5)
    )
    assert all(not isinstance(value, np.generic) for value in policy.to_dict().values())
    for value in (True, np.bool_(True), np.float64(4), np.array(4), torch.tensor(4)):
        with pytest.raises(TypeError, match="d_model must be int"):
            ModelConfig(d_model=value)  # type: ignore[arg-type]


@every_constructor
def test_what_is_no_size_flag_or_number_is_refused(name: str) -> None:
    make = CONSTRUCTORS[name]
    for size in (True, np.bool_(True), 4.0, np.float64(4), "4", None, torch.tensor(4)):
        for sizes in ((I, size), (size, H)):
            with pytest.raises(TypeError, match=f"must be an int, got {type(size).__name__}"):
                make(*sizes)
    for size in (0, -1, np.int64(0)):
        with pytest.raises(ValueError, match="must be greater than zero, got"):
            make(I, size)
    options = options_of(name)
    for option in {*options} & SIZES - {"dt_rank"}:
        with pytest.raises(TypeError, match=f"{option} must be an int, got bool"):
            make(I, H, **{option: True})
    for option in {*options} & FLAGS - {"recompute"}:
        with pytest.raises(TypeError, match=f"{option} must be a bool, got int"):
            make(I, H, **{option: 1})
    for option in {*options} & NUMBERS:
        for value in (float("nan"), float("inf"), np.float64("nan")):
            with pytest.raises(ValueError, match=f"{option} must be finite, got"):
                make(I, H, **{option: value})
        for wrong in ("1", True, [1.0], torch.tensor(1.0)):
            with pytest.raises(TypeError, match=f"{option} must be a number, got {type(wrong).__name__}"):
                make(I, H, **{option: wrong})


@every_constructor
@pytest.mark.parametrize("value", [None, [[1.0]], np.zeros((2, 3, I))], ids=["None", "list", "array"])
def test_what_is_no_tensor_is_refused_by_one_line(name: str, value: Any) -> None:
    module = CONSTRUCTORS[name](I, H)
    with pytest.raises(
        TypeError, match=rf"^Min|^Paired|^\w+Mixer: \w+ must be a tensor.*, got {type(value).__name__}$"
    ):
        module(value)
    if name in MIXERS:
        with pytest.raises(TypeError, match="reset must be a tensor, got list"):
            module(torch.zeros(1, 2, I), reset=[[True, False]])


# --- programs --------------------------------------------------------------------------------------------

B, T = torch.export.Dim("B", min=2, max=4096), torch.export.Dim("T", min=2, max=4096)


def assert_exports(module: nn.Module, arguments: Any, dims: Any, more: Any) -> None:
    program = torch.export.export(module, arguments, dynamic_shapes=dims)
    for actual, expected in zip(tensors(program.module()(*more)), tensors(module(*more)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_export_with_any_batch_and_length(name: str, batch_first: bool) -> None:
    layer = LAYERS[name](I, H, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, more = torch.randn(3, 7, I), torch.randn(5, 9, I)
    states = [torch.randn(4, n, H) for n in (3, 5)]
    if name.startswith("Paired"):
        states, hx_dims = [(s, s) for s in states], ({1: B}, {1: B})  # type: ignore[misc]
    else:
        hx_dims = {1: B}  # type: ignore[assignment]
    x, more = (x, more) if batch_first else (x.transpose(0, 1), more.transpose(0, 1))
    dims = {0: B, 1: T} if batch_first else {0: T, 1: B}
    assert_exports(layer, (x, states[0]), (dims, hx_dims), (more, states[1]))


@pytest.mark.parametrize("name", [*gated.LAYERS, "aaren", "mamba"])
def test_recurrent_mixers_export_with_any_batch_and_length(name: str) -> None:
    """From a state too."""
    mixer, x, more = MIXERS[name](I, H), torch.randn(3, 7, I), torch.randn(5, 9, I)
    (_, state), (_, other) = mixer(x), mixer(more)
    assert_exports(mixer, (x,), ({0: B, 1: T},), (more,))
    assert_exports(mixer, (x, state), ({0: B, 1: T}, tuple({0: B} for _ in state)), (more, other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@every_constructor
def test_traced_modules_run_at_other_sizes_train_and_are_saved(name: str) -> None:
    torch.manual_seed(0)
    module = CONSTRUCTORS[name](I, H)
    x, more = (
        (torch.randn(2, I), torch.randn(5, I))
        if name in CELLS
        else (torch.randn(3, 7, I), torch.randn(5, 9, I))
    )
    traced = torch.jit.trace(module, (x,))
    parameters = list(module.parameters())
    results = []
    for call in (traced, module):
        outputs = [y for y in tensors(call(more)) if y.is_floating_point()]
        gradients = torch.autograd.grad(outputs[0].square().sum(), parameters, allow_unused=True)
        results.append([*outputs, *(d for d in gradients if d is not None)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(next(tensors(torch.jit.load(file)(more))), next(tensors(traced(more))))


class Both(nn.Module):
    """Calls both operators."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.mamba = MinGRU(I, H, batch_first=True), MIXERS["mamba"](I, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0] + self.mamba(x)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], float]:
    """Both forms of a saved program, and what they give for ones."""
    model, x, folder = Both(), torch.ones(2, 3, I), tmp_path_factory.mktemp("programs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (x,)).save(folder / "traced.pt")
    torch.export.save(torch.export.export(model, (x,)), folder / "exported.pt2")
    return [str(folder / "traced.pt"), str(folder / "exported.pt2")], model(x).sum().item()


@pytest.mark.parametrize(
    "imports",
    ["import minrnn, torch", "import torch, minrnn"],
)
def test_saved_programs_load_after_importing_minrnn(imports: str, saved: tuple[list[str], float]) -> None:
    files, expected = saved
    code = (
        f"import sys, warnings; warnings.simplefilter('ignore'); {imports}\n"
        f"x = torch.ones(2, 3, {I})\n"
        "print(torch.jit.load(sys.argv[1])(x).sum().item())\n"
        "print(torch.export.load(sys.argv[2]).module()(x).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [float(line) for line in done.stdout.split()] == pytest.approx([expected] * 2)


def test_an_engine_that_cannot_load_is_said_and_leaves_torch_whole() -> None:
    code = (
        "import minrnn, torch\ntorch.zeros(1)\n"
        "for _ in range(2):\n"
        "    try: minrnn.MinGRU\n"
        "    except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "MINRNN_ENGINE": "bogus"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "operators could not be registered: MINRNN_ENGINE must be one of" in done.stderr
    assert (
        done.stdout.count("MINRNN_ENGINE must be one of cpp, triton, portable, reference, got 'bogus'") == 2
    )
