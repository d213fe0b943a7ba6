"""Transforms of torch.func and forward mode, nested in any order: operators, layers, cells and mixers.

A word names a nesting from the outside in: F is forward mode, R reverse mode, V vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from laws import GATES, TOLERANCE, gated_scan, inputs, mode, relative_error
from selective_laws import draw
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import silu, softplus

from minrnn.mixers import (
    MIXERS,
    MinGRU,
    MinGRUCell,
    MinLSTM,
    MinLSTMCell,
    PairedMinLSTM,
    PairedMinLSTMCell,
)
from minrnn.mixers.convolution import CausalConv
from minrnn.ops import CANDIDATES, scan, selective_scan

Scalar = Callable[[Tensor], Tensor]

TRANSFORMS: dict[str, Callable[[Scalar], Scalar]] = {
    "F": lambda f: lambda s: jvp(f, (s,), (torch.ones_like(s),))[1],
    "R": lambda f: lambda s: vjp(f, s)[1](torch.ones_like(s))[0],
    "V": lambda f: lambda s: vmap(f)(torch.stack([s, s / 2]))[0],
}
WORDS = ["".join(word) for length in (1, 2, 3) for word in product("FR", repeat=length)]
WITH_VMAP = ["VF", "FV", "VFF", "FVF", "FFV", "VR", "RV", "RVF", "FVR", "VFR"]
POINT = torch.tensor(0.7, dtype=torch.float64)


def transformed(word: str, f: Scalar) -> Scalar:
    for letter in reversed(word):
        f = TRANSFORMS[letter](f)
    return f


def wave(s: Tensor, *shape: int, phase: float = 0.0) -> Tensor:
    """Numbers of a shape that each depend on s."""
    at = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return torch.sin(s * (at / 3 + phase))


def loop(a: Tensor, b: Tensor, h: Tensor, reset: Tensor | None, reverse: bool) -> Tensor:
    states: list[Tensor] = []
    for t in sorted(range(a.shape[1]), reverse=reverse):
        h = a[:, t] * (h if reset is None else h.masked_fill(reset[:, t, None], 0)) + b[:, t]
        states.append(h)
    return torch.stack(states[::-1] if reverse else states, 1)


RESET = torch.tensor([[False, False, True, False]])


def gated(gate: str, candidate: str, reverse: bool, *, ours: bool) -> Scalar:
    def f(s: Tensor) -> Tensor:
        pre = [wave(s, 1, 4, 2, phase=j) for j in range(GATES[gate].num_pre)]
        h0 = wave(s, 1, 2, phase=9)
        if ours:
            h = gated_scan(gate, *pre, h0=h0, reset=RESET, reverse=reverse, candidate=candidate)
        else:
            h = loop(*GATES[gate].equations(CANDIDATES[candidate], *pre), h0, RESET, reverse)
        return h.pow(2).sum()

    return f


def selective(*, ours: bool) -> Scalar:
    def f(s: Tensor) -> Tensor:
        u, delta_pre, z = (wave(s, 1, 4, 2, phase=j) for j in range(3))
        B, C = wave(s, 1, 4, 2, phase=3), wave(s, 1, 4, 2, phase=4)
        A, D, h = -wave(s, 2, 2, phase=5).exp(), wave(s, 2, phase=6), wave(s, 1, 2, 2, phase=7)
        if ours:
            y, h = selective_scan(u, delta_pre, A, B, C, D, z=z, h0=h, reset=RESET)
            return y.pow(2).sum() + h.pow(3).sum()
        rows = []
        for t in range(4):
            delta = softplus(delta_pre[:, t]).unsqueeze(-1)
            h = h.masked_fill(RESET[:, t, None, None], 0)
            h = (delta * A).exp() * h + delta * B[:, t].unsqueeze(1) * u[:, t].unsqueeze(-1)
            rows.append((torch.einsum("bdn,bn->bd", h, C[:, t]) + D * u[:, t]) * silu(z[:, t]))
        return torch.stack(rows, 1).pow(2).sum() + h.pow(3).sum()

    return f


@pytest.mark.parametrize(
    ("gate", "word"),
    [
        *product(["identity", "minlstm_signed"], [*WORDS, *WITH_VMAP]),
        *product(
            [gate for gate in GATES if gate not in ("identity", "minlstm_signed")], ["FF", "RFF", "FRF"]
        ),
    ],
)
def test_nested_transforms_of_the_gated_scan(gate: str, word: str) -> None:
    candidate = "tanh" if GATES[gate].has_candidate else "positive"
    expected = transformed(word, gated(gate, candidate, True, ours=False))(POINT)
    actual = transformed(word, gated(gate, candidate, True, ours=True))(POINT)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("word", [*WORDS, *WITH_VMAP])
def test_nested_transforms_of_the_selective_scan(word: str) -> None:
    expected = transformed(word, selective(ours=False))(POINT)
    torch.testing.assert_close(transformed(word, selective(ours=True))(POINT), expected, rtol=1e-9, atol=1e-9)


def test_second_derivatives_by_every_pair_of_jacobians() -> None:
    """By the words of the torch issue: 1 where 2 is right."""

    def f(x: Tensor) -> Tensor:
        return scan(x.reshape(1, 1, 2), x.reshape(1, 1, 2), x.reshape(1, 2)).sum()  # x^2 + x

    x = torch.tensor([0.5, -1.5], dtype=torch.float64)
    expected = 2 * torch.eye(2, dtype=torch.float64)
    for nested in (jacfwd(jacfwd(f)), jacfwd(jacrev(f)), jacrev(jacfwd(f)), jacrev(jacrev(f)), hessian(f)):
        torch.testing.assert_close(nested(x), expected)
    with torch.no_grad():  # which turns forward mode off at no level
        torch.testing.assert_close(jacfwd(jacfwd(f))(x), expected)


@pytest.mark.parametrize("word", ["F", "FR"])
@pytest.mark.parametrize("inside", [False, True], ids=["of a compiled function", "compiled"])
def test_transforms_and_compilation(word: str, inside: bool) -> None:
    torch._dynamo.reset()
    f, expected = (
        gated("mingru", "tanh", False, ours=True),
        transformed(word, gated("mingru", "tanh", False, ours=False)),
    )
    if inside:
        nested = torch.compile(transformed(word, f), backend="aot_eager")
    else:
        nested = transformed(word, torch.compile(f, backend="aot_eager"))
    torch.testing.assert_close(nested(POINT), expected(POINT), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("word", WORDS)
def test_the_operator_itself_is_transformed_alike(word: str) -> None:
    """Exported programs and traced modules hold it, and meet transforms too."""

    def f(s: Tensor) -> Tensor:
        pre = [wave(s, 1, 4, 2), wave(s, 1, 4, 2, phase=1)]
        operator = torch.ops.minrnn.gated_scan.default
        return operator(pre, wave(s, 1, 2, phase=9), RESET, *mode("mingru", "tanh")).pow(2).sum()

    expected = transformed(word, gated("mingru", "tanh", False, ours=False))(POINT)
    torch.testing.assert_close(transformed(word, f)(POINT), expected, rtol=1e-10, atol=1e-10)


def test_a_tangent_of_an_outer_level_passes_the_engines_backward() -> None:
    """Gradients without create_graph, of what has a tangent at a level that is not the innermost."""
    a, b = torch.rand(1, 3, 2).sigmoid(), torch.rand(1, 3, 2)
    pullback = vjp(lambda b: scan(a, b), b)[1]

    def outer(c: Tensor) -> Tensor:
        with torch.no_grad():
            inner = jvp(lambda d: pullback(c * torch.ones(1, 3, 2))[0].sum() * d, (c,), (torch.ones(()),))
        return inner[1]

    value, tangent = jvp(outer, (torch.tensor(3.0),), (torch.tensor(1.0),))
    torch.testing.assert_close(tangent, value / 3)


MODULES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    # torch's fused attention has no forward mode, and its glu, S4D's last step, only one level; both raise.
    **{
        name: (lambda name=name: MIXERS[name](4, 4), (1, 3, 4))
        for name in MIXERS
        if name not in ("attention", "s4d")
    },
    "convolution": (lambda: CausalConv(4, 3), (1, 5, 4)),
    **{
        f"{kind.__name__}, recompute={recompute}": (
            lambda kind=kind, recompute=recompute: kind(4, 4, 2, bidirectional=True, recompute=recompute),
            (3, 1, 4),
        )
        for kind in (MinGRU, MinLSTM, PairedMinLSTM)
        for recompute in (False, True)
    },
    **{
        kind.__name__: (lambda kind=kind: kind(4, 4), (1, 4))
        for kind in (MinGRUCell, MinLSTMCell, PairedMinLSTMCell)
    },
}


@pytest.mark.parametrize("name", MODULES)
def test_nested_transforms_of_modules(name: str) -> None:
    """Against finite differences of plain gradients."""
    torch.manual_seed(0)
    module, shape = MODULES[name][0]().double(), MODULES[name][1]

    def f(s: Tensor) -> Tensor:
        output = module(wave(s, *shape))
        return (output[0] if isinstance(output, tuple) else output).pow(2).sum()

    def gradient(s: Tensor, order: int) -> Tensor:
        s = s.detach().requires_grad_()
        found = f(s)
        for remaining in reversed(range(order)):
            (found,) = torch.autograd.grad(found, s, create_graph=remaining > 0)
        return found.detach()

    eps = 1e-5
    for word in WORDS:
        order = len(word) - 1
        expected = (gradient(POINT + eps, order) - gradient(POINT - eps, order)) / (2 * eps)
        actual = transformed(word, f)(POINT).detach()
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=1e-5, msg=lambda m, word=word: f"{word}: {m}"
        )


@pytest.mark.parametrize("name", ["attention", "s4d"])
def test_what_torch_cannot_nest_raises(name: str) -> None:
    mixer = MIXERS[name](4, 8).double()
    with pytest.raises(NotImplementedError, match="forward AD"):
        transformed("FF", lambda s: mixer(wave(s, 1, 3, 4))[0].sum())(POINT)


def test_gradients_and_tangents_at_one_level() -> None:
    """What backward computes with has tangents, as torch's own operators have it."""
    pre = [torch.rand(1, 4, 2, dtype=torch.float64) for _ in range(2)]
    results = []
    for f in (lambda a, b: scan(a, b), lambda a, b: loop(a, b, torch.zeros(1, 2), None, False)):
        with forward_ad.dual_level():
            leaves = [forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x)) for x in pre]
            gradients = torch.autograd.grad(f(*leaves).pow(2).sum(), leaves, create_graph=True)
            results.append([forward_ad.unpack_dual(x).tangent for x in gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", MIXERS)
def test_many_gradients_at_once_of_a_mixer(name: str) -> None:
    """torch.autograd's own vmap, which is older, over every mixer's backward."""
    torch.manual_seed(0)
    mixer, x = MIXERS[name](4, 8).double(), wave(POINT, 2, 5, 4).requires_grad_()
    y, _ = mixer(x)
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    leaves = [x, *mixer.parameters()]
    batched = torch.autograd.grad(y, leaves, directions, is_grads_batched=True, retain_graph=True)
    for n, direction in enumerate(directions):
        expected = torch.autograd.grad(y, leaves, direction, retain_graph=True)
        for ours, theirs in zip(batched, expected, strict=True):
            torch.testing.assert_close(ours[n], theirs, rtol=1e-9, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------
# The operators' own rules, whichever tensor, dimension and dtype


def selective_scan_of(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    u, delta_pre, A, B, C, D, z, delta_bias, h0, reset = tensors
    return selective_scan(u, delta_pre, A, B, C, D, z=z, delta_bias=delta_bias, h0=h0, reset=reset)


def gated_scan_of(*tensors: Tensor) -> tuple[Tensor]:
    f, i, c, h0, reset = tensors
    return (gated_scan("minlstm", f, i, c, h0=h0, reset=reset),)


def tensors_of(operator: Callable[..., Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    if operator is selective_scan_of:
        return list(draw(2, 5, 3, 4, dtype))
    pre, h0, reset, _ = inputs("minlstm", 2, 5, 3, dtype)
    return [*pre, h0, reset]


operators = pytest.mark.parametrize("operator", [gated_scan_of, selective_scan_of])


@operators
@pytest.mark.parametrize("size", [2, 0])
def test_any_dimension_of_any_tensor_may_be_mapped(operator: Callable[..., Any], size: int) -> None:
    tensors = tensors_of(operator)
    for index, x in enumerate(tensors):
        two = [x, x.logical_not() if x.dtype == torch.bool else x / 3]
        expected = [operator(*tensors[:index], y, *tensors[index + 1 :]) for y in two]
        for dim in range(x.dim() + 1):
            many = torch.stack(two, dim).narrow(dim, 0, size)
            in_dims = [dim if j == index else None for j in range(len(tensors))]
            mapped = vmap(operator, tuple(in_dims))(*tensors[:index], many, *tensors[index + 1 :])
            for j, y in enumerate(mapped):
                assert y.shape == (size, *expected[0][j].shape)
                for n in range(size):
                    torch.testing.assert_close(y[n], expected[n][j], rtol=1e-12, atol=1e-12)


@operators
@pytest.mark.parametrize("size", [2, 0])
def test_any_dimension_of_gradients_may_be_mapped(operator: Callable[..., Any], size: int) -> None:
    *tensors, reset = tensors_of(operator)
    leaves = [x.requires_grad_() for x in tensors]
    y = operator(*leaves, reset)[0]
    two = [torch.ones_like(y), y.detach().cos()]
    expected = [torch.autograd.grad(y, leaves, one, retain_graph=True) for one in two]
    for dim in range(y.dim() + 1):
        many = torch.stack(two, dim).narrow(dim, 0, size)
        mapped = vmap(lambda v: torch.autograd.grad(y, leaves, v, retain_graph=True), dim)(many)
        for j, d in enumerate(mapped):
            assert d.shape == (size, *leaves[j].shape)
            for n in range(size):
                torch.testing.assert_close(d[n], expected[n][j], rtol=1e-12, atol=1e-12)


@operators
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tangents_have_their_outputs_dtypes(operator: Callable[..., Any], dtype: torch.dtype) -> None:
    *tensors, reset = tensors_of(operator, dtype)
    f = lambda *given: operator(*given, reset)  # noqa: E731
    exact = tuple(x.double() for x in tensors)
    _, expected = jvp(f, exact, tuple(x.cos() for x in exact))
    outputs, tangents = jvp(f, tuple(tensors), tuple(x.cos() for x in tensors))
    for y, dy, wanted in zip(outputs, tangents, expected, strict=True):
        assert dy.dtype == y.dtype
        assert relative_error(dy, wanted) < 4 * TOLERANCE[dtype]
