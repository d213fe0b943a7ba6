"""Some of the planted faults, others for each commit, and the measure itself; `make mutants` plants all.

`MINRNN_FAULTS` says how many, 15 by default. None is of csrc, whose faults have to be compiled.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FAULTS = int(os.environ.get("MINRNN_FAULTS", "15"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tests/mutants/run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def commit() -> str:
    said = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return said.stdout.strip()


@pytest.mark.timeout(1800)  # a fault takes as long as its tests, twice
def test_no_fault_of_a_sample_survives_unexplained() -> None:
    seed = int(commit() or "0", 16) % 2**32
    done = run("--sample", FAULTS, "--seed", seed, "--without", "csrc")
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_the_measure_tells_a_fault_that_is_noticed_from_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "files.toml").write_text(
        """
tests = ["tests/test_files.py"]

[[fault]]
file = "src/minrnn/files/claims.py"
old = "def fresh_file("
new = "def stale_file("

[[fault]]
file = "src/minrnn/files/claims.py"
old = "import os"
new = "import os  # which nobody can notice"
"""
    )
    done = run("--lists", tmp_path, "--workers", 1)
    assert done.returncode == 1, done.stderr
    assert "survived, unexplained: files-2 src/minrnn/files/claims.py:" in done.stdout
    assert re.search(r"^files +2 +1 ", done.stdout, re.MULTILINE), done.stdout
