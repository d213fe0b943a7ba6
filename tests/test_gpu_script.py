"""benchmarks/gpu.py: that it runs from end to end, here on a CPU with the least of everything."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch


@cache
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_a_dry_run_measures_everything_and_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "it.json"
    assert script().main(["--dry", "--output", str(path)]) == 0
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["dry"] is True
    assert document["laws"] == {"status": "not run"}
    assert document["left_out"] == []
    assert {(r["gate"], r["dtype"]) for r in document["shares"]} == {
        ("mingru", "float32"),
        ("minlstm", "float32"),
    }
    for result in document["shares"]:
        assert set(result["share"]) == {"forward", "backward"}
        assert max(result["error"].values()) < 1e-5
    for result, names in zip(document["steps"], [("gru", "gru-loop"), ("lstm", "lstm-loop")], strict=True):
        assert set(result["systems"]) == {"minrnn", *names}
        assert result["systems"]["minrnn"]["status"] == "equal"
        assert all("seconds" in record and "peak_bytes" in record for record in result["systems"].values())
    (result,) = document["peers"]
    assert {"minrnn", "loop"} <= result["systems"].keys()
    said = path.with_suffix(".md").read_text()
    assert said.startswith("**A dry run on the CPU.**")
    assert said.count("## ") == 3
    assert said in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_it_stops_when_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    assert script().main(["--dry", "--minutes", "0", "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["shares"] == document["steps"] == document["peers"] == []
    assert [(x["stage"], x["reason"]) for x in document["left_out"]] == [
        (stage, "time is up") for stage in ("shares", "shares", "steps", "steps", "peers")
    ]
    assert (
        "Left out: shares, mingru, 1 x 64 x 16, float32: time is up." in path.with_suffix(".md").read_text()
    )


def test_nothing_is_timed_where_the_engine_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = script().gated_scan
    monkeypatch.setattr(
        script(), "gated_scan", lambda gate, *pre: right(gate, *pre) * (1 + (pre[0].dtype != torch.float64))
    )
    path = tmp_path / "it.json"
    assert script().main(["--dry", "--output", str(path)]) == 1
    assert "minrnn differs from float64" in capsys.readouterr().err
    assert not path.exists() or json.loads(path.read_text())["shares"] == []


@pytest.mark.parametrize("status", ["failed", "not finished"])
def test_nothing_is_timed_where_a_law_does_not_hold(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script(), "full", script().dry)
    monkeypatch.setattr(
        script(), "laws", lambda seconds: {"status": status, "seconds": 1.0, "tail": "1 failed"}
    )
    path = tmp_path / "it.json"
    assert script().main(["--output", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["laws"]["status"] == status
    assert document["shares"] == []
    assert "the laws do not hold here; nothing is timed" in capsys.readouterr().err


def test_laws_that_were_skipped_have_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are where there is no GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # one process is enough
    if torch.cuda.is_available():
        pytest.skip("torch finds a CUDA device")
    assert script().laws(120)["status"] == "failed"


def test_whoever_lacks_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(torch.nn.Module):
        def __init__(self, d_model: int, d_hidden: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setitem(script().LOOPS, "gru-loop", Greedy)
    systems = script().step(script().dry(), "mingru", (2, 4, 4))["systems"]
    assert systems["gru-loop"]["detail"] == "OutOfMemoryError: CUDA out of memory."
    assert systems["gru"]["times_ours"] > 0


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script().main([]) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_the_full_plan_is_the_one_that_the_claims_are_about() -> None:
    plan = script().full()
    assert {(8, 4096, 2048), (64, 512, 256), (1, 1 << 20, 256)} <= set(plan.shapes)
    assert set(plan.dtypes) == {torch.float32, torch.bfloat16}
    assert (plan.batch, set(plan.lengths), set(plan.widths)) == (64, {512, 4096}, {64, 256, 1024})
    assert {"accelerated-scan-warp", "fla-hgrn-chunk"} <= set(plan.peers)
