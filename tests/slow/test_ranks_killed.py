"""Ranks killed at random moments, in steps and in checkpoints, MINRNN_KILLS of each, and started again."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_runs import assert_same, config_of, saved_step, started_server

from minrnn.training import RunConfig, RunLog, train
from minrnn.training.config import WEIGHTS

KILLS = int(os.environ.get("MINRNN_KILLS", "20"))
"""Of each rank, in steps and in checkpoints each."""

EACH = 5
"""Kills of one run, before it is left to end."""

LIMIT = 100
"""Seconds that a rank waits for the other."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MINRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield started_server()


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def be_rank(rank: int, config: RunConfig, run_dir: Path, store: str) -> None:
    """Train, or go on, as one of two ranks."""
    from torch.distributed import FileStore

    from minrnn.distributed import Launch, join
    from minrnn.distributed.failures import LostRanksError

    try:
        with join("cpu", LIMIT, Launch(rank, 2, rank, 2), FileStore(store, 2)) as ranks:
            train(config, run_dir, resume=(run_dir / "config.json").is_file(), log=RunLog(), ranks=ranks)
    except LostRanksError:
        sys.exit(1)


class Pair:
    """Two ranks of one run, as torchrun starts them."""

    def __init__(self, processes: Any, config: RunConfig, run_dir: Path, store: Path) -> None:
        self.ranks = [
            processes.Process(target=be_rank, args=(rank, config, run_dir, str(store))) for rank in range(2)
        ]
        for rank in self.ranks:
            rank.start()

    def end(self) -> list[int]:
        """Wait for both; return their exit codes."""
        for rank in self.ranks:
            rank.join(2 * LIMIT)  # the other may be killed before they have found each other
            assert rank.exitcode is not None, "a rank waits for one that has ended"
        return [rank.exitcode for rank in self.ranks]

    def kill(self, which: int, after: float) -> bool:
        """Kill a rank after some seconds; return whether it had not ended before."""
        self.ranks[which].join(after)
        self.ranks[which].kill()
        codes = self.end()
        assert codes[which] in (0, -signal.SIGKILL)
        if codes[which] == 0:
            return False
        # The other had its last step behind it, or ended because of this one.
        assert codes[1 - which] in (0, 1)
        return True


@pytest.mark.timeout(0)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("every", [1, 10], ids=["checkpoints", "steps"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_ranks_killed_at_random_moments_and_started_again_were_never_killed(
    which: int, every: int, weights: str, corpus: Path, tmp_path: Path, processes: Any
) -> None:
    """With a checkpoint in every step most moments are of one; with one in ten, of a step."""
    config = config_of(corpus, batch_size=5, fresh_share=0.3, checkpoint_every=every, weights=weights)
    began = time.monotonic()
    assert Pair(processes, config, tmp_path / "whole", tmp_path / "store").end() == [0, 0]
    takes = time.monotonic() - began
    draw = random.Random(which)
    kills, runs, steps = 0, 0, Counter[int]()
    while kills < KILLS:
        runs += 1
        run_dir = tmp_path / f"run{runs}"
        for attempt in range(min(EACH, KILLS - kills)):
            pair = Pair(processes, config, run_dir, tmp_path / f"store{runs}-{attempt}")
            kills += pair.kill(which, draw.uniform(0.3 * takes, takes))
            steps[saved_step(run_dir)] += 1
            if (run_dir / "results.json").is_file():  # it has ended
                break
        assert Pair(processes, config, run_dir, tmp_path / f"store{runs}").end() == [0, 0]
        assert_same(tmp_path / "whole", run_dir)
    told = f"{kills} kills in {runs} runs; last saved step: {dict(sorted(steps.items()))}"
    print(f"\n{weights}, rank {which}: {told}")
