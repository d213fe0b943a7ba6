"""MinGRU and MinLSTM as layers: the surface of torch.nn.GRU around the equations of the paper."""

import copy
import itertools
import pickle
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from types import FrameType
from typing import Any

import laws
import pytest
import torch
from gated import LAYERS, RECURRENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from minrnn.ops import GATES

B, T, I, H = 3, 7, 5, 4  # noqa: E741

every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](I, H, dtype=torch.float64, **options)


def make_input(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


# Of the gates, after the sigmoid: the decay, the signed decay, and what the candidate is multiplied by.
PAPER: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor]]] = {
    "mingru": lambda z: (1 - z, 1 - 2 * z, z),
    "minlstm": lambda f, i: (f / (f + i), (f - i) / (f + i), i / (f + i)),
    "minlstm_unnormalized": lambda f, i: (f, f, i),
    "minema": lambda alpha, delta: (1 - alpha * delta, 1 - 2 * alpha * delta, alpha),
}


def step_by_the_paper(
    layer: Any, suffix: str, x: Tensor, h: Tensor, candidate: Callable[[Tensor], Tensor] = positive
) -> Tensor:
    """One step of the recurrence as the paper writes it, x (B, I), h (B, H)."""
    pre = x @ getattr(layer, f"weight_ih_{suffix}").T
    if layer.bias:
        pre = pre + getattr(layer, f"bias_ih_{suffix}")
    *gates, c = pre.chunk(GATES[layer.gate].num_pre, dim=-1)
    decay, signed, weight = PAPER[layer.gate](*(torch.sigmoid(gate) for gate in gates))
    return (signed if layer.signed else decay) * h + weight * candidate(c)


@pytest.mark.parametrize("form", RECURRENCES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("candidate", "g"), [("positive", positive), ("linear", lambda x: x), ("tanh", torch.tanh)]
)
def test_equations(form: str, bias: bool, candidate: str, g: Any) -> None:
    name, options = RECURRENCES[form]
    layer = build(name, bias=bias, candidate=candidate, **options)
    x, h = make_input(T, B, I), make_input(B, H)
    output, h_n = layer(x, h.unsqueeze(0))
    for t in range(T):
        h = step_by_the_paper(layer, "l0", x[t], h, g)
        torch.testing.assert_close(output[t], h, rtol=0, atol=1e-12)
    torch.testing.assert_close(h_n[0], h, rtol=0, atol=1e-12)


# What a one does to the gates' logits, so that the decay is -1.
PARITY = {"mingru": [1.0], "minlstm": [-1.0, 1.0]}


@pytest.mark.parametrize("name", PARITY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_signed_layer_of_one_channel_tells_parity(name: str, dtype: torch.dtype) -> None:
    """With fixed weights, at every length: one logit is the bit, and the candidate is one."""
    layer, gate = LAYERS[name](1, 1, signed=True, candidate="linear", dtype=dtype), PARITY[name]
    with torch.no_grad():
        layer.weight_ih_l0.copy_(80 * torch.tensor([*gate, 0.0])[:, None])
        layer.bias_ih_l0.copy_(torch.tensor([*(-40 * sign for sign in gate), 1.0]))
    bits = torch.randint(2, (1000, B, 1), generator=torch.Generator().manual_seed(0))
    output, _ = layer(bits.to(dtype))
    assert torch.equal(output.round().long(), bits.cumsum(0) % 2)
    assert (output - output.round()).abs().max() < 1e-12


@every_layer
def test_layers_and_directions_stack_as_in_torch(name: str) -> None:
    layer, x = build(name, num_layers=2, bidirectional=True), make_input(T, B, I)
    h_0 = make_input(4, B, H)
    output, h_n = layer(x, h_0)
    finals = []
    for k in range(2):
        directions = []
        for d, suffix in enumerate((f"l{k}", f"l{k}_reverse")):
            h, states = h_0[2 * k + d], []
            for t in reversed(range(T)) if d else range(T):
                h = step_by_the_paper(layer, suffix, x[t], h)
                states.append(h)
            finals.append(h)
            directions.append(torch.stack(states[::-1] if d else states))
        x = torch.cat(directions, dim=-1)
    torch.testing.assert_close(output, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(h_n, torch.stack(finals), rtol=0, atol=1e-12)


@every_layer
@pytest.mark.parametrize(
    ("num_layers", "bias", "batch_first", "bidirectional"),
    list(itertools.product((1, 3), (True, False), (True, False), (True, False))),
)
def test_shapes_and_names_are_those_of_torch(
    name: str, num_layers: int, bias: bool, batch_first: bool, bidirectional: bool
) -> None:
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "bias": bias,
        "batch_first": batch_first,
        "bidirectional": bidirectional,
    }
    ours, theirs = build(name, **options), nn.GRU(I, H, **options).double()
    h_0 = make_input(num_layers * (2 if bidirectional else 1), B, H)
    batched = make_input(*((B, T) if batch_first else (T, B)), I)
    for x, h in ((batched, None), (batched, h_0), (batched[0], None), (make_input(T, I), h_0[:, 0])):
        assert [tuple(o.shape) for o in ours(x, h)] == [tuple(o.shape) for o in theirs(x, h)]

    without_hh = [key for key in theirs.state_dict() if "_hh_" not in key]
    assert list(ours.state_dict()) == without_hh
    for key, parameter in ours.named_parameters():
        rows, *columns = getattr(theirs, key).shape
        assert parameter.shape == (rows // 3 * GATES[name].num_pre, *columns)
    assert [len(group) for group in ours.all_weights] == [1 + bias] * len(h_0)


@every_layer
def test_positional_arguments_mean_what_they_mean_in_torch(name: str) -> None:
    ours, theirs = LAYERS[name](I, H, 2, False, True, 0.25, True), nn.GRU(I, H, 2, False, True, 0.25, True)
    assert repr(ours) == repr(theirs).replace("GRU", type(ours).__name__)


@every_layer
def test_options_are_arguments_and_attributes(name: str) -> None:
    """All but device and dtype, which the parameters have."""
    ours = signature(LAYERS[name]).parameters
    theirs = signature(nn.RNNBase).parameters.keys() - {"mode", "proj_size", "device", "dtype"}
    assert {key for key, parameter in ours.items() if parameter.kind is not parameter.KEYWORD_ONLY} == theirs
    layer = LAYERS[name](I, H)
    assert {key for key in ours if not hasattr(layer, key)} == {"device", "dtype"}
    assert layer.gate == name


@every_layer
def test_layouts_agree(name: str) -> None:
    layer = build(name, num_layers=2, bidirectional=True)
    batch_first = copy.deepcopy(layer)
    batch_first.batch_first = True
    x = make_input(T, B, I)
    reset = torch.rand(T, B, generator=torch.Generator().manual_seed(2)) < 0.3
    output, h_n = layer(x, reset=reset)
    output_bf, h_n_bf = batch_first(x.transpose(0, 1), reset=reset.T)
    torch.testing.assert_close(output_bf.transpose(0, 1), output, rtol=0, atol=1e-12)
    torch.testing.assert_close(h_n_bf, h_n, rtol=0, atol=1e-12)
    for row in range(B):
        alone, h_alone = layer(x[:, row], reset=reset[:, row])
        torch.testing.assert_close(alone, output[:, row], rtol=0, atol=1e-12)
        torch.testing.assert_close(h_alone, h_n[:, row], rtol=0, atol=1e-12)


class CopiesOf(TorchDispatchMode):
    """Record operators that copy a tensor of at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = ("clone", "copy_", "_to_copy", "contiguous", "_reshape_copy")
        if func._opname in copies and isinstance(args[0], Tensor) and args[0].numel() >= self.size:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@every_layer
@pytest.mark.parametrize("batch_first", [True, False])
def test_input_is_not_copied(name: str, batch_first: bool) -> None:
    layer = LAYERS[name](I, 1, batch_first=batch_first)
    x = torch.randn(6, 9, I)
    with torch.no_grad(), CopiesOf(x.numel()) as copies:
        layer(x)
    assert copies.found == []


@every_layer
@settings(max_examples=15)
@given(starts=st.lists(st.sets(st.integers(1, T - 1)), min_size=B, max_size=B))
def test_reset_separates_sequences_in_both_directions(name: str, starts: list[set[int]]) -> None:
    layer, x = build(name, bidirectional=True), make_input(T, B, I)
    reset = torch.zeros(T, B, dtype=torch.bool)
    for row, marks in enumerate(starts):
        reset[sorted(marks), row] = True
    output, _ = layer(x, reset=reset)
    for row, marks in enumerate(starts):
        edges = [0, *sorted(marks), T]
        alone = [layer(x[start:stop, row])[0] for start, stop in itertools.pairwise(edges)]
        torch.testing.assert_close(output[:, row], torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", RECURRENCES)
def test_forget_bias_moves_one_gate_only(form: str) -> None:
    name, options = RECURRENCES[form]
    plain, moved = (build(name, forget_bias=bias, **options) for bias in (0.0, 2.5))
    index, sign = laws.GATES[plain.gate].keeps
    shift = (moved.bias_ih_l0 - plain.bias_ih_l0).detach().view(-1, H)
    torch.testing.assert_close(shift[index], torch.full((H,), 2.5 * sign, dtype=torch.float64))
    assert not shift[[i for i in range(len(shift)) if i != index]].any()
    assert torch.equal(plain.weight_ih_l0, moved.weight_ih_l0)


@every_layer
def test_default_forget_bias_makes_the_cell_keep_more(name: str) -> None:
    h_0, x = torch.ones(1, B, 64), torch.zeros(1, B, I)
    kept = []
    for forget_bias in (0.0, None, 4.0):
        torch.manual_seed(0)
        layer = LAYERS[name](I, 64, forget_bias=forget_bias)
        kept.append((layer(x, h_0)[0] - layer(x)[0]).mean().item())
    assert kept[0] < kept[1] < kept[2]


@every_layer
def test_initial_parameters_lie_in_torchs_range(name: str) -> None:
    for parameter in LAYERS[name](I, 100, forget_bias=0.0).parameters():
        assert parameter.abs().max() <= 0.1
        assert parameter.abs().max() > 0.09


@every_layer
def test_dropout_acts_between_layers_in_training_only(name: str) -> None:
    layer, x = build(name, num_layers=2, dropout=0.5), make_input(T, B, I)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    torch.manual_seed(0)
    undropped = build(name, num_layers=2)
    torch.testing.assert_close(layer.eval()(x)[0], undropped(x)[0])


@every_layer
def test_gradients(name: str) -> None:
    layer = build(name, num_layers=2, bidirectional=True)
    x, h_0 = make_input(4, 2, I).requires_grad_(), make_input(4, 2, H).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, h_0))


@every_layer
def test_copies_are_whole(name: str) -> None:
    layer, x = build(name, num_layers=2, bidirectional=True), make_input(T, B, I)
    loaded = LAYERS[name](I, H, num_layers=2, bidirectional=True).double()
    assert loaded.load_state_dict(layer.state_dict()) == ([], [])
    emptied = LAYERS[name](I, H, num_layers=2, bidirectional=True, device="meta", dtype=torch.float64)
    emptied = emptied.to_empty(device="cpu")
    emptied.load_state_dict(layer.state_dict())
    for same in (loaded, emptied, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(same) == repr(layer)
        assert torch.equal(same(x)[0], layer(x)[0])
    assert copy.deepcopy(layer).weight_ih_l0 is not layer.weight_ih_l0


@every_layer
def test_emptied_parameters_can_be_drawn_anew(name: str) -> None:
    layer = LAYERS[name](I, H, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    for key, value in LAYERS[name](I, H).state_dict().items():
        assert torch.equal(layer.state_dict()[key], value)


@every_layer
def test_runs_on_the_meta_device(name: str) -> None:
    layer = LAYERS[name](I, H, num_layers=2, bidirectional=True, device="meta")
    output, h_n = layer(torch.empty(T, B, I, device="meta"), torch.empty(4, B, H, device="meta"))
    assert output.shape == (T, B, 2 * H)
    assert h_n.shape == (4, B, H)
    assert output.is_meta


@every_layer
def test_conversion_of_dtype(name: str) -> None:
    layer, x = build(name, num_layers=2), make_input(T, B, I)
    assert layer.flatten_parameters() is None
    assert layer.to(torch.bfloat16)(x.bfloat16())[0].dtype == torch.bfloat16


class Halved(nn.Module):
    """Half the weight, counting how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.computed += 1
        return weight / 2


@every_layer
def test_parametrized_weights(name: str) -> None:
    layer, x = build(name, num_layers=2), make_input(T, B, I)
    expected = copy.deepcopy(layer)
    halved = [Halved(), Halved()]
    for number, parametrization in enumerate(halved):
        parametrize.register_parametrization(layer, f"weight_ih_l{number}", parametrization)
        with torch.no_grad():
            getattr(expected, f"weight_ih_l{number}").div_(2)
    before = [parametrization.computed for parametrization in halved]
    output, _ = layer(x)
    assert [p.computed for p in halved] == [count + 1 for count in before]  # spectral_norm counts on it
    assert torch.equal(output, expected(x)[0])
    output.sum().backward()
    assert layer.parametrizations.weight_ih_l0.original.grad is not None  # type: ignore[union-attr]
    for key in ("weight_ih_l0", "weight_ih_l1"):
        parametrize.remove_parametrizations(layer, key)
    assert torch.equal(layer(x)[0], expected(x)[0])


@every_layer
def test_weight_norm_and_pruning(name: str) -> None:
    layer, x = build(name), make_input(T, B, I)
    output, _ = layer(x)
    nn.utils.parametrizations.weight_norm(layer, "weight_ih_l0")
    torch.testing.assert_close(layer(x)[0], output)
    pruned = prune.random_unstructured(build(name), "weight_ih_l0", amount=0.5)
    assert not torch.equal(pruned(x)[0], output)
    pruned(x)[0].sum().backward()


@every_layer
def test_functional_call_reads_the_weights_it_is_given(name: str) -> None:
    layer, x = build(name), make_input(T, B, I)
    zeros = {key: torch.zeros_like(p) for key, p in layer.named_parameters()}
    output, _ = functional_call(layer, zeros, (x,))
    # All gates half open and g(0) = 0.5, whatever the input: h[0] is 0.25.
    torch.testing.assert_close(output[0], torch.full((B, H), 0.25, dtype=torch.float64))


@every_layer
def test_state_may_be_passed_by_torchs_name(name: str) -> None:
    layer, x, h_0 = build(name), make_input(T, B, I), make_input(1, B, H)
    assert torch.equal(layer(input=x, hx=h_0)[0], layer(x, h_0)[0])


@every_layer
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_size": 0}, ValueError, "input_size must be greater than zero, got 0"),
        ({"hidden_size": -1}, ValueError, "hidden_size must be greater than zero, got -1"),
        ({"num_layers": 0}, ValueError, "num_layers must be greater than zero, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size must be an int, got float"),
        ({"bias": 1}, TypeError, "bias must be a bool, got int"),
        ({"batch_first": "yes"}, TypeError, "batch_first must be a bool, got str"),
        ({"dropout": 1.5}, ValueError, r"dropout must be a probability in \[0, 1\], got 1.5"),
        ({"dropout": True}, ValueError, "dropout must be a probability"),
        ({"candidate": "relu"}, ValueError, "candidate must be one of positive, linear, tanh, got 'relu'"),
        ({"candidate": "tan"}, ValueError, r"got 'tan'; did you mean 'tanh'\?"),
        ({"bias": False, "forget_bias": 1.0}, ValueError, "forget_bias=1.0 needs a bias"),
        ({"proj_size": 2}, TypeError, "proj_size"),
    ],
)
def test_constructor_errors(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LAYERS[name](**{"input_size": I, "hidden_size": H, **options})


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_of_all_is_of_what_passes_between_layers(name: str, bidirectional: bool) -> None:
    """With probability 1, the first layer reads the input as it is, and those above read zeros."""
    layer = build(name, num_layers=3, dropout=1.0, bidirectional=bidirectional)
    x, directions = make_input(T, B, I), 2 if bidirectional else 1
    output, h_n = layer(x)
    kept = layer.eval()(x)[1]
    assert torch.equal(h_n[:directions], kept[:directions])
    assert output.ne(0).any()
    torch.testing.assert_close(output[:, :1].expand_as(output), output)  # no row is told apart
    assert not torch.equal(h_n[directions:], kept[directions:])


@every_layer
def test_without_a_bias_a_forget_bias_of_nothing_is_taken(name: str) -> None:
    assert LAYERS[name](I, H, bias=False, forget_bias=0.0).forget_bias == 0
    assert (LAYERS[name](I, H).forget_bias, LAYERS[name](I, H, bias=False).forget_bias) == (1, 0)


@every_layer
def test_what_has_no_signed_form_refuses_it(name: str) -> None:
    if GATES[name].can_be_signed:
        assert LAYERS[name](I, H, signed=True).signed
        return
    with pytest.raises(ValueError, match="signed must be False, got True: this gate has no signed form"):
        LAYERS[name](I, H, signed=True)


@every_layer
@pytest.mark.parametrize("dropout", [0, 1])
def test_both_ends_of_the_range_are_probabilities(name: str, dropout: int) -> None:
    layer = LAYERS[name](I, H, num_layers=2, dropout=dropout)
    assert (type(layer.dropout), layer.dropout) == (float, dropout)


@every_layer
def test_useless_dropout_warns_at_the_callers_line(name: str) -> None:
    with pytest.warns(UserWarning, match="has no effect") as caught:
        LAYERS[name](I, H, dropout=0.1)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LAYERS[name](I, H, num_layers=2, dropout=0.1)


@every_layer
def test_call_errors(name: str) -> None:
    layer, x = build(name), make_input(T, B, I)
    with pytest.raises(ValueError, match=r"input must be \(T, B, 5\) or \(T, 5\)"):
        layer(x[..., :3])
    with pytest.raises(ValueError, match="input must be"):
        layer(x[None])
    with pytest.raises(ValueError, match="T of at least 1"):
        layer(x[:0])
    with pytest.raises(ValueError, match=r"weights' dtype, torch.float64, got torch.float32"):
        layer(x.float())
    with pytest.raises(ValueError, match=r"hx must be \(1, 3, 4\), got \(1, 2, 4\)"):
        layer(x, make_input(1, 2, H))
    with pytest.raises(ValueError, match=r"hx must be \(1, 4\), got \(1, 1, 4\)"):
        layer(x[:, 0], make_input(1, 1, H))
    with pytest.raises(TypeError, match="there is no cell state"):
        layer(x, (make_input(1, B, H), make_input(1, B, H)))
    with pytest.raises(ValueError, match=r"reset must be \(7, 3\).*got \(3, 7\)"):
        layer(x, reset=torch.zeros(B, T, dtype=torch.bool))


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_no_step_is_an_error_and_no_row_is_none(name: str, batch_first: bool) -> None:
    layer = LAYERS[name](I, H, batch_first=batch_first)
    for shape in ((0, I), (B, 0, I) if batch_first else (0, B, I)):
        with pytest.raises(ValueError, match=r"with T of at least 1, got \(" + ", ".join(map(str, shape))):
            layer(torch.zeros(shape))
    assert layer(torch.zeros((0, T, I) if batch_first else (T, 0, I)))[1].shape == (1, 0, H)


@every_layer
def test_an_input_passes_through_few_files(name: str) -> None:
    """From a layer's call to the compiled kernel, with its tensors: so many files are there to read."""
    layer, x = LAYERS[name](I, H), torch.randn(T, B, I)
    files = set()

    def holds_tensor(value: Any) -> bool:
        return isinstance(value, Tensor) or (
            isinstance(value, tuple | list) and any(map(holds_tensor, value))
        )

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and "minrnn" in path.parts and any(map(holds_tensor, frame.f_locals.values())):
            files.add(f"{path.parent.name}/{path.name}")

    layer(x)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(before)
    assert {"mixers/layer.py", "ops/operators.py"} <= files
    # The portable engine uses two files of equations and algorithm, which C++ has in the kernel.
    assert len(files) <= (7 if laws.SERVING == "cpp" else 9), sorted(files)
