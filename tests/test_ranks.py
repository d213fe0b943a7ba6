"""Ranks: what each computes, what they exchange, how they are found, and how they fail."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_pool import MISSING, Pool, pool

from minrnn.cli.main import main
from minrnn.cli.train import _launcher
from minrnn.distributed import ALONE, Launch, RankGroup, Ranks, join
from minrnn.distributed.failures import Failures, LostRanksError, describe
from minrnn.distributed.launch import REMEDY
from minrnn.training import stopping

needs_processes = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool(tmp_path_factory.mktemp("stores"), 3) as made:
        yield made


# --- what a rank computes --------------------------------------------------------------------------------

sizes = st.integers(1, 9)


@given(sizes, st.integers(0, 100), st.booleans())
def test_rows_are_divided_evenly_without_gaps(size: int, count: int, mirrored: bool) -> None:
    parts = [Ranks(rank, size).rows(count, mirrored=mirrored) for rank in range(size)]
    assert parts == [Ranks(0, size).rows(count, mirrored=mirrored, rank=rank) for rank in range(size)]
    assert [row for part in parts for row in range(count)[part]] == list(range(count))
    lengths = [part.stop - part.start for part in parts]
    assert max(lengths) - min(lengths) <= 1


@given(sizes, st.integers(0, 50), st.integers(0, 50))
def test_two_batches_are_divided_evenly_together(size: int, one: int, other: int) -> None:
    lengths = [
        len(range(one)[ranks.rows(one)]) + len(range(other)[ranks.rows(other, mirrored=True)])
        for ranks in (Ranks(rank, size) for rank in range(size))
    ]
    assert max(lengths) - min(lengths) <= 2
    if one % size + other % size <= 1:
        assert max(lengths) - min(lengths) <= 1


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 30), st.integers(0, 30))
def test_divided_sequences_are_divided_evenly_without_gaps(
    groups: int, parts: int, rows: int, steps: int
) -> None:
    """Each place of a batch is one rank's, and consecutive ranks hold the same rows."""
    ranks = [Ranks(rank, groups * parts).sharing(parts) for rank in range(groups * parts)]
    assert all(each.row_groups == groups for each in ranks)
    held = [
        (row, step)
        for each in ranks
        for row in range(rows)[each.rows(rows)]
        for step in range(steps)[each.steps(steps)]
    ]
    assert sorted(held) == [(row, step) for row in range(rows) for step in range(steps)]
    for first in range(0, len(ranks), parts):
        own = ranks[first : first + parts]
        assert len({str(each.rows(rows, mirrored=True)) for each in own}) == 1
        cuts = [each.steps(steps) for each in own]
        assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]


def test_the_ranks_of_a_sequence_divide_their_number() -> None:
    assert Ranks(1, 4).sharing(1) == Ranks(1, 4)
    assert Ranks(1, 4).sharing(2).describe() == "4 ranks, 1 on this machine, 2 for each sequence; each: "
    for ranks, parts in ((Ranks(1, 4), 3), (ALONE, 2)):
        message = rf"train\.sequence_ranks must divide the number of ranks, {ranks.size} .*, got {parts}"
        with pytest.raises(ValueError, match=message):
            ranks.sharing(parts)


@given(sizes, st.integers(0, 100))
def test_every_index_is_one_ranks(size: int, index: int) -> None:
    assert [Ranks(rank, size).mine(index) for rank in range(size)].count(True) == 1


@given(sizes, st.integers(0, 100))
def test_ranks_of_sharded_weights_call_the_model_equally_often(size: int, count: int) -> None:
    ranks = [Ranks(rank, size).sharing(1, weights=True) for rank in range(size)]
    calls = [sum(map(each.mine, range(count))) + each.lags(count) for each in ranks]
    assert set(calls) == {-(-count // size)}
    assert not any(Ranks(rank, size).lags(count) for rank in range(size))


def test_ranks_that_take_part_in_saving() -> None:
    for weights, expected in ((False, [True, False]), (True, [True, True])):
        ranks = [Ranks(rank, 2).sharing(1, weights=weights) for rank in range(2)]
        assert [each.saves for each in ranks] == expected
    assert ranks[0].describe() == "2 ranks, 1 on this machine, sharded weights; each: "


def test_a_run_of_one_process_is_not_told_apart() -> None:
    assert (ALONE.is_first, ALONE.rows(5), ALONE.mine(3)) == (True, slice(0, 5), True)
    assert (ALONE.device("cuda:3"), ALONE.threads(3)) == ("cuda:3", 3)
    assert ALONE.threads(0) == torch.get_num_threads()
    assert (ALONE.sums([0.5, 2]), ALONE.highest([3]), ALONE.first_says(lambda: "a")) == ([0.5, 2], [3], "a")
    model = torch.nn.Linear(1, 1)
    assert ALONE.distribute(model, torch.device("cpu")) is model
    with ALONE.evaluating(model), ALONE.accumulating(model):
        pass
    assert ALONE.sharing(1, weights=True) == ALONE
    assert (ALONE.saves, ALONE.lags(3)) == (True, False)
    state = torch.get_rng_state()
    ALONE.reseed(3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert ALONE.describe() == _launcher(ALONE) == ""


@pytest.mark.parametrize(
    ("name", "has_gpu", "expected"),
    [
        ("auto", False, "cpu"),
        ("auto", True, "cuda:1"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda:1"),
    ],
)
def test_a_rank_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, has_gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert RankGroup(3, 4, 1, 2).device(name) == expected


def test_the_number_of_a_gpu_is_not_for_ranks_that_share_a_machine() -> None:
    assert RankGroup(1, 2, 0, 1).device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match=r"without a number where 2 ranks share a machine, got 'cuda:1'"):
        RankGroup(1, 2, 1, 2).device("cuda:1")


def test_threads_of_a_machine_are_divided_among_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    of_two, of_nine = RankGroup(0, 2, 0, 2), RankGroup(0, 9, 0, 9)
    for variable in (None, "1"):  # torchrun sets it to 1
        if variable is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert [of_two.threads(0), of_two.threads(6), of_two.threads(1)] == [4, 3, 1]
        assert of_nine.threads(0) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert [of_two.threads(0), of_two.threads(6)] == [3, 3]


# --- how they are found ----------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_torchrun_is_found_in_the_environment() -> None:
    assert Launch.of({}) == Launch.of({"RANK": "3"}) == Launch()
    assert Launch.of(TORCHRUN) == Launch(3, 4, 1, 2)
    elastic = {
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_MAX_RESTARTS": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    assert Launch.of(TORCHRUN | elastic) == Launch(3, 4, 1, 2, 1, 2, True)
    with pytest.raises(ValueError, match="LOCAL_RANK must be a number, as torchrun sets it, got None"):
        Launch.of({"RANK": "3", "WORLD_SIZE": "4"})
    with pytest.raises(ValueError, match="RANK must be a number, as torchrun sets it, got 'x'"):
        Launch.of(TORCHRUN | {"RANK": "x"})


def test_restarts_that_would_fail_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Launch(0, 2, most_restarts=0, shares_store=True).check()
    Launch(0, 2, most_restarts=1, shares_store=False).check()
    Launch(0, 1, most_restarts=1, shares_store=True).check()
    elastic = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (TORCHRUN | elastic).items():
        monkeypatch.setenv(name, value)
    assert main(["train", "demo", "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"minrnn: error: {REMEDY}\n"
    assert main(["train", "demo"]) == 2
    assert "--max-restarts needs --run-dir DIR" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_that_torchrun_has_not_started_is_alone() -> None:
    with join("cpu", 1, Launch()) as ranks:
        assert ranks is ALONE
    assert not torch.distributed.is_initialized()


# --- what they exchange ----------------------------------------------------------------------------------


def exchanged(ranks: Ranks) -> dict[str, Any]:
    own = torch.arange(7.0).view(7, 1)[ranks.rows(7)]
    return {
        "sums": ranks.sums([ranks.rank, 0.1]),
        "highest": ranks.highest([ranks.rank, -ranks.rank, 1 << 60]),
        "said": ranks.first_says(lambda: {"rank": ranks.rank, "nan": float("inf"), "text": "ü" * 1000}),
        "rows": ranks.gather_rows(own, 7).flatten().tolist(),
        "half": ranks.gather_rows(own.to(torch.bfloat16), 7).dtype,
        "flags": ranks.gather_rows(own > 3, 7).flatten().tolist(),
        "described": ranks.describe(),
    }


@needs_processes
def test_what_ranks_exchange(ranks_of: Pool) -> None:
    first, *others = ranks_of.run(3, exchanged)
    for found in (first, *others):
        assert found["sums"] == pytest.approx([3, 0.3], rel=1e-15)
        assert found["sums"] == first["sums"]
        assert found["highest"] == [2, 0, 1 << 60]
        assert found["said"] == {"rank": 0, "nan": float("inf"), "text": "ü" * 1000}
        assert found["half"] == torch.bfloat16
        assert found["described"] == "3 ranks, 3 on this machine; each: "
    assert first["rows"] == list(range(7))
    assert first["flags"] == [row > 3 for row in range(7)]
    assert [found["rows"] for found in others] == [[2, 3], [4, 5, 6]]


def in_order(ranks: Ranks, machines: int) -> list[str]:
    """Return which ranks had made something, as each found it, with two ranks a machine."""
    assert isinstance(ranks, RankGroup)
    assert ranks.failures is not None
    local = RankGroup(ranks.rank, ranks.size, ranks.rank // machines, 2, ranks.failures)
    store, found = ranks.failures.store, []

    def make() -> list[int]:
        before = [rank for rank in range(ranks.size) if store.check([f"made{rank}"])]
        time.sleep(0.1)
        store.set(f"made{ranks.rank}", "1")
        return before

    found = local.in_order("something", make)
    assert local.in_order("else", lambda: 3) == 3
    return [str(rank) for rank in found]


@needs_processes
def test_the_first_rank_prepares_then_the_first_of_each_machine(ranks_of: Pool) -> None:
    """Ranks 0 and 1 are the first of two machines; rank 2 is the second of the first one."""
    found = ranks_of.run(3, in_order, 2)
    assert found == [[], ["0"], ["0", "1"]]


def fail_first(ranks: Ranks) -> None:
    def make() -> None:
        raise ValueError("no such data")

    ranks.in_order("something", make)


@needs_processes
def test_none_waits_for_what_the_first_rank_failed_to_prepare(ranks_of: Pool) -> None:
    assert ranks_of.failures(3, fail_first) == ["ValueError: no such data", "Reported: 1", "Reported: 1"]


def unequal(ranks: Ranks, values: list[Any]) -> None:
    ranks.check_equal("the data", values[0])
    ranks.check_equal("the data", values[ranks.rank])


@needs_processes
def test_what_must_be_the_same_is_compared(ranks_of: Pool) -> None:
    assert ranks_of.run(3, unequal, [{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 1, "b": 2}]) == [None] * 3
    found = ranks_of.failures(3, unequal, ["a", "a", "b"])
    told = "ValueError: the data must be the same on all ranks; on rank 2 it is 'b', and 'a' on rank 0"
    assert sorted(found) == ["Reported: 1", "Reported: 1", told]
    settings = [{"train": {"steps": steps, "seed": 0}} for steps in (3, 4, 3)]
    assert any(
        "on rank 1 train.steps is 4, and 3 on rank 0" in one
        for one in ranks_of.failures(3, unequal, settings)
    )


def requested(ranks: Ranks, signums: list[int], code: int) -> tuple[bool, bool, int, str, bool]:
    interruption = stopping.SharedInterruption(ranks=ranks)
    interruption.agree()
    before = interruption.requested
    interruption.signum = signums[ranks.rank]
    if code and ranks.is_first:
        interruption.failure = OSError(code, "rank 0's")
    assert not interruption.requested  # not before the others know
    interruption.agree()
    reason = type(interruption.to_exception("step 3")).__name__ if interruption.requested else ""
    return before, interruption.requested, interruption.signum, reason, interruption.announces


@needs_processes
def test_a_request_to_one_rank_is_one_to_all(ranks_of: Pool) -> None:
    term, pipe, full = signal.SIGTERM, 32, 28
    for signums, code, expected in (
        ([0, 0, 0], 0, (False, 0, "")),
        ([0, 0, term], 0, (True, term, "Interrupted")),
        ([0, 0, 0], pipe, (True, 0, "Interrupted")),
        ([0, 0, 0], full, (True, 0, "OSError")),
    ):
        for rank, found in enumerate(ranks_of.run(3, requested, signums, code)):
            assert found == (False, *expected, rank == 0)


# --- how they fail ---------------------------------------------------------------------------------------


def fail(ranks: Ranks, text: str) -> None:
    raise ValueError(text)


def fail_alone(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("no such data")
    ranks.sums([1.0])


def fail_differently(ranks: Ranks) -> None:
    raise ValueError(f"of rank {ranks.rank}")


@needs_processes
def test_an_error_of_all_ranks_is_reported_once(ranks_of: Pool) -> None:
    assert sorted(ranks_of.failures(3, fail, "x: y")) == ["Reported: 1", "Reported: 1", "ValueError: x: y"]
    assert sorted(ranks_of.failures(3, fail_differently)) == [f"ValueError: of rank {r}" for r in range(3)]


@needs_processes
def test_an_error_of_one_rank_ends_the_others_without_another(ranks_of: Pool) -> None:
    assert ranks_of.failures(3, fail_alone) == ["Reported: 1", "ValueError: no such data", "Reported: 1"]


def be_killed(ranks: Ranks, who: int, at_the_end: bool) -> None:
    ranks.sums([1.0])
    if ranks.rank == who:
        os.kill(os.getpid(), signal.SIGKILL)
    if not at_the_end:
        ranks.sums([1.0])


@needs_processes
@pytest.mark.parametrize(("who", "at_the_end"), [(0, False), (1, True)])
def test_a_rank_that_is_killed_is_named_once(tmp_path: Path, who: int, at_the_end: bool) -> None:
    with pool(tmp_path, 3) as own:
        found = own.failures(3, be_killed, who, at_the_end)
    assert found.pop(who) == "killed"
    assert sorted(found) == [f"LostRanksError: {describe([who], 250)}", "Reported: 1"]


def hang(ranks: Ranks) -> None:
    ranks.sums([1.0])
    if ranks.rank == 1:
        signal.pause()
    ranks.sums([1.0])


@needs_processes
def test_a_rank_that_hangs_is_named_in_bounded_time(tmp_path: Path) -> None:
    with pool(tmp_path, 2) as own:
        own._ends[1] = Silent(own._ends[1])
        found = own.failures(2, hang, timeout=5)
    assert found[0] == f"LostRanksError: {describe([1], 5)}"


def test_ranks_that_never_join_are_missed_in_bounded_time(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 3)
    message = re.escape(describe([0, 2], 1))
    with pytest.raises(LostRanksError, match=message), join("cpu", 1, Launch(1, 3, 1, 3), store):
        pass
    assert not torch.distributed.is_initialized()


def number_joined(ranks: Ranks) -> int:
    assert isinstance(ranks, RankGroup)
    assert ranks.failures is not None
    return ranks.failures.store.add("joined", 0)


@needs_processes
def test_none_has_joined_before_all_have(ranks_of: Pool) -> None:
    store = torch.distributed.HashStore()
    first, last = Failures(store, 0, 2), Failures(store, 1, 2)
    with pytest.raises(torch.distributed.DistStoreError):
        first.meet(timedelta(milliseconds=100))
    last.meet(timedelta(milliseconds=100))
    assert ranks_of.run(2, number_joined) == [2, 2]


def test_functions_of_torch_do_not_hold_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of torch has the group of its import as a default: it is imported before there is one."""
    name, seen = "torch.distributed.nn.functional", []
    monkeypatch.delitem(sys.modules, name, raising=False)

    def refuse(*_: Any, **__: Any) -> None:
        seen.append(sys.modules[name])
        raise ValueError("no group")

    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    store = torch.distributed.HashStore()
    with pytest.raises(ValueError, match="no group"), join("cpu", 1, Launch(0, 2, 0, 2), store):
        pass
    assert seen[0].broadcast.__defaults__ == (None,)


class Silent:
    """The end of a pipe whose process is not waited for."""

    def __init__(self, end: Any) -> None:
        self._end = end

    def send(self, message: Any) -> None:
        self._end.send(message)

    def poll(self, seconds: float) -> bool:
        return True

    def recv(self) -> Any:
        raise EOFError


def test_sentences_about_lost_ranks() -> None:
    assert describe([1, 3], 2).startswith("ranks 1, 3 have ended or have not answered for 2 s")
    assert describe([], 2).startswith("another rank has ended or has not answered")
