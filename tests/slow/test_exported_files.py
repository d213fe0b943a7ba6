"""Files of every format, form and mixer, loaded and run in processes that have no minrnn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import V, decision_model, draw, follow, language_model, relative, run_elsewhere

from minrnn.export import FORMATS, Exported, export_sequence, export_step
from minrnn.export.converting import Run
from minrnn.export.models import interface_of
from minrnn.mixers import GATED_RNNS, MIXERS
from minrnn.models import Policy

NEEDED = {
    ".onnx": ("onnxruntime", "onnxruntime is not installed: the extra export"),
    ".pte": ("executorch", "executorch is not installed: the extra executorch"),
}
"""The module of a format's runtime, and why a test is skipped without it."""

pytestmark = pytest.mark.timeout(1200)  # an export takes a minute on a busy machine

CLOSE = 1e-5
"""Largest difference from the model, relative to the largest number."""

SEQUENCES = {
    ".onnx": (*GATED_RNNS, "attention", "aaren", "mamba"),
    ".pte": tuple(GATED_RNNS),
    ".pt2": (*GATED_RNNS, "mamba", "s4d"),
}
"""The mixers whose sequences each format holds; docs/export.md says why it holds no others."""


def needs(suffix: str) -> None:
    if suffix in NEEDED:
        module, reason = NEEDED[suffix]
        if find_spec(module) is None:
            pytest.skip(reason)


def compare(exported: Exported, path: Path, model: Any, sizes: list[dict[str, int]]) -> None:
    """Hold a file to its model, at several sizes."""
    exported.save(path)
    assert path.parent.exists()
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    module, *_ = interface_of(model, exported.form, None)
    for free in sizes:
        inputs = draw(exported, free)
        found, metadata = run_elsewhere(path, inputs)
        assert [port["name"] for port in metadata["inputs"]] == [port.name for port in exported.inputs]
        with torch.no_grad():
            expected = module(*inputs)
        assert len(found) == len(expected) == len(exported.outputs)
        for name, ours, theirs in zip(exported.outputs, found, expected, strict=True):
            assert relative(ours, theirs) < CLOSE, name


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_mixers_step_is_a_file(suffix: str, mixer: str, tmp_path: Path) -> None:
    needs(suffix)
    model, free = language_model(mixer), "step" in FORMATS[suffix].free_batch
    exported = export_step(model, batch=None if free else 2)
    sizes = [{"batch": 1}, {"batch": 3}, {"batch": 64}] if free else [{}]
    compare(exported, tmp_path / f"step{suffix}", model, sizes)


@pytest.mark.parametrize(
    ("suffix", "mixer"), [(suffix, mixer) for suffix, mixers in SEQUENCES.items() for mixer in mixers]
)
def test_sequences_are_a_file(suffix: str, mixer: str, tmp_path: Path) -> None:
    needs(suffix)
    model, kind = language_model(mixer), FORMATS[suffix]
    free = "sequence" in kind.free_batch
    longest = None if kind.free_length else 64
    exported = export_sequence(model, batch=None if free else 2, longest=longest)
    lengths = (2, 64) if longest else (2, 1000)
    sizes = [{"batch": batch, "time": T} for batch in ((1, 3, 64) if free else (2,)) for T in lengths]
    compare(exported, tmp_path / f"sequence{suffix}", model, sizes)


def written(exported: Exported, path: Path) -> Run:
    """Return the file of a program, written and loaded."""
    exported.save(path)
    return FORMATS[path.suffix].load(path.read_bytes(), exported)


def check_steps(mixer: str, rows: int, steps: int, path: Path) -> None:
    """Hold steps of a file, whose inputs are views if there are several rows, to the model's sequence."""
    model = language_model(mixer)
    exported = export_step(model, batch=rows)
    run = written(exported, path)
    tokens = torch.randint(V, (rows, steps), generator=torch.Generator().manual_seed(0))
    logits = follow(exported, run, [{"tokens": tokens[:, t]} for t in range(steps)])
    with torch.no_grad():
        expected, _ = model(tokens)
    assert relative(torch.stack(logits, 1), expected) < CLOSE


@pytest.mark.parametrize("suffix", FORMATS)
def test_ten_thousand_steps_are_the_sequence(suffix: str, tmp_path: Path) -> None:
    needs(suffix)
    for mixer in ("mingru", "minlstm"):
        check_steps(mixer, 1, 10_000, tmp_path / f"{mixer}{suffix}")


@pytest.mark.parametrize("suffix", FORMATS)
def test_inputs_may_be_views(suffix: str, tmp_path: Path) -> None:
    needs(suffix)
    check_steps("mingru", 3, 20, tmp_path / f"step{suffix}")


@pytest.mark.parametrize("opset", [20, 23])
def test_newer_operator_sets_are_written_too(opset: int) -> None:
    needs(".onnx")
    from minrnn.export import onnx

    exported = export_step(language_model())
    contents = onnx.convert(exported, opset)
    assert contents


def test_a_kept_state_is_the_passed_one(tmp_path: Path) -> None:
    needs(".pte")
    model = language_model()
    exported = export_step(model, batch=1, keeps_state=True)
    run = written(exported, tmp_path / "kept.pte")
    tokens, no, yes = torch.randint(V, (1, 20)), torch.tensor([False]), torch.tensor([True])
    with torch.no_grad():
        expected, _ = model(tokens)
    for first in (no, yes):  # the second time, the state has to be cleared
        found = [run((tokens[:, t], first if t == 0 else no))[0] for t in range(20)]
        assert relative(torch.stack(found, 1), expected) < CLOSE


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("options", [{}, {"tokens": "interleaved"}, {"discrete": True, "max_steps": 50}])
def test_a_policys_file_acts_as_the_policy(suffix: str, options: dict[str, Any], tmp_path: Path) -> None:
    needs(suffix)
    model = decision_model(**options)
    exported = export_step(model, batch=2)
    run, policy = written(exported, tmp_path / f"policy{suffix}"), Policy(model)
    generator = torch.Generator().manual_seed(1)
    steps, actions = [], []
    for t in range(40):
        obs = 3 * torch.randn(2, 5, generator=generator)
        reward = torch.randn(2, generator=generator) if t else torch.zeros(2)
        steps.append({"obs": obs, "reward": reward})
        actions.append(policy.act(obs, reward))
    for ours, theirs in zip(follow(exported, run, steps), actions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)


def test_a_policys_file_hops(tmp_path: Path) -> None:
    """In Hopper-v5 the file and the policy see the same and do the same, until the hopper falls."""
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: the extra rl")
    needs(".onnx")
    from minrnn.models import DecisionConfig, DecisionModel, ModelConfig

    torch.manual_seed(0)
    config = DecisionConfig(
        ModelConfig(d_model=32, num_layers=2), 11, 3, target_return=3000.0, return_scale=1e3
    )
    model = DecisionModel(config).eval()
    exported = export_step(model)
    run = written(exported, tmp_path / "hopper.onnx")
    for seed in range(3):
        environments = [gymnasium.make("Hopper-v5") for _ in range(2)]
        policy = Policy(model)
        observed = [environment.reset(seed=seed)[0] for environment in environments]
        rewards, ended, steps = [0.0, 0.0], False, []
        while not ended:
            theirs = policy.act(observed[0], rewards[0])
            steps.append(
                {
                    "obs": torch.as_tensor(observed[1], dtype=torch.float32).unsqueeze(0),
                    "reward": torch.tensor([rewards[1]], dtype=torch.float32),
                }
            )
            ours = follow(exported, run, steps)[-1][0]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=CLOSE)
            for index, action in enumerate((theirs, ours)):
                after = environments[index].step(action.double().numpy())
                observed[index], rewards[index] = after[0], float(after[1])
                ended = ended or after[2] or after[3]
        assert len(steps) > 5
