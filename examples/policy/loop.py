"""Run a policy that `minrnn export` wrote in its environment, without torch and without minrnn.

pip install 'gymnasium[mujoco]' numpy onnxruntime
python examples/policy/loop.py policy.onnx --episodes 10
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import gymnasium
import numpy as np
import onnxruntime


class Policy:
    """An exported step, with its state between calls.

    The file's metadata say what it needs: the number that each state starts from, and the output that
    replaces it. What is left are the observation and, if the policy is conditioned on a return, the last
    reward.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.about: dict[str, Any] = json.loads(self.session.get_modelmeta().custom_metadata_map["minrnn"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.dtypes = {port["name"]: port["dtype"] for port in self.about["inputs"]}
        self.reset()

    def reset(self) -> None:
        """Forget the last episode."""
        self.state = {
            port["name"]: np.full(
                [1 if size == "batch" else size for size in port["shape"]], port["initial"], port["dtype"]
            )
            for port in self.about["inputs"]
            if "next" in port
        }

    def act(self, observation: Any, reward: float) -> Any:
        """Return the next action."""
        inputs = {"obs": [observation], "reward": [reward], **self.state}
        feed = {name: np.asarray(inputs[name], dtype) for name, dtype in self.dtypes.items()}
        found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.state = {port["name"]: found[port["next"]] for port in self.about["inputs"] if "next" in port}
        return found["actions"][0]


def play(policy: Policy, environment: gymnasium.Env[Any, Any], seed: int) -> tuple[float, list[float]]:
    """Return an episode's return, and the milliseconds of each action."""
    space = environment.action_space
    observation, _ = environment.reset(seed=seed)
    policy.reset()
    total, reward, times, over = 0.0, 0.0, [], False
    while not over:
        start = time.perf_counter()
        action = policy.act(observation, reward)
        times.append(1000 * (time.perf_counter() - start))
        if isinstance(space, gymnasium.spaces.Box):
            action = np.clip(action, space.low, space.high)
        else:
            action += space.start  # a discrete one
        observation, step_reward, terminated, truncated, _ = environment.step(action)
        reward = float(step_reward)
        total, over = total + reward, terminated or truncated
    return total, times


def main() -> None:
    """Play episodes and print their returns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("policy", type=Path, help="what `minrnn export RUN policy.onnx` wrote")
    parser.add_argument("--episodes", type=int, default=10, help="episode k has the seed plus k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, help="acting.json, as `minrnn act RUN` wrote it: its returns")
    options = parser.parse_args()

    policy = Policy(options.policy)
    environment = gymnasium.make(policy.about["environment"])
    played = [play(policy, environment, options.seed + k) for k in range(options.episodes)]
    returns = [total for total, _ in played]
    print("| episode | return | steps |\n|---|---|---|")
    for number, (total, times) in enumerate(played):
        print(f"| {number} | {total:.2f} | {len(times)} |")
    milliseconds = median([one for _, times in played for one in times])
    print(f"\nmean return {mean(returns):.2f}; {milliseconds:.3f} ms an action")
    if options.compare is not None:
        known = json.loads(options.compare.read_text(encoding="utf-8"))["returns"]
        print(f"largest difference from {options.compare}: {np.abs(np.subtract(returns, known)).max():.2g}")
    if unwanted := {"torch", "minrnn"} & sys.modules.keys():
        sys.exit(f"loop.py: {' and '.join(sorted(unwanted))} must not be imported")


if __name__ == "__main__":
    main()
