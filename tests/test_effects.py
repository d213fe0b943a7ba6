"""A setting that has no effect with another says so, in one line that names both."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.benchmarks.gpu import GpuBench
from minrnn.benchmarks.scan import ScanBench
from minrnn.cli import export
from minrnn.cli.main import main
from minrnn.demonstrations import make_data
from minrnn.experiments import EXPERIMENTS
from minrnn.experiments.experiment import SCALES, Choice
from minrnn.files import NoEffect, warn_without_effect
from minrnn.mixers import GATED_RNNS
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel, Steps, generate
from minrnn.tasks import DecisionsConfig, ListOpsConfig, TextConfig
from minrnn.tasks.listops import generate_expressions
from minrnn.training import RunConfig, TrainConfig, load_recipe, recipe_names


@dataclass
class Row:
    """Settings of which `named` has no effect with `other`."""

    make: Callable[..., Any]
    """What takes the settings."""
    named: Mapping[str, Any]
    other: Mapping[str, Any]
    free: Mapping[str, Any]
    """Values of the other setting with which the first has an effect."""
    owner: str = ""
    result: Callable[[Any], Any] | None = None
    """What does not change with the setting: the proof that it has no effect."""
    rest: Mapping[str, Any] = field(default_factory=dict)


def _weights(config: ModelConfig) -> list[Any]:
    torch.manual_seed(0)
    return [tensor.tolist() for tensor in SequenceModel(config).state_dict().values()]


def _model() -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(ModelConfig(vocab_size=8, d_model=8, num_layers=1)).eval()


def _sample(**settings: Any) -> list[int]:
    torch.manual_seed(0)  # of the draws without a generator
    settings = {**settings, "generator": settings.get("generator") and torch.Generator().manual_seed(7)}
    return [int(token) for token in generate(_model(), torch.tensor([[1, 2, 3]]), 12, **settings)]


def _policy(**settings: Any) -> DecisionConfig:
    return DecisionConfig(ModelConfig(d_model=8, num_layers=1), observation_size=2, action_size=1, **settings)


def _actions(config: DecisionConfig) -> list[Any]:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    returns, seen = torch.randn(1, 4, generator=random), torch.randn(1, 4, 2, generator=random)
    steps = Steps(returns, seen, torch.zeros(1, 4, 1), torch.arange(4)[None])
    return DecisionModel(config)(steps)[0].tolist()


def _run(**settings: Any) -> RunConfig:
    task = TextConfig(best_in_windows=settings.pop("best_in_windows"))
    return RunConfig(task=task, train=TrainConfig(steps=100, eval_every=settings.pop("train.eval_every")))


def _listops(config: ListOpsConfig) -> list[int]:
    return generate_expressions(config).tokens.tolist()


GREEDY, RANDOM = {"temperature": 0.0}, {"temperature": 1.5}
DIGITS = {"min_length": 0, "max_length": 2, "num_train": 4, "num_validation": 2, "num_test": 2}
POLICY = {"owner": "DecisionConfig", "other": {"tokens": "observation"}, "free": {"tokens": "joined"}}

TABLE = [
    Row(ModelConfig, {"mlp_activation": "relu"}, {"mlp_ratio": 0.0}, {"mlp_ratio": 1.0}, result=_weights),
    Row(ModelConfig, {"mlp_activation": "swiglu"}, {"mlp_ratio": 0.001}, {"mlp_ratio": 0.1}, result=_weights),
    Row(_policy, {"return_scale": 9.0}, result=_actions, **POLICY),
    Row(_policy, {"target_return": 9.0}, result=_actions, **POLICY),
    Row(DecisionsConfig, {"target_return": 9.0}, {"tokens": "observation"}, {"tokens": "joined"}),
    Row(ListOpsConfig, {"max_args": 3}, {"max_depth": 1}, {"max_depth": 2}, result=_listops, rest=DIGITS),
    Row(_run, {"best_in_windows": True}, {"train.eval_every": 0}, {"train.eval_every": 99}, "TextConfig"),
    Row(_run, {"best_in_windows": True}, {"train.eval_every": 100}, {"train.eval_every": 50}, "TextConfig"),
    Row(_sample, {"top_k": 2}, GREEDY, RANDOM, "generate", list),
    Row(_sample, {"top_p": 0.5}, GREEDY, RANDOM, "generate", list),
    Row(_sample, {"generator": True}, GREEDY, RANDOM, "generate", list),
    Row(_sample, {"temperature": 3.0}, {"top_k": 1}, {"top_k": 2}, "generate", list),
    Row(_sample, {"top_p": 0.5}, {"top_k": 1}, {"top_k": 2}, "generate", list),
    Row(_sample, {"generator": True}, {"top_k": 1}, {"top_k": 2}, "generate", list),
    Row(ScanBench, {"threads": (2,)}, {"device": "cuda"}, {"device": "cpu"}),
    Row(GpuBench, {"tests": False}, {"dry": True}, {"dry": False}),
    Row(GpuBench, {"tf32": True}, {"dry": True}, {"dry": False}),
    *(
        Row(
            rnn.layer,
            {"dropout": 0.5},
            {"num_layers": 1},
            {"num_layers": 2},
            rest={"input_size": 2, "hidden_size": 2},
        )
        for rnn in GATED_RNNS.values()
    ),
]
NAMES = [f"{row.owner or row.make.__name__}-{'-'.join([*row.named, *row.other])}" for row in TABLE]

package_warnings = pytest.mark.filterwarnings(
    "default"
)  # elsewhere a warning at the package's lines is an error


def _said(make: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Return the warnings of a call, and what it returned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = make(**settings)
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught], made


@pytest.mark.parametrize("row", TABLE, ids=NAMES)
def test_a_setting_without_effect_is_named_with_what_takes_its_effect(row: Row) -> None:
    (message,), made = _said(row.make, {**row.rest, **row.named, **row.other})
    (setting, value), (other, taken) = *row.named.items(), *row.other.items()
    given = setting if value is True and setting == "generator" else f"{setting}={value!r}"
    assert message == f"{row.owner or row.make.__name__}: {given} has no effect with {other}={taken!r}"
    assert _said(row.make, {**row.rest, **row.named, **row.free})[0] == []  # there it has one
    if row.make is not _run:
        assert _said(row.make, {**row.rest, **row.other})[0] == []  # nothing was set
    if row.result is not None:
        assert row.result(made) == row.result(_said(row.make, {**row.rest, **row.other})[1])


@pytest.mark.parametrize(
    "config", [ModelConfig, ListOpsConfig, DecisionsConfig, ScanBench, GATED_RNNS["mingru"].layer]
)
def test_the_line_of_the_warning_is_the_callers(config: Any) -> None:
    row = next(row for row in TABLE if row.make is config)
    with pytest.warns(UserWarning, match="has no effect") as caught:
        config(**row.rest, **row.named, **row.other)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="has no effect") as caught:
        generate(_model(), torch.tensor([[1]]), 1, temperature=0, top_k=3)
    assert caught[0].filename == __file__


def test_a_setting_is_named_once_and_in_one_short_line() -> None:
    def owner(a: str = "", b: int = 0, c: int = 0) -> None: ...

    rules = [NoEffect("a", "b", lambda s: s["b"] > 0), NoEffect("a", "c", lambda s: s["c"] > 0)]
    with pytest.warns(UserWarning, match="has no effect") as caught:
        warn_without_effect(owner, {"a": "x" * 500, "b": 1, "c": 1}, rules)
    (message,) = (str(warning.message) for warning in caught)
    assert message.endswith("has no effect with b=1")
    assert len(message) < 110


@pytest.mark.parametrize("settings", [{"training_steps": 9}, {"algorithm": "ars"}, {}], ids=str)
def test_random_data_train_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("gymnasium", reason="needs the extra rl")
    file = tmp_path / "file.hdf5"
    said, _ = _said(
        lambda **given: make_data(
            "MountainCarContinuous-v0", "random", lambda *_: None, output=file, **given
        ),
        {"steps": 3, **settings},
    )
    expected = [
        f"make_data: {name}={value!r} has no effect with quality='random'" for name, value in settings.items()
    ]
    assert said == expected


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_set_nothing_without_effect(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recipe(name).resolved()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_set_nothing_without_effect(name: str, scale: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EXPERIMENTS[name].load().trials(Choice(scale=scale))  # type: ignore[arg-type]


@package_warnings
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            "runtime --list-trials --seeds 2",
            "ReproduceCommand: seeds=2 has no effect with experiment='runtime'",
        ),
        ("listops --list-trials --seeds 2", ""),
        (
            "listops --list-trials --estimate",
            "ReproduceCommand: estimate=True has no effect with list_trials=True",
        ),
        ("listops --list-trials", ""),
    ],
)
def test_options_of_reproduce_without_effect(
    options: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *options.split(), "--scale", "tiny", "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (f"minrnn: warning: {expected}\n" if expected else "")


@package_warnings
@pytest.mark.parametrize(
    ("options", "name"),
    [("--batch 3", "batch=3"), ("--form sequence", "form='sequence'"), ("--keeps-state", "keeps_state=True")],
)
def test_options_of_files_have_no_effect_on_directories(
    options: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_export_pretrained", lambda command: 0)
    assert main(["export", "run", "out", "--format", "transformers", *options.split()]) == 0
    said = f"minrnn: warning: ExportCommand: {name} has no effect with format='transformers'\n"
    assert capsys.readouterr().err == said


@package_warnings
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--harness-folder tasks", "harness_folder has no effect with harness=''"),
        ("--harness-shots 2", "harness_shots=2 has no effect with harness=''"),
        ("--harness-limit 3", "harness_limit=3 has no effect with harness=''"),
        ("--harness piqa --window 7", "window=7 has no effect with harness='piqa'"),
        ("--harness piqa --max-tokens 9", "max_tokens=9 has no effect with harness='piqa'"),
        ("--harness piqa --harness-folder tasks --harness-shots 2 --harness-limit 3", ""),
        ("--window 7 --max-tokens 9", ""),
    ],
)
def test_options_of_evaluate_without_effect(
    options: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nowhere"), *options.split()]) != 0
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert said == ([f"minrnn: warning: EvaluateCommand: {expected}"] if expected else [])


@package_warnings
def test_commands_show_a_warning_once_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)
    run = tmp_path / "run"
    sizes = "--model.d-model 8 --model.num-layers 1 --task.window 16 --train.steps 2 --train.device cpu"
    command = f"train demo --run {run} --task.source {tmp_path / 'text.txt'} {sizes} --model.mlp-ratio 0"
    assert main([*command.split(), "--model.mlp-activation", "relu"]) == 0
    alone = "minrnn: warning: ModelConfig: mlp_activation='relu' has no effect with mlp_ratio=0.0\n"
    assert capsys.readouterr().err.count("warning: ") == 1
    assert main(["sample", str(run), "--tokens", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == alone
    greedy = f"sample {run} --tokens 3 --device cpu --temperature 0 --top-k 3 --top-p 0.5 --seed 5"
    assert main(greedy.split()) == 0
    assert capsys.readouterr().err.splitlines() == [
        alone.strip(),
        "minrnn: warning: SampleCommand: seed=5 has no effect with temperature=0.0",
        "minrnn: warning: generate: top_k=3 has no effect with temperature=0.0",
        "minrnn: warning: generate: top_p=0.5 has no effect with temperature=0.0",
    ]
