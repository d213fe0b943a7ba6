"""`torchrun -m -- minrnn train`: signals, kills and restarts of real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rank_pool import MISSING, Pool, training_pool
from test_distributed import run_on
from test_training import assert_same_run, run_config

from minrnn.training import RunConfig, read_metrics

pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(
        bool(MISSING) or not Path("/proc/self/environ").exists(), reason=MISSING or "no /proc"
    ),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]

STEPS = 60
"""More than pass between a signal and its effect: the log tells the step, and steps take milliseconds."""


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with training_pool(tmp_path_factory, 2) as made:
        yield made


def config_of(corpus: Path) -> RunConfig:
    """A run that saves in every fifth step, and not otherwise before it ends."""
    return run_config(corpus, steps=STEPS, batch_size=4, log_every=1, checkpoint_every=5, eval_every=0)


def write_recipe(config: RunConfig, folder: Path) -> Path:
    """Write a configuration as a recipe; paths and texts are valid TOML in JSON's form."""
    path = folder / "test.toml"
    tables = {name: value for name, value in config.to_dict().items() if isinstance(value, dict)}
    lines = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    path.write_text("\n".join(lines))
    return path


Act = Callable[[int, list[int]], None]
"""Called with torchrun's process id and those of the ranks."""


class Torchrun:
    """A run of two ranks on one machine.

    Args:
        folder: where its run directory, recipe and output go.
        config: the configuration.
        options: further options of torchrun.
        when: the step of the log at which to `act`.
        act: what is done then.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        options: list[str],
        when: int,
        act: Act,
    ) -> None:
        self.run_dir, out = folder / "run", folder / "out.txt"
        recipe = write_recipe(config, folder)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
        command += ["-m", "--", "minrnn", "train", str(recipe), "--run-dir", str(self.run_dir)]
        environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        with out.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                self._await(process, when)
                act(process.pid, ranks_below(process.pid))
                process.wait()
            finally:
                process.kill()
                process.wait()
        self.status, self.output = process.returncode, out.read_text()

    def _await(self, process: subprocess.Popen[bytes], step: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
            assert process.poll() is None
            time.sleep(0.02)

    @property
    def saved(self) -> int:
        state = json.loads((self.run_dir / "checkpoints" / "last" / "trainer.json").read_text())
        return int(state["step"])


def ranks_below(torchrun: int) -> list[int]:
    """Return the processes that torchrun has started, in the order of their ranks."""
    found: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, StopIteration):  # it has ended, or is another user's
            if f"PPid:\t{torchrun}\n" in (folder / "status").read_text():
                variables = (folder / "environ").read_bytes().split(b"\0")
                rank = next(one for one in variables if one.startswith(b"RANK="))
                found[int(rank.removeprefix(b"RANK="))] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ranks_of: Pool) -> Path:
    """The directory of a run on two ranks that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on(ranks_of, 2, config_of(corpus), run_dir)
    return run_dir


def test_a_signal_saves_all_after_one_step_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, ranks_of: Pool, whole: Path
) -> None:
    """Signals to torchrun are among the slow tests: each takes the start of three processes."""

    def terminate(_: int, ranks: list[int]) -> None:
        os.kill(ranks[1], signal.SIGTERM)

    stop_and_go_on(corpus, tmp_path, ranks_of, whole, "SIGTERM", terminate)


def stop_and_go_on(corpus: Path, folder: Path, ranks_of: Pool, whole: Path, name: str, act: Act) -> None:
    """Check a run that is stopped by a signal, and continued."""
    stopped = Torchrun(folder, config_of(corpus), [], 7, act)
    assert stopped.status == 1
    assert 7 <= stopped.saved < STEPS
    assert f"{name}: stopped and saved after step {stopped.saved}; resume with: torchrun" in stopped.output
    assert stopped.output.count("stopped and saved after") == 1
    run_on(ranks_of, 2, config_of(corpus), stopped.run_dir, resume=True)
    assert_same_run(whole, stopped.run_dir)


def test_a_rank_that_is_killed_is_started_again_and_the_run_goes_on(
    corpus: Path, tmp_path: Path, whole: Path
) -> None:
    killed = Torchrun(
        tmp_path,
        config_of(corpus),
        ["--standalone", "--max-restarts", "1"],
        7,
        lambda _, ranks: os.kill(ranks[0], signal.SIGKILL),
    )
    assert killed.status == 0, killed.output
    assert killed.output.count("resumed after step") == 1
    assert_same_run(whole, killed.run_dir)
