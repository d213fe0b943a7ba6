"""`minrnn bench`: what it writes, whom it refuses, and how it takes turns; no test depends on a time."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from rich.console import Console
from torch import Tensor

from minrnn.benchmarks import BENCHES, plots, prefix, scan, timing
from minrnn.benchmarks.options import lengths, parse_shapes
from minrnn.benchmarks.peers import LAYER_PEERS, SCAN_PEERS, LayerPeer, Scan, ScanPeer
from minrnn.benchmarks.report import Report
from minrnn.cli.main import main
from minrnn.export import FORMATS, Format
from minrnn.ops import GATES, gated_scan
from minrnn.ops.registry import load
from minrnn.training import compilation

FAST = ["--seconds", "0.01", "--samples", "3"]
EAGER_SCANS = [name for name, peer in SCAN_PEERS.items() if not peer.compiled and "cpu" in peer.devices]
OUR_ENGINES = ("minrnn", "portable", "reference")
EAGER_LAYERS = [name for name, peer in LAYER_PEERS.items() if not peer.compiled]
HAS_MINGRU_PYTORCH = importlib.util.find_spec("minGRU_pytorch") is not None

Document = dict[str, Any]


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINRNN_DEBUG", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # plots take longer than all the rest
    return tmp_path


@pytest.fixture
def plotting(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plots be drawn."""
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: the extra plots")


def bench(name: str, *args: str, status: int = 0) -> Document:
    """Run a benchmark; return its document."""
    assert main(["bench", name, *args, "--output", "out/it.json"]) == status
    return json.loads(Path("out/it.json").read_text(), parse_constant=pytest.fail)


def scans(*args: str) -> dict[str, Any]:
    """Run the smallest benchmark of scans; return its systems."""
    return bench("scan", "--shapes", "2x8x4", *FAST, *args)["results"][0]["systems"]


def add_scan(monkeypatch: pytest.MonkeyPatch, function: Scan, inexact: str = "", **fields: Any) -> None:
    monkeypatch.setitem(SCAN_PEERS, "new", ScanPeer(make=lambda: function, inexact=inexact, **fields))


# --- what is written ---------------------------------------------------------------------------------------


def test_scan_writes_what_it_measured(plotting: None, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "--shapes",
        "2x8..16x4",
        "--gates",
        "mingru",
        "minlstm",
        "--threads",
        "1",
        "--peers",
        "loop",
        *FAST,
    ]
    document = bench("scan", *args)
    assert document["format"] == 1
    assert document["benchmark"] == "scan"
    assert shlex.split(document["command"]) == ["minrnn", "bench", "scan", *args, "--output", "out/it.json"]
    assert {"machine", "versions", "commit", "device", "load", "engines", "options"} <= document.keys()
    assert document["peers"] == {"loop": {"package": "torch", "version": version("torch")}}
    cases = [(result["gate"], result["shape"]["T"]) for result in document["results"]]
    assert cases == [("mingru", 8), ("mingru", 16), ("minlstm", 8), ("minlstm", 16)]
    for result in document["results"]:
        assert (result["dtype"], result["threads"], result["limit"]) == ("float32", 1, "copy")
        assert list(result["systems"]) == ["copy", "minrnn", "loop"]
        for name, record in result["systems"].items():
            check_record(record, ("forward", "backward", "step"))
            assert record["status"] == ("other function" if name == "copy" else "equal")
        assert set(result["systems"]["copy"]["bytes_per_second"]) == {"forward", "backward"}
        assert result["systems"]["loop"]["error"].keys() == {"h", "gradients"}
    assert Path("out/it.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("minlstm, B = 2, T = 16, D = 4, float32, 1 thread") == 2  # announced, then the table
    assert said.endswith("results: out/it.json\nplot: out/it.png\n")


def check_record(record: dict[str, Any], phases: tuple[str, ...], memory: bool = True) -> None:
    assert tuple(record["seconds"]) == phases
    for times in record["seconds"].values():
        assert 0 < times["min"] <= times["p10"] <= times["median"] <= times["p90"]
        assert times["samples"] >= 3
    assert tuple(record["share"]) == phases
    assert record["times_ours"] > 0
    assert ("peak_bytes" in record) == memory


@pytest.mark.parametrize("options", [["--packed", "--dtypes", "float64"], ["--dtypes", "bfloat16"]])
@pytest.mark.parametrize("gate", GATES)
def test_every_peer_computes_every_gate_that_it_claims(gate: str, options: list[str]) -> None:
    systems = scans("--gates", gate, "--peers", *EAGER_SCANS, *options)
    installed = [name for name in EAGER_SCANS if importlib.util.find_spec(SCAN_PEERS[name].module)]
    assert systems.keys() == {"copy", "minrnn"} | {n for n in installed if gate in SCAN_PEERS[n].gates}
    for name, record in systems.items():
        allowed = {"other function"} if name == "copy" else {"equal"}
        if "bfloat16" in options and name not in OUR_ENGINES:
            allowed |= {"inexact"}
        assert record["status"] in allowed, (name, record["detail"], record["error"])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_our_engines_are_peers_in_every_dtype(dtype: str) -> None:
    """Equal to the reference, values and gradients, at a length of many spans; no reason excuses them."""
    args = ["--shapes", "2x300x3", "--gates", *GATES, "--dtypes", dtype, "--peers", *OUR_ENGINES[1:]]
    document = bench("scan", *args, *FAST)
    assert document["peers"].keys() == {"portable", "reference"}
    assert {peer["package"] for peer in document["peers"].values()} == {"minrnn"}
    for result in document["results"]:
        assert list(result["systems"]) == ["copy", *OUR_ENGINES]
        for name in OUR_ENGINES:
            record = result["systems"][name]
            assert record["status"] == "equal", (result["gate"], name, record["error"])
            check_record(record, ("forward", "backward", "step"))


def test_layers_of_both_cells_and_any_input_size() -> None:
    args = [
        "--shapes",
        "2x6x8",
        "--cells",
        "mingru",
        "minlstm",
        "--input-size",
        "4",
        "--peers",
        *EAGER_LAYERS,
    ]
    gru, lstm = (result["systems"] for result in bench("layer", *args, *FAST)["results"])
    same = {"mingru-pytorch"} if HAS_MINGRU_PYTORCH else set()
    same |= {"minrnn", "minrnn-recompute"}
    assert gru.keys() == {"linear", "gru"} | same
    assert lstm.keys() == {"linear", "lstm"} | same
    for name, record in [*gru.items(), *lstm.items()]:
        check_record(record, ("forward", "backward", "step"))
        assert record["status"] == ("equal" if name in same else "other function")
    assert gru["minrnn"]["share"]["step"] == pytest.approx(
        gru["linear"]["seconds"]["step"]["median"] / gru["minrnn"]["seconds"]["step"]["median"]
    )


def test_decoding_goes_on_from_the_state() -> None:
    args = ["--shapes", "1..2x8", "--peers", *EAGER_LAYERS, *FAST]
    results = bench("decode", *args)["results"]
    assert [(r["gate"], r["shape"]["B"]) for r in results] == [
        ("mingru", 1),
        ("mingru", 2),
        ("minlstm", 1),
        ("minlstm", 2),
    ]
    for result in results:
        for name, record in result["systems"].items():
            check_record(record, ("step",), memory=False)
            assert record["status"] == ("equal" if name.startswith("min") else "other function")


@pytest.mark.parametrize("cell", ["mingru", "minlstm"])
def test_a_models_step_is_that_of_torch(cell: str) -> None:
    document = bench("step", "--shapes", "1..2x8x2", "--cells", cell, *FAST)
    torchs = {"mingru": "gru", "minlstm": "lstm"}[cell]
    assert [result["shape"] for result in document["results"]] == [{"B": B, "D": 8, "L": 2} for B in (1, 2)]
    for result in document["results"]:
        assert list(result["systems"]) == ["minrnn", "torch", torchs]
        for name, record in result["systems"].items():
            assert record["status"] == ("other function" if name == torchs else "equal")
            assert record["seconds"].keys() == {"step"}
            assert "share" not in record
    assert "| rows | width | layers | in one call, ms |" in BENCHES["step"].load().render(document)


def test_a_training_step_as_it_is_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    document = bench("train", "--shapes", "2x8x8x1", *FAST)
    (result,) = document["results"]
    assert list(result["systems"]) == ["minrnn", "compiled"]
    for record in result["systems"].values():
        assert record["status"] == "equal"
        assert record["seconds"].keys() == {"forward", "backward", "step"}
    assert result["systems"]["compiled"]["compile_seconds"] > 0
    result["systems"]["compiled"]["compile_seconds"] = 3.0
    for record, median in zip(result["systems"].values(), (0.004, 0.003), strict=True):
        record["seconds"]["step"]["median"] = median
    render = BENCHES["train"].load().render
    assert "| mingru | 2 | 8 | 8 | 1 | 4 | 3 | 0.75 | 3 | 3,000 steps |" in render(document)
    result["systems"]["compiled"]["seconds"]["step"]["median"] = 0.005
    assert "| 1.25 | 3 | never |" in render(document)


def test_a_training_step_by_several_processes_is_that_of_one() -> None:
    """Rows that are not divided evenly, so that the ranks' gradients have unequal weights."""
    document = bench("ranks", "--shapes", "3x8x8x1", *FAST)
    (result,) = document["results"]
    assert list(result["systems"]) == ["minrnn", "replicated", "sharded"]
    for record in result["systems"].values():
        assert record["status"] == "equal"
        assert record["error"].keys() == {"h", "gradients"}
    assert "| 2 processes, sharded weights |" in BENCHES["ranks"].load().render(document)


def test_an_exported_step_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that keeps the program in torch stands for those whose packages may be missing."""
    kept = Format(
        "kept", lambda _: b"12345", lambda _, program: lambda given: program.call(*given), (), False
    )
    monkeypatch.setitem(FORMATS, ".pt2", kept)
    document = bench("export", "--shapes", "2x8x1", "--peers", "torch", "aotinductor", *FAST)
    (result,) = document["results"]
    assert list(result["systems"]) == ["minrnn", "torch", "aotinductor"]
    for name, record in result["systems"].items():
        assert record["status"] == "equal"
        assert record["seconds"].keys() == {"step"}
        assert record.get("bytes") == (5 if name == "aotinductor" else None)


def test_a_selective_scan_beside_mambapys(plotting: None) -> None:
    document = bench("selective", "--shapes", "2x8..16x4x3", *FAST)
    peers = {"mambapy"} if importlib.util.find_spec("mambapy") else set()
    for result in document["results"]:
        assert result["systems"].keys() == {"minrnn"} | peers
        for record in result["systems"].values():
            assert record["status"] == "equal"
            assert record["error"].keys() == {"h", "gradients"}
            assert record["seconds"].keys() == {"forward", "backward", "step"}
    assert "2, 16, 4, 3 | minrnn |" in BENCHES["selective"].load().render(document)
    assert Path("out/it.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("scan", "--shapes 2x4x3 2x8x5 --threads 1", "| B, T, D | system | forward, ms | backward, ms |"),
        ("scan", "--shapes 2x4x3 --threads 2 1", "| share forward | backward | speed of one thread |"),
        ("scan", "--shapes 2x4x3 --gates mingru minlstm", "| B, T, D | gate | system |"),
        ("layer", "--shapes 2x4..8x3", "| T | minrnn, ms | linear, times ours |"),
        ("layer", "--shapes 2x4..8x3 --cells mingru minlstm", "| B, T, D | gate | system |"),
        ("decode", "--shapes 1x3", "| B, D | gate | system | step, us | times ours |"),
    ],
)
def test_each_benchmark_renders_its_table(name: str, args: str, expected: str) -> None:
    document = bench(name, *args.split(), "--peers", "none", *FAST)
    table = BENCHES[name].load().render(document)
    assert expected in table
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert len(table.splitlines()) >= 3


def test_accuracy_is_measured_for_each_kind_of_forgetting(plotting: None) -> None:
    args = ["--lengths", "16..64", "--channels", "2", "--gates", "mingru", "minlstm", "minlstm_unnormalized"]
    document = bench("accuracy", *args)
    results = document["results"]
    assert len({(r["gate"], r["T"], r["forgetting"], r["system"], r["dtype"]) for r in results}) == len(
        results
    )
    assert len(results) == 3 * 3 * 3 * 2 * (1 + HAS_MINGRU_PYTORCH)
    for result in results:
        if result["system"] == "minrnn":
            limit = {"float32": 5e-6, "bfloat16": 1e-2}[result["dtype"]]
            assert max(result["error"].values()) <= limit, result
    assert document["half_lives"]["medium"] == pytest.approx(1)
    table = BENCHES["accuracy"].load().render(document)
    assert "| gate | system | forgetting | T = 16 | T = 32 | T = 64 |" in table
    assert len(table.splitlines()) == 2 + len(results) // 3
    assert Path("out/it.png").exists()


def test_forgetting_is_as_fast_as_it_says() -> None:
    """A state decays by half in the half-life, for every gate, where gates sit at their middle."""
    from minrnn.benchmarks.accuracy import FORGETTING, AccuracyBench, _half_life, _inputs

    for gate in ("mingru", "minlstm", "minlstm_unnormalized"):
        pre, _ = _inputs(gate, 4000, AccuracyBench(channels=1))
        middle = [x.median(1, keepdim=True).values for x in pre]  # (3, 1, 1)
        middle[-1] = torch.full_like(middle[-1], -1e9)  # a candidate of zero
        kept = gated_scan(gate, *middle, h0=torch.ones(3, 1)).flatten()
        expected = [0.5 ** (1 / _half_life(bias)) for bias in FORGETTING.values()]
        torch.testing.assert_close(kept, torch.tensor(expected), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("engine", ["portable", "reference"])
def test_the_engine_that_serves_is_named(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINRNN_ENGINE", engine)
    Report("scan", Path("it.json"), [], {}, torch.device("cpu"), Console())
    assert f"bench scan on cpu: {engine} (" in capsys.readouterr().out
    monkeypatch.delenv("MINRNN_ENGINE")
    Report("scan", Path("it.json"), [], {}, torch.device("cpu"), Console())
    expected = "portable" if isinstance(load("cpp"), ImportError) else "cpp"
    assert f"bench scan on cpu: {expected} (" in capsys.readouterr().out


def test_output_has_a_default_place(plotting: None) -> None:
    assert main(["bench", "scan", "--shapes", "1x2x3", "--peers", "none", *FAST]) == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert [re.sub(r"\d{8}-\d{6}", "TIME", name) for name in names] == [
        "bench-scan-TIME.json",
        "bench-scan-TIME.png",
    ]


def test_without_matplotlib_there_is_no_plot(capsys: pytest.CaptureFixture[str]) -> None:
    bench("scan", "--shapes", "1x2x3", "--peers", "none", *FAST)
    assert "no plot: matplotlib is not installed" in capsys.readouterr().out
    assert not Path("out/it.png").exists()


def test_names_of_lines_do_not_overlap() -> None:
    heights = plots.spread([0.0, 0.5, 0.5, 0.52, 0.99, 1.0], 0.1)
    assert all(upper - lower >= 0.1 - 1e-9 for lower, upper in pairwise(heights))
    assert heights[0] == 0
    assert heights[-1] <= 1


# --- who is refused ----------------------------------------------------------------------------------------


def shifted(factor: float) -> Scan:
    return lambda gate, pre: gated_scan(gate, *pre) * factor


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return 1.01 * dx


@pytest.mark.parametrize(
    ("wrong", "null"),
    [
        (shifted(1.001), []),
        (lambda gate, pre: WrongGradient.apply(gated_scan(gate, *pre)), []),
        (shifted(float("nan")), ["h", "gradients"]),
    ],
    ids=["values", "gradients", "not finite"],
)
def test_a_wrong_peer_is_refused(wrong: Scan, null: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    add_scan(monkeypatch, wrong)
    systems = scans("--peers", "new", "loop")
    assert systems["new"]["status"] == "refused"
    assert [name for name, error in systems["new"]["error"].items() if error is None] == null
    assert "seconds" not in systems["new"]
    assert "seconds" in systems["loop"]


def test_a_peer_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add_scan(monkeypatch, lambda gate, pre: gated_scan(gate, *pre)[:, :, :1])
    assert scans("--peers", "new")["new"]["status"] in ("refused", "failed")


def test_a_known_weakness_is_timed_and_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_scan(monkeypatch, shifted(1.25), inexact="it is a quarter too large")
    record = scans("--peers", "new")["new"]
    assert (record["status"], record["detail"]) == ("inexact", "it is a quarter too large")
    assert record["error"]["h"] == pytest.approx(0.25, rel=1e-3)
    assert "seconds" in record
    assert re.search(r"new +[23]e-01 inexact", capsys.readouterr().out)


def test_a_peer_that_raises_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(gate: str, pre: list[Tensor]) -> Tensor:
        raise NotImplementedError("only on Mondays\nand so on")

    add_scan(monkeypatch, broken)
    record = scans("--peers", "new")["new"]
    assert (record["status"], record["detail"]) == ("failed", "NotImplementedError: only on Mondays")
    assert "only on Mondays" in capsys.readouterr().out


def test_a_wrong_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear
    peer = LayerPeer(
        build=lambda cell, input_size, hidden_size: linear(input_size, hidden_size),
        call=lambda layer, x, state: (layer(x), None),
        load=lambda layer, weights: None,
        gates=("mingru",),
    )
    monkeypatch.setitem(LAYER_PEERS, "new", peer)
    args = ["--shapes", "2x4x4", "--peers", "new", *FAST]
    assert bench("layer", *args)["results"][0]["systems"]["new"]["status"] == "refused"
    args = ["--shapes", "2x4", "--cells", "mingru", "--peers", "new", *FAST]
    assert bench("decode", *args)["results"][0]["systems"]["new"]["status"] == "refused"


def test_nothing_is_timed_when_we_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scan, "gated_scan", lambda gate, *pre: gated_scan(gate, *pre) + 1e-3)
    assert main(["bench", "scan", "--shapes", "2x8x4", "--peers", "none", "--output", "it.json"]) == 1
    assert "minrnn differs from the reference" in capsys.readouterr().err
    assert not Path("it.json").exists()


def test_a_peer_that_is_not_installed_takes_no_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add_scan(monkeypatch, shifted(1), package="No-Such", module="no_such")
    document = bench("scan", "--shapes", "2x8x4", *FAST, "--peers", "new", "loop")
    assert document["peers"]["new"] == {"package": "No-Such", "version": None}
    assert "new" not in document["results"][0]["systems"]
    assert "new takes no part: No module named 'no_such' (pip install No-Such)" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(gate: str, pre: list[Tensor]) -> Tensor:
        if pre[0].shape[1] == 16:
            raise KeyboardInterrupt
        return gated_scan(gate, *pre)

    add_scan(monkeypatch, impatient)
    document = bench("scan", "--shapes", "2x4..16x4", "--peers", "new", *FAST, status=130)
    assert [result["shape"]["T"] for result in document["results"]] == [4, 8]


# --- how it is measured ------------------------------------------------------------------------------------


class FakeTime:
    """A clock that only moves when a workload takes its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def workload(self, name: str, seconds: float) -> timing.Workload:
        def workload() -> timing.Phases:
            self.calls.append(name)
            self.now += seconds
            return {"step": seconds}

        return workload


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: fake.now)
    return fake


def test_systems_take_turns(fake: FakeTime) -> None:
    told: list[str] = []
    workloads = {"slow": fake.workload("slow", 10.0), "fast": fake.workload("fast", 0.5)}
    taken = timing.interleave(workloads, seconds=5.0, samples=30, progress=told.append)
    assert {name: len(samples) for name, samples in taken.items()} == {"slow": 3, "fast": 9}
    warm_up, measured = fake.calls[:2], fake.calls[2:]
    assert warm_up == ["slow", "fast"]
    assert measured == ["slow", "fast", "fast", "fast"] * 3
    assert told == ["warming up slow", "warming up fast", *(f"round {n} of 3" for n in (1, 2, 3))]


def test_equals_alternate_and_stop_at_the_samples(fake: FakeTime) -> None:
    workloads = {name: fake.workload(name, 0.01) for name in "ab"}
    taken = timing.interleave(workloads, seconds=5.0, samples=7, progress=lambda text: None)
    assert fake.calls[-14:] == ["a", "b"] * 7
    assert [len(samples) for samples in taken.values()] == [7, 7]


def test_short_calls_are_not_timed_cold(fake: FakeTime) -> None:
    workloads = {"short": fake.workload("short", 1e-4), "long": fake.workload("long", 0.1)}
    taken = timing.interleave(workloads, seconds=0.3, samples=3, progress=lambda text: None)
    assert [len(samples) for samples in taken.values()] == [3, 3]
    assert fake.calls[-9:] == ["short", "short", "long"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux's /proc")
def test_peak_memory_is_what_a_call_adds() -> None:
    def call() -> dict[str, float]:
        x = torch.ones(8 << 20)  # 32 MB
        x = x + 1  # and as much again, while the first is held
        return {"step": float(x[0])}

    held = torch.ones(16 << 20)
    call()
    assert timing.peak_bytes(call, torch.device("cpu")) == pytest.approx(64 << 20, rel=0.1)
    assert held[0] == 1


def test_traffic_is_the_budget() -> None:
    float32 = {gate: scan.traffic(gate, torch.float32) for gate in GATES}
    assert float32["mingru"] == {"forward": 12, "backward": 24}
    assert float32["minlstm"] == float32["minlstm_unnormalized"] == {"forward": 16, "backward": 32}
    assert float32["identity"] == {"forward": 12, "backward": 20}
    assert scan.traffic("mingru", torch.bfloat16) == {"forward": 6, "backward": 12}


def test_threads_are_set_and_put_back() -> None:
    before = torch.get_num_threads()
    document = bench("scan", "--shapes", "1x2x3", "--peers", "none", "--threads", "1", "2", *FAST)
    assert [result["threads"] for result in document["results"]] == [1, 2]
    assert torch.get_num_threads() == before


# --- options and mistakes ----------------------------------------------------------------------------------


def test_shapes_are_read() -> None:
    assert lengths("256..1048576") == [2**n for n in range(8, 21)]
    assert lengths("100..350") == [100, 200]
    assert parse_shapes(["8x64..128x512", "1x64x32", "8x64x512"], "BTD") == [
        (8, 64, 512),
        (8, 128, 512),
        (1, 64, 32),
    ]


def test_every_gate_can_be_chosen() -> None:
    choices, _ = get_args(get_type_hints(scan.ScanBench)["gates"])
    assert set(get_args(choices)) == set(GATES)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("scn", "unknown benchmark 'scn'; did you mean 'scan'?"),
        ("scan --shapes 8x64", "shapes must be BxTxD such as 8x64..1024x512, got '8x64'"),
        ("scan --shapes 8x0x4", "such as 512 or a range 64..1024, got '0'"),
        ("scan --shapes 8x64..32x4", "got '64..32'"),
        ("scan --shapes", "shapes must be at least one"),
        ("ranks --shapes 1x8x8x1", "shapes must be of 2 rows or more, one a process, got 1"),
        ("ranks --threads 2 1", "threads must be 2 or more, got (2, 1)"),
        ("ranks --device cuda", "device must be cpu, got 'cuda'"),
        ("decode --shapes 1x2x3", "shapes must be BxD such as 8x512, got '1x2x3'"),
        ("scan --peers mamba", "did you mean 'mambapy'?"),
        ("layer --peers loop", "peers must be all, none or among gru, lstm"),
        ("scan --gates gru", "'mingru'"),
        ("scan --dtypes int8", "'bfloat16'"),
        ("scan --threads -1", "threads must be 0 to 1024"),
        ("scan --seconds 0", "seconds must be more than 0"),
        ("scan --samples 2", "samples must be 3 or more, got 2"),
        ("scan --device gpu", "device must be one that works here, got 'gpu'"),
        ("scan --output it.txt", "output must end in .json, got 'it.txt'"),
        ("scan --sead 5", "did you mean --seed?"),
        ("layer --input-size -1", "input_size must be 0 or more, got -1"),
        ("accuracy --lengths 0", "got '0'"),
        ("accuracy --channels 0", "channels must be 1 or more, got 0"),
        ("accuracy --peers nobody", "peers must be all, none or among loop"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    args: str, message: str, capsys: pytest.CaptureFixture[str], workplace: Path
) -> None:
    assert main(["bench", *args.split()]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minrnn: error: [^\n]+\n", error), error
    assert message in error
    assert list(workplace.iterdir()) == []


def test_prefix_writes_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--shapes", "2x300x4", "--gates", "mingru", "identity", "--keeping", "14")
    for result in bench("prefix", *args, *FAST)["results"]:
        ours = result["systems"]["minrnn"]
        assert ours["status"] == "equal"
        assert set(ours["seconds"]) == {"forward", "prefix", "backward", "prefix of gradients", "step"}
        assert ours["bytes_sent"] == 2 * 2 * 4 * 4
    seen: list[Tensor] = []
    found = prefix.prefix
    monkeypatch.setattr(prefix, "prefix", lambda pre, *rest: (seen.append(pre[0]), found(pre, *rest))[1])
    bench("prefix", "--shapes", "1x30x64", "--keeping", "14", *FAST)
    assert all(z.mean() < -13 for z in seen)


@pytest.mark.parametrize("name", BENCHES)
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: minrnn bench {name}")
    options = re.split(r"\n\W+(?=--[a-z])", text.partition("help message and exit")[2])[1:]
    assert len(options) == len(fields(BENCHES[name].load().options))
    for option in options:
        words = re.sub(r"\s*│?\n│?\s*", " ", option)
        assert re.search(r"[a-z]{2,}.*\. \(default:", words), words


def test_help_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and entry.help in text for name, entry in BENCHES.items())


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from minrnn.cli.main import main\ntry: main(['bench', '--help'])\nexcept SystemExit "
        "as stop: sys.exit(stop.code or ', '.join({'torch', 'numpy', 'rich'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_kernels_ask_for_triton(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "minrnn.benchmarks.compiled", raising=False)
    assert main(["bench", "kernels"]) == 1
    assert "bench kernels: needs Triton, pip install 'minrnn[gpu]'" in capsys.readouterr().err
    assert list(workplace.iterdir()) == []


def test_compiled_peers_are_the_eager_ones_compiled() -> None:
    for table in (SCAN_PEERS, LAYER_PEERS):
        for name, peer in table.items():
            assert peer.compiled == name.endswith("-compiled")
            if peer.compiled:
                assert replace(peer, compiled=False) == table[name.removesuffix("-compiled")]
