"""The adapters of peers that compute on GPUs only: what they hand over and take back, with stand-ins.

A stand-in computes what its original's documentation promises, and insists on the layout that it demands. It
says nothing of the original's speed or accuracy.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from minrnn.benchmarks.check import errors, scan_reference
from minrnn.benchmarks.peers import LAYER_PEERS, SCAN_PEERS, ScanPeer
from minrnn.cli.main import main
from minrnn.ops import GATES

ON_GPU = [name for name, peer in SCAN_PEERS.items() if "cpu" not in peer.devices]


def scan_rows(a: Tensor, b: Tensor) -> Tensor:
    """accelerated_scan's scan(gates, tokens): (B, C, T), time contiguous."""
    assert a.is_contiguous()
    assert b.is_contiguous()
    states = [b[..., 0]]
    for t in range(1, a.shape[-1]):
        states.append(a[..., t] * states[-1] + b[..., t])
    return torch.stack(states, -1)


def hgrn(x: Tensor, g: Tensor, initial_state: None = None, output_final_state: bool = False) -> Any:
    """fla's HGRN: o[t] = exp(g[t]) o[t-1] + x[t], (B, T, D)."""
    assert x.is_contiguous()
    assert g.is_contiguous()
    states = [x[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(g[:, t].exp() * states[-1] + x[:, t])
    return torch.stack(states, 1), None


STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "accelerated_scan": {},
    "accelerated_scan.scalar": {"scan": scan_rows},
    "accelerated_scan.warp": {"scan": scan_rows},
    "fla": {},
    "fla.ops": {},
    "fla.ops.hgrn": {"chunk_hgrn": hgrn, "fused_recurrent_hgrn": hgrn},
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, functions in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)


def test_these_are_the_peers() -> None:
    assert ON_GPU == [
        "accelerated-scan-triton",
        "accelerated-scan-warp",
        "fla-hgrn-chunk",
        "fla-hgrn-recurrent",
    ]


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_what_they_compute_is_the_scan(name: str, packed: bool, stand_ins: None) -> None:
    """From pre-activations to h in (B, T, D), and back, for every gate that they claim."""
    peer = SCAN_PEERS[name]
    assert peer.gates
    for gate in peer.gates:
        generator = torch.Generator().manual_seed(0)
        pre = [torch.randn(2, 64, 3, generator=generator) for _ in GATES[gate].pre]
        if gate == "identity":
            pre[0] = pre[0].sigmoid()
        pre = [torch.cat(pre, -1)] if packed else pre
        pre = [x.requires_grad_() for x in pre]
        dh = torch.randn(2, 64, 3, generator=generator)
        h = peer.scan()(gate, pre)
        assert h.is_contiguous()
        actual = {"h": h} | {f"d{i}": d for i, d in enumerate(torch.autograd.grad(h, pre, dh))}
        assert max(errors(actual, scan_reference(gate, pre, dh)).values()) < 1e-5


@pytest.mark.parametrize("T", [16, 48, 131072])
def test_the_warp_scan_is_not_asked_for_what_it_leaves_undefined(T: int, stand_ins: None) -> None:
    pre = [torch.zeros(1, T, 1)] * 2
    with pytest.raises(ValueError, match=f"T must be a power of two from 32 to 65536, got {T}"):
        SCAN_PEERS["accelerated-scan-warp"].scan()("mingru", pre)


def bench(*args: str) -> dict[str, Any]:
    command = ["bench", "scan", "--shapes", "2x32x4", "--seconds", "0.01", "--samples", "3", *args]
    assert main([*command, "--output", "it.json"]) == 0
    return json.loads(Path("it.json").read_text())


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # plots take longer than all the rest


def test_on_a_cpu_they_say_why_they_take_no_part(capsys: pytest.CaptureFixture[str]) -> None:
    document = bench("--peers", "fla-hgrn-chunk", "loop")
    assert "fla-hgrn-chunk takes no part: it computes on cuda only" in capsys.readouterr().out
    assert (
        document["peers"].keys() == document["results"][0]["systems"].keys() - {"copy", "minrnn"} == {"loop"}
    )


def test_where_they_can_they_are_checked_and_timed(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ON_GPU:
        monkeypatch.setitem(SCAN_PEERS, name, replace(SCAN_PEERS[name], devices=("cpu",)))
    systems = bench("--peers", *ON_GPU)["results"][0]["systems"]
    for name in ON_GPU:
        assert systems[name]["status"] == "equal"
        assert systems[name]["seconds"]["step"]["median"] > 0


def test_a_peer_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some compile when they are imported, and fail in their own ways."""

    def make() -> Any:
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setitem(SCAN_PEERS, "new", ScanPeer(make=make))
    record = bench("--peers", "new")["results"][0]["systems"]["new"]
    assert (record["status"], record["detail"]) == (
        "failed",
        "OSError: CUDA_HOME environment variable is not set",
    )


def test_torchs_cells_are_cudnns_there() -> None:
    """nn.GRU and nn.LSTM need no adapters of their own: on a GPU they are cuDNN's."""
    for name in ("gru", "lstm"):
        assert "cuda" in LAYER_PEERS[name].devices
