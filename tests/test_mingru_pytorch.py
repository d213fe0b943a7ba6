"""from_mingru_pytorch: what that package's layers compute, ours compute with their weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minrnn
from minrnn.mixers import MinGRU, MinLSTM, from_mingru_pytorch

B, T, DIM = 2, 9, 6

KINDS: dict[str, tuple[type[MinGRU] | type[MinLSTM], str, int]] = {
    "minGRU": (MinGRU, "to_hidden_and_gate.weight", 2),
    "minLSTM": (MinLSTM, "to_hidden_and_f_i_gate.weight", 3),
}
"""Of each of their classes: ours, the name of the weight, and its blocks of rows."""

every_kind = pytest.mark.parametrize("kind", KINDS)
every_expansion = pytest.mark.parametrize("expansion", [1.0, 1.5, 0.5])


def parameters(kind: str, expansion: float, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Draw a state_dict as theirs is: a projection back where the width changes."""
    generator, hidden = torch.Generator().manual_seed(0), int(DIM * expansion)
    _, name, blocks = KINDS[kind]
    state = {name: torch.randn(blocks * hidden, DIM, generator=generator, dtype=dtype)}
    if expansion != 1:
        state["to_out.weight"] = torch.randn(DIM, hidden, generator=generator, dtype=dtype)
    return state


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(kind: str, state: Mapping[str, Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Their step at T = 1, one after another: x (B, T, dim), h (B, hidden) -> outputs and the last state."""
    _, name, blocks = KINDS[kind]
    outputs = []
    for step in x.unbind(1):
        hidden, *gates = (step @ state[name].T).chunk(blocks, dim=-1)
        hidden = torch.where(hidden >= 0, hidden + 0.5, hidden.sigmoid())
        if kind == "minGRU":
            h = torch.lerp(h, hidden, gates[0].sigmoid())
        else:
            f, i = (gate.sigmoid() for gate in gates)
            h = h * f / (f + i) + hidden * i / (f + i)
        outputs.append(h @ state["to_out.weight"].T if "to_out.weight" in state else h)
    return torch.stack(outputs, 1), h


@every_kind
@every_expansion
def test_it_computes_their_equations(kind: str, expansion: float) -> None:
    state, x, h = parameters(kind, expansion), draw(B, T, DIM), draw(B, int(DIM * expansion), seed=2).abs()
    layer, to_out = from_mingru_pytorch(state)
    assert type(layer) is KINDS[kind][0]
    assert isinstance(to_out, nn.Identity if expansion == 1 else nn.Linear)
    output, h_n = layer(x, h.unsqueeze(0))
    expected, last = oracle(kind, state, x, h)
    torch.testing.assert_close(to_out(output), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h_n[0], last, rtol=1e-12, atol=1e-12)


def theirs(kind: str, expansion: float) -> nn.Module:
    reason = "minGRU-pytorch is not installed: the extra peers"
    module: Any = pytest.importorskip(f"minGRU_pytorch.{kind}", reason=reason)
    layer = getattr(module, kind)(DIM, expansion_factor=expansion).double()
    layer.load_state_dict(parameters(kind, expansion))
    return layer


@every_kind
@every_expansion
def test_it_computes_what_their_module_computes(kind: str, expansion: float) -> None:
    module, x = theirs(kind, expansion), draw(B, T, DIM)
    layer, to_out = from_mingru_pytorch(module)
    expected, prev_hidden = module(x, return_next_prev_hidden=True)
    output, h_n = layer(x)
    torch.testing.assert_close(to_out(output), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(h_n, prev_hidden.transpose(0, 1), rtol=1e-9, atol=1e-9)
    expected, after = module(x[:, :1], prev_hidden, return_next_prev_hidden=True)
    output, h_n = layer(x[:, :1], prev_hidden.transpose(0, 1))
    torch.testing.assert_close(to_out(output), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(h_n, after.transpose(0, 1), rtol=1e-9, atol=1e-9)


@every_kind
def test_their_gradients_are_ours(kind: str) -> None:
    module, x = theirs(kind, 1.0), draw(B, T, DIM)
    layer, _ = from_mingru_pytorch(module)
    (expected,) = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    (actual,) = torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters()))
    candidate, *gates = expected.chunk(KINDS[kind][2])
    torch.testing.assert_close(actual, torch.cat([*gates, candidate]), rtol=1e-9, atol=1e-9)


@every_kind
def test_dtype_is_taken_over_and_weights_are_copies(kind: str) -> None:
    state = parameters(kind, 1.5, torch.bfloat16)
    layer, to_out = from_mingru_pytorch(state)
    before = [p.clone() for p in (*layer.parameters(), *to_out.parameters())]
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in before)
    for weight in state.values():
        weight.zero_()
    for p, kept in zip((*layer.parameters(), *to_out.parameters()), before, strict=True):
        assert torch.equal(p, kept)


@every_kind
def test_what_is_no_such_layer_is_named(kind: str) -> None:
    state, (_, name, blocks) = parameters(kind, 1.5), KINDS[kind]
    whole = {f"layers.0.{key}": value for key, value in state.items()}
    wrong: list[Any] = [{}, whole, {**state, "bias": draw(2)}, nn.GRU(2, 2), {"to_out.weight": draw(2, 2)}]
    for source in wrong:
        with pytest.raises(ValueError, match=r"source must have the parameter .*, got"):
            from_mingru_pytorch(source)
    for source in ([state], None, {name: [1.0]}, "weights.pt"):
        with pytest.raises(TypeError, match="source must be a minGRU or minLSTM of minGRU-pytorch"):
            from_mingru_pytorch(source)
    with pytest.raises(ValueError, match=rf"{name} must be \({blocks} \* hidden_size, dim\), got \(7, 2\)"):
        from_mingru_pytorch({name: draw(7, 2)})
    with pytest.raises(ValueError, match=r"to_out.weight must be \(6, 9\), got \(9, 6\)"):
        from_mingru_pytorch({**state, "to_out.weight": draw(9, 6)})


def test_it_is_public() -> None:
    assert minrnn.from_mingru_pytorch is from_mingru_pytorch
