"""Operators, layers and cells take part in all that torch does with its own: modes, transforms, exporters.

What tests/test_scan.py has of this for the operator, and tests/test_chunked.py for layers, is not repeated.
"""

from __future__ import annotations

import copy
from typing import Any

import laws
import pytest
import torch
from gated import CELLS, LAYERS
from laws import GATES, gated_scan
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from minrnn.mixers import MinGRU
from minrnn.ops.transforms import in_autocast, is_plain, without_autocast

B, T, C, D = 2, 5, 3, 4

every_gate = pytest.mark.parametrize("gate", GATES)
every_layer = pytest.mark.parametrize("name", LAYERS)
recomputed = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](C, D, 2, bidirectional=True, dtype=dtype, **options)


def pre_of(gate: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Pre-activations, of which the identity's decays are below 1."""
    pre = [draw(B, T, D, seed=j, dtype=dtype) for j in range(GATES[gate].num_pre)]
    return [pre[0].sigmoid(), *pre[1:]] if gate == "identity" else pre


# ----------------------------------------------------------------------------------------------------------
# Derivatives


@every_gate
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_vectorised_jacobians_of_the_operator(gate: str, strategy: str) -> None:
    """torch.autograd's own vmap, which is not torch.func's."""
    pre, h0 = pre_of(gate), draw(B, D, seed=9)

    def f(*leaves: Tensor) -> Tensor:
        return gated_scan(gate, *leaves[1:], h0=leaves[0])

    one_by_one = torch.autograd.functional.jacobian(f, (h0, *pre))
    at_once = torch.autograd.functional.jacobian(f, (h0, *pre), vectorize=True, strategy=strategy)
    for x, y in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@recomputed
@every_layer
def test_many_gradients_at_once(name: str, recompute: bool) -> None:
    layer, x = build(name, recompute=recompute), draw(T, B, C).requires_grad_()
    output, _ = layer(x)
    directions = draw(3, *output.shape, seed=1)
    leaves = [x, *layer.parameters()]
    batched = torch.autograd.grad(output, leaves, directions, is_grads_batched=True, retain_graph=True)
    assert not any(x_batched.requires_grad for x_batched in batched)
    for n, direction in enumerate(directions):
        for x_batched, y in zip(
            batched, torch.autograd.grad(output, leaves, direction, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(x_batched[n], y, rtol=1e-11, atol=1e-12)


@recomputed
@every_layer
def test_second_derivatives_of_a_layer(name: str, recompute: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](2, 2, 2, bidirectional=True, dtype=torch.float64, recompute=recompute)
    x, hx = draw(3, 1, 2).requires_grad_(), draw(4, 1, 2, seed=1).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x, hx), check_fwd_over_rev=True)


@recomputed
@every_layer
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(name: str, grad: bool, recompute: bool) -> None:
    """With and without backward mode, the pushed tangent is the derivative along it."""
    layer, x, direction = build(name, recompute=recompute), draw(T, B, C), draw(T, B, C, seed=1)
    with torch.set_grad_enabled(grad):
        _, (tangent, _) = jvp(layer, (x,), (direction,))
    eps = 1e-6
    with torch.no_grad():
        expected = (layer(x + eps * direction)[0] - layer(x - eps * direction)[0]) / (2 * eps)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-7)


@recomputed
@every_layer
def test_a_tangent_is_pushed_through_a_backward_pass(name: str, recompute: bool) -> None:
    """Gradients are linear in that of the output: of its tangent, they are their own tangents."""
    layer, x = build(name, recompute=recompute), draw(T, B, C).requires_grad_()
    output, _ = layer(x)
    direction = draw(*output.shape, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(output), direction)
        (dx,) = torch.autograd.grad(output, x, dual, retain_graph=True)
        tangent = forward_ad.unpack_dual(dx).tangent
    (expected,) = torch.autograd.grad(output, x, direction)
    torch.testing.assert_close(tangent, expected, rtol=1e-11, atol=1e-12)


@recomputed
@pytest.mark.parametrize("kind", [*LAYERS.values(), *CELLS.values()])
def test_an_ensemble_is_one_call(kind: Any, recompute: bool) -> None:
    """vmap over stacked weights and inputs, and per-sample gradients of one of them."""
    options = {"recompute": recompute} if kind in LAYERS.values() else {}
    torch.manual_seed(0)
    models = [kind(C, D, dtype=torch.float64, **options) for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    x = draw(3, T, B, C) if kind in LAYERS.values() else draw(3, B, C)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(models[0], (parameters, buffers), (x,))

    def loss(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        output = call(parameters, buffers, x)
        return (output[0] if isinstance(output, tuple) else output).square().sum()

    together = vmap(call)(parameters, buffers, x)
    gradients = vmap(torch.func.grad(loss))(parameters, buffers, x)
    for n, model in enumerate(models):
        alone = model(x[n])
        actual, expected = (together, alone) if isinstance(alone, Tensor) else (together[0], alone[0])
        torch.testing.assert_close(actual[n], expected, rtol=1e-12, atol=1e-12)
        each = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        for (key, _), gradient in zip(model.named_parameters(), each, strict=True):
            torch.testing.assert_close(gradients[key][n], gradient, rtol=1e-11, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Number formats


def test_autocast_is_seen_and_left() -> None:
    x = torch.ones(2, 2)
    assert not in_autocast(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_autocast(x)
        assert not in_autocast(x.to("meta"))
        with without_autocast(x):
            assert not in_autocast(x)
            assert (x @ x).dtype == torch.float32
        with without_autocast(x.to("meta")):  # a device that has none
            assert in_autocast(x)
        assert (x @ x).dtype == torch.bfloat16


def test_what_may_be_written_in_place_is_plain() -> None:
    """Only tensors of torch's own types, and only outside of transforms."""

    class Other(torch.Tensor):
        pass

    x = torch.ones(2)
    assert is_plain(x, None, nn.Parameter(x))
    assert not is_plain(x, x.as_subclass(Other))
    seen = []
    vmap(lambda y: seen.append(is_plain(x)) or y)(x)
    jvp(lambda y: seen.append(is_plain(x)) or y, (x,), (x,))
    with forward_ad.dual_level():
        seen.append(is_plain(x))
    assert seen == [False] * 3


@every_gate
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_operator_alone(gate: str, dtype: torch.dtype) -> None:
    """Its gates are computed in float32 whatever comes in, so there is nothing to cast."""
    pre = [x.requires_grad_() for x in pre_of(gate, dtype)]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            h = gated_scan(gate, *pre)
        assert h.dtype == dtype
        results.append([h, *torch.autograd.grad(h.sum(), pre)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_keeps_a_layers_gates_in_float32(name: str) -> None:
    """Its projections are bfloat16, and the state forgets what bfloat16 gates could not."""
    layer = LAYERS[name](C, D)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.bias_ih_l0.zero_()
        index, sign = laws.GATES[name].keeps
        layer.bias_ih_l0.view(-1, D)[index] = 6.9 * sign  # keeps 0.998 to 0.9995
    inputs = torch.zeros(4000, 1, C), torch.full((1, 1, D), 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(*inputs)
    assert output.dtype == torch.bfloat16
    exact, _ = copy.deepcopy(layer).double()(*(x.double() for x in inputs))
    torch.testing.assert_close(output[-1].double(), exact[-1], rtol=0.1, atol=0)  # of a rounded bias


# ----------------------------------------------------------------------------------------------------------
# Memory


@every_gate
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_of_the_operator(gate: str, use_reentrant: bool) -> None:
    pre, h0 = [x.requires_grad_() for x in pre_of(gate)], draw(B, D, seed=9).requires_grad_()

    def f(*leaves: Tensor) -> Tensor:
        return gated_scan(gate, *leaves[1:], h0=leaves[0])

    expected = torch.autograd.grad(f(h0, *pre).square().sum(), [h0, *pre])
    checkpoint(f, h0, *pre, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, gradient in zip((h0, *pre), expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


# ----------------------------------------------------------------------------------------------------------
# Without numbers


@every_gate
def test_fake_tensors_in_the_operator(gate: str) -> None:
    """Shapes, dtypes, strides and devices, forward and backward, are foretold."""
    real = [
        x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in pre_of(gate, torch.float32)
    ]
    h = gated_scan(gate, *real)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        foretold = gated_scan(gate, *fake)
        gradients = torch.autograd.grad(foretold.sum(), fake)
    for x, y in zip((foretold, *gradients), (h, *torch.autograd.grad(h.sum(), real)), strict=True):
        assert (x.shape, x.dtype, x.stride(), x.device) == (y.shape, y.dtype, y.stride(), y.device)


@recomputed
@every_layer
def test_fake_tensors_in_a_layer(name: str, recompute: bool) -> None:
    with FakeTensorMode():
        layer = build(name, torch.float32, recompute=recompute)
        x = torch.empty(T, B, C, requires_grad=True)
        output, h_n = layer(x)
        output.sum().backward()
    assert output.shape == (T, B, 2 * D)
    assert h_n.shape == (4, B, D)
    assert x.grad is not None
    assert x.grad.shape == x.shape


# ----------------------------------------------------------------------------------------------------------
# Graphs


@pytest.mark.parametrize("kind", CELLS.values())
def test_a_cell_is_exported_for_any_batch(kind: Any) -> None:
    cell, batch = kind(C, D), torch.export.Dim("B", min=2, max=4096)
    arguments = (draw(3, C, dtype=torch.float32), draw(3, D, seed=1, dtype=torch.float32))
    program = torch.export.export(cell, arguments, dynamic_shapes=({0: batch}, {0: batch}))
    more = [torch.cat([x, x]) for x in arguments]
    torch.testing.assert_close(program.module()(*more), cell(*more))


@pytest.mark.parametrize("kind", CELLS.values())
def test_a_cell_compiles_forward_and_backward(kind: Any) -> None:
    torch._dynamo.reset()
    cell = kind(C, D)
    fast = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (5, 6, 8):  # of no other size here, or torch takes the two for one
            x, hx = (draw(batch, n, dtype=torch.float32).requires_grad_() for n in (C, D))
            leaves = [x, hx, *cell.parameters()]
            for actual, expected in zip(
                torch.autograd.grad(fast(x, hx).square().sum(), leaves),
                torch.autograd.grad(cell(x, hx).square().sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(actual, expected)


def test_a_model_around_a_layer_compiles() -> None:
    """One graph with what comes before and after it, as torch.compile makes it unless told otherwise."""
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = MinGRU(C, D, batch_first=True), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x.tanh())[0])

    model, x = Model(), draw(B, T, C, dtype=torch.float32)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        torch.autograd.grad(fast(x).square().sum(), list(model.parameters())),
        torch.autograd.grad(model(x).square().sum(), list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)
