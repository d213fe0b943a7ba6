"""The compiled engine's threads are those of torch's OpenMP, wherever torch keeps it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minrnn.ops.registry import engines, load

pytestmark = pytest.mark.skipif(
    isinstance(load("cpp"), ImportError), reason=f"no compiled engine: {load('cpp')}"
)

LOCAL = """
import ctypes
CDLL = ctypes.CDLL
ctypes.CDLL = lambda *names, mode=0, **options: CDLL(*names, mode=0, **options)
"""
"""As torch's CUDA builds, which offer no other library their OpenMP."""

POOL = """
import os, re, torch
torch.set_num_threads(3)

def threads():
    return len(os.listdir("/proc/self/task"))

from minrnn.ops import cpu, gated_scan
pre = [torch.randn(8, 512, 64) for _ in range(2)]
before = threads()
h = gated_scan("mingru", *pre)
ours = threads()
torch.randn(1 << 21).exp_()
print(cpu.compiled.threads_by, ours - before, threads() - ours)
found = set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)\\b\\S*", open("/proc/self/maps").read()))
assert len(found) == 1, found
torch.set_num_threads(1)
assert torch.equal(h, gated_scan("mingru", *pre))
"""


def output(code: str) -> list[str]:
    settings = {**os.environ, "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux lists a process's threads")
@pytest.mark.parametrize("before", ["", LOCAL], ids=["for all", "torch's own"])
def test_the_threads_are_torchs(before: str) -> None:
    """The engine starts two beside the first, with which torch then does."""
    by, ours, torchs = output(before + POOL)
    assert by in ("GOMP_parallel", "__kmpc_fork_call")
    assert (int(ours), int(torchs)) == (2, 0)


def test_without_openmp_one_thread_serves() -> None:
    """The extension alone needs neither torch nor an OpenMP runtime."""
    code = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("minrnn.ops._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(repr(module.threads_by))
"""
    from minrnn.ops import cpu

    command = [sys.executable, "-c", code, str(cpu.compiled.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux lists a processor's features")
def test_the_widest_instruction_set_is_what_the_system_lists() -> None:
    flags = set(
        Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    )
    needs = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"},
    }
    needs["avx512_bf16"] = needs["avx512"] | {"avx512_bf16"}
    expected = ["baseline", *(name for name, wanted in needs.items() if wanted <= flags)][-1]
    code = "from minrnn.ops import cpu; print(cpu.ISA)"
    settings = {name: value for name, value in os.environ.items() if name != "MINRNN_ISA"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings
    )
    assert done.stdout.strip() == expected


def test_what_is_said_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from minrnn.ops import cpu

    monkeypatch.delenv("MINRNN_ENGINE", raising=False)
    detail = f"compiled C++, {cpu.ISA} instructions"
    assert engines()[0].detail == detail
    monkeypatch.setattr(cpu, "compiled", SimpleNamespace(threads_by=""))
    assert engines()[0].detail == f"{detail}, one thread: torch's OpenMP was not found"
