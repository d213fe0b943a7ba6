"""The laws that every mixer obeys, swept over MIXERS and the options that change how a mixer computes."""

import copy
from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import pytest
import torch
from gated import RECURRENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import minrnn.mixers.attention
from minrnn.mixers import MIXERS, Mixer, State, classic

B, T, D_MODEL, D_HIDDEN = 3, 13, 6, 8

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MIXERS},
    **RECURRENCES,
    "mingru-linear": ("mingru", {"candidate": "linear"}),
    "mingru-tanh-no-bias": ("mingru", {"candidate": "tanh", "bias": False}),
    "minlstm-unnormalized-forget-bias": ("minlstm", {"normalize": False, "forget_bias": 3.0}),
    "gru-forget-bias": ("gru", {"forget_bias": 2.0}),
    "lstm-forget-bias": ("lstm", {"forget_bias": 1.0}),
    "minlstm-signed-tanh": ("minlstm", {"signed": True, "candidate": "tanh"}),
    "attention-window-1": ("attention", {"window": 1}),
    "attention-window-4": ("attention", {"window": 4, "num_heads": 2}),
    "attention-window-longer-than-T": ("attention", {"window": 50, "bias": False}),
    "aaren-one-head-no-bias": ("aaren", {"num_heads": 1, "bias": False}),
    "s4d-short-chunks": ("s4d", {"d_state": 4}),
    "mamba-small": ("mamba", {"d_state": 3, "d_conv": 1, "dt_rank": 2}),
}

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def small_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the attention cut these short sequences into several blocks of queries."""
    monkeypatch.setattr(minrnn.mixers.attention, "QUERY_BLOCK", 3)


def build(variant: str, dtype: torch.dtype = torch.float64) -> Mixer:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    return MIXERS[name](D_MODEL, D_HIDDEN, **options).to(dtype)


def make_input(dtype: torch.dtype = torch.float64, length: int = T, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, length, D_MODEL, dtype=dtype, generator=generator)


def make_reset(length: int = T, seed: int = 2) -> Tensor:
    """Mark about one step in four, row by row, so that rows reset at different steps."""
    return torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) < 0.25


def run_in_pieces(
    mixer: Mixer, x: Tensor, lengths: list[int], reset: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    outputs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        y, state = mixer(x[:, piece], state, reset=None if reset is None else reset[:, piece])
        outputs.append(y)
        start += length
    assert state is not None
    return torch.cat(outputs, dim=1), state


def gradients(loss: Tensor, mixer: Mixer, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [*inputs, *mixer.parameters()]))


TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


@every_variant
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("with_reset", [False, True])
def test_repeated_steps_equal_one_pass(variant: str, dtype: torch.dtype, with_reset: bool) -> None:
    mixer, x = build(variant, dtype), make_input(dtype)
    reset = make_reset() if with_reset else None
    y, state = mixer(x, reset=reset)
    stepped, stepped_state = run_in_pieces(mixer, x, [1] * T, reset)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(stepped, y, rtol=0, atol=tolerance)
    for ours, theirs in zip(stepped_state, state, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@every_variant
@settings(max_examples=12)
@given(cuts=st.sets(st.integers(1, T - 1)), reset_seed=st.none() | st.integers(0, 99))
def test_any_split_with_the_state_carried_equals_one_pass(
    variant: str, cuts: set[int], reset_seed: int | None
) -> None:
    mixer, x = build(variant), make_input().requires_grad_()
    reset = None if reset_seed is None else make_reset(seed=reset_seed)
    edges = [0, *sorted(cuts), T]
    lengths = [stop - start for start, stop in pairwise(edges)]
    weights = torch.randn(B, T, D_HIDDEN, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    whole, _ = mixer(x, reset=reset)
    pieces, _ = run_in_pieces(mixer, x, lengths, reset)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-10)
    expected = gradients((whole * weights).sum(), mixer, x)
    for ours, theirs in zip(gradients((pieces * weights).sum(), mixer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@every_variant
def test_gradients_flow_through_the_carried_state(variant: str) -> None:
    mixer, x = build(variant), make_input().requires_grad_()
    _, state = mixer(x[:, :5])
    y, _ = mixer(x[:, 5:7], state)
    (dx,) = torch.autograd.grad(y.sum(), x)
    reached = dx[:, 4].abs().amax() > 0
    assert bool(reached) == (variant != "attention-window-1")


@every_variant
def test_reset_forgets_everything_before_it(variant: str) -> None:
    mixer, x = build(variant), make_input()
    _, old = mixer(make_input(length=7, seed=5))
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 0], reset[1, 4], reset[2, 9] = True, True, True
    y, state = mixer(x, old, reset=reset)
    for row, start in enumerate((0, 4, 9)):
        fresh, fresh_state = mixer(x[row : row + 1, start:])
        torch.testing.assert_close(y[row : row + 1, start:], fresh, rtol=0, atol=1e-10)
        later = make_input(seed=6)[row : row + 1]
        after, _ = mixer(later, tuple(part[row : row + 1] for part in state))
        after_fresh, _ = mixer(later, fresh_state)
        torch.testing.assert_close(after, after_fresh, rtol=0, atol=1e-10)


@every_variant
def test_reset_stops_gradients(variant: str) -> None:
    mixer, x = build(variant), make_input().requires_grad_()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 6] = True
    y, _ = mixer(x, reset=reset)
    (dx,) = torch.autograd.grad(y[:, 6:].sum(), x)
    assert not dx[:, :6].any()
    assert dx[:, 6:].abs().sum() > 0


@every_variant
def test_reset_nowhere_changes_nothing(variant: str) -> None:
    mixer, x = build(variant), make_input()
    _, old = mixer(make_input(length=4, seed=5))
    plain, _ = mixer(x, old)
    marked, _ = mixer(x, old, reset=torch.zeros(B, T, dtype=torch.bool))
    torch.testing.assert_close(marked, plain, rtol=0, atol=1e-10)


@every_variant
def test_no_output_depends_on_later_input(variant: str) -> None:
    mixer, x = build(variant), make_input()
    y, _ = mixer(x)
    changed = x.clone()
    changed[:, 8:] += 1
    y_changed, _ = mixer(changed)
    torch.testing.assert_close(y_changed[:, :8], y[:, :8], rtol=0, atol=1e-12)
    assert not torch.allclose(y_changed[:, 8], y[:, 8])


@every_variant
def test_rows_of_a_batch_do_not_meet(variant: str) -> None:
    mixer, x, reset = build(variant), make_input(), make_reset()
    _, old = mixer(make_input(length=5, seed=5))
    y, state = mixer(x, old, reset=reset)
    for row in range(B):
        one = slice(row, row + 1)
        alone, alone_state = mixer(x[one], tuple(part[one] for part in old), reset=reset[one])
        torch.testing.assert_close(alone, y[one], rtol=0, atol=1e-10)
        for ours, theirs in zip(alone_state, state, strict=True):
            torch.testing.assert_close(ours, theirs[one], rtol=0, atol=1e-10)


@every_variant
def test_state_is_a_tuple_of_tensors_with_the_batch_first(variant: str) -> None:
    mixer = build(variant)
    y, state = mixer(make_input(), reset=make_reset())
    assert y.shape == (B, T, D_HIDDEN)
    assert isinstance(state, tuple)
    assert len(state) == len(mixer.state_names)
    assert all(part.shape[0] == B for part in state)


@every_variant
def test_state_does_not_keep_the_sequence_alive(variant: str) -> None:
    """A server that holds the states of many idle streams must not hold their inputs as well."""
    mixer = build(variant)
    _, state = mixer(make_input(length=200))
    for part in state:
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_windowed_attention_keeps_a_bounded_state() -> None:
    mixer, x = build("attention-window-4"), make_input(length=40)
    _, state = run_in_pieces(mixer, x, [1] * 20 + [20])
    assert [tuple(part.shape) for part in state] == [(B, 3, D_HIDDEN), (B, 3, D_HIDDEN), (B,), (B,)]
    assert state[2].tolist() == [3] * B
    assert state[3].tolist() == [40] * B


@pytest.mark.parametrize(("window", "with_reset"), [(4, False), (4, True), (0, True)])
def test_attention_builds_no_square_mask(
    monkeypatch: pytest.MonkeyPatch, window: int, with_reset: bool
) -> None:
    attend, masks = functional.scaled_dot_product_attention, []

    def record(*args: Tensor, attn_mask: Tensor, **options: Any) -> Tensor:
        masks.append(attn_mask.shape[-2:])
        return attend(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    mixer = MIXERS["attention"](D_MODEL, D_HIDDEN, window=window)
    mixer(make_input(torch.float32, 100), reset=make_reset(100) if with_reset else None)
    block = max(window, 3)
    assert len(masks) == -(-100 // block)
    assert all(queries <= block for queries, _ in masks)
    assert not window or all(keys <= block + window - 1 for _, keys in masks)


def test_plain_causal_attention_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, calls = functional.scaled_dot_product_attention, []

    def record(*args: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return attend(*args, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    for variant in ("attention", "attention-window-longer-than-T"):
        build(variant)(make_input())
    assert calls == [{"is_causal": True}] * 2


def test_attention_sees_exactly_its_window() -> None:
    mixer, x = build("attention-window-4"), make_input().requires_grad_()
    y, _ = mixer(x)
    (dx,) = torch.autograd.grad(y[:, 10].sum(), x)
    reached = dx.abs().sum(dim=(0, 2)) > 0
    assert reached.nonzero().flatten().tolist() == [7, 8, 9, 10]


def test_attention_matches_the_textbook() -> None:
    mixer, x = build("attention-window-4"), make_input()
    q, k, v = (part.unflatten(-1, (2, 4)) for part in mixer.qkv(x).chunk(3, dim=-1))  # (B, T, heads, 4)
    rates = torch.tensor([1.0, 0.01], dtype=torch.float64)  # 10000 ** (-2 j / 4)
    q, k = (
        torch.view_as_real(
            torch.complex(part[..., :2], part[..., 2:])
            * torch.exp(1j * torch.arange(T)[:, None, None] * rates)
        ).mT.flatten(-2)
        for part in (q, k)
    )
    y = torch.zeros(B, T, 2, 4, dtype=torch.float64)
    for t in range(T):
        seen = slice(max(0, t - 3), t + 1)
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) / 4**0.5
        y[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen])
    torch.testing.assert_close(mixer(x)[0], y.flatten(2), rtol=0, atol=1e-12)


@every_variant
def test_bfloat16_autocast_runs_and_carries(variant: str) -> None:
    mixer, x = build(variant, torch.float32), make_input(torch.float32)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run_in_pieces(mixer, x, [6, 7], make_reset() & False)
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.05)


def test_an_lstm_is_exact_under_autocast_where_the_processor_has_none_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classic, "computes_on_onednn", lambda dtype: dtype != torch.bfloat16)
    mixer, x = build("lstm", torch.float32), make_input(torch.float32)
    _, state = mixer(x)
    exact_next, _ = mixer(x, state)
    with torch.autocast("cpu", torch.bfloat16):
        y, last = mixer(x.bfloat16())  # as the layer before it leaves its outputs
        y_next, _ = mixer(x, tuple(part.bfloat16() for part in state))
    torch.testing.assert_close(y, mixer(x.bfloat16().float())[0], rtol=0, atol=0)
    torch.testing.assert_close(y_next, exact_next, rtol=0, atol=0.01)
    assert [part.dtype for part in last] == [torch.float32] * 2


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_outputs_are_of_the_inputs_dtype_and_states_no_wider_than_their_form(
    variant: str, dtype: torch.dtype
) -> None:
    mixer, x = build(variant, dtype), make_input(dtype)
    form = [part_dtype for _, part_dtype in mixer.state_form(dtype)]
    for reset in (None, make_reset()):
        y, state = mixer(x, reset=reset)
        y_next, state_next = mixer(x[:, :1], state)
        assert (y.dtype, y_next.dtype) == (dtype, dtype)
        assert [part.dtype for part in mixer.empty_state(B, x)] == form
        for parts in (state, state_next):  # narrower, perhaps: all of it is taken again
            assert [
                torch.promote_types(part.dtype, wide) for part, wide in zip(parts, form, strict=True)
            ] == form


@every_variant
@pytest.mark.parametrize("length", [1, T])
def test_a_call_with_the_empty_state_is_one_without_a_state(variant: str, length: int) -> None:
    mixer, x = build(variant), make_input(length=length)
    reset = make_reset(length)
    for starts in (None, reset):
        y, state = mixer(x, mixer.empty_state(B, x), reset=starts)
        expected, expected_state = mixer(x, reset=starts)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        if "window" not in variant:  # a window's keys of before the start are only masked
            torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-12)


@every_variant
def test_the_empty_state_has_the_shapes_of_a_long_calls(variant: str) -> None:
    """So that a pool made of it has room for every later state."""
    mixer, x = build(variant), make_input(length=60)  # longer than every window
    _, state = mixer(x)
    form, empty = mixer.state_form(x.dtype), mixer.empty_state(B, x)
    for (shape, _), part, before in zip(form, state, empty, strict=True):
        bounded = None not in shape or mixer.window > 0
        assert before.shape == (part.shape if bounded else (B, 0, D_HIDDEN))
        assert all(size in (None, found) for size, found in zip(shape, part.shape[1:], strict=True))


@pytest.mark.parametrize(("name", "part"), [("aaren", "lse"), ("s4d", "h")])
def test_states_that_need_float32_are_not_rounded_by_autocast(name: str, part: str) -> None:
    """Their recurrence reads the input itself, so that the state has the bits that it has without."""
    mixer, x = build(name, torch.float32), make_input(torch.float32)
    place = mixer.state_names.index(part)
    for piece in (x, x[:, :1]):
        _, expected = mixer(piece)
        with torch.autocast("cpu", torch.bfloat16):
            _, state = mixer(piece)
        assert torch.equal(state[place], expected[place])


@every_variant
def test_gradcheck(variant: str) -> None:
    mixer = build(variant)
    x = make_input(length=5)[:2].requires_grad_()
    reset = make_reset(length=5)[:2]
    assert torch.autograd.gradcheck(lambda x: mixer(x, reset=reset)[0], (x,))


@every_variant
def test_state_dict_round_trip_and_deepcopy(variant: str) -> None:
    mixer, x = build(variant), make_input()
    name, options = VARIANTS[variant]
    other = MIXERS[name](D_MODEL, D_HIDDEN, **options).double()
    other.load_state_dict(mixer.state_dict())
    for twin in (other, copy.deepcopy(mixer)):
        torch.testing.assert_close(twin(x)[0], mixer(x)[0], rtol=0, atol=0)


SET: dict[str, Any] = {
    "candidate": "tanh",
    "forget_bias": 3.0,
    "normalize": False,
    "signed": True,
    "bias": False,
    "num_heads": 2,
    "window": 5,
    "d_state": 6,
    "d_conv": 3,
    "dt_rank": 2,
    "initialization": "inv",
    "dt_min": 0.01,
    "dt_max": 0.01,
}
"""A value of each option that is no mixer's default."""

INITIAL = {"initialization", "dt_min", "dt_max"}
"""Options of initial values alone, which tests/test_s4d.py reads off the parameters."""


@pytest.mark.parametrize("name", MIXERS)
def test_options_reach_what_they_are_options_of(name: str) -> None:
    for option in list(signature(MIXERS[name]).parameters)[2:]:
        if (name, option) in {("minema", "signed"), ("gru", "forget_bias"), ("lstm", "forget_bias")}:
            continue  # refused; and added to what torch draws: test_a_forget_bias_keeps_the_state
        mixer = MIXERS[name](D_MODEL, D_HIDDEN, **{option: SET[option]})
        if option == "bias":
            assert not any("bias" in parameter for parameter, _ in mixer.named_parameters())
        elif option not in INITIAL:
            assert getattr(getattr(mixer, "rnn", mixer), option) == SET[option], option


@pytest.mark.parametrize("name", MIXERS)
def test_unknown_option_raises(name: str) -> None:
    with pytest.raises(TypeError, match="heads_up"):
        MIXERS[name](D_MODEL, D_HIDDEN, heads_up=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", MIXERS)
def test_misuse_is_reported(name: str) -> None:
    mixer, x = build(name), make_input()
    _, state = mixer(x)
    with pytest.raises(ValueError, match="d_hidden must be greater than zero, got 0"):
        MIXERS[name](D_MODEL, 0)
    with pytest.raises(ValueError, match=r"x must be \(B, T, 6\)"):
        mixer(x[..., :5])
    with pytest.raises(ValueError, match="T of at least 1"):
        mixer(x[:, :0])
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(TypeError, match="reset must be bool"):
            mixer(x, reset=torch.zeros(B, T, dtype=dtype))
    with pytest.raises(ValueError, match="reset must be"):
        mixer(x, reset=torch.zeros(T, B, dtype=torch.bool))
    with pytest.raises(TypeError, match="state must be the tuple of tensors"):
        mixer(x, list(state))
    with pytest.raises(ValueError, match="got 5 tensors"):
        mixer(x, (state[0],) * 5)
    with pytest.raises(ValueError, match="must have the batch, 3, as its first axis"):
        mixer(x, tuple(part[:2] for part in state))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_a_forget_bias_keeps_the_state_of_torchs_gated_cells(name: str) -> None:
    """At a large one, GRU's h and LSTM's c stay, but for what LSTM adds, at most 1 a step."""
    x = make_input()
    (plain, moved), kept = (
        [MIXERS[name](D_MODEL, D_HIDDEN, forget_bias=bias).double() for bias in (0.0, 50.0)],
        5 * torch.ones(B, D_HIDDEN, dtype=torch.float64),
    )
    state = (kept,) if name == "gru" else (torch.zeros_like(kept), kept)
    assert (plain(x, state)[1][-1] - kept).abs().min() > 0.5
    if name == "gru":
        torch.testing.assert_close(moved(x, state)[1][0], kept)
    else:
        with torch.no_grad():
            moved.rnn.get_parameter("bias_ih_l0")[:D_HIDDEN] -= 50  # the input gate
        torch.testing.assert_close(moved(x, state)[1][1], kept)
    with pytest.raises(ValueError, match=r"forget_bias=1\.0 needs a bias"):
        MIXERS[name](D_MODEL, D_HIDDEN, bias=False, forget_bias=1)


def test_attention_misuse_is_reported() -> None:
    with pytest.raises(ValueError, match="even widths, got 3"):
        MIXERS["attention"](D_MODEL, D_HIDDEN, num_heads=3)
    with pytest.raises(ValueError, match="even widths, got 8"):
        MIXERS["attention"](D_MODEL, D_HIDDEN, num_heads=8)
    with pytest.raises(ValueError, match="window must be at least 0, got -1"):
        MIXERS["attention"](D_MODEL, D_HIDDEN, window=-1)


# Numbers of the matrices' entries, from the papers, and of all that the mixer learns beside them.
PARAMETERS: dict[str, tuple[Callable[[int, int], int], Callable[[int, int], int]]] = {
    # "Were RNNs All We Needed?", sections 3.1 and 3.2; one bias a pre-activation.
    "mingru": (lambda d_x, d_h: 2 * d_h * d_x, lambda d_x, d_h: 2 * d_h),
    "minlstm": (lambda d_x, d_h: 3 * d_h * d_x, lambda d_x, d_h: 3 * d_h),
    "minema": (lambda d_x, d_h: 3 * d_h * d_x, lambda d_x, d_h: 3 * d_h),
    # torch.nn's cells have two biases a pre-activation, of which one would do.
    "rnn": (lambda d_x, d_h: d_h * (d_x + d_h), lambda d_x, d_h: 2 * d_h),
    "gru": (lambda d_x, d_h: 3 * d_h * (d_x + d_h), lambda d_x, d_h: 2 * 3 * d_h),
    "lstm": (lambda d_x, d_h: 4 * d_h * (d_x + d_h), lambda d_x, d_h: 2 * 4 * d_h),
    "attention": (lambda d_x, d_h: 3 * d_h * d_x, lambda d_x, d_h: 3 * d_h),
    # The queries, and a bias of the values.
    "aaren": (lambda d_x, d_h: 2 * d_h * d_x, lambda d_x, d_h: 2 * d_h),
    # For each channel D and dt, and for each of N / 2 pairs A and C, two numbers each; a bias of the mixing.
    "s4d": (lambda d_x, d_h: 2 * d_h * d_x, lambda d_x, d_h: d_x * (2 + 2 * 64) + 2 * d_h),
    # The way in; to step sizes, B and C; to the steps' channels. Convolution, steps' bias, A and D.
    "mamba": (
        lambda d_x, d_h: 2 * d_h * d_x + d_h * (-(-d_x // 16) + 2 * 16) + -(-d_x // 16) * d_h,
        lambda d_x, d_h: d_h * (4 + 1 + 1 + 16 + 1),
    ),
}


def test_every_mixer_has_its_parameters_counted() -> None:
    assert PARAMETERS.keys() == MIXERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize(("d_x", "d_h"), [(8, 8), (8, 32), (24, 16)])
def test_parameter_counts(name: str, d_x: int, d_h: int) -> None:
    matrices, others = PARAMETERS[name]
    count = sum(parameter.numel() for parameter in MIXERS[name](d_x, d_h).parameters())
    assert count == matrices(d_x, d_h) + others(d_x, d_h)
    if "bias" not in signature(MIXERS[name]).parameters:
        return
    bare = sum(parameter.numel() for parameter in MIXERS[name](d_x, d_h, bias=False).parameters())
    in_no_bias = {"aaren": d_h, "s4d": d_x * (2 + 2 * 64)}.get(name, 0)
    assert bare == matrices(d_x, d_h) + in_no_bias


@pytest.mark.parametrize(("small", "full"), [("mingru", "gru"), ("minlstm", "lstm")])
def test_ratios_of_parameters(small: str, full: str) -> None:
    """Percent of the traditional cell's, at d_h = 1, 2, 3 and 4 times d_x."""
    expected = {"mingru": [33, 22, 17, 13], "minlstm": [38, 25, 19, 15]}[small]
    found = [100 * PARAMETERS[small][0](64, 64 * a) / PARAMETERS[full][0](64, 64 * a) for a in (1, 2, 3, 4)]
    assert [round(percent) for percent in found] == expected
