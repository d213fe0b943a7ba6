"""Recorded episodes for tests, written where `find_episodes` looks for local data."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import numpy as np

from minrnn.tasks.episodes import Episodes
from minrnn.tasks.locomotion import local_name, local_path
from minrnn.tasks.recordings import write_episodes

NEEDED = ("gymnasium", "h5py")
MISSING = ", ".join(f"{name} is not installed: the extra rl" for name in NEEDED if find_spec(name) is None)
"""Why there can be no episodes, or nothing."""


DRAW = """
import sys
from minrnn.tasks.rollouts import make_filmed, picture
try:
    environment = make_filmed("InvertedPendulum-v5")
    environment.reset(seed=0)
    picture(environment)
except (ImportError, RuntimeError) as error:
    print(error)
"""


@cache
def cannot_draw() -> str:
    """Return why this machine draws no pictures of MuJoCo, or nothing.

    Another process tries: where OpenGL is missing, a try leaves mujoco half imported for all that follows.
    """
    done = subprocess.run([sys.executable, "-c", DRAW], stdout=subprocess.PIPE, text=True, check=True)
    return f"this machine cannot draw MuJoCo: {done.stdout.strip()}" if done.stdout else ""


def write_pendulum_data() -> None:
    """Write small local data sets for Pendulum-v1: ten episodes of noise, whose returns differ."""
    if MISSING:
        return
    for quality in ("medium", "medium-replay"):
        path = local_path(local_name("Pendulum-v1", quality))
        if path.is_file():
            continue
        draws = np.random.default_rng(len(quality))
        lengths = draws.integers(20, 60, 10)
        N = int(lengths.sum())
        observations = draws.normal(size=(N, 3)).astype(np.float32)
        episodes = Episodes(
            observations,
            draws.uniform(-2, 2, (N, 1)).astype(np.float32),
            -draws.uniform(0, 1, N).astype(np.float32),
            np.cumsum(lengths).astype(np.int64),
            np.zeros(10, bool),
            "Pendulum-v1",
            {"source": "local", "name": local_name("Pendulum-v1", quality)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_episodes(path, episodes, observations)
