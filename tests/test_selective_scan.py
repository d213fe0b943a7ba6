"""The laws of Mamba's selective scan: oracle, engines, carry, reset, derivatives, memory, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import laws
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import TOLERANCE, relative_error
from selective_laws import NAMES, cast, compare, draw, gradients_like
from torch import Tensor

from minrnn.ops import selective_scan
from minrnn.ops.registry import ENGINES, load
from minrnn.ops.selective import reference
from minrnn.ops.selective.operator import MODULES, SELECTIVE_SCAN
from minrnn.ops.selective.reference import CHUNK, Inputs

LOADED = load("cpp")
compiled = pytest.mark.skipif(
    not isinstance(LOADED, ModuleType), reason=f"no compiled engine to compare: {LOADED}"
)


def engine() -> ModuleType:
    return pytest.importorskip(MODULES["cpp"], reason="no compiled engine")


def leaves(x: Inputs) -> Inputs:
    """The same inputs, to be differentiated."""
    *tensors, reset = x
    return Inputs(*(None if t is None else t.detach().clone().requires_grad_() for t in tensors), reset)


def scan(x: Inputs) -> tuple[Tensor, Tensor]:
    u, delta_pre, A, B, C, D, z, delta_bias, h0, reset = x
    return selective_scan(u, delta_pre, A, B, C, D, z=z, delta_bias=delta_bias, h0=h0, reset=reset)


def differentiate(x: Inputs, dy: Tensor, dlast: Tensor) -> list[Tensor]:
    """y, the final state, and the gradients of all that is there."""
    x = leaves(x)
    outputs = scan(x)
    given = [t for t in x[:-1] if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, given, (dy, dlast))]


def part(x: Inputs, steps: slice, h0: Tensor | None) -> Inputs:
    names = ("u", "delta_pre", "B", "C", "z", "reset")
    cut = {name: None if (s := getattr(x, name)) is None else s[:, steps] for name in names}
    return x._replace(**cut, h0=h0)


# ----------------------------------------------------------------------------------------------------------
# The oracle: the paper's equations, written out number by number


def oracle(x: Inputs) -> tuple[Tensor, Tensor]:
    """Equations 2a and 2b with the discretisation of section 3.2, without a vector in sight."""
    batch, T, channels = x.u.shape
    N = x.A.shape[1]
    rows, finals = [], []
    for b in range(batch):
        for d in range(channels):
            h = [x.h0[b, d, n] for n in range(N)]
            y = []
            for t in range(T):
                if x.reset[b, t]:
                    h = [torch.zeros((), dtype=x.u.dtype)] * N
                delta = torch.log(1 + torch.exp(x.delta_pre[b, t, d] + x.delta_bias[d]))
                h = [
                    torch.exp(delta * x.A[d, n]) * h[n] + delta * x.B[b, t, n] * x.u[b, t, d]
                    for n in range(N)
                ]
                out = sum(x.C[b, t, n] * h[n] for n in range(N)) + x.D[d] * x.u[b, t, d]
                y.append(out * x.z[b, t, d] / (1 + torch.exp(-x.z[b, t, d])))
            rows.append(torch.stack(y))
            finals.append(torch.stack(h))
    return torch.stack(rows).view(batch, channels, T).mT, torch.stack(finals).view(batch, channels, N)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_oracle(dtype: torch.dtype) -> None:
    """Values and gradients, across the border of a chunk."""
    x = draw(1, CHUNK + 8, 3, 2, dtype)
    exact = leaves(cast(x, torch.float64))
    expected = oracle(exact)
    dy, dlast = gradients_like(x)
    gradients = torch.autograd.grad(expected, exact[:-1], (dy.double(), dlast.double()))
    y, last, *actual = differentiate(x, dy, dlast)
    limit = 1e-10 if dtype == torch.float64 else 2e-6
    assert relative_error(y, expected[0]) < limit
    assert relative_error(last, expected[1]) < limit
    for name, ours, theirs in zip(NAMES, actual, gradients, strict=True):
        assert relative_error(ours, theirs) < 2.5 * limit, name


# ----------------------------------------------------------------------------------------------------------
# The laws


def test_step() -> None:
    """One pass is the same as one call per step."""
    x = draw(2, 40, 5, 3)
    whole, last = scan(x)
    h = x.h0
    for t in range(40):
        y, h = scan(part(x, slice(t, t + 1), h))
        torch.testing.assert_close(y[:, 0], whole[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h, last, rtol=1e-12, atol=1e-12)


@given(data=st.data())
@settings(max_examples=20)
def test_carry(data: st.DataObject) -> None:
    """Two parts with the state carried are one pass: values and gradients."""
    T = data.draw(st.integers(2, 3 * CHUNK))
    cut = data.draw(st.integers(1, T - 1))
    x = leaves(draw(2, T, 3, 2, seed=data.draw(st.integers(0, 99))))
    dy, dlast = gradients_like(x)
    whole = scan(x)
    first, h = scan(part(x, slice(None, cut), x.h0))
    second, last = scan(part(x, slice(cut, None), h))
    pieces = (torch.cat([first, second], 1), last)
    expected = torch.autograd.grad(whole, x[:-1], (dy, dlast))
    actual = torch.autograd.grad(pieces, x[:-1], (dy, dlast))
    for ours, theirs in zip((*pieces, *actual), (*whole, *expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_restart() -> None:
    """Reset forgets, even a state that is not a number; no gradient crosses it."""
    cut = CHUNK + 5
    x = draw(2, 2 * CHUNK + 3, 3, 2)
    x.reset[:] = False
    x.reset[:, cut] = True
    y, last = scan(x._replace(h0=torch.full_like(x.h0, torch.nan)))
    fresh, fresh_last = scan(part(x._replace(reset=None), slice(cut, None), None))
    torch.testing.assert_close(y[:, cut:], fresh, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, fresh_last, rtol=1e-12, atol=1e-12)
    x = leaves(x)
    du, dB, dh0 = torch.autograd.grad(scan(x)[0][:, cut:].sum(), (x.u, x.B, x.h0))
    assert not du[:, :cut].any()
    assert not dB[:, :cut].any()
    assert not dh0.any()


def test_causality() -> None:
    """No output depends on later input: changing it leaves the same bits."""
    x = draw(2, 50, 3, 2, torch.float32)
    y, _ = scan(x)
    for sequence in (x.u, x.delta_pre, x.B, x.C, x.z):
        sequence[:, 35:] += 1
    changed, _ = scan(x)
    assert torch.equal(y[:, :35], changed[:, :35])


def test_keeps_where_nothing_decays_or_enters() -> None:
    """A = 0 and u = 0 keep the state, exactly."""
    x = draw(2, 70, 5, 3, torch.float32)
    x = x._replace(A=torch.zeros(5, 3), u=torch.zeros(2, 70, 5), reset=None)
    assert torch.equal(scan(x)[1], x.h0)


@pytest.mark.parametrize(
    "absent",
    [("D",), ("z",), ("delta_bias",), ("h0",), ("reset",), ("D", "z", "delta_bias", "h0", "reset")],
    ids=str,
)
def test_absent_inputs(absent: tuple[str, ...]) -> None:
    """What may be left out is zero, or one where it would be multiplied with."""
    x = draw(2, 20, 5, 3)
    neutral = {
        "D": torch.zeros_like(x.D),
        "delta_bias": torch.zeros_like(x.delta_bias),
        "h0": torch.zeros_like(x.h0),
        "reset": torch.zeros_like(x.reset),
        "z": None,
    }
    gone = x._replace(**dict.fromkeys(absent))
    present = x._replace(**{name: neutral[name] for name in absent})
    dy, dlast = gradients_like(x)
    found = dict(zip([n for n in NAMES if n not in absent], differentiate(gone, dy, dlast)[2:], strict=True))
    kept = [name for name, value in zip(NAMES, present, strict=False) if value is not None]
    expected = dict(zip(kept, differentiate(present, dy, dlast)[2:], strict=True))
    torch.testing.assert_close(scan(gone), scan(present), rtol=1e-13, atol=1e-13)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------
# Engines


@compiled
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_engine(dtype: torch.dtype, T: int) -> None:
    """The engine equals the reference: both outputs and every gradient, with poisoned buffers."""
    compare(engine(), draw(3, T, 37, 5, dtype))


@compiled
@pytest.mark.parametrize("channels", [1, 4, 16, 17, 33, 48, 64, 65, 100, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_engine_widths(channels: int, dtype: torch.dtype) -> None:
    """However channels fill vectors, tiles and groups."""
    compare(engine(), draw(2, CHUNK + 3, channels, 3, dtype))


@compiled
def test_engine_on_a_long_sequence() -> None:
    compare(engine(), draw(1, 2**11, 2, 4, torch.float64))


@compiled
@pytest.mark.parametrize("N", [1, 2, 16, 40])
def test_engine_state_sizes(N: int) -> None:
    compare(engine(), draw(2, CHUNK + 3, 20, N, torch.float32))


@compiled
def test_engine_does_not_depend_on_threads() -> None:
    """The same bits however batch and channels are shared out, values and gradients."""
    x = draw(3, 2 * CHUNK, 150, 4, torch.float32)
    dy, dlast = gradients_like(x)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, last, borders = engine().forward(x, True)
            results.append([y, last, *engine().backward(dy, dlast, borders, x)])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_layouts() -> None:
    """Time-major, sliced, expanded, negated and channel-strided inputs."""
    x = draw(3, 12, 4, 2)
    expected = scan(x)

    def lay_out(change: Callable[[Tensor], Tensor]) -> Inputs:
        return x._replace(**{name: change(getattr(x, name)) for name in ("u", "delta_pre", "B", "C", "z")})

    def inside(s: Tensor) -> Tensor:
        wide = torch.full((6, 15, s.shape[2] + 2), torch.nan, dtype=s.dtype)
        wide[::2, 1:13, 1:-1] = s
        return wide[::2, 1:13, 1:-1]

    variants = {
        "time-major": lambda s: s.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": inside,
        "channels strided": lambda s: s.mT.contiguous().mT,
        "negated": lambda s: torch._neg_view(-s),
    }
    for name, change in variants.items():
        dy, dlast = gradients_like(x)
        ours, theirs = differentiate(lay_out(change), dy, dlast), differentiate(x, dy, dlast)
        for a, b in zip((*scan(lay_out(change)), *ours), (*expected, *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    assert scan(lay_out(variants["time-major"]))[0].stride(0) == 4, "time-major in must give time-major out"
    expanded = x._replace(A=x.A[:1].expand(4, 2), h0=x.h0[:1].expand(3, 4, 2), u=x.u[:1].expand(3, -1, -1))
    solid = cast(expanded._replace(u=expanded.u.contiguous()), torch.float64)
    torch.testing.assert_close(scan(expanded), scan(solid), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    """Step sizes and rates of every size: nothing overflows that should not."""
    pre = torch.tensor([-1e4, -200.0, -90.0, -20.0, -1e-3, 0.0, 1e-20, 3.0, 30.0, 1e4], dtype=dtype)
    rates = -torch.tensor([0.0, 1e-30, 1e-6, 1.0, 80.0, 1e4, 1e9], dtype=dtype)
    channels, N = len(pre), len(rates)
    x = draw(1, 3, channels, N, dtype)
    x = x._replace(delta_pre=pre.expand(1, 3, -1), A=rates.expand(channels, -1), z=None, reset=None)
    x = x._replace(delta_bias=None)
    y, last, borders = reference.forward(cast(x, torch.float64), True)
    dy, dlast = gradients_like(x)
    gradients = reference.backward(dy.double(), dlast.double(), borders, cast(x, torch.float64))
    for name in ("cpp", "portable", "reference"):
        module = pytest.importorskip(MODULES[name], reason=f"no engine {name}")
        found, found_last, saved = module.forward(x, True)
        torch.testing.assert_close(found.double(), y, rtol=3e-6, atol=3e-4)
        torch.testing.assert_close(found_last.double(), last, rtol=3e-6, atol=1e-30)
        for name, ours, theirs in zip(NAMES, module.backward(dy, dlast, saved, x), gradients, strict=True):
            assert relative_error(ours, theirs) < 5e-6, name


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_the_step_is_not_rounded(name: str, dtype: torch.dtype) -> None:
    """A step size near 1e-3 keeps its digits beside 16-bit inputs; in delta_pre it would keep two."""
    if name == "triton":
        pytest.skip("runs on a GPU")
    module = pytest.importorskip(MODULES[name], reason=f"no engine {name}")
    x = draw(1, 40, 5, 3, dtype)
    bias = torch.linspace(1e-3, 2e-3, 5).expm1().log()
    x = x._replace(
        delta_pre=torch.zeros_like(x.delta_pre), delta_bias=bias, A=-torch.ones(5, 3), D=None, z=None
    )
    x = x._replace(h0=torch.ones(1, 5, 3), u=torch.zeros_like(x.u), reset=None)
    expected = torch.exp(-40 * torch.nn.functional.softplus(bias.double()))[:, None].expand(5, 3)
    last = module.forward(x, False)[1][0]
    torch.testing.assert_close(last.double(), expected, rtol=1e-6, atol=0)
    in_delta = x._replace(delta_pre=x.delta_pre + bias.to(dtype), delta_bias=None)
    assert (module.forward(in_delta, False)[1][0] - expected).abs().max() > 1e-5


def test_a_strong_decay_leaves_nothing_of_a_large_state() -> None:
    """Not even its rounding errors."""
    one = torch.ones(1, 1, 1)
    large = torch.full((1, 1, 1), 1e20)
    y, last = selective_scan(one, 50 * one, torch.full((1, 1), -3.0), one, one, h0=large)
    assert y.item() == last.item() == 50.0


def test_other_peoples_subnormal_numbers_survive() -> None:
    """The engine flushes its own to zero, and leaves the processor as it found it."""
    tiny = torch.full((64,), 1e-40)
    differentiate(x := draw(2, 40, 5, 3, torch.float32), *gradients_like(x))
    assert (tiny * 0.5 > 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_propagates_from_its_step_on(dtype: torch.dtype) -> None:
    """A NaN is never swallowed, and never reaches other rows, channels or earlier steps."""
    for field in ("u", "delta_pre"):
        x = draw(2, 40, 18, 3, dtype)._replace(reset=None)
        getattr(x, field)[0, 4, 2] = torch.nan
        expected = torch.zeros(2, 40, 18, dtype=torch.bool)
        expected[0, 4:, 2] = True
        assert torch.equal(scan(x)[0].isnan(), expected)


# ----------------------------------------------------------------------------------------------------------
# Numbers and memory


@compiled
@pytest.mark.parametrize("slow", [0.0, 4.0, 8.0], ids="decay {}".format)
@pytest.mark.parametrize("steady", [False, True], ids=["random", "steady"])
def test_accuracy_does_not_fall_with_length(slow: float, steady: bool) -> None:
    """2^14 steps in float32 against float64, where constant input makes all errors have one sign."""
    T = 2**14
    x = draw(1, T, 4, 8, torch.float32)._replace(reset=None, z=None)
    x = x._replace(delta_pre=x.delta_pre - slow)
    dy, dlast = gradients_like(x)
    if steady:
        u, delta_pre, B, C, dy = (
            s[:, :1].expand(-1, T, -1).contiguous() for s in (x.u, x.delta_pre, x.B, x.C, dy)
        )
        x = x._replace(u=u, delta_pre=delta_pre, B=B, C=C)
    expected = differentiate(cast(x, torch.float64), dy.double(), dlast.double())
    found = differentiate(x, dy, dlast)
    for name, ours, theirs in zip(("y", "last", *NAMES), found, expected, strict=False):
        assert relative_error(ours, theirs) < (2e-6 if name in ("y", "last") else 5e-6), name


def test_saves_borders_only() -> None:
    """What is kept for backward has far fewer numbers than the states of all steps."""
    batch, T, channels, N = 2, 8 * CHUNK, 6, 16
    x = leaves(draw(batch, T, channels, N))
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scan(x)
    given = sum(t.numel() for t in x if t is not None)
    assert sum(kept.values()) == given + batch * (T // CHUNK) * channels * N


def test_bfloat16_forgets() -> None:
    """A decay of 0.999 rounds to 1 in bfloat16; computed in float32 inside, the state still decays."""
    delta_pre = torch.full((1, 4000, 1), math.log(math.expm1(1e-3))).to(torch.bfloat16)
    zero = torch.zeros_like(delta_pre)
    h0 = torch.full((1, 1, 1), 100.0)
    A = torch.full((1, 1), -1.0)
    _, last = selective_scan(zero, delta_pre, A, zero, zero, h0=h0)
    assert last.dtype == torch.float32
    assert last.item() == pytest.approx(100 * math.exp(-4), rel=0.05)


# ----------------------------------------------------------------------------------------------------------
# Derivatives of every order, and torch's own checks


def function(x: Inputs) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *tensors: scan(Inputs(*tensors, x.reset))


def test_gradcheck() -> None:
    """First derivatives, backward and forward mode, against finite differences."""
    x = leaves(draw(2, 5, 2, 2))
    x.reset[1, 3] = True
    assert torch.autograd.gradcheck(function(x), x[:-1], check_forward_ad=True)


def test_gradgradcheck() -> None:
    """Second derivatives, reverse over reverse and forward over reverse."""
    x = leaves(draw(1, 4, 2, 2))
    x.reset[0, 2] = True
    assert torch.autograd.gradgradcheck(function(x), x[:-1], check_fwd_over_rev=True)


def test_what_the_operator_returns_does_not_depend_on_gradients() -> None:
    """The states before the chunks are for backward alone, unless they are asked for."""
    x = draw(2, CHUNK + 4, 5, 3)
    for save in (False, True):
        plain = torch.ops.minrnn.selective_scan(*x, save)
        recorded = torch.ops.minrnn.selective_scan(*leaves(x), save)
        for ours, theirs in zip(recorded, plain, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-12)
        assert (plain[2].numel() > 0) == save
        assert [t.requires_grad for t in recorded] == [True, True, False]
    assert SELECTIVE_SCAN(x, False)[2].numel() == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_reset_forgets_what_is_not_finite_for_differentiated_gradients_too(where: str) -> None:
    x = draw(1, 7, 3, 2)._replace(D=None, z=None)
    x.reset[:] = False
    x.reset[0, 3] = True
    dy, dlast = gradients_like(x)
    if where == "before":
        x.h0[0, 1] = torch.inf
    else:
        dlast[0, 1] = torch.inf
    x = leaves(x)
    given = [t for t in x[:-1] if t is not None]
    outputs = scan(x)
    expected = torch.autograd.grad(outputs, given, (dy, dlast), retain_graph=True)
    actual = torch.autograd.grad(outputs, given, (dy, dlast), create_graph=True)
    assert not expected[1].isfinite().all()
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@compiled
def test_the_engine_is_given_torchs_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = engine()
    given: list[int] = []
    whole = cpu._selective
    spy = SimpleNamespace(
        num_groups=whole.num_groups,
        forward=lambda *call: (given.append(call[1]), whole.forward(*call)),
        backward=lambda *call: (given.append(call[1]), whole.backward(*call)),
    )
    monkeypatch.setattr(cpu, "_selective", spy)
    x = draw(2, 5, 3, 2)
    with laws.threads(3):
        cpu.backward(*gradients_like(x), cpu.forward(x, True)[2], x)
    assert given == [3, 3]


def test_an_empty_batch_has_gradients_of_zero() -> None:
    """Of what has no batch axis, whatever memory held."""
    x = leaves(draw(0, 5, 3, 2))
    with laws.poisoned():
        outputs = scan(x)
        gradients = torch.autograd.grad(outputs, x[:-1], tuple(torch.ones_like(y) for y in outputs))
    for t, d in zip(x[:-1], gradients, strict=True):
        assert torch.equal(d, torch.zeros_like(t))


@compiled
def test_the_gradient_of_the_bias_is_summed_in_more_than_float32() -> None:
    """Its terms are of both signs, and their sum may be small beside that of the first half."""
    T = 4096
    u = torch.rand(1, T, 1, generator=torch.Generator().manual_seed(0)) + 1
    one = torch.ones(1, T, 1)
    x = Inputs(u, one, -torch.ones(1, 1), one, one, None, None, torch.zeros(1), None, None)
    dy = torch.where(torch.arange(T) < T // 2, 1.0, -1.0)[None, :, None]
    gradients = engine().backward(dy, torch.zeros(1, 1, 1), engine().forward(x, True)[2], x)
    terms = gradients[NAMES.index("delta_pre")].double()
    torch.testing.assert_close(
        gradients[NAMES.index("delta_bias")].double(), terms.sum((0, 1)), rtol=2.0**-23, atol=0
    )


def test_gradients_that_are_differentiated_are_the_engines() -> None:
    x = draw(2, CHUNK + 4, 5, 3)
    x.reset[1, 0] = True
    x = leaves(x)
    dy, dlast = gradients_like(x)
    outputs = scan(x)
    expected = torch.autograd.grad(outputs, x[:-1], (dy, dlast), retain_graph=True)
    actual = torch.autograd.grad(outputs, x[:-1], (dy, dlast), create_graph=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_vmap_and_jacobians() -> None:
    """torch.func transforms compose with the scan, whichever input is mapped over."""
    x = draw(2, 5, 3, 2)
    f = function(x)
    for index, tensor in enumerate(x[:-1]):
        batched = torch.stack([tensor, 2 * tensor, tensor / 3], 1)
        dims = tuple(1 if i == index else None for i in range(len(NAMES)))
        mapped = torch.func.vmap(f, in_dims=dims)(*x[:index], batched, *x[index + 1 : -1])
        for n in range(3):
            one = f(*x[:index], batched[:, n], *x[index + 1 : -1])
            torch.testing.assert_close(tuple(m[n] for m in mapped), one, rtol=1e-12, atol=1e-12)
        forward = torch.func.jacfwd(f, argnums=index)(*x[:-1])
        backward = torch.func.jacrev(f, argnums=index)(*x[:-1])
        torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-11)


def test_forward_mode_without_gradients() -> None:
    """torch.no_grad turns backward mode off, and leaves forward mode on."""
    x = draw(2, 5, 3, 2)
    tangents = tuple(torch.ones_like(t) for t in x[:-1])
    _, expected = torch.func.jvp(function(x), x[:-1], tangents)
    with torch.no_grad():
        _, actual = torch.func.jvp(function(x), x[:-1], tangents)
        torch.testing.assert_close(actual, expected)
        batched = torch.func.vmap(function(x), in_dims=(0, *[None] * (len(NAMES) - 1)))(x.u[None], *x[1:-1])
    torch.testing.assert_close(batched[0][0], scan(x)[0])


def test_batched_gradients() -> None:
    """Many output gradients at once, by vmap over torch.autograd.grad: the engine's backward, batched."""
    x = leaves(draw(2, 5, 3, 2))
    y, _ = scan(x)
    directions = torch.randn(4, *y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    batched = torch.func.vmap(lambda v: torch.autograd.grad(y, x[:-1], v, retain_graph=True))(directions)
    for n, direction in enumerate(directions):
        expected = torch.autograd.grad(y, x[:-1], direction, retain_graph=True)
        for ours, theirs in zip(batched, expected, strict=True):
            torch.testing.assert_close(ours[n], theirs, rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(y, x[:-1], directions, is_grads_batched=True)
    torch.testing.assert_close(again, batched, rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    """Schema, autograd registration, fake tensors and ahead-of-time dispatch with dynamic shapes."""
    x = draw(2, 5, 3, 2, torch.float32)
    some = x._replace(D=None, z=None, delta_bias=None, h0=None, reset=None)
    for inputs in (x, some):
        torch.library.opcheck(torch.ops.minrnn.selective_scan.default, (*leaves(inputs), True))
        torch.library.opcheck(torch.ops.minrnn.selective_scan.default, (*inputs, False))
        borders = torch.ops.minrnn.selective_scan(*inputs, True)[2]
        torch.library.opcheck(
            torch.ops.minrnn.selective_scan_backward.default, (*gradients_like(x), borders, *inputs)
        )


def test_compile() -> None:
    """torch.compile(fullgraph=True): same values and gradients, and no recompilation for another T."""
    torch._dynamo.reset()

    def f(u: Tensor, delta_pre: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
        return selective_scan(u, delta_pre, A, B, C, D, z=z)[0]

    fast = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 12, 40):
            results = []
            for g in (f, fast):
                inputs = leaves(draw(2, T, 3, 2, torch.float32))[:7]
                y = g(*inputs)
                results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
            torch.testing.assert_close(*results)


def test_export() -> None:
    """torch.export holds the operator, for any T."""

    class Model(torch.nn.Module):
        def forward(self, u: Tensor, delta_pre: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return selective_scan(u, delta_pre, A, B, C)[0]

    x = draw(2, 6, 3, 2, torch.float32)[:5]
    T = torch.export.Dim("T", min=2, max=4096)
    shapes = {"u": {1: T}, "delta_pre": {1: T}, "A": {}, "B": {1: T}, "C": {1: T}}
    program = torch.export.export(Model(), x, dynamic_shapes=shapes)
    longer = draw(2, 50, 3, 2, torch.float32)[:5]
    torch.testing.assert_close(program.module()(*longer), selective_scan(*longer)[0])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_meta(dtype: torch.dtype, save: bool) -> None:
    """Shapes, dtypes and layouts of outputs and gradients are known without data."""
    x = draw(2, CHUNK + 3, 4, 3, dtype)
    late = x._replace(u=x.u.transpose(0, 1).contiguous().transpose(0, 1))
    some = x._replace(D=None, z=None, delta_bias=None, h0=None, reset=None)
    for tensors in (x, late, some):
        known = []
        for device in ("cpu", "meta"):
            given = [None if t is None else t.to(device) for t in tensors]
            outputs = torch.ops.minrnn.selective_scan(*given, save)
            gradients = [d.to(device) for d in gradients_like(x)]
            if save:
                outputs += (*torch.ops.minrnn.selective_scan_backward(*gradients, outputs[2], *given),)
            known.append([(t.shape, t.dtype, t.stride()) for t in outputs])
        assert known[0] == known[1]
        wide = torch.promote_types(dtype, torch.float32)
        assert known[1][:2] == [
            ((2, CHUNK + 3, 4), dtype, known[1][0][2]),
            ((2, 4, 3), wide, known[1][1][2]),
        ]


def test_every_engine_that_knows_the_scan_is_an_engine() -> None:
    assert MODULES.keys() <= ENGINES.keys()


# ----------------------------------------------------------------------------------------------------------
# Bad input

BAD = {
    "u is a list": ({"u": [1.0]}, TypeError, "u must be a tensor, got list"),
    "no A": ({"A": None}, TypeError, "A must be a tensor, got NoneType"),
    "integers": ({"u": torch.ones(2, 5, 3).long()}, TypeError, "u must be float32"),
    "two axes": ({"u": torch.ones(5, 3)}, ValueError, r"\(batch, T, channels\)"),
    "no steps": ({"u": torch.ones(2, 0, 3)}, ValueError, "at least 1"),
    "no states": (
        {"A": torch.ones(3, 0), "B": torch.ones(2, 5, 0), "C": torch.ones(2, 5, 0), "h0": None},
        ValueError,
        r"A must be of shape \(channels, N\), N at least 1, got \(3, 0\)",
    ),
    "A is a vector": ({"A": torch.ones(3)}, ValueError, r"A must be of shape \(channels, N\)"),
    "A has other channels": ({"A": torch.ones(4, 2)}, ValueError, r"A must be of shape \(3, 2\)"),
    "B has channels": ({"B": torch.ones(2, 5, 3, 2)}, ValueError, r"B must be of shape \(2, 5, 2\)"),
    "delta is double": ({"delta_pre": torch.ones(2, 5, 3).double()}, TypeError, "must be torch.float32"),
    "bias is of one row": (
        {"delta_bias": torch.ones(2, 3)},
        ValueError,
        r"delta_bias must be of shape \(3,\)",
    ),
    "bias is double": ({"delta_bias": torch.ones(3).double()}, TypeError, "delta_bias must be torch.float32"),
    "state transposed": ({"h0": torch.ones(2, 2, 3)}, ValueError, r"h0 must be of shape \(2, 3, 2\)"),
    "reset is float": ({"reset": torch.ones(2, 5)}, TypeError, "reset must be torch.bool"),
    "elsewhere": ({"C": torch.ones(2, 5, 2, device="meta")}, ValueError, "C must be on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case: str) -> None:
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        scan(draw(2, 5, 3, 2, torch.float32)._replace(**changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_argument_goes_with_u(dtype: torch.dtype) -> None:
    laws.refuses_wrong_tensors(selective_scan, "selective_scan", draw(2, 5, 3, 2, dtype)._asdict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_no_sequence_may_be_float32_beside_16_bits(dtype: torch.dtype) -> None:
    x = draw(2, 5, 3, 2, dtype)
    wide = {name: getattr(x, name).float() for name in ("A", "D", "delta_bias", "h0")}
    y, last = scan(x._replace(**wide))
    expected = scan(cast(x, torch.float32))
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert relative_error(y, expected[0]) < TOLERANCE[dtype]
    assert relative_error(last, expected[1]) < TOLERANCE[torch.float32]
