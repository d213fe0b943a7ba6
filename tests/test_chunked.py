"""Layers computed in chunks are the composition of a projection and a scan, whatever the chunks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from gated import LAYERS
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import GATES, SERVING
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minrnn.mixers import MinGRU
from minrnn.mixers.layer import MinRNN
from minrnn.ops import CANDIDATES, chunks, projected, projected_scan
from minrnn.ops.chunks import Chunk, cut_batch, cut_sequences
from minrnn.ops.spans import RADIX

# The gates that layers have, with each candidate.
CELLS = [(gate, candidate) for gate in GATES if GATES[gate].has_candidate for candidate in CANDIDATES]
# Largest error relative to the largest value: some roundings of the sums in matrix products.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
C, D = 5, 3

recomputed = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])


@contextmanager
def chunks_of(size: int, run: int = 1) -> Iterator[None]:
    """Within it, all is cut into chunks of `size` steps, rows that lie side by side into runs of `run`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projected, "LARGE_BYTES", 0)
        patch.setattr(projected, "steps_at_once", lambda step_bytes: size)
        patch.setattr(chunks, "MIN_RUN", run)
        cut_batch.cache_clear()
        yield
    cut_batch.cache_clear()


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Recurrence(NamedTuple):
    """The arguments of projected_scan that stay the same in a test."""

    gate: str
    candidate: str
    signed: bool
    weight: Tensor
    bias: Tensor | None
    recompute: bool = False

    def scan(
        self, x: Tensor, h0: Tensor | None = None, reset: Tensor | None = None, **options: bool
    ) -> Tensor:
        return projected_scan(
            self.gate, x, self.weight, self.bias, candidate=self.candidate, signed=self.signed, h0=h0,
            reset=reset, recompute=self.recompute, **options,
        )  # fmt: skip

    def compose(
        self, x: Tensor, h0: Tensor | None, reset: Tensor | None, reverse: bool, time_major: bool
    ) -> Tensor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(projected, "LARGE_BYTES", 1 << 60)
            return self._replace(recompute=False).scan(x, h0, reset, reverse=reverse, time_major=time_major)


def make_recurrence(
    gate: str,
    candidate: str = "positive",
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Recurrence:
    rows = GATES[gate].num_pre * D
    weight = draw(rows, C, seed=1, dtype=dtype).requires_grad_()
    form, offset = GATES[gate], draw(rows, seed=2, dtype=dtype).requires_grad_() if bias else None
    return Recurrence(form.gate, candidate, form.signed, weight, offset, **options)


# How x (B, T, C) may lie in memory, made from one that is contiguous.
LAYOUTS = {
    "batch-major": lambda x: x,
    "time-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other step": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "channels apart": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one row expanded": lambda x: x[:1].expand_as(x),
}


# ----------------------------------------------------------------------------------------------------------
# How it is cut


def entered(pieces: tuple[Chunk, ...]) -> list[list[Chunk]]:
    """The chunks of each recurrence, in its order."""
    recurrences: list[list[Chunk]] = []
    for chunk in pieces:
        if chunk.entry is not None:
            recurrences.append([])
        recurrences[-1].append(chunk)
    return recurrences


def check_order(recurrence: list[Chunk], reverse: bool) -> None:
    """A recurrence's chunks follow each other in time, without a gap."""
    for left, right in itertools.pairwise(recurrence[::-1] if reverse else recurrence):
        assert left.rows == right.rows
        assert left.steps.stop == right.steps.start


@given(
    B=st.integers(1, 9),
    T=st.integers(1, 40),
    size=st.integers(1, 50),
    by_time=st.booleans(),
    reverse=st.booleans(),
)
def test_every_step_is_in_one_chunk(B: int, T: int, size: int, by_time: bool, reverse: bool) -> None:
    with chunks_of(size):
        pieces = cut_batch(B, T, size, by_time=by_time, reverse=reverse)
    times = torch.zeros(B, T, dtype=torch.int64)
    for chunk in pieces:
        times[chunk.rows, chunk.steps] += 1
    assert torch.equal(times, torch.ones_like(times))
    if len(pieces) == 1:
        assert pieces == (chunks.WHOLE,)
        return
    for recurrence in entered(pieces):
        check_order(recurrence, reverse)
        assert recurrence[0].entry == recurrence[0].rows


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1).filter(any),
    size=st.integers(1, 20),
    reverse=st.booleans(),
)
def test_every_step_of_every_sequence_is_in_one_chunk(lengths: list[int], size: int, reverse: bool) -> None:
    offsets = [0, *itertools.accumulate(lengths)]
    recurrences = entered(cut_sequences(offsets, size, reverse=reverse))
    assert len(recurrences) == sum(length > 0 for length in lengths)
    for recurrence in recurrences:
        check_order(recurrence, reverse)
        number = recurrence[0].entry.start  # type: ignore[union-attr]
        first, last = sorted((recurrence[0], recurrence[-1]), key=lambda chunk: chunk.steps.start)
        assert (first.steps.start, last.steps.stop) == (offsets[number], offsets[number + 1])


@pytest.mark.parametrize("by_time", [False, True])
def test_chunks_are_as_large_as_they_shall_be(by_time: bool) -> None:
    """Few calls, and few roundings of the state, however the steps are divided into rows."""
    for B, T in ((1, 100_000), (3, 5000), (16, 512), (1000, 70), (5000, 1)):
        for chunk in cut_batch(B, T, 1024, by_time=by_time, reverse=False):
            rows, steps = range(B)[chunk.rows], range(T)[chunk.steps]
            assert 512 <= len(rows) * len(steps) <= max(2048, 2 * chunks.MIN_RUN * B)
            assert len(steps) == T or len(steps) >= (512 if len(rows) == 1 else chunks.MIN_RUN)


def test_threads_and_wide_layers_get_larger_chunks() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert chunks.steps_at_once(2048) == chunks.CACHED_BYTES // 2048
        assert chunks.steps_at_once(1 << 20) == chunks.MIN_STEPS
        torch.set_num_threads(3)
        assert chunks.steps_at_once(1 << 20) == 3 * chunks.MIN_STEPS
    finally:
        torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------
# What it computes


def both(recurrence: Recurrence, x: Tensor, h0: Tensor | None, reset: Tensor | None, **options: bool) -> None:
    """Compare values and gradients, in chunks and composed; `options` are those of `scan`."""
    leaves = [
        leaf
        for leaf in (x, recurrence.weight, recurrence.bias, h0)
        if leaf is not None and leaf.requires_grad
    ]
    law = recurrence._replace(recompute=False)
    expected = law.compose(x, h0, reset, options.get("reverse", False), options.get("time_major", False))
    actual = recurrence.scan(x, h0, reset, **options)
    dh = draw(*expected.shape, seed=9, dtype=expected.dtype)
    pairs = [(actual, expected)]
    pairs += zip(
        torch.autograd.grad(actual, leaves, dh), torch.autograd.grad(expected, leaves, dh), strict=True
    )
    with torch.no_grad():
        pairs.append((recurrence.scan(x, h0, reset, **options), expected))
    for x_actual, x_expected in pairs:
        assert x_actual.shape == x_expected.shape
        largest = x_expected.abs().max().clamp(min=1e-30)
        assert (x_actual - x_expected).abs().max() / largest < TOLERANCE[x.dtype]


@recomputed
@pytest.mark.parametrize(("gate", "candidate"), CELLS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_chunks_are_the_composition(
    gate: str, candidate: str, reverse: bool, dtype: torch.dtype, recompute: bool
) -> None:
    recurrence = make_recurrence(gate, candidate, dtype=dtype, recompute=recompute)
    x, h0 = (
        draw(3, 23, C, seed=3, dtype=dtype).requires_grad_(),
        draw(3, D, seed=4, dtype=dtype).requires_grad_(),
    )
    reset = draw(3, 23, seed=5) > 1
    for size in (7, 10, 50):  # rows in three parts; in two; two rows at once
        with chunks_of(size):
            both(recurrence, x, h0, reset, reverse=reverse)


@settings(max_examples=60)
@given(
    B=st.integers(1, 5),
    T=st.integers(1, 20),
    size=st.integers(1, 60),
    layout=st.sampled_from(sorted(LAYOUTS)),
    flags=st.tuples(*[st.booleans()] * 6),
)
def test_any_layout_and_any_chunks(B: int, T: int, size: int, layout: str, flags: tuple[bool, ...]) -> None:
    bias, with_h0, with_reset, reverse, time_major, recompute = flags
    recurrence = make_recurrence("mingru", bias=bias, recompute=recompute)
    x = LAYOUTS[layout](draw(B, T, C, seed=B))
    x = (x.transpose(0, 1) if time_major else x).detach().requires_grad_()
    h0 = draw(B, D, seed=4).requires_grad_() if with_h0 else None
    reset = draw(B, T, seed=5) > 1 if with_reset else None
    with chunks_of(size):
        both(recurrence, x, h0, reset, reverse=reverse, time_major=time_major)


@recomputed
@pytest.mark.parametrize("frozen", itertools.product([False, True], repeat=4), ids=str)
def test_only_what_is_asked_for_is_differentiated(frozen: tuple[bool, ...], recompute: bool) -> None:
    recurrence = make_recurrence("minlstm", recompute=recompute)
    x, h0 = draw(2, 9, C, seed=3).requires_grad_(), draw(2, D, seed=4).requires_grad_()
    leaves = (x, recurrence.weight, recurrence.bias, h0)
    for leaf, stays in zip(leaves, frozen, strict=True):
        leaf.requires_grad_(not stays)  # type: ignore[union-attr]
    with chunks_of(4):
        if all(frozen):
            assert not recurrence.scan(x, h0).requires_grad
        else:
            both(recurrence, x, h0, None)
            h, given = recurrence.scan(x, h0), [leaf for leaf in leaves if leaf.requires_grad]
            expected = torch.autograd.grad(h.sum(), given, retain_graph=True)
            actual = torch.autograd.grad(h.sum(), given, create_graph=True)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@recomputed
def test_gradients_that_are_expanded(recompute: bool) -> None:
    """h.sum() hands back one number for all of dh, which must not be written into."""
    recurrence, x = make_recurrence("mingru", recompute=recompute), draw(2, 12, C, seed=3).requires_grad_()
    with chunks_of(5):
        (actual,) = torch.autograd.grad(recurrence.scan(x).sum(), x)
    (expected,) = torch.autograd.grad(make_recurrence("mingru").compose(x, None, None, False, False).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    dh = draw(2, 12, D, seed=5)
    untouched = dh.clone()
    with chunks_of(5):
        recurrence.scan(x).backward(dh)
    assert torch.equal(dh, untouched)


@recomputed
@pytest.mark.parametrize("layout", ["batch-major", "time-major"])
def test_the_output_may_be_changed_in_place_where_it_is_not_kept(layout: str, recompute: bool) -> None:
    """Where backward reads it, backward raises; recomputed, the gradients are right."""
    recurrence, x = make_recurrence("mingru", recompute=recompute), LAYOUTS[layout](draw(3, 8, C, seed=3))
    x.requires_grad_()
    with chunks_of(4):
        h = recurrence.scan(x).mul_(2)
        if not recompute:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(h.sum(), x)
            return
        (actual,) = torch.autograd.grad(h.sum(), x)
    (expected,) = torch.autograd.grad(2 * recurrence.compose(x, None, None, False, False).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@recomputed
@pytest.mark.parametrize("hidden_size", [64, 2000])
def test_the_same_call_gives_the_same_bits(hidden_size: int, recompute: bool) -> None:
    torch.manual_seed(0)
    layer = MinGRU(8, hidden_size, recompute=recompute)
    x = torch.randn(70, 40, 8)
    with chunks_of(900):
        first, second = [
            torch.autograd.grad(layer(x)[0].square().sum(), layer.parameters()) for _ in range(2)
        ]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("T", [1 << 12, 1 << 16])
def test_borders_do_not_cost_accuracy(T: int) -> None:
    """The state is rounded to float32 where it passes from chunk to chunk; h and gradients do not tell.

    Where 1e-6 is forgotten a step, an error stays. The tolerances are those of the scan's own laws. But the
    portable engine rounds a state's decay in each step of a chunk's outermost span, here always in the same
    direction: by up to a unit in the last place of a number below 1.
    """
    borders = 0.0 if SERVING == "cpp" else (T / chunks.MIN_STEPS) * RADIX * torch.finfo(torch.float32).eps / 2
    channels, generator = 16, torch.Generator().manual_seed(0)
    weight = torch.zeros(2 * channels, channels)
    weight[channels:] = torch.eye(channels)
    bias = torch.cat([torch.full((channels,), -13.8), torch.zeros(channels)])
    x = torch.randn(1, T, channels, generator=generator).requires_grad_()
    dh = torch.randn(1, T, channels, generator=generator)
    exact = Recurrence("mingru", "linear", False, weight.double(), bias.double())
    wide = x.detach().double().requires_grad_()
    expected = exact.compose(wide, None, None, False, False)
    (dx,) = torch.autograd.grad(expected, wide, dh.double())
    for recompute in (False, True):
        with chunks_of(chunks.MIN_STEPS):
            h = Recurrence("mingru", "linear", False, weight, bias, recompute).scan(x)
            (actual,) = torch.autograd.grad(h, x, dh)
        assert (h - expected).abs().max() / expected.abs().max() < 2e-6 + borders
        assert (actual - dx).abs().max() / dx.abs().max() < 5e-6 + borders


# ----------------------------------------------------------------------------------------------------------
# What it holds


class Largest(TorchDispatchMode):
    """Note the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("shape", [(4, 96), (1, 384), (96, 4)], ids=str)
def test_pre_activations_are_never_whole(shape: tuple[int, int], batch_first: bool) -> None:
    """Nothing larger than the output is made: forward without gradients, and backward."""
    layer = MinGRU(8, 8, batch_first=batch_first)
    x = torch.randn(*(shape if batch_first else shape[::-1]), 8, requires_grad=True)
    with chunks_of(32):
        with torch.no_grad(), Largest() as inference:
            layer(x)
        assert inference.numel == x.numel()
        output, _ = layer(x)
        with Largest() as backward:
            output.sum().backward()
        assert backward.numel == x.numel()


@recomputed
@pytest.mark.parametrize("batch_first", [False, True])
def test_large_input_is_cut_unasked(batch_first: bool, recompute: bool) -> None:
    """As every other test, but for sizes as they are."""
    torch.manual_seed(0)
    B, T, hidden_size = 2, 12_000, 200
    layer = MinGRU(4, hidden_size, batch_first=batch_first, recompute=recompute)
    x = torch.randn(*((B, T) if batch_first else (T, B)), 4, requires_grad=True)
    with Largest() as forward:
        output, _ = layer(x)
    with Largest() as backward:
        gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    assert forward.numel <= output.numel() or not recompute
    assert backward.numel == output.numel()  # of dh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projected, "LARGE_BYTES", 1 << 60)
        layer.recompute = False
        expected, _ = layer(x)
        exact = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    for actual, wanted in zip((output, *gradients), (expected, *exact), strict=True):
        assert (actual - wanted).abs().max() / wanted.abs().max() < TOLERANCE[torch.float32]


def saved_by(layer: MinRNN, x: Tensor, *arguments: Any, **options: Any) -> list[Tensor]:
    """What a call keeps for backward, weights aside."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x, *arguments, **options)
    parameters = {p.data_ptr() for p in layer.parameters()}
    return [tensor for tensor in kept if tensor.data_ptr() not in parameters]


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_keeps_the_input_and_border_states(name: str) -> None:
    B, T, width, size = 2, 64, 6, 16
    x = torch.randn(T, B, width, requires_grad=True)
    with chunks_of(size):
        kept = saved_by(LAYERS[name](width, width, recompute=True), x)
        assert {tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()} == {x.data_ptr()}
        states = sum(tensor.numel() for tensor in kept) - x.numel()
        assert states == B * (T // size - 1) * width
        everything = saved_by(LAYERS[name](width, width), x)
        borders = [tensor for tensor in kept if tensor.numel() < x.numel()]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in borders)
    k = GATES[name].num_pre
    assert sum(tensor.numel() for tensor in everything) >= (2 + k) * x.numel()


@pytest.mark.parametrize(("sequences", "apart"), [(2, True), (3, False)])
def test_sequences_that_are_long_on_average_are_scanned_apart(
    sequences: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here 40 steps of 6 channels, and 100 states or more for each sequence."""
    calls = []
    monkeypatch.setattr(projected, "MIN_ELEMENTS", 100)
    monkeypatch.setattr(
        projected, "cut_sequences", lambda *given, **how: calls.append(given) or cut_sequences(*given, **how)
    )
    offsets = torch.tensor([0, 25, 40, 40][: sequences + 1])
    MinGRU(6, 6)(torch.randn(40, 6), torch.randn(1, sequences, 6), cu_seqlens=offsets)
    assert bool(calls) == apart


@pytest.mark.parametrize("min_elements", [0, 10**9], ids=["long sequences", "short sequences"])
def test_recompute_keeps_as_little_of_sequences_with_states(
    min_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projected, "MIN_ELEMENTS", min_elements)
    x, hx = torch.randn(40, 6, requires_grad=True), torch.randn(1, 2, 6)
    offsets = torch.tensor([0, 25, 40])
    less = saved_by(MinGRU(6, 6, recompute=True), x, hx, cu_seqlens=offsets)
    large = [tensor for tensor in less if tensor.is_floating_point() and tensor.numel() >= x.numel()]
    assert {tensor.data_ptr() for tensor in large} == {x.data_ptr()}


# ----------------------------------------------------------------------------------------------------------
# Every other way to differentiate


@recomputed
@pytest.mark.parametrize("gate", ["mingru", "minlstm"])
def test_derivatives_of_every_order(gate: str, recompute: bool) -> None:
    recurrence = make_recurrence(gate, recompute=recompute)
    x, h0 = draw(2, 5, C, seed=3).requires_grad_(), draw(2, D, seed=4).requires_grad_()
    reset = draw(2, 5, seed=5) > 1

    def f(x: Tensor, weight: Tensor, bias: Tensor, h0: Tensor) -> Tensor:
        return recurrence._replace(weight=weight, bias=bias).scan(x, h0, reset)

    leaves = (x, recurrence.weight, recurrence.bias, h0)
    with chunks_of(2):
        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, leaves, check_fwd_over_rev=True, check_batched_grad=True)


@recomputed
def test_function_transforms(recompute: bool) -> None:
    recurrence = make_recurrence("mingru", recompute=recompute)
    law = recurrence._replace(recompute=False)
    x = draw(4, 2, 6, C, seed=3)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return recurrence._replace(weight=weight).scan(x).square().sum()

    def expected_loss(weight: Tensor, x: Tensor) -> Tensor:
        return law._replace(weight=weight).compose(x, None, None, False, False).square().sum()

    weight = recurrence.weight.detach()
    with chunks_of(2):
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, x)
        hessian = torch.func.hessian(loss)(weight, x[0])
        _, pushed = torch.func.jvp(lambda w: loss(w, x[0]), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(
        per_sample, torch.func.vmap(torch.func.grad(expected_loss), in_dims=(None, 0))(weight, x)
    )
    torch.testing.assert_close(hessian, torch.func.hessian(expected_loss)(weight, x[0]))
    torch.testing.assert_close(pushed, torch.func.grad(expected_loss)(weight, x[0]).sum())


@recomputed
def test_gradient_of_a_gradient_where_weights_come_from_the_input(recompute: bool) -> None:
    """What flows from the weights on to the input is counted once."""
    recurrence = make_recurrence("mingru", recompute=recompute)
    x = draw(2, 6, C, seed=3).requires_grad_()

    def twice(in_chunks: bool) -> Tensor:
        made = recurrence._replace(weight=recurrence.weight * x.mean())
        law = made._replace(recompute=False)
        h = made.scan(x) if in_chunks else law.compose(x, None, None, False, False)
        (dx,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    with chunks_of(3):
        actual = twice(True)
    torch.testing.assert_close(actual, twice(False))


@recomputed
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool, recompute: bool) -> None:
    torch.manual_seed(0)
    layer, x = MinGRU(C, D, 2, recompute=recompute).double(), draw(9, 2, C, seed=3).requires_grad_()
    leaves = [x, *layer.parameters()]
    with chunks_of(4):
        expected = torch.autograd.grad(layer(x)[0].square().sum(), leaves)
        output, h_n = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
        (output.square().sum() + 0 * h_n.sum()).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


# ----------------------------------------------------------------------------------------------------------
# Recomputing where chunks do not serve


def differentiate(layer: MinRNN, x: Tensor, call: Any = None) -> list[Tensor]:
    output, h_n = (layer if call is None else call)(x)
    gradients = torch.autograd.grad(output.square().sum() + h_n.sum(), [x, *layer.parameters()])
    return [output, h_n, *gradients]


def a_pair(**options: Any) -> tuple[MinGRU, MinGRU]:
    torch.manual_seed(0)
    plain = MinGRU(C, D, 2, bidirectional=True, **options)
    again = MinGRU(C, D, 2, bidirectional=True, recompute=True, **options)
    again.load_state_dict(plain.state_dict())
    return plain, again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_recompute_in_16_bits_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    plain, again = a_pair(dtype=dtype)
    x = draw(9, 2, C, seed=3, dtype=dtype).requires_grad_()
    with chunks_of(4):
        for one, other in zip(differentiate(plain, x), differentiate(again, x), strict=True):
            assert torch.equal(one, other)
        kept = saved_by(again, x)
    assert sum(tensor.numel() for tensor in kept) < sum(tensor.numel() for tensor in saved_by(plain, x)) / 2


def test_recompute_under_autocast() -> None:
    plain, again = a_pair()
    x = draw(9, 2, C, seed=3, dtype=torch.float32).requires_grad_()
    results = []
    for layer in (plain, again):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = layer(x)
        assert output.dtype == torch.bfloat16
        results.append(
            [output, *torch.autograd.grad(output.float().square().sum(), [x, *layer.parameters()])]
        )
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@recomputed
def test_compile_serves_every_length(recompute: bool) -> None:
    torch._dynamo.reset()
    plain, again = a_pair()
    layer = again if recompute else plain
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for T in (7, 12, 31):
            x = draw(T, 2, C, seed=T, dtype=torch.float32).requires_grad_()
            for one, other in zip(differentiate(layer, x, fast), differentiate(plain, x), strict=True):
                torch.testing.assert_close(one, other)


# ----------------------------------------------------------------------------------------------------------
# Sequences with states of their own


@recomputed
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [3, 100])
def test_sequences_are_as_their_gates_outside_the_scan(
    name: str, size: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long sequences start from hx in calls of their own, short ones by their first step's drive."""
    torch.manual_seed(0)
    layer = LAYERS[name](C, D, 2, bidirectional=True, recompute=recompute).double()
    lengths = [4, 0, 9, 1, 5]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    x, hx = draw(19, C, seed=3).requires_grad_(), draw(4, 5, D, seed=4).requires_grad_()

    def results(min_elements: int) -> list[Tensor]:
        monkeypatch.setattr(projected, "MIN_ELEMENTS", min_elements)
        output, h_n = layer(x, hx, cu_seqlens=offsets)
        loss = output.square().sum() + h_n.sum()
        first = torch.autograd.grad(loss, [x, hx, *layer.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), [x, hx, *layer.parameters()])
        return [output, h_n, *first, *second]

    with chunks_of(size):
        for one, other in zip(results(0), results(10**9), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        monkeypatch.setattr(projected, "MIN_ELEMENTS", 0)
        plain = torch.autograd.grad(layer(x, hx, cu_seqlens=offsets)[0].square().sum(), [x, hx])
        monkeypatch.setattr(projected, "MIN_ELEMENTS", 10**9)
        for one, other in zip(
            plain,
            torch.autograd.grad(layer(x, hx, cu_seqlens=offsets)[0].square().sum(), [x, hx]),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
