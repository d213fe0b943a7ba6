"""The Mamba mixer: how it starts, what it refuses, and that it is the block that others have."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from minrnn import ModelConfig, SequenceModel, load_checkpoint, save_checkpoint
from minrnn.mixers.mamba import MambaMixer
from minrnn.ops import selective_scan


def test_starts_as_the_source_does() -> None:
    torch.manual_seed(0)
    mixer = MambaMixer(40, 64)
    assert mixer.dt_rank == math.ceil(40 / 16)
    delta = functional.softplus(mixer.dt_bias)
    assert (delta > 0.999e-3).all()
    assert (delta < 1.001e-1).all()
    many = functional.softplus(MambaMixer(16, 4000, d_state=1).dt_bias)
    assert (many.min() < 1.02e-3, many.max() > 0.98e-1) == (True, True)
    assert abs(many.log().mean().item() - math.log(1e-2)) < 0.1  # even in the logarithm
    rates = torch.arange(1.0, 17.0).expand(64, 16)
    torch.testing.assert_close(mixer.A_log.exp(), rates)
    assert torch.equal(mixer.D, torch.ones(64))
    for weight, bound in (
        (mixer.conv.weight, 4**-0.5),
        (mixer.conv.bias, 4**-0.5),
        (mixer.dt_proj.weight, 3**-0.5),
    ):
        assert -bound <= weight.min() < -0.8 * bound
        assert 0.8 * bound < weight.max() <= bound
    assert mixer.in_proj.bias is None
    assert mixer.x_proj.bias is None


def test_state_is_a_window_and_float32_at_least() -> None:
    mixer = MambaMixer(6, 8, d_state=5, d_conv=3)
    _, (window, h) = mixer(torch.randn(2, 7, 6))
    assert (window.shape, h.shape) == ((2, 2, 8), (2, 8, 5))
    y, (window, h) = mixer.bfloat16()(torch.randn(2, 7, 6, dtype=torch.bfloat16))
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)


def test_the_bias_of_the_step_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast it reaches the scan in float32, though all else is in bfloat16."""
    mixer, given = MambaMixer(6, 8), {}

    def spy(u: torch.Tensor, delta_pre: torch.Tensor, *others: torch.Tensor, **named: torch.Tensor) -> Any:
        given.update(named, u=u, delta_pre=delta_pre)
        return selective_scan(u, delta_pre, *others, **named)

    monkeypatch.setattr("minrnn.mixers.mamba.selective_scan", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(torch.randn(2, 7, 6))
    assert {given[name].dtype for name in ("u", "delta_pre", "z")} == {torch.bfloat16}
    assert given["delta_bias"].dtype == torch.float32
    (gradient,) = torch.autograd.grad(y.float().square().sum(), mixer.dt_bias)
    assert gradient.any()


def test_the_rates_of_a_model_of_16_bits_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, given = MambaMixer(6, 8).bfloat16(), []

    def spy(u: torch.Tensor, delta_pre: torch.Tensor, A: torch.Tensor, *others: Any, **named: Any) -> Any:
        given.append(A)
        return selective_scan(u, delta_pre, A, *others, **named)

    monkeypatch.setattr("minrnn.mixers.mamba.selective_scan", spy)
    mixer(torch.randn(2, 7, 6, dtype=torch.bfloat16))
    assert torch.equal(given[0], -mixer.A_log.float().exp())
    assert given[0].dtype == torch.float32


def test_weights_of_earlier_versions(tmp_path: Path) -> None:
    """There the bias belonged to the projection; layers and checkpoints with it are read."""
    mixer, other = MambaMixer(6, 8), MambaMixer(6, 8)
    state = mixer.state_dict()
    state["dt_proj.bias"] = state.pop("dt_bias")
    other.load_state_dict(state)
    assert torch.equal(other.dt_bias, mixer.dt_bias)
    model = SequenceModel(ModelConfig(vocab_size=5, d_model=8, mixer="mamba", num_layers=1))
    save_checkpoint(tmp_path / "checkpoint", model)
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = {name.replace("dt_bias", "dt_proj.bias"): x for name, x in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    config["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    }
    del config["sha256"]  # which format 1 had not
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("option", ["d_state", "d_conv", "dt_rank"])
def test_refuses(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be greater than zero, got 0"):
        MambaMixer(6, 8, **{option: 0})


def test_is_mambapys_block() -> None:
    """Values and gradients, from the same weights; it rounds A to float32, whatever the rest is in."""
    package = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed: the extra peers")
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
