"""What benchmarks measure and what they make of it: inputs, phases, errors, shares and styles."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks import (
    accuracy,
    check,
    gpu,
    layer,
    options,
    peers,
    plots,
    report,
    scan,
    selective,
    session,
    step,
    timing,
    workloads,
)
from minrnn.benchmarks import measure as measuring
from minrnn.benchmarks.measure import System, measure
from minrnn.benchmarks.session import Case
from minrnn.models import ModelConfig, SequenceModel
from minrnn.ops import GATES

CPU = torch.device("cpu")


def case(gate: str, seed: int = 0, **sizes: int) -> Case:
    return Case(gate, sizes, "float32", 1, CPU, seed)


# --- inputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_scans_are_packed_in_the_order_of_their_pre_activations(gate: str) -> None:
    of = case(gate, 3, B=2, T=50, D=4)
    separate, dh = scan.draw_inputs(of, packed=False)
    (packed,), same = scan.draw_inputs(of, packed=True)
    assert torch.equal(packed, torch.cat(separate, -1))
    assert torch.equal(dh, same)
    assert all(x.requires_grad for x in (packed, *separate))
    if gate == "identity":  # the decays themselves
        assert ((separate[0] > 0) & (separate[0] < 1)).all()


def test_seeds_decide_inputs() -> None:
    def draw(seed: int) -> list[Tensor]:
        sizes = {"B": 2, "T": 3, "D": 4}
        pre, dh = scan.draw_inputs(case("mingru", seed, **sizes), packed=False)
        inputs, dy = selective._draw_inputs(case("selective", seed, **sizes, N=2))
        return [*pre, dh, *inputs, dy]

    for one, again, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert torch.equal(one, again)
        assert one.shape == other.shape
    assert not any(
        torch.equal(one, other) for one, other in zip(draw(1), draw(2), strict=True) if one.shape != (4, 2)
    )


def test_inputs_of_selective_scans_are_those_of_an_untrained_block() -> None:
    (_, delta_pre, A, *_), _ = selective._draw_inputs(case("selective", B=4, T=64, D=8, N=3))
    assert A.tolist() == [[-1, -2, -3]] * 8
    assert torch.nn.functional.softplus(delta_pre).mean().item() == pytest.approx(0.03, rel=0.3)


@pytest.mark.parametrize("gate", ["mingru", "minlstm", "minlstm_unnormalized"])
def test_forgetting_is_slow_medium_and_fast_in_inputs_of_16_bits(gate: str) -> None:
    pre, dh = accuracy._inputs(gate, 4000, accuracy.AccuracyBench(gates=(gate,), seed=5))
    for x in (*pre, dh):
        assert torch.equal(x, x.bfloat16().float())
    keep = -pre[0] if gate == "mingru" else pre[0]
    assert keep.mean((1, 2)).tolist() == pytest.approx([-4, 0, 6], abs=0.05)
    if gate != "mingru":  # the input's gate closes as the state's opens
        assert pre[1].mean((1, 2)).tolist() == pytest.approx([4, 0, -6], abs=0.05)
    others, _ = accuracy._inputs(gate, 4000, accuracy.AccuracyBench(gates=(gate,), seed=6))
    assert not torch.equal(pre[0], others[0])


def test_each_kind_of_forgetting_has_its_own_error() -> None:
    pre = [torch.ones(3, 5, 2), torch.ones(3, 5, 2)]
    exact = check.scan_reference("mingru", pre, torch.ones(3, 5, 2))
    exact["h"] = exact["h"] * torch.tensor([1.0, 1.25, 0.5])[:, None, None]

    def ours(gate: str, pre: list[Tensor]) -> Tensor:
        return scan.gated_scan(gate, *pre)

    found = accuracy._errors(ours, "mingru", pre, torch.ones(3, 5, 2), exact)
    assert [one["h"] for one in found] == pytest.approx([0, 0.2, 1.0], abs=1e-4)


# --- comparison with the reference --------------------------------------------------------------------------


def test_errors_are_relative_to_the_largest_value_and_of_the_worst_gradient() -> None:
    expected = {"h": torch.tensor([2.0, -8.0]), "d0": torch.tensor([4.0]), "d1": torch.tensor([10.0])}
    actual = {"h": torch.tensor([4.0, -8.0]), "d0": torch.tensor([5.0]), "d1": torch.tensor([5.0])}
    assert check.errors(actual, expected) == {"h": 0.25, "gradients": 0.5}
    assert check.errors({"h": actual["h"]}, expected) == {"h": 0.25}
    assert check.errors({"h": torch.tensor([4.0])}, expected) == {"h": math.inf}
    assert check.errors({"h": torch.tensor([4.0, math.nan])}, expected) == {"h": math.inf}


def test_as_many_rows_are_compared_as_memory_allows() -> None:
    assert [
        check.some_rows(8, *sizes) for sizes in ((16, 4), (1 << 20, 16), (1 << 20, 32), (1 << 20, 64))
    ] == [
        8,
        2,
        1,
        1,
    ]


def test_tolerances() -> None:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    assert [check.TOLERANCE[dtype] for dtype in dtypes] == [1e-10, 1e-5, 4e-3, 2e-2]


@pytest.mark.parametrize("systems", [scan.scan_systems, layer.layer_systems])
def test_some_rows_are_compared_with_their_own_reference(
    systems: Callable[..., dict[str, System]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "MOST_ELEMENTS", 2 * 6 * 4)
    found = systems(case("mingru", B=5, T=6, D=4), {}, 4)["minrnn"].errors
    assert found is not None
    assert max(found().values()) < 1e-5


# --- phases ------------------------------------------------------------------------------------------------


def clock_of(*times: float) -> Callable[..., float]:
    left = iter(times)
    return lambda *_: next(left)


def test_phases_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(workloads, "clock", clock_of(10, 11, 14))
    workload = workloads.training_step(lambda: 2 * x, [x], torch.ones(3))
    assert workload() == {"forward": 1, "backward": 3, "step": 4}


def test_a_copy_of_n_bytes_moves_two_n(monkeypatch: pytest.MonkeyPatch) -> None:
    made, ones = [], torch.ones

    def noted(size: int, **options: Any) -> Tensor:
        made.append(ones(size, **options))
        return made[-1]

    monkeypatch.setattr(torch, "ones", noted)
    monkeypatch.setattr(workloads, "clock", clock_of(0, 1, 5, 7))
    copy = workloads.copies({"forward": 800, "backward": 1600}, CPU)
    assert [2 * source.nbytes for source in made] == [800, 1600]
    assert copy() == {"forward": 1, "backward": 2, "step": 3}


def test_calls_in_a_row_are_timed_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads.time, "perf_counter", clock_of(2.0, 8.0))
    calls: list[int] = []
    assert workloads._mean_seconds(calls.append, 3, CPU) == 2.0
    assert calls == [0, 1, 2]


def test_steps_carry_their_state() -> None:
    def count_up(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        seen.append(state)
        total = x + (0 if state is None else state)
        return total, total

    seen: list[Any] = []
    assert workloads.run_steps(count_up, torch.ones(2, 4)).tolist() == [[1, 2, 3, 4]] * 2
    seen.clear()
    workloads.steps_in_a_row(count_up, torch.ones(1))()
    assert [None if state is None else state.item() for state in seen[:4]] == [None, 1, 2, 3]


def test_percentiles_of_samples() -> None:
    found = timing.summary([float(n) for n in (11, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)])
    assert found == {"median": 6.0, "p10": 2.0, "p90": 10.0, "min": 1.0, "samples": 11}


def test_the_collector_works_again_after_a_measurement() -> None:
    states: list[bool] = []

    def workload() -> dict[str, float]:
        states.append(gc.isenabled())
        return {"step": 1.0}

    timing.interleave({"one": workload}, 0.01, 3, lambda text: None)
    assert gc.isenabled()
    assert not states[-1]


def test_leaves_of_a_layers_step_are_its_input_and_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves: list[list[tuple[int, ...]]] = []
    monkeypatch.setattr(
        layer, "training_step", lambda call, of, dy: leaves.append([tuple(x.shape) for x in of])
    )
    layer.layer_systems(case("mingru", B=2, T=3, D=4), {}, 5)
    assert leaves == [[(2, 3, 5), (8, 5), (8,)]] * 3


@pytest.mark.parametrize(("asked", "read"), [(0, 4), (7, 7)])
def test_layers_read_as_many_channels_as_asked(
    asked: int, read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(layer, "layer_systems", lambda case, peers, input_size: seen.append(input_size))
    of = case("mingru", B=1, T=1, D=4)
    monkeypatch.setattr(layer, "run", lambda kind, options, cells, peers, systems, *_: systems(of, {}))
    layer.bench_layer(layer.LayerBench(input_size=asked), [], Console())
    assert seen == [read]


def test_our_layer_is_timed_with_recomputation_too() -> None:
    ours = layer.build_ours(case("minlstm", B=1, T=1, D=4), 4)
    assert [each.recompute for each in (ours, layer._recomputing(ours), ours)] == [False, True, False]


# --- what is made of measurements ---------------------------------------------------------------------------


def taking(seconds: float) -> Callable[[], dict[str, float]]:
    return lambda: {"forward": seconds, "step": 4 * seconds}


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each system have three samples: as it says, twice and six times that."""

    def interleave(workloads: dict[str, Any], *_: Any) -> dict[str, list[dict[str, float]]]:
        return {
            name: [{phase: n * seconds for phase, seconds in workload().items()} for n in (1, 2, 6)]
            for name, workload in workloads.items()
        }

    monkeypatch.setattr(measuring, "interleave", interleave)


def measured(**systems: System) -> dict[str, dict[str, Any]]:
    settings = {"memory_of": None, "seconds": 1e-3, "samples": 3, "show": lambda found, text: None}
    return measure(systems, limit="copy", dtype=torch.float32, **settings)


def right() -> dict[str, float]:
    return {"h": 1e-6, "gradients": 1e-5}


def test_medians_make_ratios_shares_and_speeds(uneven: None) -> None:
    found = measured(
        copy=System(taking(1.0), traffic={"forward": 600}),
        minrnn=System(taking(2.0), right, facts={"parameters": 7}),
        other=System(taking(5.0), right),
    )
    assert found["copy"]["seconds"]["forward"]["median"] == 2
    assert found["copy"]["bytes_per_second"] == {"forward": 300}
    assert [one["times_ours"] for one in found.values()] == [0.5, 1.0, 2.5]
    assert found["minrnn"]["share"] == {"forward": 0.5, "step": 0.5}
    assert found["other"]["share"] == {"forward": 0.2, "step": 0.2}
    assert found["minrnn"]["parameters"] == 7
    assert [one["status"] for one in found.values()] == ["other function", "equal", "equal"]


@pytest.mark.parametrize(
    ("errors", "inexact", "status", "noted"),
    [
        ({"h": 1e-9, "gradients": 1e-3}, "", "refused", {"h": 1e-9, "gradients": 1e-3}),
        ({"h": 1e-3, "gradients": 1e-9}, "", "refused", {"h": 1e-3, "gradients": 1e-9}),
        ({"h": math.inf}, "", "refused", {"h": None}),
        ({"h": 1e-3}, "known", "inexact", {"h": 1e-3}),
        ({"h": 1e-5}, "known", "equal", {"h": 1e-5}),
    ],
)
def test_verdicts(
    errors: dict[str, float], inexact: str, status: str, noted: dict[str, float | None]
) -> None:
    found = measured(minrnn=System(taking(1.0), right), other=System(taking(1.0), lambda: errors, inexact))[
        "other"
    ]
    assert (found["status"], found["error"]) == (status, noted)
    assert ("seconds" in found) == (status != "refused")


@pytest.mark.parametrize("wrong", [{"h": 1e-3}, {"h": math.nan}])
def test_nothing_is_timed_if_ours_is_wrong(wrong: dict[str, float]) -> None:
    with pytest.raises(RuntimeError, match="minrnn differs from the reference"):
        measured(minrnn=System(taking(1.0), lambda: wrong), other=System(taking(1.0), right))


# --- plots and pages ----------------------------------------------------------------------------------------


def test_curves_are_of_milliseconds_percents_and_megabytes() -> None:
    record = {
        "status": "equal",
        "seconds": {"step": {"median": 0.25, "min": 0.2}},
        "share": {"step": 0.5},
        "peak_bytes": 3e6,
    }
    figures = [session._milliseconds, session._share, session._megabytes]
    assert [figure(record) for figure in figures] == [250, 50, 3]
    assert session._megabytes({"peak_bytes": 5e4}) is None
    group = [{"shape": {"T": T}, "systems": {"minrnn": record | {"share": {"step": T - 1}}}} for T in (1, 2)]
    assert session._lines(group, "T", session._share) == {"minrnn": [(2, 100)]}


def test_styles_of_systems() -> None:
    style = plots.system_style(["minrnn float32", "minrnn bfloat16", "copy", "loop"], "copy")
    styles = {name: style(name) for name in ("minrnn float32", "minrnn bfloat16", "copy", "loop")}
    assert {name: (one.dashed, one.emphasized) for name, one in styles.items()} == {
        "minrnn float32": (False, True),
        "minrnn bfloat16": (True, True),
        "copy": (True, False),
        "loop": (False, False),
    }
    assert len({one.color for one in styles.values()}) == 3


class Axes:
    """Notes what is drawn."""

    def __init__(self) -> None:
        self.drawn: list[tuple[list[float], ...]] = []

    def plot(self, *columns: Any, **style: Any) -> None:
        self.drawn.append(tuple(map(list, columns)))

    def fill_between(self, *columns: Any, **style: Any) -> None:
        self.drawn.append(tuple(map(list, columns)))


def test_lines_are_drawn_by_their_x_and_bands_around_the_mean() -> None:
    axes: Any = Axes()
    plots.draw_lines(axes, {"gru": [(4, 1.0), (2, 3.0)], "lstm": []})
    plots.band(axes, "gru", [1, 2], [[1.0, 5.0], [2.0, 6.0], [6.0, 1.0]])
    assert axes.drawn == [([2, 4], [3, 1]), ([1, 2], [1, 1], [6, 6]), ([1, 2], [3, 4])]


def test_names_end_below_the_top() -> None:
    assert plots.spread([0.98, 0.99, 1.0], 0.1) == pytest.approx([0.8, 0.9, 1.0])
    assert plots.spread([0.1, 0.12, 0.14, 0.5], 0.1) == pytest.approx([0.02, 0.12, 0.22, 0.5])


@pytest.mark.parametrize("tf32", [False, True])
def test_products_are_set_and_put_back(tf32: bool) -> None:
    matmul = torch.backends.cuda.matmul
    at_first = matmul.allow_tf32
    try:
        for before in (False, True):
            matmul.allow_tf32 = before
            with gpu._float32_products(tf32):
                assert matmul.allow_tf32 == tf32
            assert matmul.allow_tf32 == before
    finally:
        matmul.allow_tf32 = at_first


def test_a_step_is_timed_in_the_compiled_engine_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SimpleNamespace(backend="torch", reason="it is Monday")
    monkeypatch.setattr(step, "Decoder", lambda model: decoder)
    with pytest.raises(RuntimeError, match="must take the steps, but it is Monday"):
        step._fused(SequenceModel(ModelConfig(vocab_size=2, d_model=2, num_layers=1)))
    decoder.backend = "cpp"
    assert step._fused(SequenceModel(ModelConfig(vocab_size=2, d_model=2, num_layers=1))) is decoder


def test_other_recurrences_are_not_compared_with_our_model() -> None:
    systems = step._systems(case("mingru", B=1, D=4, L=1), step.STEP_PEERS)
    assert [name for name, system in systems.items() if system.errors is None] == ["gru", "lstm"]


def test_crowds_of_names_keep_their_distance_as_a_whole() -> None:
    assert plots.spread([0.1, 0.1, 0.1, 0.25], 0.1) == pytest.approx([-0.0125, 0.0875, 0.1875, 0.2875])


def test_plots_of_equal_results_are_equal_files(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    assert plots.save_figure(matplotlib.Figure, tmp_path) is None
    assert "<dc:date>" not in (tmp_path / "plot.svg").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_a_warm_call_is_as_long_as_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_elapsed", clock_of(5.0, 3.0, 4.0))
    assert timing._cost(lambda: {}, 100.0) == 3.0
    monkeypatch.setattr(timing, "_elapsed", clock_of(5.0))
    assert timing._cost(lambda: {}, 10.0) == 5.0


def test_a_range_may_hold_one_size() -> None:
    assert options.lengths("64..64") == [64]
    with pytest.raises(ValueError, match=r"got '64\.\.63'"):
        options.lengths("64..63")


def test_cases_have_the_seed_and_the_threads_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[Case] = []
    monkeypatch.setattr(session, "measure_case", lambda kind, case, *_: cases.append(case))
    monkeypatch.setattr(session.Report, "finish", lambda *_: None)
    asked = scan.ScanBench(
        shapes=("1x2x3",), seed=5, threads=(1, 2), peers=("none",), output=tmp_path / "it.json"
    )
    scan.bench_scan(asked, [], Console(file=io.StringIO()))
    assert [(case.seed, case.threads) for case in cases] == [(5, 1), (5, 2)]


@pytest.mark.parametrize(("load", "said"), [([0.1, 9.0, 9.0], False), ([4.0, 0.0, 0.0], True), (None, False)])
def test_a_busy_machine_is_said(
    load: list[float] | None, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "load_averages", lambda: load)
    out = io.StringIO()
    made = report.Report("scan", tmp_path / "it.json", [], {}, CPU, Console(file=out))
    assert ("the machine is busy (load 4.0)" in out.getvalue()) == said
    assert made.write_text("# it") == tmp_path / "it.md"
    assert (tmp_path / "it.md").read_text() == "# it"


@pytest.mark.parametrize(
    ("record", "verdict"),
    [
        ({"status": "equal", "error": {"h": 1e-7, "gradients": 3e-6}}, "3e-06"),
        ({"status": "inexact", "error": {"h": 0.2, "gradients": 1e-3}}, "2e-01 inexact"),
        ({"status": "refused", "error": {"h": None, "gradients": 1e-3}}, "inf REFUSED"),
        ({"status": "failed", "detail": "why"}, "failed: why"),
        ({"status": "other function"}, "-"),
        ({"status": "other function", "bytes_per_second": {"forward": 2e9, "step": 3.5e9}}, "3.5 GB/s"),
    ],
)
def test_verdicts_are_of_the_worst_error(record: dict[str, Any], verdict: str) -> None:
    assert report._verdict(record) == verdict


def test_cells_of_the_live_table() -> None:
    seconds = {"median": 2e-3, "p10": 1e-3, "p90": 4e-3}
    record = {
        "status": "equal",
        "error": {"h": 1e-6},
        "seconds": {"step": seconds},
        "times_ours": 1.5,
        "share": {"step": 0.25},
        "peak_bytes": 3e6,
    }
    in_ms, in_us = (report.CaseView(Console(), "", ("step",), unit, "copy") for unit in ("ms", "us"))
    assert in_ms._cells(record) == ["1e-06", "2", "1-4", "1.50", "25", "3.0"]
    assert in_us._cells(record)[1:3] == ["2e+03", "1e+03-4e+03"]


def test_16_bits_are_a_reason_to_differ() -> None:
    reasons = [peers.SCAN_PEERS["loop"].reason(dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert reasons == ["", "gates and state are kept in 16 bits"]
    assert peers.SCAN_PEERS["log-space"].reason(torch.float32) == peers.LOG_SPACE
    assert peers.SCAN_PEERS["portable"].reason(torch.bfloat16) == ""


def test_their_projection_begins_with_the_candidate() -> None:
    theirs = torch.nn.Linear(2, 3, bias=False)
    peers._load_mingru_pytorch(theirs, tuple(torch.full((1, 2), value) for value in (1.0, 2.0, 3.0)))
    assert theirs.weight.tolist() == [[3, 3], [1, 1], [2, 2]]
