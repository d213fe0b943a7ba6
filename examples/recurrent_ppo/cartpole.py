"""Balance a pole without seeing speeds, with RecurrentPPO's LSTM and with MinGRU in its place.

pip install 'minrnn[rl]'
python examples/recurrent_ppo/cartpole.py                    # the table of docs/examples/recurrent-ppo.md
python examples/recurrent_ppo/cartpole.py --steps 20000 --seeds 0    # a minute or two
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import gymnasium
import torch
import tyro
from gymnasium.wrappers import TransformObservation
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import minrnn
from minrnn.integrations import sb3  # noqa: F401  # makes "MinGruPolicy" known

SETTINGS = {  # RL Zoo's for the LSTM on this task: hyperparameters/ppo_lstm.yml, CartPoleNoVel-v1
    "n_steps": 32,
    "batch_size": 256,
    "gae_lambda": 0.8,
    "gamma": 0.98,
    "n_epochs": 20,
    "ent_coef": 0.0,
}  # with a rate that falls from 1e-3 to 0, a clip range that falls from 0.2 to 0, and 8 environments
ENVIRONMENTS = 8
EVALUATIONS = 10


def without_speeds() -> gymnasium.Env[Any, Any]:
    """Return CartPole with the position and the angle as observations."""
    env = gymnasium.make("CartPole-v1")
    space = env.observation_space
    seen = gymnasium.spaces.Box(space.low[::2], space.high[::2], dtype=space.dtype)
    return TransformObservation(env, lambda observation: observation[::2], seen)


def falling(value: float) -> Callable[[float], float]:
    """Return a schedule from this value down to 0."""
    return lambda remaining: remaining * value


def run(policy: str, seed: int, steps: int) -> dict[str, Any]:
    """Train an agent; return its returns while it learns and after, and its speed."""
    name, width, *others = policy.split(":")
    sizes = {"lstm_hidden_size": int(width)} | ({"conv_width": int(others[0])} if others else {})
    model = RecurrentPPO(
        name,
        make_vec_env(without_speeds, ENVIRONMENTS, seed=seed),
        learning_rate=falling(1e-3),
        clip_range=falling(0.2),
        policy_kwargs=sizes,
        seed=seed,
        device="cpu",
        **SETTINGS,
    )
    with tempfile.TemporaryDirectory() as log:  # without it, EvalCallback keeps no results
        watch = EvalCallback(
            make_vec_env(without_speeds, ENVIRONMENTS, seed=1000 + seed),
            n_eval_episodes=ENVIRONMENTS,
            eval_freq=steps // EVALUATIONS // ENVIRONMENTS,
            log_path=log,
            verbose=0,
        )
        began = time.process_time()
        model.learn(steps, callback=watch)
        seconds = time.process_time() - began
    test = make_vec_env(without_speeds, ENVIRONMENTS, seed=2000 + seed)
    returned, _ = evaluate_policy(model, test, n_eval_episodes=50)
    return {
        "policy": policy,
        "seed": seed,
        "parameters": sum(x.numel() for x in model.policy.parameters()),
        "steps": model.num_timesteps,
        "cpu_seconds": seconds,
        "curve": [
            [int(at), float(mean(found))]
            for at, found in zip(watch.evaluations_timesteps, watch.evaluations_results, strict=True)
        ],
        "return": float(returned),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of means and deviations over the seeds."""
    lines = [
        "| policy | parameters | seeds | return | lowest | best while learning | steps a CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy in dict.fromkeys(record["policy"] for record in records):
        rows = [record for record in records if record["policy"] == policy]
        best = [max(value for _, value in row["curve"]) for row in rows]
        cells = [
            spread([row["return"] for row in rows]),
            f"{min(row['return'] for row in rows):.0f}",
            spread(best),
            spread([row["steps"] / row["cpu_seconds"] for row in rows]),
        ]
        lines.append(f"| {policy} | {rows[0]['parameters']:,} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(numbers: Sequence[float]) -> str:
    """Return the mean, and the standard deviation if there are several."""
    return f"{mean(numbers):.0f}" + (f" ± {stdev(numbers):.0f}" if len(numbers) > 1 else "")


def main(
    policies: tuple[str, ...] = ("MlpLstmPolicy:64", "MinGruPolicy:64", "MinGruPolicy:64:0"),
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    steps: int = 50_000,
    threads: int = 1,
    output: Path | None = None,
) -> None:
    """Train agents on CartPole without speeds, in turns, and print their returns and speed.

    Args:
        policies: names of policies, widths, and conv_width where it is not the policy's own.
        seeds: of the weights, of what is explored and of the environments.
        steps: environment steps of each agent.
        threads: torch's threads.
        output: a JSON file for the results.
    """
    torch.set_num_threads(threads)
    records = []
    for seed, policy in product(seeds, policies):
        records.append(run(policy, seed, steps))
        last = records[-1]
        print(
            f"{policy}, seed {seed}: return {last['return']:.0f}, {last['cpu_seconds']:.0f} CPU s", flush=True
        )
        if output:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            settings = {"steps": steps, "threads": threads, "environments": ENVIRONMENTS, **SETTINGS}
            found = {"minrnn": minrnn.__version__, **versions, "settings": settings, "records": records}
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(records))


if __name__ == "__main__":
    tyro.cli(main)
