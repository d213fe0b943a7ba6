"""The GPU engine's kernels, compiled ahead of time for cards that need not be there."""

from __future__ import annotations

import importlib
import re
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from laws import GATES

from minrnn.benchmarks import BENCHES
from minrnn.benchmarks.scan import traffic

pytest.importorskip("triton", reason="Triton is not installed: the extra gpu")

LARGE, LONG, STEP = (8, 4096, 2048), (1, 2**20, 256), (64, 1, 512)
# gate, dtype, shape, compute capability, with an initial state and resets
BUILDS = [
    *((gate, torch.float32, LARGE, 90, False) for gate in GATES),
    ("mingru", torch.bfloat16, LARGE, 80, False),
    ("mingru", torch.float32, LONG, 90, True),
    ("minlstm", torch.bfloat16, LONG, 80, True),
    ("mingru", torch.float64, LONG, 80, False),
    ("mingru", torch.float32, STEP, 80, True),
]
builds = pytest.mark.parametrize("settings", BUILDS, ids=lambda s: "-".join(map(str, s)))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@cache
def script() -> ModuleType:
    """The functions that compile the kernels for `minrnn bench kernels`."""
    return importlib.import_module("minrnn.benchmarks.compiled")


@cache
def kernels(settings: tuple[Any, ...]) -> dict[str, Any]:
    gate, dtype, shape, capability, optional = settings
    processors = script().CAPABILITIES[capability]
    return script().build(
        GATES[gate].gate, dtype, shape, capability, processors, signed=GATES[gate].signed, optional=optional
    )


@builds
def test_each_row_is_read_and_written_once(settings: tuple[Any, ...]) -> None:
    """The bytes that a program moves are the budget: there is no loop, and no row is exchanged or spilled."""
    gate, dtype, shape, capability, _ = settings
    for direction, kernel in kernels(settings).items():
        kept, processors = script().rows_kept(GATES[gate].gate, direction), script().CAPABILITIES[capability]
        cut = script().engine._cut(shape, kept, dtype.itemsize, processors)
        assert kernel.metadata.num_warps == cut.WARPS
        reads, writes = script().rows_moved(kernel, cut.WARPS * cut.STEPS)
        assert (reads + writes) * dtype.itemsize == traffic(GATES[gate].gate, dtype)[direction]
        assert writes == (1 if direction == "forward" else GATES[gate].num_pre)
        assert "scf.for" not in kernel.asm["ttgir"]
        # One lane a channel, one warp a span: what a walk needs is in its own registers.
        layout = f"sizePerThread = [1, 1], threadsPerWarp = [1, 32], warpsPerCTA = [{cut.WARPS}, 1]"
        assert layout in kernel.asm["ttgir"]
        assert kernel.metadata.shared <= 12288
        resources, _ = script().assembly(kernel)
        if dtype != torch.float64:
            assert resources["reg"] <= 128
            # The backward of mingru_signed spills 16 registers of a thread.
            few = 64 if gate == "mingru_signed" else 16
            assert resources["stack"] <= (few if shape == LARGE else 160)


@builds
def test_rows_are_read_ahead_of_their_use(settings: tuple[Any, ...]) -> None:
    """All loads of rows are issued before anything is computed from them."""
    for kernel in kernels(settings).values():
        code = kernel.asm["ptx"]
        loads = [match.start() for match in re.finditer(r"\bld\.global\.", code)]
        uses = [match.start() for match in re.finditer(r"\bex2\.approx|\bdiv\.full|\bfma\.rn", code)]
        barriers = [match.start() for match in re.finditer(r"\bbar\.(warp\.)?sync", code)]
        assert any(loads[-1] < barrier < min(uses) for barrier in barriers) or not uses


@builds
def test_offsets_are_64_bit(settings: tuple[Any, ...]) -> None:
    for kernel in kernels(settings).values():
        into = re.findall(
            r"tt\.addptr .*? : .*!tt\.ptr<(\w+)>>?, (?:tensor<[\dx]+x)?(i\d+)>?", kernel.asm["ttir"]
        )
        assert into
        assert {offset for element, offset in into if element != "i32"} == {"i64"}  # i32: words of bits


EVENTS = re.compile(
    r"\b((?:st|ld|ld\.volatile)\.global|(?:st|ld)\.shared|bar\.sync|(?:atom|red)\.global\.gpu\.\w+)"
)


@builds
def test_messages_are_ordered(settings: tuple[Any, ...]) -> None:
    """Data is written, then a barrier, then the bit; the bit is read, then a barrier, then the data."""
    for kernel in kernels(settings).values():
        code = kernel.asm["ptx"]
        events = EVENTS.findall(code)
        atomics = [i for i, event in enumerate(events) if event.startswith(("atom", "red"))]
        if settings[2] == STEP:
            assert not atomics
            continue
        # The ticket comes first, and as every atomic's result, it reaches all lanes from the one that asked.
        assert events[atomics[0]].endswith("relaxed")
        assert "ld.global" not in events[: atomics[0]]
        kinds = {events[i].rpartition(".")[2] for i in atomics}
        assert kinds == {"relaxed", "acquire", "release"} | ({"acq_rel"} if settings[2] == LONG else set())
        for i in atomics:
            if not events[i].endswith("release"):
                assert events[i + 1 : i + 4] == ["st.shared", "bar.sync", "ld.shared"]
            if events[i].endswith(("release", "acq_rel")):
                before = events[:i][::-1]
                barrier, written = before.index("bar.sync"), before.index("st.global")
                assert barrier < written
        for i, event in enumerate(events):
            if event == "ld.volatile.global":
                before = events[:i][::-1]
                last = next(j for j, e in enumerate(before) if e.startswith(("atom", "red")))
                assert before[last].endswith(("acquire", "acq_rel"))
                assert "bar.sync" in before[:last]


def test_one_kernel_serves_every_length() -> None:
    """Lengths and batches do not compile anew."""
    engine = script().engine
    with script().compiling(90, 132) as built:
        for B, T in ((64, 4096), (64, 5000), (65, 4096), (66, 2**20)):
            with torch.device("meta"):
                pre = torch.empty(B, T, 2 * 512)
            engine.forward([pre], None, None, "mingru", "positive", False, False)
    assert len({kernel.hash for kernel in built}) == 1


def test_the_benchmark_counts_the_budget() -> None:
    counted = script()._count(
        kernels(BUILDS[1])["forward"], "forward", "mingru", torch.float32, LARGE, 90, 132
    )
    assert counted["bytes"] == counted["budget"] == 12
    assert counted["message_bytes"] < 0.02 * counted["bytes"]
    assert BENCHES["kernels"].load().render({"results": [counted]}).count("\n") == 3
