"""Balance a pole without seeing speeds, by recurrent DQN with torchrl's LSTM and with MinGRU in its place.

Loss, loop and settings are those of torchrl's tutorial "Recurrent DQN: Training recurrent policies". It sees
pictures, which need a renderer; here the network sees the cart's position and the pole's angle.

pip install 'minrnn[rl,torchrl]'
python examples/recurrent_dqn/cartpole.py                      # the table of docs/examples/recurrent_dqn.md
python examples/recurrent_dqn/cartpole.py --frames 2000 --seeds 0
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Generator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium
import torch
import torchrl
import tyro
from gymnasium.wrappers import TransformObservation
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import (
    Compose,
    ExplorationType,
    InitTracker,
    RewardScaling,
    StepCounter,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.envs.libs.gym import GymWrapper
from torchrl.modules import MLP, EGreedyModule, GRUModule, LSTMModule, QValueModule, set_recurrent_mode
from torchrl.objectives import DQNLoss, SoftUpdate

import minrnn
from minrnn.integrations import torchrl as integration

SETTINGS = {  # the tutorial's
    "frames_per_batch": 50,
    "updates_per_batch": 16,
    "batch_size": 4,
    "learning_rate": 3e-4,
    "eps_init": 0.2,
    "soft_update": 0.95,
    "reward_scale": 0.1,
}
FEATURES, WIDTH = 64, 128
EPISODES, EVALUATIONS = 20, 10
KINDS = {
    "LSTM": (LSTMModule, {}),
    "GRU": (GRUModule, {}),
    "MinGRU": (integration.MinGRUModule, {"conv_width": 4}),
    "MinGRU:0": (integration.MinGRUModule, {}),
}
"""Modules by name, and their arguments; without a convolution, MinGRU is MinGRU:0."""


class Agent:
    """An environment and a network with a recurrent module between two perceptrons."""

    def __init__(self, kind: str, seed: int, frames: int) -> None:
        torch.manual_seed(seed)
        module, options = KINDS[kind]
        recurrent = module(FEATURES, WIDTH, in_key="embed", out_key="embed", **options)
        scaled = RewardScaling(loc=0.0, scale=SETTINGS["reward_scale"])
        self.env = TransformedEnv(GymWrapper(without_speeds()), Compose(StepCounter(), InitTracker(), scaled))
        self.env.append_transform(recurrent.make_tensordict_primer())
        self.env.set_seed(seed)
        features = nn.Sequential(nn.Linear(2, FEATURES), nn.ELU())
        values = MLP(in_features=WIDTH, out_features=2, num_cells=[64])
        self.network = TensorDictSequential(
            TensorDictModule(features, ["observation"], ["embed"]),
            recurrent,
            TensorDictModule(values, ["embed"], ["action_value"]),
            QValueModule(action_space=None, spec=self.env.action_spec),
        )
        spec = self.env.action_spec
        self.exploration = EGreedyModule(spec, eps_init=SETTINGS["eps_init"], annealing_num_steps=frames)
        self.explorer = TensorDictSequential(self.network, self.exploration)

    @torch.no_grad()
    def play(self, episodes: int) -> float:
        """Return the mean length of episodes with the best action, which is their return."""
        with set_exploration_type(ExplorationType.MODE):
            played = [self.env.rollout(500, self.explorer) for _ in range(episodes)]
        return mean(float(each["next", "step_count"].max()) for each in played)


def without_speeds() -> gymnasium.Env[Any, Any]:
    """Return CartPole with the position and the angle as observations."""
    env = gymnasium.make("CartPole-v1")
    space = env.observation_space
    seen = gymnasium.spaces.Box(space.low[::2], space.high[::2], dtype=space.dtype)
    return TransformObservation(env, lambda observation: observation[::2], seen)


def updates(agent: Agent) -> Generator[None, Any, None]:
    """Receive rollouts, and learn from each and from those before."""
    loss_of = DQNLoss(agent.network, action_space=agent.env.action_spec, delay_value=True)
    target = SoftUpdate(loss_of, eps=SETTINGS["soft_update"])
    optimizer = torch.optim.Adam(agent.network.parameters(), lr=SETTINGS["learning_rate"])
    storage = LazyTensorStorage(20_000)
    replay = TensorDictReplayBuffer(storage=storage, batch_size=SETTINGS["batch_size"])
    while True:
        replay.extend((yield).unsqueeze(0))
        with set_recurrent_mode(True):
            for _ in range(SETTINGS["updates_per_batch"]):
                loss_of(replay.sample())["loss"].backward()
                optimizer.step()
                optimizer.zero_grad()
        target.step()


def run(kind: str, seed: int, frames: int) -> dict[str, Any]:
    """Train an agent; return its returns while it learns and after, and its speed."""
    agent, curve, seconds = Agent(kind, seed, frames), [], {"collecting": 0.0, "learning": 0.0}
    learning = updates(agent)
    next(learning)
    collector = Collector(
        agent.env, agent.explorer, frames_per_batch=SETTINGS["frames_per_batch"], total_frames=frames
    )
    done, began = 0, time.process_time()
    for data in collector:
        seconds["collecting"] += time.process_time() - began
        began = time.process_time()
        learning.send(data)
        seconds["learning"] += time.process_time() - began
        agent.exploration.step(data.numel())
        before, done = done, done + data.numel()
        if before * EVALUATIONS // frames < done * EVALUATIONS // frames:
            curve.append([done, agent.play(5)])
        began = time.process_time()
    collector.shutdown()
    parameters = sum(x.numel() for x in agent.network.parameters())
    found = {"module": kind, "seed": seed, "parameters": parameters, "frames": done, "seconds": seconds}
    return found | {"curve": curve, "return": agent.play(EPISODES)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of means and deviations over the seeds."""
    lines = [
        "| module | parameters | seeds | return | highest | best on the way | frames a CPU s | learning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(record["module"] for record in records):
        rows = [record for record in records if record["module"] == kind]
        cells = [
            spread([row["return"] for row in rows]),
            f"{max(row['return'] for row in rows):.0f}",
            spread([max(value for _, value in row["curve"]) for row in rows]),
            spread([row["frames"] / sum(row["seconds"].values()) for row in rows]),
            spread([row["frames"] / row["seconds"]["learning"] for row in rows]),
        ]
        lines.append(f"| {kind} | {rows[0]['parameters']:,} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(numbers: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    return f"{mean(numbers):.0f}" + (f" ± {stdev(numbers):.0f}" if len(numbers) > 1 else "")


def main(
    modules: tuple[str, ...] = ("LSTM", "MinGRU"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    frames: int = 10_000,
    threads: int = 1,
    output: Path | None = None,
) -> None:
    """Train agents on CartPole without speeds, in turns, and print their returns and speed.

    Args:
        modules: names in KINDS.
        seeds: of the weights, of what is explored and of the environment.
        frames: environment steps of each agent.
        threads: torch's threads.
        output: a JSON file for the results.
    """
    torch.set_num_threads(threads)
    records = []
    for seed, kind in product(seeds, modules):
        records.append(run(kind, seed, frames))
        last = records[-1]
        print(f"{kind}, seed {seed}: return {last['return']:.0f}, {last['seconds']}", flush=True)
        if output:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            versions |= {"minrnn": minrnn.__version__, "torchrl": torchrl.__version__}
            found = {**versions, "settings": {"frames": frames, "threads": threads, **SETTINGS}}
            output.write_text(json.dumps(found | {"records": records}, indent=1) + "\n", encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    tyro.cli(main)
