"""The loop without torch: an exported policy acts there as it does here."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES, imported, run

from minrnn import DecisionConfig, DecisionModel, ModelConfig, Policy
from minrnn.export import export_step
from minrnn.tasks.rollouts import play

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: the extra rl")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the extra export")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: the extra export")

TRUNK = ModelConfig(d_model=16, num_layers=2, mixer="mingru")
CONFIGS = {
    "Pendulum-v1": DecisionConfig(
        TRUNK, observation_size=3, action_size=1, return_scale=100.0, target_return=-200.0
    ),
    "CartPole-v1": DecisionConfig(
        TRUNK, observation_size=4, action_size=2, discrete=True, tokens="observation"
    ),
}
EPISODES = 3


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with imported("policy/loop.py") as module:
        yield module


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Policy, Path]:
    """An environment, a policy for it, and its file."""
    name = request.param
    torch.manual_seed(0)
    policy = Policy(DecisionModel(CONFIGS[name]))
    path = tmp_path_factory.mktemp("policy") / "policy.onnx"
    export_step(policy, metadata={"environment": name}).save(path)
    return name, policy, path


def test_the_loop_imports_neither_torch_nor_minrnn() -> None:
    tree = ast.parse((EXAMPLES / "policy/loop.py").read_text(encoding="utf-8"))
    found = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {"gymnasium", "numpy", "onnxruntime"} <= found
    assert not {name for name in found if (name or "").split(".")[0] in ("torch", "minrnn")}


def test_actions_are_the_policys(script: ModuleType, exported: tuple[str, Policy, Path]) -> None:
    name, policy, path = exported
    there = script.Policy(path)
    rng = np.random.default_rng(0)
    for _ in range(2):  # a second episode starts anew
        there.reset()
        for step in range(20):
            observation, reward = rng.normal(size=policy.model.config.observation_size), rng.normal()
            wanted = policy.act(observation, reward, reset=step == 0).numpy()
            np.testing.assert_allclose(
                there.act(observation, 0.0 if step == 0 else reward), wanted, atol=1e-5
            )
    assert there.about["environment"] == name


def test_returns_are_those_of_the_original(exported: tuple[str, Policy, Path], tmp_path: Path) -> None:
    """In a process of its own, which fails if torch is there."""
    name, policy, path = exported
    *_, played = play(policy, [gymnasium.make(name)], EPISODES, seed=5)
    known = tmp_path / "acting.json"
    known.write_text(json.dumps({"returns": [episode.total_return for episode in played]}))
    done = run("policy/loop.py", path, "--episodes", str(EPISODES), "--seed", "5", "--compare", known)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\d+) \|$", done.stdout, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(EPISODES))
    assert [int(steps) for _, _, steps in rows] == [episode.steps for episode in played]
    returns = [float(total) for _, total, _ in rows]
    np.testing.assert_allclose(returns, [episode.total_return for episode in played], rtol=1e-3)
    (difference,) = re.findall(r"^largest difference from .*: (\S+)$", done.stdout, re.MULTILINE)
    assert float(difference) < 1e-3 * max(map(abs, returns))


def test_it_says_when_torch_was_imported(
    script: ModuleType, exported: tuple[str, Policy, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["loop.py", str(exported[2]), "--episodes", "1"])
    with pytest.raises(SystemExit, match="minrnn and torch must not be imported"):  # it is, in this process
        script.main()
