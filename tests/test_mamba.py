"""The Mamba mixer: how it starts, what it refuses, and that it is the block that others have."""

import math

import pytest
import torch
from torch.nn import functional

from minrnn.mixers.mamba import DT_MAX, DT_MIN, MambaMixer


def test_starts_as_the_source_does() -> None:
    torch.manual_seed(0)
    mixer = MambaMixer(40, 64)
    assert mixer.dt_rank == math.ceil(40 / 16)
    delta = functional.softplus(mixer.dt_bias)
    assert (delta > 0.999 * DT_MIN).all()
    assert (delta < 1.001 * DT_MAX).all()
    assert delta.min() < 3 * DT_MIN
    assert delta.max() > DT_MAX / 3
    rates = torch.arange(1.0, 17.0).expand(64, 16)
    torch.testing.assert_close(mixer.A_log.exp(), rates)
    assert torch.equal(mixer.D, torch.ones(64))
    assert mixer.in_proj.bias is None
    assert mixer.x_proj.bias is None


def test_state_is_a_window_and_float32_at_least() -> None:
    mixer = MambaMixer(6, 8, d_state=5, d_conv=3)
    _, (window, h) = mixer(torch.randn(2, 7, 6))
    assert (window.shape, h.shape) == ((2, 2, 8), (2, 8, 5))
    y, (window, h) = mixer.bfloat16()(torch.randn(2, 7, 6, dtype=torch.bfloat16))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("option", ["d_state", "d_conv", "dt_rank"])
def test_refuses(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be positive, got 0"):
        MambaMixer(6, 8, **{option: 0})


def test_is_mambapys_block() -> None:
    """Values and gradients, from the same weights; it rounds A to float32, whatever the rest is in."""
    package = pytest.importorskip("mambapy.mamba", reason="pip install 'minrnn[peers]'")
    torch.manual_seed(0)
    theirs = package.MambaBlock(package.MambaConfig(d_model=12, n_layers=1, d_state=4)).double()
    ours = MambaMixer(12, 24, d_state=4).double()
    known = {*ours.state_dict(), "dt_proj.bias"}
    state = {name: value for name, value in theirs.state_dict().items() if name in known}
    ours.load_state_dict(
        state
        | {
            "conv.weight": theirs.conv1d.weight.squeeze(1).flip(1).T,  # theirs runs backwards in time
            "conv.bias": theirs.conv1d.bias,
        }
    )
    x = torch.randn(2, 37, 12, dtype=torch.float64, requires_grad=True)
    y, expected = functional.linear(ours(x)[0], theirs.out_proj.weight), theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
    dy = torch.randn_like(y)
    names = {name: name for name, _ in ours.named_parameters() if name in state} | {"dt_bias": "dt_proj.bias"}
    assert set(names) == {"A_log", "D", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "dt_bias"}
    gradients = (
        torch.autograd.grad(out, [x, *map(module.get_parameter, of)], dy)
        for out, module, of in ((y, ours, names), (expected, theirs, names.values()))
    )
    for ours_, theirs_ in zip(*gradients, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-5, atol=1e-7)
