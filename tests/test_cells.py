"""MinGRUCell and MinLSTMCell: the surface of torch.nn.GRUCell around a step of the layers."""

from typing import Any

import pytest
import torch
from gated import CELLS, LAYERS, RECURRENCES
from torch import Tensor, nn

from minrnn.mixers import MinGRUCell, MinLSTMCell

B, T, I, H = 3, 6, 5, 4  # noqa: E741

PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    **RECURRENCES,
    "mingru, linear": ("mingru", {"candidate": "linear"}),
    "mingru, no bias": ("mingru", {"bias": False}),
    "minlstm, tanh": ("minlstm", {"candidate": "tanh"}),
}

every_pair = pytest.mark.parametrize("name", PAIRS)
every_cell = pytest.mark.parametrize("cell_type", CELLS.values(), ids=CELLS)


def build(name: str) -> tuple[Any, Any]:
    """A cell and a layer of one seed."""
    gate, options = PAIRS[name]
    torch.manual_seed(0)
    cell = CELLS[gate](I, H, dtype=torch.float64, **options)
    torch.manual_seed(0)
    return cell, LAYERS[gate](I, H, dtype=torch.float64, **options)


def make_input(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@every_pair
def test_a_cell_starts_with_the_layers_parameters(name: str) -> None:
    cell, layer = build(name)
    assert [f"{key}_l0" for key in cell.state_dict()] == list(layer.state_dict())
    for key, parameter in cell.named_parameters():
        assert torch.equal(parameter, getattr(layer, f"{key}_l0"))


@every_pair
@pytest.mark.parametrize("with_hx", [False, True])
def test_repeated_steps_are_the_layer(name: str, with_hx: bool) -> None:
    cell, layer = build(name)
    x, h = make_input(T, B, I), make_input(B, H) if with_hx else None
    output, _ = layer(x, None if h is None else h.unsqueeze(0))
    for t in range(T):
        h = cell(x[t], h)
        torch.testing.assert_close(h, output[t], rtol=0, atol=1e-12)


@every_pair
def test_unbatched(name: str) -> None:
    cell, _ = build(name)
    x, h = make_input(B, I), make_input(B, H)
    batched, from_zero = cell(x, h), cell(x)
    for row in range(B):
        torch.testing.assert_close(cell(x[row], h[row]), batched[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(cell(x[row]), from_zero[row], rtol=0, atol=1e-12)


@every_pair
def test_gradients(name: str) -> None:
    cell, _ = build(name)
    x, h = make_input(2, I).requires_grad_(), make_input(2, H).requires_grad_()
    assert torch.autograd.gradcheck(cell, (x, h))
    assert torch.autograd.gradgradcheck(cell, (x, h))


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_surface_is_that_of_torchs_gru_cell(cell_type: Any, bias: bool) -> None:
    ours, theirs = cell_type(I, H, bias), nn.GRUCell(I, H, bias)
    assert repr(ours) == repr(theirs).replace("GRUCell", cell_type.__name__)
    for x, hx in (
        (torch.randn(B, I), torch.randn(B, H)),
        (torch.randn(I), torch.randn(H)),
        (torch.randn(B, I), None),
    ):
        assert ours(x, hx=hx).shape == theirs(x, hx=hx).shape
    assert list(ours.state_dict()) == [key for key in theirs.state_dict() if not key.endswith("_hh")]


def test_representation_shows_what_is_not_default() -> None:
    assert repr(MinGRUCell(2, 3, candidate="tanh", forget_bias=2.0)) == (
        "MinGRUCell(2, 3, candidate=tanh, forget_bias=2.0)"
    )
    assert repr(MinGRUCell(2, 3, signed=True)) == "MinGRUCell(2, 3, signed=True)"
    assert repr(MinLSTMCell(2, 3, normalize=False)) == "MinLSTMCell(2, 3, normalize=False)"


@every_cell
def test_16_bit_state_may_be_kept_in_float32(cell_type: Any) -> None:
    cell = cell_type(I, H, dtype=torch.bfloat16)
    x = torch.randn(B, I, dtype=torch.bfloat16)
    assert cell(x, torch.randn(B, H)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert cell_type(I, H)(x.float()).dtype == torch.bfloat16


@every_cell
def test_compiles_to_one_graph(cell_type: Any) -> None:
    cell = cell_type(I, H)
    x, h = torch.randn(B, I), torch.randn(B, H)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, h), cell(x, h))


@every_cell
def test_errors(cell_type: Any) -> None:
    cell = cell_type(I, H)
    with pytest.raises(ValueError, match=r"input must be \(B, 5\) or \(5,\), got \(3, 6\)"):
        cell(torch.randn(B, I + 1))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\)"):
        cell(torch.randn(2, B, I))
    with pytest.raises(ValueError, match=r"hx must be \(3, 4\), got \(2, 4\)"):
        cell(torch.randn(B, I), torch.randn(2, H))
    with pytest.raises(ValueError, match=r"hx must be \(4,\), got \(1, 4\)"):
        cell(torch.randn(I), torch.randn(1, H))
    with pytest.raises(ValueError, match=r"weights' dtype, torch.float32, got torch.float64"):
        cell(torch.randn(B, I).double())
    with pytest.raises(TypeError, match="there is no cell state"):
        cell(torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H)))
    for options, error in (
        ({"input_size": 0}, ValueError),
        ({"hidden_size": 2.5}, TypeError),
        ({"bias": 1}, TypeError),
        ({"candidate": "relu"}, ValueError),
        ({"signed": 1}, TypeError),
        ({"bias": False, "forget_bias": 1.0}, ValueError),
    ):
        with pytest.raises(error, match=f"{cell_type.__name__}: "):
            cell_type(**{"input_size": I, "hidden_size": H, **options})
    assert not list(cell_type(I, H, bias=False, forget_bias=0.0).named_parameters())[1:]
    with pytest.raises(TypeError, match="normalize must be a bool, got str"):
        MinLSTMCell(I, H, normalize="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MinLSTMCell: signed must be False with normalize=False"):
        MinLSTMCell(I, H, normalize=False, signed=True)
