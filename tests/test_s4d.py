"""S4D beyond the laws of every mixer: how it starts, its convolutions, its accuracy and its memory."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minrnn.mixers.s4d
from minrnn.mixers.s4d import FREQUENCIES, S4DMixer, convolve, convolve_sequences

D_MODEL, D_HIDDEN = 6, 8


def build(dtype: torch.dtype = torch.float64, **options: Any) -> S4DMixer:
    torch.manual_seed(0)
    return S4DMixer(D_MODEL, D_HIDDEN, **options).to(dtype)


def step_by_step(mixer: S4DMixer, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for step in x.split(1, dim=1):
        y, state = mixer(step, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


# --- how it starts ------------------------------------------------------------------------------------------


def test_lin_and_inv_are_the_papers_formulas() -> None:
    n = torch.arange(4)
    torch.testing.assert_close(FREQUENCIES["lin"](8), math.pi * n.double())
    inverse = torch.tensor([8 / math.pi * (8 / (2 * j + 1) - 1) for j in range(4)], dtype=torch.float64)
    torch.testing.assert_close(FREQUENCIES["inv"](8), inverse)


def test_legs_are_the_eigenvalues_of_hippo() -> None:
    """A + P P^T of HiPPO-LegS, whose eigenvalues are -1/2 + i w in conjugate pairs."""
    N = 16
    A = torch.zeros(N, N, dtype=torch.float64)
    for n in range(N):
        for k in range(n + 1):
            A[n, k] = -(n + 1) if n == k else -math.sqrt((2 * n + 1) * (2 * k + 1))
    P = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    eigenvalues = torch.linalg.eigvals(A + torch.outer(P, P))
    torch.testing.assert_close(eigenvalues.real, torch.full((N,), -0.5, dtype=torch.float64))
    positive = eigenvalues.imag[eigenvalues.imag > 0].sort().values
    torch.testing.assert_close(FREQUENCIES["legs"](N), positive)


@pytest.mark.parametrize("initialization", FREQUENCIES)
def test_every_channel_starts_alike_but_for_its_step(initialization: str) -> None:
    torch.manual_seed(0)
    mixer = S4DMixer(4000, 2, d_state=4, initialization=initialization)
    torch.testing.assert_close(mixer.log_decay.exp(), torch.full((4000, 2), 0.5))
    assert (mixer.frequency == FREQUENCIES[initialization](4).float()).all()
    parts = torch.cat([mixer.C.flatten(), mixer.D]).detach()  # C is complex: half of its variance each
    assert abs(mixer.C.square().sum(-1).mean().item() - 1) < 0.05
    assert abs(mixer.D.square().mean().item() - 1) < 0.1
    assert abs(parts.mean().item()) < 0.05
    low, high = math.log(1e-3), math.log(1e-1)
    assert low <= mixer.log_dt.min() < mixer.log_dt.max() <= high
    assert abs(float(mixer.log_dt.detach().mean()) - (low + high) / 2) < 0.1  # even in the logarithm
    assert S4DMixer(50, 2, dt_min=0.3, dt_max=0.3).log_dt.unique().numel() == 1


@pytest.mark.parametrize("initialization", FREQUENCIES)
def test_inputs_are_held_for_a_step(initialization: str) -> None:
    """exp(dt A) and (exp(dt A) - 1) / A, by torch's complex numbers."""
    mixer = build(initialization=initialization)
    rate, B_bar, C = (torch.view_as_complex(x.detach()) for x in mixer._discretize())
    A = torch.complex(-mixer.log_decay.exp(), mixer.frequency).detach()
    dt_A = mixer.log_dt.detach().exp().unsqueeze(1) * A
    torch.testing.assert_close(rate, dt_A)
    torch.testing.assert_close(B_bar, (dt_A.exp() - 1) / A, rtol=1e-9, atol=0)  # of which some cancels
    x = torch.randn(1, 1, D_MODEL, dtype=torch.float64)
    u, _ = mixer._step(x, None, None)
    torch.testing.assert_close(u.detach(), 2 * (C * B_bar).real.sum(-1) * x)


def test_misuse_is_reported() -> None:
    for d_state, what in ((0, "greater than zero"), (7, "even"), (-2, "greater than zero")):
        with pytest.raises(ValueError, match=f"d_state must be {what}, got {d_state}"):
            S4DMixer(D_MODEL, D_HIDDEN, d_state=d_state)
    with pytest.raises(ValueError, match="initialization must be one of lin, inv, legs, got 'real'"):
        S4DMixer(D_MODEL, D_HIDDEN, initialization="real")
    for low, high in ((0.0, 0.1), (0.2, 0.1)):
        with pytest.raises(ValueError, match="0 < dt_min <= dt_max"):
            S4DMixer(D_MODEL, D_HIDDEN, dt_min=low, dt_max=high)
    with pytest.raises(ValueError, match="dt_max must be finite, got inf"):
        S4DMixer(D_MODEL, D_HIDDEN, dt_max=math.inf)


# --- convolution and recurrence -----------------------------------------------------------------------------


@pytest.mark.parametrize("d_state", [2, 16, 64])
def test_convolution_is_the_recurrence_in_every_layout_of_chunks(d_state: int) -> None:
    """Lengths below, at and above the chunk, which is at least d_state; chunks that do not come out even."""
    mixer = build(d_state=d_state)
    for length in (2, 15, 16, 17, 64, 65, 150):
        x = torch.randn(2, length, D_MODEL, dtype=torch.float64)
        _, before = mixer(torch.randn(2, 3, D_MODEL, dtype=torch.float64))
        for state in (None, before):
            y, last = mixer(x, state)
            stepped, stepped_last = step_by_step(mixer, x, state)
            torch.testing.assert_close(y, stepped, rtol=0, atol=1e-11)
            torch.testing.assert_close(last, stepped_last, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [2**8, 2**11, 2**14])
def test_error_in_float32_does_not_grow_with_length(length: int) -> None:
    """In the longest of these, phases turn by tens of thousands of radians."""
    single = build(torch.float32)
    double = copy.deepcopy(single).double()
    x, half = torch.randn(1, length, D_MODEL), length // 2
    y, state = single(x[:, :half])
    y_later, state = single(x[:, half:], state)
    truth, last = double(x.double())
    ours = torch.cat([y, y_later], dim=1)
    assert (ours - truth).abs().max() < 2e-6 * truth.abs().max()
    assert (state[0] - last[0]).abs().max() < 2e-6 * last[0].abs().max()


def test_steps_in_float32_stay_with_the_convolution() -> None:
    single = build(torch.float32, dt_min=1e-4, dt_max=1e-3)  # remembers tens of thousands of steps
    x = torch.randn(1, 1000, D_MODEL)
    stepped, state = step_by_step(single, x)
    truth, last = copy.deepcopy(single).double()(x.double())
    assert (stepped - truth).abs().max() < 2e-6 * truth.abs().max()
    assert (state[0] - last[0]).abs().max() < 2e-6 * last[0].abs().max()


def naive(x: Tensor, kernel: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for t in range(x.shape[-1]):
        y[..., t] = sum(kernel[:, None, t - s] * x[..., s] for s in range(t + 1))
    return y


@settings(max_examples=30)
@given(length=st.integers(1, 40), seed=st.integers(0, 99))
def test_convolve(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 2, length, generator=generator, dtype=torch.float64)
    kernel = torch.randn(3, length, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(convolve(x, kernel), naive(x, kernel), rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(length=st.integers(1, 40), share=st.sampled_from([0.0, 0.05, 0.3, 1.0]), seed=st.integers(0, 99))
def test_convolve_sequences(length: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    kernel = torch.randn(2, length, generator=generator, dtype=torch.float64)
    reset = torch.rand(3, length, generator=generator) < share
    y = convolve_sequences(x, kernel, reset)
    for row in range(3):
        edges = sorted({0, *reset[row].nonzero().flatten().tolist(), length})
        for start, stop in pairwise(edges):
            piece = x[:, row : row + 1, start:stop]
            expected = naive(piece, kernel[:, : stop - start])[:, 0]
            torch.testing.assert_close(y[:, row, start:stop], expected, rtol=0, atol=1e-12)


def test_many_sequences_take_few_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def record(x: Tensor, kernel: Tensor) -> Tensor:
        sizes.append(x.shape[1] * x.shape[2])
        return convolve(x, kernel)

    monkeypatch.setattr(minrnn.mixers.s4d, "convolve", record)
    B, T = 4, 512
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.1
    build()(torch.randn(B, T, D_MODEL, dtype=torch.float64), reset=reset)
    assert len(sizes) <= 1 + math.log2(T)
    assert sum(sizes) < 2 * B * T


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    mixer, x = build(), torch.randn(2, 20, D_MODEL, dtype=torch.float64)
    _, state = mixer(x)
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[0, 8], reset[1, 0] = True, True
    fresh, _ = mixer(x[:1, 8:])
    other, _ = mixer(x[1:])
    x[0, 3] = math.nan
    y, last = mixer(x, (torch.full_like(state[0], math.inf),), reset=reset)
    torch.testing.assert_close(y[:1, 8:], fresh, rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1:], other, rtol=0, atol=1e-12)
    assert last[0].isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the largest number of bytes that any tensor made under it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def test_no_state_for_each_step_is_made() -> None:
    """Of d_state = 64 times the input, no more than a sixteenth: a spectrum may be four times the input."""
    B, T = 8, 2048
    mixer, x = build(torch.float32), torch.randn(B, T, D_MODEL)
    _, state = mixer(x)
    reset = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.003
    with Largest() as largest:
        y, _ = mixer(x, state, reset=reset)
        y.sum().backward()
    assert largest.nbytes <= 4 * x.nbytes


def test_the_state_is_float32_in_a_model_of_16_bits() -> None:
    mixer = build(torch.bfloat16)
    x = torch.randn(2, 5, D_MODEL, dtype=torch.bfloat16)
    y, state = mixer(x)
    y_step, state = mixer(x[:, :1], state)
    assert y.dtype == y_step.dtype == torch.bfloat16
    assert state[0].dtype == torch.float32
    assert state[0].shape == (2, D_MODEL, 32, 2)
