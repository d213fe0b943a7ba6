"""Aaren beyond the laws of every mixer: that it is attention, for long and large input too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minrnn.mixers.aaren
from minrnn.mixers.aaren import AarenMixer, _running_max
from minrnn.ops import gated_scan

D_MODEL, D_HIDDEN = 6, 8


def build(dtype: torch.dtype = torch.float64, **options: int) -> AarenMixer:
    torch.manual_seed(0)
    return AarenMixer(D_MODEL, D_HIDDEN, **options).to(dtype)


def attend(mixer: AarenMixer, x: Tensor) -> Tensor:
    """Softmax attention of the learned queries to every prefix, as a square matrix of weights."""
    k = mixer.key(x).unflatten(-1, (mixer.num_heads, -1))
    v = mixer.value(x).unflatten(-1, (mixer.num_heads, -1))
    scores = torch.einsum("hd,bshd->bhs", mixer.query, k) / math.sqrt(k.shape[-1])
    T = x.shape[1]
    scores = scores.unsqueeze(2).expand(-1, -1, T, -1).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)


@settings(max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 4, 8]),
    length=st.integers(1, 70),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 3e4]),
    seed=st.integers(0, 99),
)
def test_it_is_attention_to_every_prefix(heads: int, length: int, scale: float, seed: int) -> None:
    """Also where scores are so large that their exponentials overflow, and rise, and fall."""
    mixer = build(num_heads=heads)
    x = torch.randn(2, length, D_MODEL, generator=torch.Generator().manual_seed(seed)).double() * scale
    y, (_, lse) = mixer(x)
    torch.testing.assert_close(y, attend(mixer, x), rtol=0, atol=1e-10 * max(1.0, scale))
    assert lse.isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_gradients_are_those_of_attention(scale: float) -> None:
    mixer, x = build(), torch.randn(2, 30, D_MODEL, dtype=torch.float64) * scale
    x.requires_grad_()
    reset = torch.zeros(2, 30, dtype=torch.bool)  # takes the path that starts sequences afresh
    expected = torch.autograd.grad(attend(mixer, x).square().sum(), [x, *mixer.parameters()])
    for marks in (None, reset):
        y, _ = mixer(x, reset=marks)
        ours = torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])
        for gradient, truth in zip(ours, expected, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-10 * float(truth.abs().max()))


def test_it_runs_on_the_scan_of_mingru(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = []

    def record(gate: str, *pre: Tensor, **options: object) -> Tensor:
        gates.append((gate, pre[0].shape[-1], pre[0].dtype))
        return gated_scan(gate, *pre, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(minrnn.mixers.aaren, "gated_scan", record)
    build(torch.float32)(torch.randn(2, 5, D_MODEL))
    assert gates == [("identity", 4, torch.float64), ("mingru", D_HIDDEN, torch.float32)]


def test_a_long_stream_in_float32_stays_a_mean() -> None:
    """With equal scores the output is the mean so far, and each step, or its logsumexp, changes little."""
    mixer = build(torch.float32)
    with torch.no_grad():
        mixer.query.zero_()
    T, later = 200_000, 50
    x = torch.randn(1, T + later, D_MODEL)
    y, state = mixer(x[:, :T])
    mean = mixer.value(x).double().cumsum(1) / torch.arange(1, T + later + 1).unsqueeze(-1)
    torch.testing.assert_close(y.double(), mean[:, :T], rtol=0, atol=2e-6)
    for t in range(T, T + later):
        y, state = mixer(x[:, t : t + 1], state)
        torch.testing.assert_close(y[:, 0].double(), mean[:, t], rtol=0, atol=2e-6)
    exact = math.log(T + later)
    assert state[1].dtype == torch.float64
    assert (state[1] - exact).abs().max() < 1e-12 * exact


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    mixer, x = build(), torch.randn(3, 20, D_MODEL, dtype=torch.float64)
    reset = torch.zeros(3, 20, dtype=torch.bool)
    reset[:, 8] = True
    expected, _ = mixer(x[:, 8:])
    x[0, 3], x[1, 3], x[2, 3] = math.nan, 1e300, -1e300
    y, state = mixer(x, reset=reset)
    torch.testing.assert_close(y[:, 8:], expected, rtol=0, atol=1e-12)
    assert all(part.isfinite().all() for part in state)


@settings(max_examples=50)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.booleans()), min_size=5, max_size=5),
        min_size=1,
        max_size=3,
    ),
    carried=st.floats(width=32, allow_nan=False),
)
def test_the_running_maximum_starts_again(rows: list[list[tuple[float, bool]]], carried: float) -> None:
    x = torch.tensor([[carried, *(value for value, _ in row)] for row in rows], dtype=torch.float64)
    starts = torch.tensor([[start for _, start in row] for row in rows])
    found = _running_max(x.unsqueeze(-1), starts.unsqueeze(-1)).squeeze(-1)
    for row, (values, begins) in enumerate(zip(x.tolist(), starts.tolist(), strict=True)):
        highest = values[0]
        assert found[row, 0] == highest
        for t, begin in enumerate(begins):
            highest = values[t + 1] if begin else max(highest, values[t + 1])
            assert found[row, t + 1] == highest


def test_misuse_is_reported() -> None:
    for heads, what in ((3, "divide d_hidden=8"), (0, "be greater than zero"), (-2, "be greater than zero")):
        with pytest.raises(ValueError, match=f"num_heads must {what}, got {heads}"):
            AarenMixer(D_MODEL, D_HIDDEN, num_heads=heads)
