"""`minrnn bench gpu` runs from end to end, here on a CPU in the smallest settings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minrnn.benchmarks import gpu
from minrnn.cli.main import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the benchmark with its results in it.json; return the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINRNN_DEBUG", raising=False)
    return lambda *args: main(["bench", "gpu", *args, "--output", "it.json"])


def document() -> dict[str, Any]:
    return json.loads(Path("it.json").read_text(), parse_constant=pytest.fail)


def stage(name: str) -> list[dict[str, Any]]:
    return [result for result in document()["results"] if result["stage"] == name]


def test_a_dry_run_measures_everything_and_says_what_it_is(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra plots")
    assert run("--dry") == 0
    assert document()["options"]["dry"] is True
    assert document()["tests"] == {"status": "not run"}
    assert document()["left_out"] == []
    assert {"machine", "versions", "commit", "device", "engines"} <= document().keys()
    assert {(r["gate"], r["dtype"]) for r in stage("shares")} == {
        ("mingru", "float32"),
        ("minlstm", "float32"),
    }
    for result in stage("shares"):
        ours = result["systems"]["minrnn"]
        assert set(ours["share"]) == {"forward", "backward", "step"}
        assert max(ours["error"].values()) < 1e-5
        assert set(result["systems"]["copy"]["bytes_per_second"]) == {"forward", "backward"}
    for result, names in zip(stage("steps"), [("gru", "gru-loop"), ("lstm", "lstm-loop")], strict=True):
        assert set(result["systems"]) == {"minrnn", *names}
        assert result["systems"]["minrnn"]["status"] == "equal"
        assert all("seconds" in record and "peak_bytes" in record for record in result["systems"].values())
    (result,) = stage("peers")
    assert {"minrnn", "loop"} <= result["systems"].keys()
    said = Path("it.md").read_text()
    assert said.startswith("**A dry run on the CPU.**")
    assert said.count("## ") == 3
    assert said in capsys.readouterr().out
    assert Path("it.png").read_bytes().startswith(b"\x89PNG")


def test_it_stops_when_time_is_up(run: Callable[..., int]) -> None:
    assert run("--dry", "--minutes", "0") == 0
    assert document()["results"] == []
    assert [(x["stage"], x["reason"]) for x in document()["left_out"]] == [
        (stage, "time is up") for stage in ("shares", "shares", "steps", "steps", "peers")
    ]
    assert "Left out: shares, mingru, B = 1, T = 64, D = 16, float32, " in Path("it.md").read_text()


def test_nothing_is_timed_where_the_engine_is_wrong(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = gpu.gated_scan
    monkeypatch.setattr(
        gpu, "gated_scan", lambda gate, *pre: right(gate, *pre) * (1 + (pre[0].dtype != torch.float64))
    )
    assert run("--dry") == 1
    assert "minrnn differs from the reference" in capsys.readouterr().err
    assert not Path("it.json").exists() or document()["results"] == []


def test_the_limit_is_in_minutes(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    monkeypatch.setattr(gpu, "_measure", lambda sweep, end, report: ends.append(end - time.monotonic()))
    run("--dry", "--minutes", "60")
    assert 1800 < ends[0] <= 3600


@pytest.mark.parametrize("status", ["failed", "not finished"])
def test_nothing_is_timed_where_a_test_fails(
    status: str,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "full_sweep", gpu.dry_sweep)
    monkeypatch.setattr(gpu, "TESTS", Path(__file__))  # an installed package has none
    monkeypatch.setattr(
        gpu, "run_tests", lambda seconds: {"status": status, "seconds": 1.0, "tail": "1 failed"}
    )
    assert run() == 1
    assert document()["tests"]["status"] == status
    assert document()["results"] == []
    said = capsys.readouterr()
    assert "1 failed" in said.out
    assert f"the engine's tests: {status}; nothing is timed" in said.err


@pytest.mark.parametrize(
    ("done", "status"),
    [
        ((0, "....\n4 passed in 1.00s"), "passed"),
        ((0, "4 passed, 1 skipped in 1.00s"), "passed"),
        ((0, "4 skipped in 1.00s"), "failed"),
        ((1, "1 failed, 3 passed in 1.00s"), "failed"),
        (None, "not finished"),
    ],
)
def test_tests_have_passed_if_some_did_and_none_failed(
    done: tuple[int, str] | None, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], timeout: float, **_: object) -> SimpleNamespace:
        assert timeout == 7
        if done is None:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=done[0], stdout=done[1], stderr="a warning")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    found = gpu.run_tests(7)
    assert found["status"] == status
    assert found["tail"] == ("" if done is None else f"{done[1]}a warning")


def test_tests_that_were_skipped_have_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are where there is no GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # one process is enough
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    assert gpu.run_tests(120)["status"] == "failed"


def test_whoever_lacks_memory_is_left_out(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(torch.nn.Module):
        def __init__(self, d_model: int, d_hidden: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(gpu.LOOPS, "gru-loop", Greedy)
    assert run("--dry") == 0
    systems = stage("steps")[0]["systems"]
    assert systems["gru-loop"]["detail"] == "OutOfMemoryError: CUDA out of memory."
    assert systems["gru"]["times_ours"] > 0
    assert "| gru-loop | failed |" in Path("it.md").read_text()


def test_a_case_that_does_not_fit_is_left_out(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(gpu, "scan_systems", large)
    assert run("--dry") == 0
    left_out = document()["left_out"]
    assert {left["reason"] for left in left_out} == {"the device's memory does not suffice"}
    assert {left["stage"] for left in left_out} == {"peers"}
    assert stage("shares")
    assert stage("steps")
    assert not stage("peers")


def test_without_a_gpu_it_says_so(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []


def test_without_a_checkout_the_tests_have_to_be_left_out(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "TESTS", Path("nowhere.py"))
    assert run() == 2
    assert "add --no-tests" in capsys.readouterr().err


def test_the_full_sweep_is_the_one_that_the_claims_are_about() -> None:
    sweep = gpu.full_sweep()
    assert {(8, 4096, 2048), (64, 512, 256), (1, 1 << 20, 256)} <= set(sweep.shapes)
    assert set(sweep.dtypes) == {"float32", "bfloat16"}
    assert (sweep.batch, set(sweep.lengths), set(sweep.widths)) == (64, {512, 4096}, {64, 256, 1024})
    assert {"accelerated-scan-warp", "fla-hgrn-chunk"} <= set(sweep.peers)
