"""convert_rnns: a model that held torch.nn's GRUs and LSTMs runs as before, on min ones."""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import minrnn
from minrnn.mixers import (
    MinGRU,
    MinGRUCell,
    MinLSTM,
    MinLSTMCell,
    PairedMinLSTM,
    PairedMinLSTMCell,
    convert_rnns,
)

B, T, I, H = 3, 6, 5, 4  # noqa: E741


class Translator(nn.Module):
    """Written for torch.nn: packed input, states handed on, attributes read, cells stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.encoder = nn.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1)
        self.bridge = nn.ModuleDict({"rnn": nn.Sequential(nn.GRU(2 * self.encoder.hidden_size, H))})
        self.decoder = nn.LSTM(H, H, num_layers=4)
        self.cells = nn.ModuleList([nn.GRUCell(H, H), nn.LSTMCell(H, H, bias=False)])
        self.plain = nn.RNN(H, H)

    def forward(self, tokens: list[Tensor]) -> Tensor:
        self.encoder.flatten_parameters()
        packed = pack_sequence([self.embed(x) for x in tokens], enforce_sorted=False)
        encoded, (h_n, c_n) = self.encoder(packed)
        assert h_n.shape == c_n.shape == (4, len(tokens), self.encoder.hidden_size)
        padded, _ = nn.utils.rnn.pad_packed_sequence(encoded)
        bridged, _ = self.bridge["rnn"](padded)
        decoded, (h, c) = self.decoder(bridged, hx=(h_n, c_n))
        step = self.cells[0](decoded[-1], hx=h[0])
        h, c = self.cells[1](step, (step, c[1]))
        return self.plain(h + c)[0]


def make_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(11, (length,), generator=generator) for length in (4, 6, 1)]


def test_a_model_runs_as_before() -> None:
    model = Translator()
    expected = model(make_tokens())
    plain, before = model.plain, model.plain.state_dict()
    assert convert_rnns(model) is model
    output = model(make_tokens())
    assert output.shape == expected.shape
    output.sum().backward()
    # h_0 and c_0 alike, so everything is reached but nothing that is not there.
    assert all(p.grad is not None for p in model.parameters())
    kinds = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("minrnn.")]
    assert kinds == ["PairedMinLSTM", "MinGRU", "PairedMinLSTM", "MinGRUCell", "PairedMinLSTMCell"]
    assert model.plain is plain
    assert model.plain.state_dict().keys() == before.keys()


def test_converting_again_changes_nothing() -> None:
    model = convert_rnns(Translator())
    modules = list(model.modules())
    assert list(convert_rnns(model).modules()) == modules


SOURCES: dict[str, tuple[nn.Module, type[nn.Module]]] = {
    "gru": (nn.GRU(I, H, 2, bias=False, batch_first=True, dropout=0.25, bidirectional=True), MinGRU),
    "lstm": (nn.LSTM(I, H, 3, dropout=0.5), PairedMinLSTM),
    "gru cell": (nn.GRUCell(I, H, bias=False), MinGRUCell),
    "lstm cell": (nn.LSTMCell(I, H), PairedMinLSTMCell),
}
every_source = pytest.mark.parametrize("name", SOURCES)


@every_source
def test_settings_are_taken_over(name: str) -> None:
    old, kind = SOURCES[name]
    new = convert_rnns(copy.deepcopy(old))
    assert type(new) is kind
    assert new.extra_repr() == old.extra_repr()
    assert list(new.state_dict()) == [key for key in old.state_dict() if "_hh" not in key]


@every_source
@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_frozen_parameters_are_taken_over(name: str, training: bool) -> None:
    old = copy.deepcopy(SOURCES[name][0]).to(torch.bfloat16).train(training)
    frozen = next(key for key, _ in old.named_parameters())
    old.get_parameter(frozen).requires_grad_(False)
    new = convert_rnns(old)
    assert new.training == training
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert {key for key, p in new.named_parameters() if not p.requires_grad} == {frozen}


@every_source
def test_device_is_taken_over(name: str) -> None:
    new = convert_rnns(copy.deepcopy(SOURCES[name][0]).to("meta"))
    assert {p.device.type for p in new.parameters()} == {"meta"}


def test_weights_are_drawn_from_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = MinGRU(I, H).state_dict()
    old = nn.GRU(I, H)
    torch.manual_seed(3)
    for key, value in convert_rnns(old).state_dict().items():
        assert torch.equal(value, expected[key])


def test_candidate_is_passed_on() -> None:
    model = convert_rnns(nn.ModuleList([nn.GRU(I, H), nn.LSTMCell(I, H)]), candidate="tanh")
    assert [m.candidate for m in model] == ["tanh", "tanh"]
    with pytest.raises(ValueError, match="candidate must be one of"):
        convert_rnns(nn.GRU(I, H), candidate="relu")


def test_signed_is_passed_on() -> None:
    model = convert_rnns(nn.ModuleList([nn.GRU(I, H), nn.LSTMCell(I, H)]), signed=True)
    assert [(m.gate, m.signed) for m in model] == [("mingru", True), ("minlstm", True)]


def test_a_module_in_two_places_stays_one() -> None:
    shared = nn.GRU(H, H)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": nn.GRU(H, H)})
    convert_rnns(model)
    assert model["a"] is model["b"][0]
    assert model["a"] is not model["c"]


# --- parameters that modules share -------------------------------------------------------------------------


def tied(first: Any, first_name: str, second: Any, second_name: str) -> nn.ModuleDict:
    setattr(second, second_name, getattr(first, first_name))
    return nn.ModuleDict({"first": first, "second": second})


TIES: dict[str, tuple[Any, Any, str, str]] = {
    "LSTM and LSTMCell": (nn.LSTM, nn.LSTMCell, "_l0", ""),
    "LSTMCell and LSTM": (nn.LSTMCell, nn.LSTM, "", "_l0"),
    "GRU and GRUCell": (nn.GRU, nn.GRUCell, "_l0", ""),
    "two GRUs": (nn.GRU, nn.GRU, "_l0", "_l0"),
}


@pytest.mark.parametrize("case", TIES)
def test_shared_parameters_stay_shared(case: str) -> None:
    first, second, left, right = TIES[case]
    model = nn.ModuleDict({"first": first(H, H), "second": second(H, H)})
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(model["second"], kind + right, getattr(model["first"], kind + left))
    convert_rnns(model)
    for kind in ("weight_ih", "bias_ih"):
        assert getattr(model["second"], kind + right) is getattr(model["first"], kind + left)
    assert len(list(model.parameters())) == 2
    x, h = torch.randn(1, B, H), torch.randn(1, B, H)
    outputs = []
    for module in model.values():
        is_cell = "Cell" in type(module).__name__
        hx, step = (h[0], x[0]) if is_cell else (h, x)
        output = module(step, (hx, hx) if "LSTM" in case else hx)
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(B, H))
    torch.testing.assert_close(*outputs)


def test_parameters_shared_by_layers_of_one_stay_shared() -> None:
    old = nn.GRU(H, H, num_layers=3)
    for kind in ("weight_ih", "bias_ih"):
        setattr(old, f"{kind}_l2", getattr(old, f"{kind}_l1"))
    new = convert_rnns(old)
    assert new.weight_ih_l2 is new.weight_ih_l1
    assert new.bias_ih_l2 is new.bias_ih_l1
    assert new.weight_ih_l0 is not new.weight_ih_l1


def test_shared_recurrent_weights_leave_with_their_partners() -> None:
    model = convert_rnns(tied(nn.GRU(H, H), "weight_hh_l0", nn.GRU(H, H), "weight_ih_l0"))
    assert model["first"].weight_ih_l0 is not model["second"].weight_ih_l0


@pytest.mark.parametrize(
    "make",
    [
        lambda: tied(nn.GRU(I, H), "weight_ih_l0", nn.Linear(I, 3 * H), "weight"),
        lambda: tied(nn.GRU(I, H), "weight_hh_l0", nn.Linear(H, 3 * H), "weight"),
        lambda: tied(nn.GRU(I, 4 * H), "weight_ih_l0", nn.LSTM(I, 3 * H), "weight_ih_l0"),
        lambda: tied(nn.GRU(I, H), "weight_ih_l0", nn.RNN(I, 3 * H), "weight_ih_l0"),
    ],
)
def test_ties_that_cannot_be_kept_are_named(make: Any) -> None:
    model = make()
    modules = list(model.modules())
    with pytest.raises(
        ValueError, match=r"weight_\wh_l0 of module 'first' must not be shared .* module 'second'"
    ):
        convert_rnns(model)
    assert list(model.modules()) == modules


def test_what_was_set_on_modules_and_parameters_is_taken_over() -> None:
    old = nn.GRU(I, H)
    old.note, old.weight_ih_l0.group = "kept", 3
    new = convert_rnns(old)
    assert new.note == "kept"
    assert new.weight_ih_l0.group == 3


# --- what is passed over is named --------------------------------------------------------------------------


class Holder(nn.Module):
    """Keeps what `hold` makes of its GRU where no table of submodules is."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.rnn = nn.GRU(I, H)
        self.kept = hold(self.rnn)


@pytest.mark.parametrize(
    "hold",
    [
        lambda rnn: [rnn],
        lambda rnn: {"a": (1, [rnn])},
        lambda rnn: rnn.forward,
        lambda rnn: functools.partial(rnn, hx=None),
        lambda rnn: functools.partial(print, rnn),
        lambda rnn: functools.partial(print, end=rnn),
        lambda rnn: [nn.Sequential(rnn)],
    ],
    ids=["list", "nested", "method", "partial", "argument", "keyword", "in an unregistered module"],
)
def test_references_beside_submodules_are_named(hold: Any) -> None:
    model = Holder(hold)
    with pytest.warns(UserWarning, match="module 'rnn' as held by attribute 'kept' of the module") as caught:
        convert_rnns(model)
    assert caught[0].filename == __file__
    assert isinstance(model.rnn, MinGRU)


def test_unregistered_ones_are_named() -> None:
    model = Holder(lambda _: [nn.LSTM(I, H)])
    with pytest.warns(UserWarning, match="an unregistered LSTM as held by attribute 'kept' of the module"):
        convert_rnns(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_rnns(Holder(lambda _: [nn.Linear(2, 2), 3, "rnn", None]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_scripted_traced_and_quantised_ones_are_named(kind: Any) -> None:
    others = {
        "scripted": torch.jit.script(kind(I, H)),
        "traced": torch.jit.trace(nn.Sequential(kind(I, H)), (torch.zeros(T, B, I),)),
        "quantised": torch.ao.quantization.quantize_dynamic(nn.Sequential(kind(I, H)), {kind})[0],
    }
    for name, other in others.items():
        model = nn.ModuleDict({name: other, "plain": nn.GRU(I, H)})
        with pytest.warns(UserWarning, match=f"left as it was: module '{name}.*', {kind.__name__} "):
            convert_rnns(model)
        assert model[name] is other
        assert isinstance(model["plain"], MinGRU)


# --- the pair of states ----------------------------------------------------------------------------------


def build_pair() -> tuple[PairedMinLSTM, MinLSTM]:
    paired = PairedMinLSTM(I, H, num_layers=2, bidirectional=True)
    plain = MinLSTM(I, H, num_layers=2, bidirectional=True)
    plain.load_state_dict(paired.state_dict())
    return paired, plain


def test_pair_is_minlstms_state_twice_and_starts_from_c() -> None:
    paired, plain = build_pair()
    x, h_0, c_0 = torch.randn(T, B, I), torch.randn(4, B, H), torch.randn(4, B, H)
    output, (h_n, c_n) = paired(x, (h_0, c_0))
    expected, expected_h_n = plain(x, c_0)
    assert torch.equal(output, expected)
    assert torch.equal(h_n, expected_h_n)
    assert torch.equal(c_n, expected_h_n)
    h_n.zero_()  # changes h_n alone
    assert torch.equal(c_n, expected_h_n)
    h, c = PairedMinLSTMCell(I, H)(x[0])
    assert torch.equal(h, c)
    h.detach().zero_()
    assert c.ne(0).any()


def test_a_returned_pair_continues_where_it_stopped() -> None:
    layer, cell = PairedMinLSTM(I, H), PairedMinLSTMCell(I, H)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = torch.randn(T, B, I)
    whole, _ = layer(x)
    first, state = layer(x[:2])
    second, _ = layer(x[2:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    step = None
    for t in range(T):
        step = cell(x[t], step)
        torch.testing.assert_close(step[0], whole[t])
        torch.testing.assert_close(step[1], whole[t])


def test_pair_goes_with_every_form_of_input() -> None:
    paired, plain = build_pair()
    sequences = [torch.randn(length, I) for length in (2, 5, 3)]
    state = torch.randn(4, 3, H)
    packed = pack_sequence(sequences, enforce_sorted=False)
    output, (h_n, _) = paired(packed, (state, state))
    assert isinstance(output, PackedSequence)
    expected, expected_h_n = plain(packed, state)
    assert torch.equal(output.data, expected.data)
    assert torch.equal(h_n, expected_h_n)
    offsets = torch.tensor([0, 2, 7, 10])
    _, (h_n, c_n) = paired(torch.cat(sequences), cu_seqlens=offsets)
    torch.testing.assert_close(h_n, plain(packed)[1])
    assert torch.equal(h_n, c_n)
    unbatched, (h_n, _) = paired(sequences[1])
    assert unbatched.shape == (5, 2 * H)
    assert h_n.shape == (4, H)


@pytest.mark.parametrize("kind", [PairedMinLSTM, PairedMinLSTMCell])
def test_weights_are_reparametrized_by_their_own_names(kind: Any) -> None:
    """The parameters are the module's own, as those of torch.nn.LSTM are."""
    torch.manual_seed(0)
    module, x = kind(I, H, normalize=False), torch.randn(B, I)
    output, name = module(x)[0], next(key for key in module.state_dict() if key.startswith("weight"))
    parametrize.register_parametrization(module, name, nn.Identity())
    assert torch.equal(module(x)[0], output)
    pruned = prune.random_unstructured(copy.deepcopy(kind(I, H)), name, amount=0.5)
    assert (getattr(pruned, name) == 0).sum() == round(1.5 * H * I)
    assert not isinstance(module, (MinLSTM, MinLSTMCell))  # which take and return one tensor


@pytest.mark.parametrize("module", [PairedMinLSTM(I, H), PairedMinLSTMCell(I, H)], ids=["layer", "cell"])
def test_pair_errors(module: nn.Module) -> None:
    name = type(module).__name__
    x = torch.randn(T, B, I) if isinstance(module, PairedMinLSTM) else torch.randn(B, I)
    state = torch.randn(1, B, H) if isinstance(module, PairedMinLSTM) else torch.randn(B, H)
    wrong: list[Any] = [state, (state,), (state, None), [state] * 3]
    for hx in wrong:
        with pytest.raises(TypeError, match=rf"{name}: hx must be the pair \(h, c\) of tensors"):
            module(x, hx)
    with pytest.raises(ValueError, match="h and c must be of one shape"):
        module(x, (state[..., :2], state))
    with pytest.raises(ValueError, match="hx must be"):
        module(x, (state[..., :2], state[..., :2]))


# --- what cannot be converted, and that nothing is changed then -------------------------------------------


class MyGRU(nn.GRU):
    pass


def parametrized() -> nn.Module:
    module = nn.GRU(I, H)
    parametrize.register_parametrization(module, "weight_ih_l0", nn.Identity())
    return module


def hooked() -> nn.Module:
    module = nn.LSTMCell(I, H)
    module.register_forward_hook(lambda *_: None)
    return module


def hooked_parameter() -> nn.Module:
    module = nn.GRU(I, H)
    module.weight_ih_l0.register_hook(lambda gradient: gradient)
    return module


def with_hooked_state_dict() -> nn.Module:
    module = nn.GRU(I, H)
    module.register_state_dict_post_hook(lambda *_: None)
    return module


def with_buffer() -> nn.Module:
    module = nn.GRU(I, H)
    module.register_buffer("count", torch.zeros(1))
    return module


def with_forward() -> nn.Module:
    module = nn.GRU(I, H)
    module.forward = lambda x: x  # type: ignore[method-assign, assignment]
    return module


def compiled_in_place() -> nn.Module:
    module = nn.GRU(I, H)
    module.compile(backend="eager")
    return module


def in_two_dtypes() -> nn.Module:
    module = nn.GRU(I, H, num_layers=2)
    module.weight_ih_l1.data = module.weight_ih_l1.data.double()
    return module


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (hooked_parameter, TypeError, r"'1\.rnn' must have no hooks"),
        (with_hooked_state_dict, TypeError, r"'1\.rnn' must have no hooks"),
        (with_buffer, TypeError, r"'1\.rnn' must have nothing of its own, got count"),
        (with_forward, TypeError, r"'1\.rnn' must have nothing of its own, got forward"),
        (compiled_in_place, TypeError, r"'1\.rnn' must not be compiled"),
        (in_two_dtypes, ValueError, r"'1\.rnn' must have its parameters on one device and in one dtype"),
        (
            lambda: nn.LSTM(I, H, proj_size=2),
            ValueError,
            r"'1\.rnn' must have no projection, got",
        ),
        (lambda: MyGRU(I, H), TypeError, r"'1\.rnn' must be torch.nn's own, got its subclass MyGRU"),
        (parametrized, TypeError, r"'1\.rnn' must be torch.nn's own, got its subclass ParametrizedGRU"),
        (hooked, TypeError, r"'1\.rnn' must have no hooks"),
    ],
)
def test_errors_come_before_any_change(make: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.GRU(I, H), nn.ModuleDict({"rnn": make()}))
    modules = list(model.modules())
    with pytest.raises(error, match=f"convert_rnns: module {message}"):
        convert_rnns(model)
    assert list(model.modules()) == modules
    with pytest.raises(error, match="convert_rnns: the module must"):
        convert_rnns(make())


@pytest.mark.parametrize("module", [nn.Linear(I, H), nn.GRU(I, H)], ids=["nothing to convert", "a GRU"])
def test_arguments_are_read_whether_anything_is_converted_or_not(module: nn.Module) -> None:
    with pytest.raises(TypeError, match="convert_rnns: signed must be a bool, got str"):
        convert_rnns(module, signed="yes")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="convert_rnns: candidate must be one of positive, linear, tanh, got"
    ):
        convert_rnns(module, candidate="x")
    with pytest.raises(TypeError, match=r"convert_rnns: module must be a torch\.nn\.Module, got list"):
        convert_rnns([module])  # type: ignore[arg-type]


def test_a_compiled_one_is_refused() -> None:
    """The wrapper calls the module that it was made of, whatever takes its place."""
    for model in (torch.compile(nn.GRU(I, H)), nn.Sequential(torch.compile(nn.GRU(I, H)))):
        with pytest.raises(TypeError, match="must not be compiled; convert first"):
            convert_rnns(model)
    model = torch.compile(nn.Sequential(nn.GRU(I, H)), backend="eager")
    assert convert_rnns(model)(torch.zeros(T, B, I))[0].shape == (T, B, H)


def test_it_is_public() -> None:
    assert minrnn.convert_rnns is convert_rnns
