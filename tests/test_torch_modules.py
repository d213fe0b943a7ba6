"""Torch's own module tests: the inputs that torch tests nn.GRU, nn.LSTM and their cells with, given to ours.

The generators are those of torch's test suite. Adapted are the constructor (no proj_size, which the min
layers do not have) and the weights (no hidden-to-hidden ones). What is asserted is what torch's
test_modules.py asserts of every module; besides, values are compared with torch's own layers whose
hidden-to-hidden weights are zero, which leaves of a GRU a minGRU with candidate tanh, and of an LSTM's cell
state a minLSTM.
"""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, unpack_sequence
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from minrnn.mixers import (
    MinGRU,
    MinGRUCell,
    MinLSTM,
    MinLSTMCell,
    PairedMinLSTM,
    PairedMinLSTMCell,
    convert_rnns,
)

pytest.importorskip("expecttest", reason="expecttest is not installed: the extra dev")
common_modules = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="this torch keeps its module tests elsewhere"
)
settings.load_profile("minrnn")  # torch's tests have loaded a profile of theirs

INFOS = {info.module_cls: info for info in common_modules.module_db}

CASES: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "GRU as MinGRU": (nn.GRU, MinGRU),
    "GRU as MinLSTM": (nn.GRU, MinLSTM),
    "LSTM as PairedMinLSTM": (nn.LSTM, PairedMinLSTM),
    "GRUCell as MinGRUCell": (nn.GRUCell, MinGRUCell),
    "GRUCell as MinLSTMCell": (nn.GRUCell, MinLSTMCell),
    "LSTMCell as PairedMinLSTMCell": (nn.LSTMCell, PairedMinLSTMCell),
}
every_case = pytest.mark.parametrize("case", CASES)


def all_samples(theirs: type[nn.Module], requires_grad: bool = False, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    info = INFOS[theirs]
    return info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=requires_grad, training=True, **options
    )


def samples(
    case: str, requires_grad: bool = False, **options: Any
) -> Iterator[tuple[nn.Module, Any, tuple[Any, ...]]]:
    """Yield ours, built as torch builds theirs; torch's sample; and the arguments of its call."""
    theirs, ours = CASES[case]
    for sample in all_samples(theirs, requires_grad, **options):
        if sample.constructor_input.kwargs.get("proj_size"):
            continue  # test_projections_are_refused
        assert not sample.forward_input.kwargs
        args, kwargs = construction(sample)
        yield ours(*args, **kwargs, dtype=torch.float64), sample, sample.forward_input.args


def construction(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = {key: value for key, value in sample.constructor_input.kwargs.items() if key != "proj_size"}
    return sample.constructor_input.args, kwargs


def flat(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def assert_equal(ours: Any, expected: Any, atol: float = 1e-12) -> None:
    mine, theirs = flat(ours), flat(expected)
    assert len(mine) == len(theirs) > 0
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_the_generators_are_there() -> None:
    counts = {case: sum(1 for _ in samples(case)) for case in CASES}
    assert min(counts.values()) >= 2
    assert counts["GRU as MinGRU"] >= 16


@every_case
def test_forward_is_torchs_reference(case: str) -> None:
    for ours, sample, inputs in samples(case):
        assert_equal(ours(*inputs), sample.reference_fn(ours, *inputs))


@every_case
def test_shapes_are_torchs(case: str) -> None:
    packed = {"with_packed_sequence": True} if "GRU as" in case else {}
    for ours, sample, inputs in samples(case, **packed):
        args, kwargs = construction(sample)
        theirs = CASES[case][0](*args, **kwargs).double()
        assert [x.shape for x in flat(ours(*inputs))] == [x.shape for x in flat(theirs(*inputs))]
        # A PackedSequence is a tuple, so its structure says which of its indices are None.
        assert tree_flatten(ours(*inputs))[1] == tree_flatten(theirs(*inputs))[1]


@every_case
def test_factory_arguments(case: str) -> None:
    for _, sample, _ in samples(case):
        args, kwargs = construction(sample)
        for device, dtype in (("meta", torch.float32), ("cpu", torch.bfloat16)):
            parameters = list(CASES[case][1](*args, **kwargs, device=device, dtype=dtype).parameters())
            assert {(p.device.type, p.dtype) for p in parameters} == {(device, dtype)}


@every_case
def test_representation(case: str) -> None:
    theirs, kind = CASES[case]
    for ours, sample, _ in samples(case):
        args, kwargs = construction(sample)
        assert repr(ours) == repr(theirs(*args, **kwargs)).replace(theirs.__name__, kind.__name__)


@every_case
def test_copies_compute_the_same(case: str) -> None:
    for ours, _, inputs in samples(case):
        expected = ours(*inputs)
        empty = copy.deepcopy(ours).to("meta").to_empty(device="cpu")
        empty.load_state_dict(ours.state_dict())
        for same in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), empty):
            assert repr(same) == repr(ours)
            assert_equal(same(*inputs), expected, atol=0)


@every_case
def test_train_and_eval_agree_without_dropout(case: str) -> None:
    for ours, _, inputs in samples(case):
        assert_equal(copy.deepcopy(ours).eval()(*inputs), ours.train()(*inputs), atol=0)


def noncontiguous(x: Tensor) -> Tensor:
    spread = torch.stack([torch.full_like(x, torch.nan), x.detach()], dim=-1)[..., 1]
    assert spread.numel() < 2 or not spread.is_contiguous()
    return spread.requires_grad_(x.requires_grad)


@every_case
def test_inputs_and_parameters_need_not_be_contiguous(case: str) -> None:
    for ours, _, inputs in samples(case, requires_grad=True):
        strided_inputs = tree_map_only(Tensor, noncontiguous, inputs)
        parameters = dict(ours.named_parameters())
        strided = {key: noncontiguous(p) for key, p in parameters.items()}
        expected, output = ours(*inputs), functional_call(ours, strided, strided_inputs)
        assert_equal(output, expected)
        wanted = gradients(expected, [*parameters.values(), *flat(inputs)])
        found = gradients(output, [*strided.values(), *flat(strided_inputs)])
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine is None) == (theirs is None)  # of nn.LSTM's pair, h_0 is not read
            assert mine is None or torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def gradients(output: Any, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of the sum of squares; None where a leaf is not read."""
    total = torch.stack([(x * x).sum() for x in flat(output)]).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True)


@every_case
@pytest.mark.parametrize("order", [1, 2])
def test_gradients(case: str, order: int) -> None:
    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    for ours, _, inputs in samples(case, requires_grad=True):
        leaves, structure = tree_flatten(inputs)
        names, parameters = zip(*ours.named_parameters(), strict=True)

        def run(
            *tensors: Tensor, ours: Any = ours, structure: Any = structure, names: Any = names
        ) -> tuple[Tensor, ...]:
            arguments = tree_unflatten(tensors[: -len(names)], structure)
            weights = dict(zip(names, tensors[-len(names) :], strict=True))
            return tuple(flat(functional_call(ours, weights, arguments)))

        assert check(run, (*leaves, *parameters), fast_mode=True)


@every_case
def test_errors_come_where_torchs_come(case: str) -> None:
    theirs, kind = CASES[case]
    info = INFOS[theirs]
    found = 0
    for bad in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
    ):
        sample = bad.module_error_input
        if bad.error_on.name == "FORWARD_ERROR" and all(
            not isinstance(x, str)
            for x in sample.constructor_input.args  # an RNN's nonlinearity
        ):
            ours = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            # Where torch's kernels raise RuntimeError, ours is a ValueError as for any shape.
            error = ValueError if bad.error_type is RuntimeError else bad.error_type
            with pytest.raises(error, match=f"^{kind.__name__}: "):
                ours(*sample.forward_input.args)
            found += 1
        elif bad.error_on.name == "CONSTRUCTION_ERROR":
            with pytest.raises(bad.error_type, match=f"^{kind.__name__}: "):
                kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
            found += 1
    assert found >= 4


def test_projections_are_refused() -> None:
    projected = [s.constructor_input for s in all_samples(nn.LSTM) if s.constructor_input.kwargs["proj_size"]]
    assert projected
    for constructor in projected:
        with pytest.raises(ValueError, match="must have no projection, got proj_size=2"):
            convert_rnns(nn.LSTM(*constructor.args, **constructor.kwargs))
        with pytest.raises(TypeError, match="proj_size"):
            PairedMinLSTM(*constructor.args, **constructor.kwargs)


# --- values, against torch's own layers without their hidden-to-hidden weights -----------------------------


def without_hidden_to_hidden(theirs: nn.Module, order: tuple[tuple[int, float], ...]) -> dict[str, Tensor]:
    """Zero the weights that the min layers lack; return the others for ours.

    `order` names, for each of our blocks of rows, theirs and its sign.
    """
    parameters = {}
    for name, parameter in theirs.named_parameters():
        if "_hh" in name:
            nn.init.zeros_(parameter)
        else:
            blocks = parameter.detach().split(theirs.hidden_size)
            parameters[name] = torch.cat([sign * blocks[number] for number, sign in order])
    return parameters


# nn.GRU's rows are [r; z; n], and its z is what it keeps: h = (1 - z) n + z h.
GRU_ROWS = ((1, -1.0), (2, 1.0))
# nn.LSTM's rows are [i; f; g; o].
LSTM_ROWS = ((1, 1.0), (0, 1.0), (2, 1.0))


@pytest.mark.parametrize(("theirs", "kind"), [(nn.GRU, MinGRU), (nn.GRUCell, MinGRUCell)])
def test_mingru_is_a_gru_without_hidden_to_hidden_weights(theirs: Any, kind: Any) -> None:
    packed = {"with_packed_sequence": True} if theirs is nn.GRU else {}
    for sample in all_samples(theirs, requires_grad=True, **packed):
        args, kwargs = construction(sample)
        reference, ours = theirs(*args, **kwargs).double(), kind(*args, **kwargs, candidate="tanh").double()
        ours.load_state_dict(without_hidden_to_hidden(reference, GRU_ROWS))
        inputs = sample.forward_input.args
        output, expected = ours(*inputs), reference(*inputs)
        assert_equal(output, expected)
        leaves = [x for x in flat(inputs) if x.requires_grad]
        assert leaves
        found, wanted = gradients(output, leaves), gradients(expected, leaves)
        for mine, gru in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, gru, rtol=0, atol=1e-12)


@pytest.mark.parametrize("theirs", [nn.LSTM, nn.LSTMCell])
def test_minlstm_is_an_lstms_cell_state_without_hidden_to_hidden_weights(theirs: Any) -> None:
    """Of the first layer: what goes up from there has passed the output gate that a minLSTM lacks."""
    kind = PairedMinLSTM if theirs is nn.LSTM else PairedMinLSTMCell
    for sample in all_samples(theirs):
        if sample.constructor_input.kwargs.get("proj_size"):
            continue
        args, kwargs = construction(sample)
        reference = theirs(*args, **kwargs).double()
        ours = kind(*args, **kwargs, candidate="tanh", normalize=False).double()
        ours.load_state_dict(without_hidden_to_hidden(reference, LSTM_ROWS))
        inputs = sample.forward_input.args
        if theirs is nn.LSTM:
            first = slice(0, ours.num_directions)
            assert_equal(ours(*inputs)[1][1][first], reference(*inputs)[1][1][first])
        else:
            assert_equal(ours(*inputs)[1], reference(*inputs)[1])


@pytest.mark.parametrize("kind", [MinGRU, MinLSTM])
def test_packed_samples_are_each_sequence_alone(kind: Any) -> None:
    name = "GRU as MinGRU" if kind is MinGRU else "GRU as MinLSTM"
    found = 0
    for ours, _, (packed, *_) in samples(name, with_packed_sequence=True):
        if not isinstance(packed, PackedSequence):
            continue
        output, h_n = ours(packed)
        for row, (x, y) in enumerate(zip(unpack_sequence(packed), unpack_sequence(output), strict=True)):
            assert_equal((y, h_n[:, row]), ours(x))
        found += 1
    assert found


@every_case
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu(case: str) -> None:
    for ours, _, inputs in samples(case):
        there = tree_map_only(Tensor, lambda x: x.cuda(), inputs)
        outputs = tree_map_only(Tensor, lambda x: x.cpu(), copy.deepcopy(ours).cuda()(*there))
        assert_equal(outputs, ours(*inputs))
