"""SequenceModel, its parts, and sampling: the laws of state for whole models, over every mixer."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from minrnn.mixers import MIXERS
from minrnn.mixers.convolution import CausalConv
from minrnn.models import ModelConfig, ModelState, SequenceModel, generate, map_state
from minrnn.models.block import ACTIVATIONS, MLP
from minrnn.models.dropout import Dropout
from minrnn.models.generation import choose
from minrnn.models.sequence import NORMS, make_norm

B, T, V, D = 3, 12, 11, 8

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"mixer": name} for name in MIXERS},
    "bare": {"conv_width": 0, "mlp_ratio": 0, "bias": False, "norm": "rms", "num_layers": 1},
    "wide": {"expansion": 2.5, "conv_width": 7, "mlp_ratio": 1.5, "mlp_activation": "silu"},
    "width-1": {"conv_width": 1, "tie_embeddings": True},
    "window": {"mixer": "attention", "window": 3, "num_heads": 2},
    "signed": {"mixer": "mingru", "signed": True},
    "minlstm-options": {"mixer": "minlstm", "normalize": False, "candidate": "tanh", "forget_bias": 3.0},
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_mixer = pytest.mark.parametrize("mixer", MIXERS)


def build(**options: Any) -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(**{"vocab_size": V, "d_model": D, "num_layers": 2, **options})).double()


def make_tokens(length: int = T, seed: int = 1) -> Tensor:
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def make_reset(seed: int = 2) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.25


def run_in_pieces(
    model: SequenceModel, tokens: Tensor, cuts: set[int], reset: Tensor | None = None
) -> tuple[Tensor, ModelState]:
    outputs, state = [], None
    for start, stop in pairwise([0, *sorted(cuts), tokens.shape[1]]):
        piece = slice(start, stop)
        logits, state = model(tokens[:, piece], state, reset=None if reset is None else reset[:, piece])
        outputs.append(logits)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def tensors_of(state: ModelState) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)  # type: ignore[func-returns-value]
    return found


# --- laws ---------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("with_reset", [False, True])
def test_repeated_steps_equal_one_pass(variant: str, with_reset: bool) -> None:
    model, tokens = build(**VARIANTS[variant]), make_tokens()
    reset = make_reset() if with_reset else None
    logits, state = model(tokens, reset=reset)
    stepped, stepped_state = run_in_pieces(model, tokens, set(range(1, T)), reset)
    assert logits.shape == (B, T, V)
    torch.testing.assert_close(stepped, logits, rtol=0, atol=1e-10)
    for ours, theirs in zip(tensors_of(stepped_state), tensors_of(state), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@every_variant
@settings(max_examples=6)
@given(cuts=st.sets(st.integers(1, T - 1)), reset_seed=st.none() | st.integers(0, 99))
def test_any_split_with_the_state_carried_equals_one_pass(
    variant: str, cuts: set[int], reset_seed: int | None
) -> None:
    model, tokens = build(**VARIANTS[variant]), make_tokens()
    reset = None if reset_seed is None else make_reset(reset_seed)
    parameters = list(model.parameters())
    gradients = []
    for run_cuts in (set[int](), cuts):
        logits, _ = run_in_pieces(model, tokens, run_cuts, reset)
        loss = functional.cross_entropy(logits.flatten(0, 1), make_tokens(seed=3).flatten())
        gradients.append((loss, *torch.autograd.grad(loss, parameters)))
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)


@every_variant
def test_reset_separates_documents(variant: str) -> None:
    model, tokens = build(**VARIANTS[variant]), make_tokens()
    _, old = model(make_tokens(7, seed=4))
    starts = (0, 2, 9)  # one of them within a convolution's reach of the beginning
    reset = torch.zeros(B, T, dtype=torch.bool)
    for row, start in enumerate(starts):
        reset[row, start] = True
    logits, _ = model(tokens, old, reset=reset)
    for row, start in enumerate(starts):
        alone, _ = model(tokens[row : row + 1, start:])
        torch.testing.assert_close(logits[row : row + 1, start:], alone, rtol=0, atol=1e-10)


@every_variant
def test_rows_of_a_batch_do_not_meet(variant: str) -> None:
    model, tokens = build(**VARIANTS[variant]), make_tokens()
    _, old = model(make_tokens(5, seed=4))
    logits, _ = model(tokens, old, reset=make_reset())
    for row in range(B):
        one = slice(row, row + 1)
        alone, _ = model(tokens[one], map_state(lambda t, one=one: t[one], old), reset=make_reset()[one])
        torch.testing.assert_close(alone, logits[one], rtol=0, atol=1e-10)


@every_variant
def test_no_logit_depends_on_later_tokens(variant: str) -> None:
    model, tokens = build(**VARIANTS[variant]), make_tokens()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % V
    logits, _ = model(tokens)
    logits_changed, _ = model(changed)
    torch.testing.assert_close(logits_changed[:, :7], logits[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(logits_changed[:, 7], logits[:, 7])


@every_variant
def test_state_has_the_batch_first_and_holds_no_sequence(variant: str) -> None:
    _, state = build(**VARIANTS[variant])(make_tokens(100))
    for tensor in tensors_of(state):
        assert tensor.shape[0] == B
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@every_mixer
def test_float32_and_bfloat16_autocast_agree_with_float64(mixer: str) -> None:
    exact, tokens = build(mixer=mixer), make_tokens()
    logits, _ = exact(tokens)
    single = exact.float()
    torch.testing.assert_close(single(tokens)[0].double(), logits, rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        halved, _ = run_in_pieces(single, tokens, {5})
    torch.testing.assert_close(halved.double(), logits, rtol=0, atol=0.05)


@every_mixer
def test_training_steps_lower_the_loss(mixer: str) -> None:
    model, tokens = build(mixer=mixer).float(), make_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        logits, _ = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("mixer", "with_reset"), [("mingru", False), ("mingru", True), ("minlstm", False), ("attention", True)]
)
def test_compiles_to_one_graph(mixer: str, with_reset: bool) -> None:
    """The classic mixers are left out: where they cut time depends on the values of reset."""
    model, tokens = build(mixer=mixer, num_layers=1), make_tokens()
    reset = make_reset() if with_reset else None
    torch.compiler.reset()  # or the graphs of the tests before count against the limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits, state = compiled(tokens, reset=reset)
    expected, expected_state = model(tokens, reset=reset)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    again, _ = compiled(tokens, state, reset=reset)
    torch.testing.assert_close(again, model(tokens, expected_state, reset=reset)[0], rtol=0, atol=1e-12)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(y.square().sum(), parameters) for y in (logits, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


# --- construction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_initial_loss_is_that_of_guessing(tie_embeddings: bool) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=100, d_model=64, num_layers=6, tie_embeddings=tie_embeddings)
    tokens = torch.randint(100, (8, 64))
    logits, _ = SequenceModel(config)(tokens)
    loss = functional.cross_entropy(logits.flatten(0, 1), torch.randint(100, (8 * 64,)))
    assert abs(loss.item() - torch.tensor(100.0).log().item()) < 0.3


def test_tied_embedding_is_one_parameter() -> None:
    tied, untied = build(tie_embeddings=True), build()
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (V, D)


def test_bias_leaves_only_the_mixers_biases() -> None:
    names = [name for name, _ in build(bias=False).named_parameters() if "bias" in name]
    assert names == ["blocks.0.mixer.rnn.bias_ih_l0", "blocks.1.mixer.rnn.bias_ih_l0"]


def test_widths() -> None:
    block = build(expansion=1.5, mlp_ratio=3.0, conv_width=5).blocks[0]
    assert (block.mixer.d_model, block.mixer.d_hidden) == (D, 12)
    assert block.mlp.up.weight.shape == (24, D)
    assert block.conv.weight.shape == (5, D)
    bare = build(conv_width=0, mlp_ratio=0).blocks[0]
    assert (bare.conv, bare.mlp, bare.mlp_norm) == (None, None, None)


@pytest.mark.parametrize("residual", [True, False])
def test_a_model_is_its_parts_one_after_the_other(residual: bool) -> None:
    """A norm before each branch of a block, whose output is added to its input or replaces it."""
    model, tokens = build(residual=residual), make_tokens()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # at first the norms of a stream are nearly one
                weight.normal_()
        x = model.embedding(tokens)
        for block in model.blocks:
            y, _ = block.conv(block.mixer_norm(x))
            y, _ = block.mixer(y)
            x = x * residual + block.down(y)
            x = x * residual + block.mlp(block.mlp_norm(x))
        torch.testing.assert_close(model(tokens)[0], model.head(model.norm(x)))


def test_with_every_part_off_a_block_is_its_mixer() -> None:
    model, tokens = build(conv_width=0, mlp_ratio=0, norm="none", residual=False), make_tokens()
    x = model.embedding(tokens)
    for block in model.blocks:
        y, _ = block.mixer(x)
        x = block.down(y)
    torch.testing.assert_close(model(tokens)[0], x @ model.head.weight.T)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_the_mean(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(301, 333, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    assert torch.equal(y, x.grad)  # the same mask forwards and backwards
    share = (y != 0).double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    assert y.unique().numel() <= 2
    torch.testing.assert_close(y.max(), x.new_tensor(1 / (1 - p)), rtol=8e-3, atol=0)


@pytest.mark.parametrize(("p", "kept"), [(0.1, 58982), (0.2, 52429), (0.5, 32768), (1 - 2**-16, 1)])
def test_dropouts_divisor_is_the_share_that_is_kept(p: float, kept: int) -> None:
    """Of 2^16: the probability is rounded, and so the mean stays what it is."""
    y = Dropout(p)(torch.ones(1 << 18, dtype=torch.float64))
    assert set(y.tolist()) <= {0, 65536 / kept}
    assert set(Dropout(1.0)(torch.ones(9)).tolist()) == {0}


def test_dropout_of_nearly_everything_is_finite() -> None:
    assert Dropout(1 - 1e-6)(torch.ones(1000)).isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    model, tokens = build(dropout=0.5), make_tokens()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert torch.equal(model(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_activation_and_norm_builds(activation: str, norm: str) -> None:
    model, tokens = build(mlp_activation=activation, norm=norm), make_tokens()
    logits, _ = model(tokens)
    assert logits.shape == (*tokens.shape, model.config.vocab_size)
    assert logits.isfinite().all()
    assert model.config == ModelConfig.from_dict(model.config.to_dict())


def test_norms_are_their_formulas() -> None:
    """On numbers as small as the epsilons: 1e-5 of nn.LayerNorm, that of float32 of nn.RMSNorm."""
    x = torch.tensor([0.003, 0.001])
    expected = {"layer": [0.301511, -0.301511], "rms": [1.325928, 0.441976], "none": [0.003, 0.001]}
    assert expected.keys() == set(NORMS)
    for norm, values in expected.items():
        found = make_norm(ModelConfig(d_model=2, norm=norm))(x)
        torch.testing.assert_close(found, torch.tensor(values), rtol=1e-4, atol=0)


def test_activations_are_their_formulas() -> None:
    """gelu is x Phi(x), silu x / (1 + exp(-x)); swiglu multiplies silu of the first half by the second."""
    x = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0, -4.0], dtype=torch.float64)
    expected = {
        "gelu": [-0.0455002638964, -0.154268769363, 0, 0.841344746069, 2.99595030590, -0.000126684967],
        "relu": [0, 0, 0, 1, 3, 0],
        "silu": [-0.238405844044, -0.188770334399, 0, 0.731058578630, 2.85772238047, -0.0719448398],
        "swiglu": [-0.238405844044 * 1, -0.188770334399 * 3, 0],
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        found = ACTIVATIONS[name](x)
        torch.testing.assert_close(found, torch.tensor(values, dtype=x.dtype), rtol=1e-8, atol=1e-12)


def test_swiglu_gates_one_half_of_its_channels_by_the_other() -> None:
    mlp = MLP(6, 5, activation="swiglu", bias=True)
    x = torch.randn(2, 3, 6)
    gate, value = mlp.up.weight[:5] @ x[..., None], mlp.up.weight[5:] @ x[..., None]
    gate, value = gate[..., 0] + mlp.up.bias[:5], value[..., 0] + mlp.up.bias[5:]
    torch.testing.assert_close(mlp(x), mlp.down(gate * torch.sigmoid(gate) * value))


# --- configuration ------------------------------------------------------------------------------------


def test_config_round_trip() -> None:
    config = ModelConfig(mixer="attention", window=64, expansion=2, tie_embeddings=True)
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"d_model": 0}, ValueError, "d_model must be positive, got 0"),
        ({"vocab_size": -1}, ValueError, "vocab_size must be positive"),
        ({"num_layers": 0}, ValueError, "num_layers must be positive"),
        ({"expansion": 0.0}, ValueError, "expansion must be positive"),
        ({"conv_width": -1}, ValueError, "conv_width must be 0"),
        ({"mlp_ratio": -0.5}, ValueError, "mlp_ratio must be 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
        ({"expansion": float("nan")}, ValueError, "expansion must be positive, got nan"),
        ({"expansion": float("inf")}, ValueError, "expansion must be positive"),
        ({"mixer": "hyena"}, ValueError, "mixer must be one of mingru, .*, got 'hyena'"),
        ({"mlp_activation": "tanh"}, ValueError, "mlp_activation must be one of gelu"),
        ({"norm": "batch"}, ValueError, "norm must be one of layer, rms, none, got 'batch'"),
        ({"d_model": "8"}, TypeError, "d_model must be int, got '8'"),
        ({"num_layers": 2.0}, TypeError, "num_layers must be int"),
        ({"bias": 1}, TypeError, "bias must be bool, got 1"),
        ({"window": 1.5}, TypeError, r"window must be int \| None"),
        ({"window": 8}, ValueError, "mixer 'mingru' has no option 'window'; .*attention"),
        ({"mixer": "rnn", "forget_bias": 1.0}, ValueError, "'rnn' has no option 'forget_bias'"),
        ({"mixer": "gru", "signed": False}, ValueError, "'gru' has no option 'signed'; .*mingru, minlstm"),
        ({"mixer": "mingru", "normalize": True}, ValueError, r"use a mixer that has it \(minlstm\)"),
    ],
)
def test_config_errors(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelConfig(**values)
    with pytest.raises(ValueError, match=r"must be|has no option"):  # of a file, types are values as well
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(("key", "near"), [("d_modle", "d_model"), ("layers", "num_layers")])
def test_unknown_config_keys_name_the_nearest(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{key}'; did you mean '{near}'"):
        ModelConfig.from_dict({key: 3})


def test_the_mixer_refuses_an_options_value() -> None:
    with pytest.raises(ValueError, match="even widths, got 3"):
        SequenceModel(ModelConfig(mixer="attention", num_heads=3, d_model=8))
    with pytest.raises(ValueError, match="candidate must be one of"):
        SequenceModel(ModelConfig(candidate="relu"))
    with pytest.raises(ValueError, match="MinLSTM: signed must be False with normalize=False"):
        SequenceModel(ModelConfig(mixer="minlstm", normalize=False, signed=True))


def test_every_field_is_documented() -> None:
    """The command line shows a field's docstring as its help; a field without one would show nothing."""
    import ast
    import inspect

    (definition,) = ast.parse(inspect.getsource(ModelConfig)).body
    assert isinstance(definition, ast.ClassDef)
    for field, after in pairwise(definition.body):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr), ast.unparse(field)
            assert isinstance(after.value, ast.Constant)


def test_call_errors() -> None:
    model, tokens = build(), make_tokens()
    _, state = model(tokens)
    with pytest.raises(TypeError, match=r"tokens must be int64, got torch.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\) with T >= 1, got \(12,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match="T >= 1"):
        model(tokens[:, :0])
    for wrong in (state[:1], state * 2):
        with pytest.raises(ValueError, match=f"state must have 2 blocks, got {len(wrong)}"):
            model(tokens, wrong)
    with pytest.raises(TypeError, match="reset must be bool"):
        model(tokens, reset=tokens)
    with pytest.raises(ValueError, match="must be the batch, 3, got shape"):
        model(tokens, map_state(lambda t: t[:2], state))


@pytest.mark.parametrize("conv_width", [0, 4])
def test_a_states_windows_are_as_many_as_convolutions(conv_width: int) -> None:
    model, tokens = build(conv_width=conv_width, num_layers=1), make_tokens()
    _, ((windows, carried),) = model(tokens)
    window = torch.zeros(B, 3, D, dtype=torch.float64)
    for count in {0, 1, 2} - {len(windows)}:
        message = f"Block: state must have {len(windows)} windows of a convolution, got {count}"
        with pytest.raises(ValueError, match=message):
            model(tokens, (((window,) * count, carried),))
    model(tokens, ((windows, carried),))


@every_variant
def test_no_parameter_is_used_twice(variant: str) -> None:
    names: dict[int, str] = {}
    for name, parameter in build(**VARIANTS[variant]).named_parameters(remove_duplicate=False):
        assert names.setdefault(id(parameter), name) == name


# --- the convolution ----------------------------------------------------------------------------------


def make_conv(width: int = 4, *, bias: bool = True) -> CausalConv:
    conv = CausalConv(5, width, bias=bias).double()
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    return conv


def test_convolution_starts_near_the_identity() -> None:
    now, *before = CausalConv(50, 4).weight.detach()
    assert torch.equal(now, torch.ones(50))
    assert all(0.1 < weight.max() <= 0.25 for weight in before)
    assert all(-0.25 <= weight.min() < -0.1 for weight in before)


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_is_torchs(width: int, bias: bool) -> None:
    conv, x = make_conv(width, bias=bias), torch.randn(2, 7, 5, dtype=torch.float64)
    kernel = conv.weight.flip(0).T.unsqueeze(1)  # (D, 1, width), oldest input first
    padded = functional.pad(x.transpose(1, 2), (width - 1, 0))
    expected = functional.conv1d(padded, kernel, conv.bias, groups=5).transpose(1, 2)
    y, window = conv(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert torch.equal(window, padded[..., 7:].transpose(1, 2))
    masked, _ = conv(x, reset=torch.zeros(2, 7, dtype=torch.bool))  # the other path
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


def test_convolution_derivatives() -> None:
    conv = make_conv(3)
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    window = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def apply(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(conv, parameters, (x, window))

    inputs = (x, window, conv.weight, conv.bias)
    assert torch.autograd.gradcheck(apply, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_gradients_of_single_examples_by_vmap() -> None:
    model = build(num_layers=1, mixer="mingru")
    parameters, tokens = dict(model.named_parameters()), make_tokens(6)

    def loss(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
        logits, _ = torch.func.functional_call(model, parameters, (tokens.unsqueeze(0),))
        return logits.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, tokens)
    for row in range(B):
        alone = torch.func.grad(loss)(parameters, tokens[row])
        for name in alone:
            torch.testing.assert_close(each[name][row], alone[name], rtol=0, atol=1e-10)


# --- generation ---------------------------------------------------------------------------------------


def sample(model: SequenceModel, prompt: Tensor, num_tokens: int, **options: Any) -> Tensor:
    return torch.stack(list(generate(model, prompt, num_tokens, **options)), dim=1)


@every_mixer
def test_greedy_generation_takes_the_likeliest_token_given_all_before(mixer: str) -> None:
    model, prompt = build(mixer=mixer), make_tokens(5)
    drawn = sample(model, prompt, 6, temperature=0)
    tokens = prompt
    for step in range(6):
        token = model(tokens)[0][:, -1].argmax(-1)
        assert torch.equal(drawn[:, step], token)
        tokens = torch.cat([tokens, token.unsqueeze(1)], dim=1)


def test_generation_streams_and_repeats_with_a_seed() -> None:
    model, prompt = build(), make_tokens(5)
    stream = generate(model, prompt, 1000, generator=torch.Generator().manual_seed(1))
    first = [next(stream) for _ in range(10)]
    assert all(token.shape == (B,) and token.dtype == torch.int64 for token in first)
    again = sample(model, prompt, 10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.stack(first, dim=1), again)
    other = sample(model, prompt, 10, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(again, other)


def test_generation_ignores_and_keeps_the_models_mode() -> None:
    model, prompt = build(dropout=0.9), make_tokens(5)
    assert torch.equal(
        sample(model, prompt, 8, temperature=0), sample(model.eval(), prompt, 8, temperature=0)
    )
    model.train()
    token = next(generate(model, prompt, 8))
    assert model.training
    assert not token.requires_grad
    assert torch.is_grad_enabled()


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build(), make_tokens(11)
    whole = sample(model, prompt, 4, temperature=0)
    monkeypatch.setattr("minrnn.models.decoder.PROMPT_CHUNK", 4)
    assert torch.equal(sample(model, prompt, 4, temperature=0), whole)


LOGITS = torch.log(torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def frequencies(**options: Any) -> list[float]:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    generator = torch.Generator().manual_seed(0)
    drawn = choose(LOGITS.expand(20_000, 4), generator=generator, **settings)
    return (drawn.bincount(minlength=4) / 20_000).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),
    ],
)
def test_choice_follows_the_distribution(options: dict[str, Any], expected: list[float]) -> None:
    assert frequencies(**options) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)]
)
def test_as_few_tokens_are_kept_as_sum_to_top_p(top_p: float, kept: int) -> None:
    """Of four with probability 1/4, which is exact."""
    logits, generator = torch.zeros(500, 4), torch.Generator().manual_seed(0)
    drawn = choose(logits, temperature=1.0, top_k=0, top_p=top_p, generator=generator)
    assert drawn.unique().numel() == kept


def test_a_low_temperature_is_still_a_temperature() -> None:
    logits, generator = torch.tensor([0.0, 0.001]).expand(4000, 2), torch.Generator().manual_seed(0)
    drawn = choose(logits, temperature=0.001, top_k=0, top_p=1.0, generator=generator)
    assert drawn.double().mean().item() == pytest.approx(0.731, abs=0.03)  # 1 / (1 + 1 / e)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_said(number: float, temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = number
    with pytest.raises(RuntimeError, match="logits are not finite; its training has diverged"):
        choose(logits, temperature=temperature, top_k=0, top_p=1.0, generator=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": torch.zeros(3, dtype=torch.int64)}, r"prompt_ids must be \(B, T\)"),
        ({"prompt_ids": torch.zeros(1, 0, dtype=torch.int64)}, "T >= 1"),
        ({"prompt_ids": torch.tensor([[0, V]])}, r"lie in 0 .. 10, got 0 .. 11"),
        ({"prompt_ids": torch.tensor([[-1]])}, "got -1 .. -1"),
        ({"num_tokens": -1}, "num_tokens must be at least 0, got -1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_generation_refuses_at_the_call(options: dict[str, Any], message: str) -> None:
    arguments = {"prompt_ids": torch.zeros(1, 2, dtype=torch.int64), "num_tokens": 3, **options}
    with pytest.raises(ValueError, match=message):
        generate(build(), **arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"model": torch.nn.Linear(2, 2)},
        {"prompt_ids": [[1]]},
        {"prompt_ids": torch.ones(1, 2)},
        {"num_tokens": 2.5},
        {"num_tokens": True},
        {"temperature": "a"},
        {"temperature": None},
        {"top_k": 1.5},
        {"top_k": None},
        {"top_p": "a"},
        {"generator": 3},
    ],
    ids=str,
)
def test_generation_names_what_has_another_type(options: dict[str, Any]) -> None:
    arguments = {
        "model": build(),
        "prompt_ids": torch.zeros(1, 2, dtype=torch.int64),
        "num_tokens": 3,
        **options,
    }
    with pytest.raises(TypeError, match=f"generate: {next(iter(options))} must be .*, got"):
        generate(**arguments)


def test_generation_reports_a_diverged_model() -> None:
    model = build()
    torch.nn.init.constant_(model.embedding.weight, float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        next(generate(model, make_tokens(2), 1))
