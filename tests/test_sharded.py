"""A scan over ranks is the scan of the whole sequence: states, end, gradients of both orders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import laws
import pytest
import torch
from laws import GATES, mode, relative_error
from rank_pool import MISSING, Pool, pool
from rank_threads import group_name, on_threads
from torch import Tensor, distributed

from minrnn.distributed import Ranks
from minrnn.ops import exchange, sharded_scan
from minrnn.ops.gated import Mode
from minrnn.ops.sharded import _scan

needs_processes = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CUTS = {2: (0, 21, 40), 4: (0, 3, 4, 30, 40)}
"""Where parts begin and end, by the number of ranks: uneven, and of a single step."""

LIMIT = {torch.float64: 2e-13, torch.float32: 1e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}


class Case(NamedTuple):
    """A recurrence over a whole sequence, and the gradients of what it returns."""

    pre: list[Tensor]
    h0: Tensor | None
    reset: Tensor | None
    dh: Tensor
    dend: Tensor
    mode: tuple[str, str, bool, bool]
    packed: bool
    cuts: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        _, candidate, signed, reverse = self.mode
        return {"candidate": candidate, "signed": signed, "reverse": reverse}

    def part(self, rank: int) -> slice:
        return slice(self.cuts[rank], self.cuts[rank + 1])

    def whole(self) -> list[Tensor]:
        """Return h, end, and the gradients of pre and h0, in float64."""
        leaves = [x.double().clone().requires_grad_() for x in (*self.pre, self.h0) if x is not None]
        start = None if self.h0 is None else leaves[-1]
        pre = leaves[: len(self.pre)]
        h = laws.minrnn.ops.gated_scan(self.mode[0], *pre, h0=start, reset=self.reset, **self.options)
        end = h[:, 0 if self.mode[3] else -1]
        gradients = [self.dh.double(), (len(self.cuts) - 1) * self.dend.double()]
        return [h, end, *torch.autograd.grad((h, end), leaves, gradients)]

    def on_rank(self, rank: int) -> list[Tensor]:
        """Return the same of one part."""
        place = self.part(rank)
        pre = [x[:, place].clone().requires_grad_() for x in self.pre]
        h0 = None if self.h0 is None else self.h0.clone().requires_grad_()
        given = [torch.cat(pre, -1)] if self.packed else pre
        reset = None if self.reset is None else self.reset[:, place]
        h, end = sharded_scan(self.mode[0], *given, h0=h0, reset=reset, group=group_name(), **self.options)
        leaves = [x for x in (*pre, h0) if x is not None]
        return [h, end, *torch.autograd.grad((h, end), leaves, (self.dh[:, place], self.dend.to(end.dtype)))]

    def check(self, found: list[list[Tensor]], limit: float) -> None:
        h, end, *gradients = self.whole()
        parts = list(zip(*found, strict=True))
        assert relative_error(torch.cat(parts[0], 1), h) < limit
        for each in parts[1]:
            assert relative_error(each, end) < max(limit / 4, 1e-13) if each.dtype == h.dtype else limit
        for of_parts, exact in zip(parts[2:], gradients, strict=True):
            if exact.dim() == 3:
                assert relative_error(torch.cat(of_parts, 1), exact) < limit
            else:
                first = -1 if self.mode[3] else 0
                assert relative_error(of_parts[first], exact) < limit
                assert not any(x.any() for x in of_parts if x is not of_parts[first])


def case(
    gate: str, size: int, dtype: torch.dtype, *, reverse: bool, forget: str, start: bool, packed: bool
) -> Case:
    cuts = CUTS[size]
    pre, h0, reset, dh = laws.inputs(gate, 2, cuts[-1], 5, dtype)
    if forget == "first steps":  # a document begins where a part does
        reset[:] = False
        reset[:, list(cuts[:-1])] = True
    return Case(
        pre,
        h0 if start else None,
        None if forget == "nothing" else reset,
        dh,
        h0.flip(0),
        mode(gate, reverse=reverse),
        packed,
        cuts,
    )


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, dtype) for size in CUTS for dtype in LIMIT if size == 4 or dtype == torch.float32],
    ids=str,
)
def test_parts_are_the_whole(gate: str, size: int, dtype: torch.dtype) -> None:
    sweep = itertools.product((False, True), ("nothing", "some", "first steps"), (False, True), (False, True))
    cases = [
        case(gate, size, dtype, reverse=reverse, forget=forget, start=start, packed=packed)
        for reverse, forget, start, packed in sweep
        if dtype != torch.float16 or packed
    ]
    found = on_threads(size, lambda rank: [each.on_rank(rank) for each in cases])
    for each, of_ranks in zip(cases, zip(*found, strict=True), strict=True):
        each.check(list(of_ranks), LIMIT[dtype])


@pytest.mark.parametrize("candidate", ["linear", "tanh"])
def test_candidates(candidate: str) -> None:
    given = case("minlstm", 2, torch.float64, reverse=False, forget="some", start=True, packed=False)
    given = given._replace(mode=mode("minlstm", candidate))
    given.check(on_threads(2, given.on_rank), LIMIT[torch.float64])


@pytest.mark.parametrize("gate", ["mingru", "minlstm_signed"])
@pytest.mark.parametrize("T", [4, 2**20], ids=["a step for each rank", "a million steps"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_lengths(gate: str, T: int, reverse: bool) -> None:
    """The error does not grow with length, though a step forgets a millionth only."""
    pre, h0, _, dh = laws.inputs(gate, 1, T, 2, torch.float32)
    which, sign = GATES[gate].keeps
    pre[which] = 0.1 * pre[which] + sign * 13.8
    if "i" in GATES[gate].pre:  # beside which a normalized f is small
        pre[1] = pre[1] - 13.8
    cuts = (0, T // 4, T // 2, 3 * T // 4, T)
    given = Case(pre, h0, None, dh, h0, mode(gate, reverse=reverse), False, cuts)
    given.check(on_threads(4, given.on_rank), 2e-6)


@pytest.mark.parametrize("gate", GATES)
def test_second_derivatives(gate: str) -> None:
    """Of the sum of squares of all first derivatives, by autograd over the ranks together."""
    given = case(gate, 4, torch.float64, reverse=True, forget="some", start=True, packed=False)
    assert given.h0 is not None

    def squares(outputs: Any, weights: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(outputs, leaves, weights, create_graph=True)
        # Where h0 is not read, its gradient is a constant.
        return torch.autograd.grad(sum((x * x).sum() for x in first), leaves, materialize_grads=True)

    leaves = [x.clone().requires_grad_() for x in (*given.pre, given.h0)]
    h = laws.gated_scan(gate, *leaves[:-1], h0=leaves[-1], reset=given.reset, reverse=True)
    exact = squares((h, h[:, 0]), (given.dh, 4 * given.dend), leaves)

    def on_rank(rank: int) -> tuple[Tensor, ...]:
        place = given.part(rank)
        own = [x.clone().requires_grad_() for x in (*(x[:, place] for x in given.pre), given.h0)]
        reset = given.reset[:, place]
        outputs = sharded_scan(
            given.mode[0], *own[:-1], h0=own[-1], reset=reset, group=group_name(), **given.options
        )
        return squares(outputs, (given.dh[:, place], given.dend), own)

    parts = list(zip(*on_threads(4, on_rank), strict=True))
    for of_parts, whole in zip(parts[:-1], exact, strict=False):
        assert relative_error(torch.cat(of_parts, 1), whole) < 1e-12
    assert relative_error(sum(parts[-1]), exact[-1]) < 1e-12


def test_what_is_not_needed_is_not_computed() -> None:
    """Gradients of some arguments alone, and of outputs of which one is not used."""
    given = case("mingru", 2, torch.float64, reverse=False, forget="nothing", start=True, packed=False)
    exact = given.whole()

    def on_rank(rank: int) -> tuple[Tensor, ...]:
        z, c = (x[:, given.part(rank)].clone() for x in given.pre)
        c.requires_grad_()
        h, end = sharded_scan("mingru", z, c, h0=given.h0, group=group_name())
        both = torch.autograd.grad(
            (h, end), c, (given.dh[:, given.part(rank)], given.dend), retain_graph=True
        )
        alone = torch.autograd.grad(h.sum(), c, create_graph=True)
        plain = sharded_scan("mingru", z, c.detach(), group=distributed.group.WORLD)
        assert not plain[0].requires_grad
        empty = sharded_scan("mingru", z[:0], c[:0], group=group_name())
        assert [x.shape for x in empty] == [(0, z.shape[1], 5), (0, 5)]
        return *both, *alone

    found = on_threads(2, on_rank)
    assert relative_error(torch.cat([x[0] for x in found], 1), exact[3]) < 1e-12
    h, c = laws.gated_scan, given.pre[1].clone().requires_grad_()
    (theirs,) = torch.autograd.grad(h("mingru", given.pre[0], c, h0=given.h0).sum(), c)
    assert relative_error(torch.cat([x[1] for x in found], 1), theirs) < 1e-12


def test_a_reset_forgets_what_is_not_finite() -> None:
    given = case("mingru", 2, torch.float32, reverse=False, forget="first steps", start=True, packed=False)
    given.pre[1][:, 5] = torch.inf
    h = torch.cat([x[0] for x in on_threads(2, given.on_rank)], 1)
    assert not h[:, 5].isfinite().any()
    assert h[:, given.cuts[1] :].isfinite().all()


@pytest.mark.parametrize(("of", "reset_at"), [("h0", 2), ("a step", 10)])
def test_a_reset_within_a_part_forgets_what_earlier_parts_left(of: str, reset_at: int) -> None:
    """The product of a part's decays is 0 then, and 0 times infinity is none."""
    given = case("mingru", 4, torch.float32, reverse=False, forget="some", start=True, packed=False)
    (given.h0 if of == "h0" else given.pre[1][:, 1]).fill_(torch.inf)
    given.reset[:] = False
    given.reset[:, reset_at] = True
    found = on_threads(4, given.on_rank)
    h, expected = torch.cat([x[0] for x in found], 1), given.whole()[0]
    assert not h[:, reset_at - 1].isfinite().any()
    torch.testing.assert_close(h[:, reset_at:], expected[:, reset_at:].float())
    torch.testing.assert_close(found[0][1], expected[:, -1].float())


@pytest.mark.parametrize("T", [40, 4000])
def test_what_is_exchanged_does_not_depend_on_the_length(T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 B D numbers of each rank in float32 forward, and 2 B D backward."""
    sent: list[int] = []
    inside = exchange._all_gather
    monkeypatch.setattr(
        exchange, "_all_gather", lambda to, x, ranks: (sent.append(x.nbytes), inside(to, x, ranks))
    )
    pre, h0, _, dh = laws.inputs("minlstm", 3, T, 7, torch.bfloat16)
    given = Case(pre, h0, None, dh, h0, mode("minlstm"), False, (0, T // 2, T))
    on_threads(2, given.on_rank)
    assert sent == [2 * 3 * 7 * 4] * 4  # by two ranks, twice each


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "gru"}, "sharded_scan: gate must be one of identity, mingru"),
        ({"reverse": 1}, "sharded_scan: reverse must be a bool, got int"),
        ({"h0": torch.zeros(2, 4)}, r"sharded_scan: h0 must be of shape \(2, 5\) to go with z, got \(2, 4\)"),
    ],
)
def test_arguments_are_checked_before_the_exchange(change: dict[str, Any], message: str) -> None:
    gate, zero = change.pop("gate", "mingru"), torch.zeros(2, 3, 5)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        sharded_scan(gate, zero, zero, group="none", **change)


# --- processes, and compiled -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool(tmp_path_factory.mktemp("stores"), 2) as made:
        yield made


def scan_on(ranks: Ranks, given: Case) -> list[Tensor]:
    return [x.detach() for x in given.on_rank(ranks.rank)]


@needs_processes
def test_processes(ranks_of: Pool) -> None:
    for dtype in (torch.float32, torch.float64):
        given = case("mingru", 2, dtype, reverse=True, forget="some", start=True, packed=True)
        given.check(ranks_of.run(2, scan_on, given), LIMIT[dtype])


def compile_on(ranks: Ranks, given: Case) -> None:
    place, group = given.part(ranks.rank), group_name()

    def run(z: Tensor, c: Tensor, h0: Tensor, reset: Tensor) -> tuple[Tensor, Tensor]:
        h, end = sharded_scan("mingru", z * 2, c, h0=h0, reset=reset, group=group)
        return h * 3, end

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = []
    for function in (run, compiled):
        leaves = [x.clone().requires_grad_() for x in (*(x[:, place] for x in given.pre), given.h0)]
        h, end = function(*leaves, given.reset[:, place])
        (h.square().sum() + end.square().sum()).backward()
        found.append([h, end, *(x.grad for x in leaves)])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*found, strict=True))
    pre = [x[:, place].clone().requires_grad_() for x in given.pre]
    arguments = pre, given.h0.clone().requires_grad_(), given.reset[:, place], *Mode(*given.mode), group
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_scan, arguments, test_utils=tests)


@needs_processes
def test_compiled_graphs_hold_the_operator(ranks_of: Pool) -> None:
    given = case("mingru", 2, torch.float32, reverse=False, forget="some", start=True, packed=False)
    ranks_of.run(2, compile_on, given)
