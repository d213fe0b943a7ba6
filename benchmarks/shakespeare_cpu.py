"""The recipe shakespeare-cpu for every mixer: the runs whose table RESULTS.md shows.

    python benchmarks/shakespeare_cpu.py mingru attention minlstm rnn lstm gru --seeds 0 1 2

Every run is `minrnn train shakespeare-cpu --model.mixer MIXER --train.seed SEED` on one CPU thread, and two
of them go on at a time, so that their seconds can be compared. What is kept of a run is its results.json and
its loss in windows of 64 characters from the empty state, the protocol of nanoGPT.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "shakespeare-cpu"
NANOGPT_WINDOW = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("mixers", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--together", type=int, default=2, help="runs at a time (default: 2)")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.together) as pool:
        jobs = itertools.product(arguments.seeds, arguments.mixers)
        for done in [pool.submit(train, mixer, seed) for seed, mixer in jobs]:
            print(done.result(), flush=True)


def train(mixer: str, seed: int) -> Path:
    """Train a model, measure it and keep its results; return where they are (what is there already stays)."""
    path = RESULTS / f"{mixer}-{seed}.json"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        subprocess.run(command(mixer, seed, run), env=one_thread(), check=True, stdout=subprocess.DEVNULL)
        result = collect(run) | {"seed": seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n")
    return path


def command(mixer: str, seed: int, run: Path) -> list[str]:
    options = ["--run", str(run), "--model.mixer", mixer, "--train.seed", str(seed), "--train.threads", "1"]
    return [sys.executable, "-m", "minrnn", "train", "shakespeare-cpu", *options]


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def collect(run: Path) -> dict[str, Any]:
    """A run's results, with its losses in windows of nanoGPT's length."""
    evaluate = ["evaluate", str(run), "--checkpoint", "last", "--window", str(NANOGPT_WINDOW)]
    subprocess.run(
        [sys.executable, "-m", "minrnn", *evaluate], env=one_thread(), check=True, stdout=subprocess.DEVNULL
    )
    results = json.loads((run / "results.json").read_text())
    short = json.loads((run / "evaluation.json").read_text())
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return results | {
        "val_loss_windowed_64": short["val_loss_windowed"],
        "training_curve": [
            [record["step"], round(record["loss"], 4)] for record in curve if "loss" in record
        ][::10],
    }


if __name__ == "__main__":
    main()
