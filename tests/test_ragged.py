"""Sequences of different lengths, in every form that torch has for them: each is as if it were alone."""

import itertools
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from gated import LAYERS, RECURRENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, unpack_sequence

from minrnn.mixers import MinGRU
from minrnn.mixers.layer import MinRNN
from minrnn.ops.joined import Joined

I, H = 5, 4  # noqa: E741
LENGTHS = [3, 7, 1, 7, 4]

Result = tuple[list[Tensor], Tensor]
Form = Callable[[MinRNN, list[Tensor], Tensor | None], Result]


def offsets_of(sequences: list[Tensor], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(len(x) for x in sequences)], dtype=dtype)


def as_packed(layer: MinRNN, sequences: list[Tensor], hx: Tensor | None) -> Result:
    output, h_n = layer(pack_sequence(sequences, enforce_sorted=False), hx)
    return unpack_sequence(output), h_n


def as_jagged(layer: MinRNN, sequences: list[Tensor], hx: Tensor | None) -> Result:
    offsets = offsets_of(sequences)
    output, h_n = layer(torch.nested.nested_tensor_from_jagged(torch.cat(sequences), offsets), hx)
    assert output.layout == torch.jagged
    assert torch.equal(output.offsets(), offsets)
    return list(output.values().split(offsets.diff().tolist())), h_n


def as_documents(layer: MinRNN, sequences: list[Tensor], hx: Tensor | None) -> Result:
    offsets = offsets_of(sequences, torch.int32)
    output, h_n = layer(torch.cat(sequences), hx, cu_seqlens=offsets)
    return list(output.split(offsets.diff().tolist())), h_n


FORMS: dict[str, Form] = {"packed": as_packed, "jagged": as_jagged, "documents": as_documents}
every_form = pytest.mark.parametrize("form", FORMS)
every_layer = pytest.mark.parametrize("name", RECURRENCES)


def one_by_one(layer: MinRNN, sequences: list[Tensor], hx: Tensor | None) -> Result:
    """Run each sequence alone, unbatched: what every form must equal. An empty one keeps its state."""
    states = layer.num_layers * layer.num_directions
    outputs, finals = [], []
    for number, x in enumerate(sequences):
        h = x.new_zeros(states, H) if hx is None else hx[:, number]
        output, final = layer(x, h) if len(x) else (x.new_zeros(0, layer.num_directions * H), h)
        outputs.append(output)
        finals.append(final)
    return outputs, torch.stack(finals, dim=1)


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    gate, form = RECURRENCES[name]
    return LAYERS[gate](I, H, dtype=dtype, **form, **options)


def make_sequences(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, I, dtype=torch.float64, generator=generator).to(dtype) for length in lengths]


def make_hx(layer: MinRNN, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (layer.num_layers * layer.num_directions, batch, H)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def assert_same(ours: Result, theirs: Result, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 1e-12}
    assert len(ours[0]) == len(theirs[0])
    for mine, alone in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(mine, alone, **tolerance)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)


def gradients(run: Form, layer: MinRNN, sequences: list[Tensor], hx: Tensor | None) -> list[Tensor]:
    """Of a loss that weighs every output and final state differently, by input, hx and parameters."""
    leaves = [x.clone().requires_grad_() for x in sequences]
    h = None if hx is None else hx.clone().requires_grad_()
    outputs, h_n = run(layer, leaves, h)
    rows = torch.cat([*outputs])
    weights = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)
    loss = (rows * weights).sum() + (h_n * torch.linspace(1, 2, H, dtype=rows.dtype)).pow(2).sum()
    return list(torch.autograd.grad(loss, [*leaves, *([] if h is None else [h]), *layer.parameters()]))


@every_form
@every_layer
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("candidate", ["positive", "linear", "tanh"])
def test_each_sequence_is_as_if_alone(form: str, name: str, with_hx: bool, candidate: str) -> None:
    layer = build(name, num_layers=2, bidirectional=True, candidate=candidate)
    sequences = make_sequences(LENGTHS)
    hx = make_hx(layer, len(LENGTHS)) if with_hx else None
    assert_same(FORMS[form](layer, sequences, hx), one_by_one(layer, sequences, hx))


@every_form
@every_layer
@pytest.mark.parametrize("with_hx", [False, True])
def test_gradients_are_those_of_each_alone(form: str, name: str, with_hx: bool) -> None:
    layer = build(name, num_layers=2, bidirectional=True)
    sequences = make_sequences(LENGTHS)
    hx = make_hx(layer, len(LENGTHS)) if with_hx else None
    ours = gradients(FORMS[form], layer, sequences, hx)
    alone = gradients(one_by_one, layer, sequences, hx)
    for mine, theirs in zip(ours, alone, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@every_form
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    bidirectional=st.booleans(),
    with_hx=st.booleans(),
)
def test_any_lengths(form: str, lengths: list[int], bidirectional: bool, with_hx: bool) -> None:
    if form == "packed":
        lengths = [max(length, 1) for length in lengths]  # torch packs no empty sequence
    layer = build("mingru", bidirectional=bidirectional)
    sequences = make_sequences(lengths)
    hx = make_hx(layer, len(lengths)) if with_hx else None
    assert_same(FORMS[form](layer, sequences, hx), one_by_one(layer, sequences, hx))


# Not of jagged tensors: torch cannot differentiate their values() twice.
@pytest.mark.parametrize("form", ["packed", "documents"])
@pytest.mark.parametrize("with_hx", [False, True])
def test_second_derivatives(form: str, with_hx: bool) -> None:
    layer = build("mingru", bidirectional=True)
    sequences = make_sequences([2, 0 if form != "packed" else 1, 3])
    inputs = [x.requires_grad_() for x in sequences]
    hx = make_hx(layer, len(sequences)).requires_grad_() if with_hx else None

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        outputs, h_n = FORMS[form](layer, list(tensors[: len(inputs)]), tensors[-1] if with_hx else None)
        return torch.cat(outputs), h_n

    arguments = (*inputs, hx) if with_hx else tuple(inputs)
    forward_too = form != "packed"  # through which torch cannot pack
    assert torch.autograd.gradcheck(run, arguments, check_forward_ad=forward_too)
    assert torch.autograd.gradgradcheck(run, arguments)


@every_form
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_hx", [False, True])
def test_dtypes(form: str, name: str, dtype: torch.dtype, with_hx: bool) -> None:
    layer, sequences = build(name, dtype), make_sequences([5, 9, 2], dtype)
    hx = make_hx(layer, 3, dtype) if with_hx else None
    ours, alone = FORMS[form](layer, sequences, hx), one_by_one(layer, sequences, hx)
    assert {x.dtype for x in (*ours[0], ours[1])} == {dtype}
    step = torch.finfo(dtype).eps
    assert_same(ours, alone, rtol=2 * step, atol=4 * step)


@every_form
def test_16_bit_input_may_start_from_a_float32_state(form: str) -> None:
    layer, sequences = build("mingru", torch.bfloat16), make_sequences([5, 9, 2], torch.bfloat16)
    hx = make_hx(layer, 3, torch.float32)
    ours = FORMS[form](layer, sequences, hx)
    assert ours[1].dtype == torch.bfloat16
    assert_same(ours, one_by_one(layer, sequences, hx), rtol=0.02, atol=0.02)
    with pytest.raises(TypeError, match=r"hx must be torch.float32 or narrower .* got torch.float64"):
        FORMS[form](layer, sequences, hx.double())


@every_form
@pytest.mark.parametrize("with_hx", [False, True])
def test_autocast(form: str, with_hx: bool) -> None:
    layer, sequences = build("mingru", torch.float32), make_sequences([5, 9, 2], torch.float32)
    hx = make_hx(layer, 3, torch.float32) if with_hx else None
    with torch.autocast("cpu", torch.bfloat16):
        ours, alone = FORMS[form](layer, sequences, hx), one_by_one(layer, sequences, hx)
    assert {x.dtype for x in (*ours[0], ours[1])} == {torch.bfloat16}
    assert_same(ours, alone, rtol=0.02, atol=0.02)


@every_form
def test_long_sequences_beside_short_ones(form: str) -> None:
    """No padding, so a long sequence costs what it costs alone."""
    layer, sequences = build("mingru", bidirectional=True), make_sequences([1, 5000, 2, 700])
    for hx in (None, make_hx(layer, 4)):
        assert_same(FORMS[form](layer, sequences, hx), one_by_one(layer, sequences, hx))


@every_form
def test_dropout_acts_in_training_only(form: str) -> None:
    layer, sequences = build("mingru", num_layers=2, dropout=0.5), make_sequences(LENGTHS)
    undropped = build("mingru", num_layers=2)
    first, second = (torch.cat(FORMS[form](layer, sequences, None)[0]) for _ in range(2))
    assert not torch.equal(first, second)
    assert_same(FORMS[form](layer.eval(), sequences, None), one_by_one(undropped, sequences, None))


# --- PackedSequence --------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7, 4, 1], [1, 7, 4, 7], [3], [2, 2]])
def test_packed_sequences_come_back_as_they_went_in(name: str, batch_first: bool, lengths: list[int]) -> None:
    layer, theirs = build(name, batch_first=batch_first), nn.GRU(I, H, batch_first=batch_first).double()
    padded = torch.randn(max(lengths), len(lengths), I, dtype=torch.float64)
    sorted_already = lengths == sorted(lengths, reverse=True)
    for enforce_sorted in {False, sorted_already}:
        packed = pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=enforce_sorted)
        (output, h_n), (expected, expected_h_n) = layer(packed), theirs(packed)
        assert isinstance(output, PackedSequence)
        assert output.data.shape == expected.data.shape
        assert h_n.shape == expected_h_n.shape
        assert torch.equal(output.batch_sizes, expected.batch_sizes)
        for ours, torchs in zip(output[2:], expected[2:], strict=True):
            assert (ours is None) == (torchs is None)
            assert ours is None or torch.equal(ours, torchs)
        sequences = [padded[:length, row] for row, length in enumerate(lengths)]
        assert_same((unpack_sequence(output), h_n), one_by_one(layer, sequences, None))


# --- jagged nested tensors -------------------------------------------------------------------------------


def test_jagged_output_goes_with_its_input() -> None:
    layer = MinGRU(H, H, dtype=torch.float64)
    nested = torch.nested.nested_tensor(
        [torch.randn(length, H, dtype=torch.float64) for length in LENGTHS], layout=torch.jagged
    )
    output, _ = layer(nested)
    residual = nested + output  # only tensors of the same raggedness add
    for total, x, y in zip(residual.unbind(), nested.unbind(), output.unbind(), strict=True):
        torch.testing.assert_close(total, x + y)


def test_jagged_gradients_reach_the_nested_tensor() -> None:
    layer = build("mingru")
    nested = torch.nested.nested_tensor(make_sequences(LENGTHS), layout=torch.jagged, requires_grad=True)
    layer(nested)[0].values().sum().backward()
    leaves = [x.requires_grad_() for x in make_sequences(LENGTHS)]
    sum(layer(x)[0].sum() for x in leaves).backward()
    assert nested.grad is not None
    for mine, leaf in zip(nested.grad.unbind(), leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad, rtol=0, atol=1e-12)


def test_jagged_tensor_with_holes() -> None:
    layer, padded = build("minlstm"), torch.randn(3, 6, I, dtype=torch.float64)
    start, length = torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4])
    nested = torch.nested.narrow(padded, 1, start, length, layout=torch.jagged)
    output, h_n = layer(nested)
    sequences = [padded[row, s : s + n] for row, (s, n) in enumerate(zip(start, length, strict=True))]
    assert_same((list(output.unbind()), h_n), one_by_one(layer, sequences, None))


# --- cu_seqlens ------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("batch_first", [False, True])
def test_documents_may_have_a_batch_of_one_beside(name: str, batch_first: bool) -> None:
    layer, sequences = build(name, batch_first=batch_first), make_sequences(LENGTHS)
    rows, offsets, axis = torch.cat(sequences), offsets_of(sequences), 0 if batch_first else 1
    output, h_n = layer(rows, cu_seqlens=offsets)
    batched, batched_h_n = layer(rows.unsqueeze(axis), cu_seqlens=offsets)
    assert torch.equal(batched, output.unsqueeze(axis))
    assert torch.equal(batched_h_n, h_n)


def test_documents_are_as_marked_by_reset() -> None:
    layer, sequences = build("mingru", bidirectional=True), make_sequences(LENGTHS)
    rows, offsets = torch.cat(sequences), offsets_of(sequences)
    reset = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, offsets[:-1], True)
    assert torch.equal(layer(rows, cu_seqlens=offsets)[0], layer(rows, reset=reset)[0])


def test_jagged_tensors_compile() -> None:
    layer = build("mingru", torch.float32, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, [9, 2, 3]):
        sequences = make_sequences(lengths, torch.float32)
        nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
        (output, h_n), expected = compiled(nested), one_by_one(layer, sequences, None)
        assert_same((list(output.unbind()), h_n), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_hx", [False, True])
def test_documents_compile_to_one_graph_for_all_lengths(with_hx: bool) -> None:
    layer = build("mingru", torch.float32, bidirectional=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in (LENGTHS, [9, 2, 3], [4, 4]):
        sequences = make_sequences(lengths, torch.float32)
        hx = make_hx(layer, len(lengths), torch.float32) if with_hx else None
        rows, offsets = torch.cat(sequences), offsets_of(sequences)
        ours, alone = (run(rows, hx, cu_seqlens=offsets) for run in (compiled, layer))
        torch.testing.assert_close(ours, alone)
        ours[0].sum().backward()


# --- what does not fit -----------------------------------------------------------------------------------


def test_errors() -> None:
    layer, sequences = build("mingru"), make_sequences(LENGTHS)
    rows, offsets = torch.cat(sequences), offsets_of(sequences)
    packed = pack_sequence(sequences, enforce_sorted=False)
    nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"hx must be \(1, 5, 4\), got \(1, 4\)"):
        layer(packed, torch.zeros(1, H))
    with pytest.raises(ValueError, match=r"hx must be \(1, 5, 4\), got \(1, 3, 4\)"):
        layer(nested, torch.zeros(1, 3, H))
    with pytest.raises(ValueError, match="reset must be None with packed, jagged or joined sequences"):
        layer(packed, reset=torch.zeros(len(rows), dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens goes with a plain tensor, got PackedSequence"):
        layer(packed, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens goes with a plain tensor, got NestedTensor"):
        layer(nested, cu_seqlens=offsets)
    with pytest.raises(ValueError, match="must have 5 channels"):
        layer(pack_sequence([x[:, :3] for x in sequences], enforce_sorted=False))
    with pytest.raises(ValueError, match=r"weights' dtype, torch.float64, got torch.float32"):
        layer(packed.float())


def test_nested_errors() -> None:
    layer, sequences = build("mingru"), make_sequences(LENGTHS)
    with pytest.raises(TypeError, match=r"must have layout torch.jagged, got torch.strided"):
        layer(torch.nested.as_nested_tensor(sequences, layout=torch.strided))
    nested = torch.nested.as_nested_tensor(sequences, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be \(N, \*, 5\)"):
        layer(nested.transpose(1, 2))
    with pytest.raises(ValueError, match=r"must be \(N, \*, 5\)"):
        layer(nested.unsqueeze(-1))


@pytest.mark.parametrize(
    ("offsets", "error", "message"),
    [
        ([0, 3, 22], TypeError, "must be an int32 or int64 tensor, got list"),
        (torch.tensor([0.0, 22.0]), TypeError, "int32 or int64 tensor, got torch.float32"),
        (torch.tensor([[0, 22]]), ValueError, r"must be \(N \+ 1,\), got \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, r"must be \(N \+ 1,\), got \(0,\)"),
        (torch.tensor([22]), ValueError, "must rise from 0"),
        (torch.tensor([1, 22]), ValueError, r"must rise from 0 to the input's 22 steps, got \[1, 22\]"),
        (torch.tensor([0, 21]), ValueError, "must rise from 0"),
        (torch.tensor([0, 9, 8, 22]), ValueError, "must rise from 0"),
    ],
)
def test_offsets_that_do_not_fit(offsets: Any, error: type[Exception], message: str) -> None:
    layer, rows = build("mingru"), torch.cat(make_sequences(LENGTHS))
    with pytest.raises(error, match=message):
        layer(rows, cu_seqlens=offsets)


def test_documents_go_with_one_row() -> None:
    layer, rows = build("mingru"), torch.cat(make_sequences(LENGTHS))
    with pytest.raises(ValueError, match=r"must be \(total, C\) or a batch of 1, got \(11, 2, 5\)"):
        layer(rows.view(11, 2, I), cu_seqlens=torch.tensor([0, 11]))


@pytest.mark.parametrize("lengths", list(product([0, 1, 3], repeat=3)), ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_state_after_each_sequence(lengths: tuple[int, ...], reverse: bool) -> None:
    """Wherever empty ones stand; they leave the state as it was."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    h, h0 = torch.rand(1, sum(lengths), 2), torch.rand(3, 2)
    joined = Joined(offsets, sum(lengths))
    edges = offsets.tolist()
    for start in (h0, None):
        final = joined.final(h, start, reverse=reverse)
        for n, (first, end) in enumerate(pairwise(edges)):
            before = torch.zeros(2) if start is None else start[n]
            expected = before if first == end else h[0, first if reverse else end - 1]
            assert torch.equal(final[n], expected)
    steps = range(sum(lengths))
    assert joined.starts[0].tolist() == [t in edges[:-1] for t in steps]
    assert joined.ends[0].tolist() == [t + 1 in edges[1:] for t in steps]
