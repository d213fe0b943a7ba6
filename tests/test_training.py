"""Training: stopped and resumed is uninterrupted; what goes wrong says so and destroys nothing."""

from __future__ import annotations

import ast
import dataclasses
import errno
import inspect
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file

from minrnn.mixers import MIXERS
from minrnn.models import ModelConfig, SequenceModel, load_checkpoint, map_state, save_checkpoint
from minrnn.tasks import TASKS, DecisionsConfig, TextConfig, TextTask
from minrnn.training import (
    Interrupted,
    NonFiniteLossError,
    Precision,
    RunConfig,
    RunLog,
    TrainConfig,
    choose_device,
    load_recipe,
    load_trained,
    read_config,
    read_metrics,
    recipe_names,
    recipe_summary,
    train,
)
from minrnn.training.config import OPTIMIZERS, OptimizerName
from minrnn.training.log import _write_line, check_written
from minrnn.training.loop import Run, products_of
from minrnn.training.optim import (
    clip_gradients,
    decayed_parameters,
    learning_rate_at,
    make_optimizers,
    orthogonalized_parameters,
)
from minrnn.training.resume import _flatten, _unflatten

pytestmark = pytest.mark.usefixtures("cache")

# What differs between two runs that are the same: the checkout may be worked in meanwhile.
SECONDS = ("tokens_per_second", "seconds", "commit")


def run_config(corpus: Path, **settings: Any) -> RunConfig:
    """A run of a second: small enough for a test, with dropout so that the random generator matters."""
    mixer = settings.pop("mixer", "mingru")
    defaults = {"steps": 12, "batch_size": 3, "warmup_steps": 3, "device": "cpu", "learning_rate": 1e-2}
    schedule = {"log_every": 3, "eval_every": 4, "checkpoint_every": 5, "eval_tokens": 100}
    return RunConfig(
        recipe="test",
        model=ModelConfig(d_model=16, num_layers=2, dropout=0.1, mixer=mixer),
        task=TextConfig(source=str(corpus), window=16),
        train=TrainConfig(**{**defaults, **schedule, **settings}),
    )


def trained(config: RunConfig, run_dir: Path, *, resume: bool = False) -> dict[str, Any]:
    return train(config, run_dir, resume=resume, log=RunLog())


def weights(run_dir: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / which / "model.safetensors")


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in SECONDS} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    """Same weights to the last bit, the same best weights, and the same metrics at the same steps."""
    for which in ("last", "best"):
        expected = weights(one, which)
        assert expected.keys() == weights(other, which).keys()
        for name, value in weights(other, which).items():
            assert torch.equal(value, expected[name]), name
    assert timeless(read_metrics(one / "metrics.jsonl")) == timeless(read_metrics(other / "metrics.jsonl"))


class StopAt(RunLog):
    """A log that sends this process a signal when it hears of a step."""

    def __init__(self, step: int, signum: int = signal.SIGINT) -> None:
        super().__init__()
        self.step, self.signum = step, signum

    def training(self, step: int, metrics: Any) -> None:
        super().training(step, metrics)
        if step == self.step:
            os.kill(os.getpid(), self.signum)


# --- configuration ---------------------------------------------------------------------------------------


def test_config_survives_a_round_trip(corpus: Path) -> None:
    config = run_config(corpus)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("task", TASKS)
def test_a_configuration_names_its_task(task: str) -> None:
    config = RunConfig(task=TASKS[task].config_type())
    assert config.to_dict()["task"]["name"] == task
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_trained_unless_it_is_asked_for_otherwise() -> None:
    assert dataclasses.asdict(TrainConfig()) == {
        **{"steps": 1000, "batch_size": 8, "accumulate": 1, "optimizer": "adamw", "learning_rate": 1e-3},
        **{"min_learning_rate_ratio": 0.1, "warmup_steps": 100, "weight_decay": 0.1, "grad_clip": 1.0},
        **{"beta1": 0.9, "beta2": 0.95, "precision": "float32", "carry_state": False, "fresh_share": 0.0},
        **{"eval_every": 250, "eval_tokens": 0, "final_eval_tokens": 0, "checkpoint_every": 250},
        **{"log_every": 10, "seed": 0, "device": "auto", "threads": 0, "compile": False, "timeout": 600},
        **{"sequence_ranks": 1, "weights": "replicated"},
    }


def test_settings_of_a_task_that_depend_on_the_mixer_are_filled_in() -> None:
    def resolved(mixer: str) -> DecisionsConfig:
        task = RunConfig(model=ModelConfig(mixer=mixer), task=DecisionsConfig()).resolved().task
        assert isinstance(task, DecisionsConfig)
        return task

    assert [(resolved(m).tokens, resolved(m).carry) for m in ("mingru", "attention")] == [
        ("joined", True),
        ("interleaved", False),
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_settings_are_overridden_by_name(name: str) -> None:
    config = load_recipe(name)
    assert config.override() == config
    changed = config.override(
        model={"num_layers": 7}, task={"window": 5} if hasattr(config.task, "window") else {}
    )
    assert changed.model == dataclasses.replace(config.model, num_layers=7)
    assert getattr(changed.task, "window", 5) == 5
    assert changed.train == config.train
    with pytest.raises(TypeError, match="stepz"):
        config.override(train={"stepz": 3})
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        config.override(train={"steps": 0})


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_say_what_to_expect(name: str) -> None:
    config = load_recipe(name)
    assert config.recipe == name
    text = (Path(inspect.getfile(SequenceModel)).parents[1] / "recipes" / f"{name}.toml").read_text()
    header = text.partition("\n[")[0]
    assert all(f"# {word}" in header for word in ("hardware:", "time:", "expected:"))
    assert len(recipe_summary(name)) > 20


def test_a_recipe_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[train]\nlearning_rate = 1\n")
    config = load_recipe(str(path))
    assert config.recipe == "mine"
    assert config.train.learning_rate == 1.0
    assert isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\n", "unknown key 'trian'; did you mean 'train'"),
        ("[train]\nlearning_rat = 1", "unknown key 'train.learning_rat'; did you mean 'learning_rate'"),
        ("[model]\nd_modle = 1", "unknown key 'model.d_modle'; did you mean 'd_model'"),
        ("[task]\nwindwo = 1", "unknown key 'task.windwo'; did you mean 'window'"),
        ("[train]\nsteps = 1.5", "train.steps must be int, got 1.5"),
        ("[train]\nsteps = true", "train.steps must be int, got True"),
        (
            "[train]\nprecision = 'half'",
            "train.precision must be one of float32, bfloat16-products, bfloat16, got 'half'",
        ),
        ("[model]\nnum_heads = 'two'", "model.num_heads must be int, got 'two'"),
        ("train = 3", "train must be a table, got 3"),
        ("[train]\nsteps = 0", "steps must be at least 1, got 0"),
        ("[train", "mine.toml"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'shakespeare'"):
        load_recipe("shakespear")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("min_learning_rate_ratio", 1.5),
        ("beta2", 1.0),
        ("grad_clip", -1.0),
        ("weight_decay", math.nan),
        ("warmup_steps", -1),
        ("threads", -1),
        ("seed", 1 << 64),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must be .*got"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("kind", [RunConfig, ModelConfig, TextConfig, DecisionsConfig, TrainConfig])
def test_every_setting_has_a_docstring(kind: type) -> None:
    """It is the option's help."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr), ast.unparse(statement)


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ValueError, match=f"must be auto or one that works here, got '{name}'"):
            choose_device(name)


# --- optimiser -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_of_linear_layers_decay(mixer: str, tied: bool) -> None:
    model = SequenceModel(ModelConfig(d_model=16, num_layers=1, mixer=mixer, tie_embeddings=tied))
    decayed = decayed_parameters(model)
    assert decayed
    for name, parameter in model.named_parameters():
        if name in decayed:
            assert parameter.ndim == 2
            assert not any(word in name for word in ("bias", "norm", "embed", "conv", "_ih_", "_hh_"))
        if name.endswith("down.weight"):
            assert name in decayed
    assert any("head" in name for name in decayed) != tied
    (adamw,) = make_optimizers(model, TrainConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in adamw.param_groups] == [
        len(decayed),
        len(list(model.parameters())) - len(decayed),
    ]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_muon_moves_the_matrices_of_blocks_and_adamw_the_rest(mixer: str, tied: bool) -> None:
    model = SequenceModel(ModelConfig(d_model=16, num_layers=1, mixer=mixer, tie_embeddings=tied))
    turned = orthogonalized_parameters(model)
    for name, parameter in model.named_parameters():
        if name in turned:
            assert parameter.ndim == 2
            assert not any(word in name for word in ("bias", "norm", "embed", "conv", "head"))
        if name.endswith(("down.weight", "up.weight", "weight_ih")):
            assert name in turned
    muon, adamw = make_optimizers(model, TrainConfig(optimizer="muon", weight_decay=0.3))
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    moved = [p for one in (muon, adamw) for group in one.param_groups for p in group["params"]]
    assert len(moved) == len({id(p) for p in moved}) == len(list(model.parameters()))
    assert {id(p) for p in muon.param_groups[0]["params"]} == {
        id(p) for name, p in model.named_parameters() if name in turned
    }


def test_muon_steps_are_as_long_as_adamw_s() -> None:
    torch.manual_seed(0)
    model = SequenceModel(ModelConfig(d_model=32, num_layers=1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in make_optimizers(
        model, TrainConfig(optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    ):
        optimizer.step()
    for name, parameter in model.named_parameters():
        length = (parameter - before[name]).square().mean().sqrt().item()
        typical = (
            0.2 * 0.01 if name in orthogonalized_parameters(model) else 0.01
        )  # AdamW's first is its rate
        assert length == pytest.approx(typical, rel=0.4), name


def test_muon_needs_blocks_with_matrices() -> None:
    with pytest.raises(ValueError, match="muon needs a model whose blocks hold matrices"):
        make_optimizers(torch.nn.Linear(3, 2), TrainConfig(optimizer="muon"))


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 100),
    ratio=st.floats(0, 1),
    peak=st.floats(1e-6, 1),
)
def test_learning_rate_rises_then_falls_to_its_floor(
    steps: int, warmup: int, ratio: float, peak: float
) -> None:
    config = TrainConfig(steps=steps, warmup_steps=warmup, min_learning_rate_ratio=ratio, learning_rate=peak)
    rates = [learning_rate_at(step, config) for step in range(steps + 1)]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > warmup:
        assert rates[warmup] == pytest.approx(peak)
        assert rates[steps] == pytest.approx(peak * ratio)


@pytest.mark.parametrize("longest", [0.0, 0.5, 100.0])
def test_clipping_shortens_long_gradients_only(longest: float) -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), 2.0)  # the bias has none
    before = math.sqrt(6 * 4)
    assert clip_gradients(model, longest).item() == pytest.approx(before)
    after = before if longest == 0 else min(before, longest)
    assert model.weight.grad.norm().item() == pytest.approx(after, rel=1e-5)


# --- the loop --------------------------------------------------------------------------------------------


def test_paths_may_be_strings_and_begin_at_home(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(run_config(corpus, steps=4), "~/run", log=RunLog())
    assert (tmp_path / "run" / "results.json").is_file()
    assert read_config("~/run").train.steps == 4
    assert read_metrics("~/run/metrics.jsonl")[-1]["step"] == 4
    trained = load_trained("~/run", "last", "cpu")
    save_checkpoint("~/copy", trained.model)
    assert load_checkpoint("~/copy")[0].config == trained.model.config


def test_a_run_learns_and_leaves_its_directory(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=40)
    results = trained(config, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "checkpoints", "loss.png"} <= names
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    saved = read_config(tmp_path / "run")
    assert (saved.task, saved.train) == (config.task, config.train)
    assert saved.model.vocab_size == 257
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert losses[-1] < losses[0] - 0.5
    evaluations = [record for record in metrics if "val_loss" in record]
    assert [record["step"] for record in evaluations] == list(range(4, 41, 4))
    best = min(evaluations, key=lambda record: record["val_loss"])
    assert results["step"] == 40
    assert results["best"]["step"] == best["step"]
    assert results["val_tokens"] > best["val_tokens"]  # at the end, all of them
    assert results["tokens"] == 40 * 3 * 16
    expected = {"val_loss", "val_loss_windowed", "bits_per_byte", "seconds", "parameters", "mixer"}
    assert expected | {"machine", "versions", "commit", "recipe", "device"} <= results.keys()
    model, extra = load_checkpoint(tmp_path / "run" / "checkpoints" / "best")
    assert extra["step"] == best["step"]
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("in_windows", "step"), [(False, 2), (True, 1)], ids=["state carried", "in windows"])
def test_the_best_weights_are_those_of_the_lowest_loss(
    in_windows: bool, step: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([(3.0, 1.0), (2.0, 1.5), (2.5, 1.2), (2.5, 1.2)])
    names = ("val_loss", "val_loss_windowed")
    monkeypatch.setattr(TextTask, "evaluate", lambda *_, **__: dict(zip(names, next(losses), strict=True)))
    config = run_config(corpus, steps=3, eval_every=1)
    task = dataclasses.replace(config.task, best_in_windows=in_windows)
    config = dataclasses.replace(config, task=task)
    assert trained(config, tmp_path / "run")["best"]["step"] == step
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best")[1]["step"] == step


def test_same_seed_same_weights_other_seed_others(corpus: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained(run_config(corpus, seed=seed, steps=5), tmp_path / name)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    one, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("carry_state", [False, True])
def test_accumulated_gradients_are_the_mean_over_batches(
    corpus: Path, tmp_path: Path, carry_state: bool
) -> None:
    run = Run(run_config(corpus, accumulate=3, carry_state=carry_state), tmp_path, RunLog())
    run.model.eval()  # no dropout: the batches are computed twice
    losses = [run._gradients(part) for part in range(3)]
    gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    run.model.zero_grad(set_to_none=True)
    state, expected = None, []
    for part in range(3):
        batch = run.task.stream_batch(part, 3) if carry_state else run.task.batch(part, 3, 0)
        loss, state = run.task.loss(run.model, batch, state if carry_state else None)
        state = _unflatten(_flatten(state, found := []), {i: t.detach() for i, t in enumerate(found)})
        expected.append(loss)
    (sum(expected) / 3).backward()
    torch.testing.assert_close(losses, [loss.detach() for loss in expected])
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_carried_state_reaches_the_next_window_and_random_windows_start_empty(
    corpus: Path, tmp_path: Path
) -> None:
    streams = Run(run_config(corpus, carry_state=True), tmp_path, RunLog())
    windows = Run(run_config(corpus), tmp_path, RunLog())
    for run in (streams, windows):
        run.step()
    assert windows.state.carry is None
    found: list[torch.Tensor] = []
    _flatten(streams.state.carry, found)
    assert found
    assert not any(tensor.requires_grad for tensor in found)


def test_fresh_windows_stand_beside_streams(corpus: Path, tmp_path: Path) -> None:
    """One of three sequences is a random window; the loss is the mean over all, the state the streams'."""
    run = Run(run_config(corpus, carry_state=True, fresh_share=0.3), tmp_path, RunLog())
    run.model.eval()
    state = None
    for step in range(2):
        streams, window = run.task.stream_batch(step, 2), run.task.batch(step, 1, 0)
        going_on, state = run.task.loss(run.model, streams, state)
        starting, _ = run.task.loss(run.model, window)
        torch.testing.assert_close(run._gradients(0), ((2 * going_on + starting) / 3).detach())
        torch.testing.assert_close(run.state.carry, map_state(torch.detach, state))
        run.state.step += 1
    assert run.state.tokens == 2 * 3 * 16


@pytest.mark.parametrize("settings", [{"fresh_share": 0.5}, {"fresh_share": 1.0}, {"fresh_share": 0.01}])
def test_fresh_share_must_leave_streams_and_windows(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TrainConfig: fresh_share must be"):
        TrainConfig(carry_state=settings["fresh_share"] != 0.5, batch_size=4, **settings)


@pytest.mark.parametrize("precision", ["bfloat16-products", "bfloat16"])
def test_bfloat16_trains_and_keeps_parameters_in_float32(
    corpus: Path, tmp_path: Path, precision: Precision
) -> None:
    config = run_config(corpus, precision=precision, carry_state=True, steps=6, checkpoint_every=2)
    trained(config, tmp_path / "run")
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}
    losses = [r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert all(map(math.isfinite, losses))


def test_products_are_rounded_within_a_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", (asked := []).append)
    with products_of("bfloat16-products"):
        assert asked == ["medium"]
    assert asked == ["medium", "highest"]
    with products_of("float32"):
        assert asked[2:] == []


def test_a_full_directory_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="resume it with --resume, or choose another --run"):
        trained(run_config(corpus), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_run_that_cannot_start_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        trained(run_config(tmp_path / "missing.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- stopping and resuming -------------------------------------------------------------------------------


CARRIED = {"carry_state": True, "fresh_share": 0.3}


@pytest.mark.parametrize(
    ("mixer", "reads", "optimizer"),
    [
        *itertools.product(["mingru"], [{}, {"carry_state": True}, CARRIED], OPTIMIZERS),
        *((mixer, CARRIED, OPTIMIZERS[index % 2]) for index, mixer in enumerate(MIXERS) if mixer != "mingru"),
    ],
)
def test_interrupted_and_resumed_is_uninterrupted(
    corpus: Path, tmp_path: Path, mixer: str, reads: dict[str, Any], optimizer: OptimizerName
) -> None:
    config = run_config(corpus, mixer=mixer, optimizer=optimizer, **reads)
    trained(config, tmp_path / "whole")
    for step, signum in ((3, signal.SIGINT), (9, signal.SIGTERM)):
        with pytest.raises(Interrupted, match=f"saved after step {step}") as stop:
            train(config, tmp_path / "parts", resume=step > 3, log=StopAt(step, signum))
        assert stop.value.signum == signum
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    results = trained(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    expected = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert timeless([results]) == timeless([expected])


KILLED = """
import os, signal, sys
from pathlib import Path
from minrnn.training import RunLog, read_config, train

killed_at, calls, fsync = int(sys.argv[3]), 0, os.fsync

def kill_in_the_middle(fd):
    global calls
    calls += "last" in os.readlink(f"/proc/self/fd/{fd}")
    if calls == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)

os.fsync = kill_in_the_middle
train(read_config(Path(sys.argv[1])), Path(sys.argv[2]), log=RunLog())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the file being written in /proc")
def test_killed_while_a_checkpoint_is_written_and_resumed_is_uninterrupted(
    corpus: Path, tmp_path: Path
) -> None:
    config = run_config(corpus, carry_state=True, threads=1, checkpoint_every=2)
    trained(config, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, tmp_path / "whole", tmp_path / "parts"]
    done = subprocess.run([*command, "6"], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    _, extra = load_checkpoint(tmp_path / "parts" / "checkpoints" / "last")
    assert extra["step"] == 2  # the kill was in the middle of the second
    trained(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_is_said_and_the_checkpoint_before_it_is_whole(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(corpus, checkpoint_every=2)
    trained(config, tmp_path / "whole")

    class FullDisk(RunLog):
        def training(self, step: int, metrics: Any) -> None:
            super().training(step, metrics)
            if step == 9:
                monkeypatch.setattr(os, "fsync", fail)

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device"):
        train(config, tmp_path / "parts", log=FullDisk())
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["best", "last"]
    _, extra = load_checkpoint(tmp_path / "parts" / "checkpoints" / "last")
    assert extra["step"] == 8
    trained(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_divergence_is_said_with_its_step_and_leaves_finite_checkpoints(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, learning_rate=1e18, warmup_steps=0, grad_clip=0.0, checkpoint_every=1)
    with pytest.raises(NonFiniteLossError, match=r"diverged at step \d+: its loss is .* train.learning_rate"):
        trained(config, tmp_path / "run")
    for which in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(value.isfinite().all() for value in weights(tmp_path / "run", which.name).values())


@pytest.mark.parametrize("found", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_divergence_is_of_the_step_whose_loss_or_norm_it_is(
    corpus: Path, tmp_path: Path, found: tuple[float, float]
) -> None:
    run = Run(run_config(corpus), tmp_path, RunLog())
    run.state.step = 9
    run._pending = [torch.tensor(pair) for pair in ((2.0, 3.0), found, (2.0, 3.0))]
    with pytest.raises(
        NonFiniteLossError, match="at step 8: its loss is {} and .* gradient {};".format(*found)
    ):
        run.report()
    assert (run.state.losses, run.state.grad_norms) == ([2.0], [3.0])


def test_a_validation_loss_that_is_not_finite_stops_the_run_before_it_is_best(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTask, "evaluate", lambda *_, **__: {"val_loss": math.nan})
    with pytest.raises(NonFiniteLossError, match="at step 4: its val_loss is nan"):
        trained(run_config(corpus), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_not_finite_are_not_saved(corpus: Path, tmp_path: Path) -> None:
    run = Run(run_config(corpus), tmp_path, RunLog())
    torch.nn.init.constant_(run.model.embedding.weight, math.inf)
    with pytest.raises(NonFiniteLossError, match="its weights are not finite"):
        run.save()
    assert not (tmp_path / "checkpoints").exists()


def test_the_seconds_of_a_run_are_those_of_all_its_sessions(corpus: Path, tmp_path: Path) -> None:
    first = Run(run_config(corpus), tmp_path, RunLog())
    first.begin(resume=False)
    first._session_started -= 5000
    first.step()
    first.save()
    second = Run(run_config(corpus), tmp_path, RunLog())
    second.begin(resume=True)
    second._session_started -= 300
    assert 5300 <= second._seconds() < 5400
    assert 5300 <= second.finish()["seconds"] < 5400


def test_resuming_a_run_that_is_not_there(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run directory"):
        trained(run_config(corpus), tmp_path / "run", resume=True)


def test_evaluations_since_the_last_line_of_training_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "val_loss": 1.0}\n{"step": 6, "loss": 1.0}\n')
    check_written(path, 5, 2, [], print)
    with pytest.raises(ValueError, match=r"must have training metrics up to step 4, .* last line of step 3"):
        check_written(path, 5, 1, [], print)


def test_resuming_before_the_first_checkpoint_starts_over(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, eval_every=0, checkpoint_every=0)
    trained(config, tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    text = (tmp_path / "whole" / "config.json").read_text()
    (tmp_path / "parts" / "config.json").write_text(text)
    (tmp_path / "parts" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 6, "lo')
    trained(config, tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_may_be_longer_but_not_another(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus)
    trained(config, tmp_path / "run")
    for other, name in (
        (dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7)), "train.seed is 0"),
        (dataclasses.replace(config, task=dataclasses.replace(config.task, window=8)), "task.window is 16"),
        (run_config(corpus, mixer="minlstm"), "model.mixer is 'mingru'"),
    ):
        with pytest.raises(ValueError, match=name):
            trained(other, tmp_path / "run", resume=True)
    shorter = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=11))
    with pytest.raises(ValueError, match=r"train\.steps must be at least the 12 that are done, got 11"):
        trained(shorter, tmp_path / "run", resume=True)
    assert read_config(tmp_path / "run").train == config.train
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=15))
    results = trained(longer, tmp_path / "run", resume=True)
    assert results["tokens"] == 15 * 3 * 16
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 15


@pytest.mark.parametrize(("warmup_steps", "said"), [(11, False), (12, True), (13, True)])
def test_a_warm_up_that_never_ends_is_said(
    corpus: Path, tmp_path: Path, warmup_steps: int, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(corpus, steps=12, warmup_steps=warmup_steps)
    Run(config, tmp_path, RunLog(Console(file=sys.stdout))).begin(resume=False)
    assert ("the peak rate is never reached" in capsys.readouterr().out) == said


def test_best_and_last_are_loaded_by_their_names(corpus: Path, tmp_path: Path) -> None:
    run = Run(run_config(corpus), tmp_path, RunLog())
    run.begin(resume=False)
    run.step()
    run.evaluate()
    run.step()
    run.save()
    assert [load_trained(tmp_path, which, torch.device("cpu")).step for which in ("best", "last")] == [1, 2]


def test_results_are_of_the_last_weights_and_not_of_those_evaluated_before(
    corpus: Path, tmp_path: Path
) -> None:
    run = Run(run_config(corpus, eval_tokens=0), tmp_path, RunLog())
    run.begin(resume=False)
    for _ in range(2):
        run.step()
        run.evaluate()
    assert run.finish()["step"] == 2
    run.step()
    assert run.finish()["step"] == 3


def test_a_run_that_has_all_its_steps_is_finished_again(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, steps=2)
    first = trained(config, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    again = trained(config, tmp_path / "run", resume=True)
    assert timeless([again]) == timeless([first])
    with pytest.raises(ValueError, match="at least the 2 that are done, got 1"):
        trained(run_config(corpus, steps=1), tmp_path / "run", resume=True)


def test_a_changed_text_is_not_resumed(tmp_path: Path) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text("one two three four\n" * 100)
    config = run_config(corpus)
    trained(config, tmp_path / "run")
    corpus.write_text("five six seven eight\n" * 100)
    with pytest.raises(ValueError, match="has changed since this run was trained on it"):
        trained(config, tmp_path / "run", resume=True)


@given(
    st.recursive(
        st.none() | st.integers(0, 9).map(lambda n: torch.full((2,), n)),
        lambda part: st.lists(part, max_size=3).map(tuple),
    )
)
def test_nested_states_survive_saving(state: Any) -> None:
    tensors: list[torch.Tensor] = []
    nesting = json.loads(json.dumps(_flatten(state, tensors)))
    torch.testing.assert_close(_unflatten(nesting, dict(enumerate(tensors))), state)


# --- what is said ----------------------------------------------------------------------------------------


def test_piped_output_is_plain_lines(corpus: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    train(run_config(corpus), tmp_path / "run", log=RunLog(Console(file=out, force_terminal=False)))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("cpu, engine ")
    assert "M parameters" in lines[1]
    assert "squares.txt" in lines[2]
    assert any(line.startswith("step  3/12  loss ") and line.endswith("tokens/s") for line in lines)
    assert any(line.startswith("step  4/12  val_loss ") and "best so far" in line for line in lines)
    assert "\x1b" not in out.getvalue()


def test_terminal_output_is_a_bar(corpus: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    train(run_config(corpus), tmp_path / "run", log=RunLog(console))
    assert "12/12" in out.getvalue()
    assert "tok/s" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()  # the cursor is shown again


def test_missing_extras_are_said_and_missed_only(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = io.StringIO()
    train(run_config(corpus, steps=3), tmp_path / "run", log=RunLog(Console(file=out)))
    assert "matplotlib is not installed" in out.getvalue()
    assert "tensorboard is not installed" in out.getvalue()
    assert not {"loss.png", "tensorboard"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
def test_a_full_disk_is_said_with_the_file() -> None:
    with (
        Path("/dev/full").open("ab", buffering=0) as file,
        pytest.raises(OSError, match="No space") as failure,
    ):
        _write_line(file, b"{}\n")
    assert failure.value.filename == "/dev/full"


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss"')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
