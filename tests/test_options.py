"""Every option of every command reaches what it is an option of."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minrnn.benchmarks import BENCHES
from minrnn.benchmarks.bench import Bench
from minrnn.benchmarks.scan import ScanBench
from minrnn.cli import act, demo, engines, evaluate, export, make_data, sample, train
from minrnn.cli.act import ActCommand
from minrnn.cli.arguments import check_range
from minrnn.cli.demo import DemoCommand
from minrnn.cli.evaluate import EvaluateCommand
from minrnn.cli.export import ExportCommand
from minrnn.cli.main import main
from minrnn.cli.make_data import MakeDataCommand
from minrnn.cli.reproduce import ReportCommand, ReproduceCommand
from minrnn.cli.sample import SampleCommand
from minrnn.experiments import EXPERIMENTS, page, runner
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel
from minrnn.ops.registry import Engine
from minrnn.tasks import TextConfig, Vocabulary
from minrnn.tasks.rollouts import Rollout
from minrnn.training import Interrupted, RunConfig
from minrnn.training.resume import Trained

pytestmark = pytest.mark.usefixtures("cache")

OPTIONS: dict[str, dict[str, Any]] = {
    "act": {
        "env": "Some-v1",
        "episodes": 3,
        "target_return": -7.5,
        "record": "film.gif",
        "seed": 11,
        "checkpoint": "last",
        "device": "cpu",
    },
    "sample": {
        "prompt": "ab",
        "tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "seed": 11,
        "checkpoint": "last",
        "device": "cpu",
    },
    "export": {
        "format": "transformers",
        "form": "sequence",
        "batch": 3,
        "longest": 77,
        "keeps_state": True,
        "target_return": -7.5,
        "checkpoint": "last",
    },
    "evaluate": {
        "checkpoint": "last",
        "window": 7,
        "max_tokens": 9,
        "device": "cpu",
        "harness": "piqa, arc_easy",
        "harness_folder": "tasks",
        "harness_shots": 2,
        "harness_limit": 3,
    },
    "demo": {"prompt": "ab", "tokens": 5},
    "make-data": {
        "quality": "medium-replay",
        "output": "out.hdf5",
        "seed": 11,
        "steps": 500,
        "training_steps": 700,
        "algorithm": "ars",
    },
    "reproduce": {
        "scale": "tiny",
        "seeds": 2,
        "mixers": ["mingru"],
        "trial": ["a", "b"],
        "output": "out",
        "device": "cpu",
        "threads": 1,
        "envs": ["pendulum"],
        "data": "d4rl",
        "list_trials": True,
        "estimate": True,
    },
    "report": {"results": "r", "benchmarks": "b", "page": "p", "write": "w", "changed": True},
}
"""A value other than the default for each option."""

COMMANDS = {
    "act": ActCommand,
    "sample": SampleCommand,
    "evaluate": EvaluateCommand,
    "export": ExportCommand,
    "demo": DemoCommand,
    "make-data": MakeDataCommand,
    "reproduce": ReproduceCommand,
    "report": ReportCommand,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    return tmp_path


def arguments(command: str, *without: str) -> list[str]:
    """The options of a command, with their values, as arguments."""
    said: list[str] = []
    for name, value in OPTIONS[command].items():
        if name not in without:
            values = [] if value is True else map(str, value) if isinstance(value, list) else [str(value)]
            said += [f"--{name.replace('_', '-')}", *values]
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_value_here_that_is_not_its_default(command: str) -> None:
    kind = COMMANDS[command]
    positional = {"run", "environment", "recipe"} | ({"output"} if command == "export" else set())
    defaults = {field.name: field.default for field in fields(kind) if field.name not in positional}
    assert defaults.keys() == OPTIONS[command].keys()
    assert not [name for name, value in OPTIONS[command].items() if value == defaults[name]]


class Calls:
    """What was called, and with what."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def spy(self, name: str, answer: Any = None) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            self.of[name] = given, named
            if isinstance(answer, BaseException):
                raise answer
            return answer

        return call


@pytest.fixture
def calls() -> Calls:
    return Calls()


def text_run(folder: Path, **task: Any) -> Trained:
    (folder / "text.txt").write_text("abc def " * 100)
    joined = TextConfig(str(folder / "text.txt"), "characters", window=5, documents="joined")
    config = RunConfig(task=replace(joined, **task))
    (folder / "run" / "config.json").write_text(json.dumps(config.to_dict()))
    vocabulary = Vocabulary.from_dict(
        {"kind": "characters", "characters": " abcdefgh"}
    )  # more than the text has
    model = SequenceModel(ModelConfig(vocab_size=9, d_model=8, num_layers=1))
    return Trained(model, vocabulary, 7, "")


def test_sample(
    calls: Calls, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "load_trained", calls.spy("load", text_run(here)))
    monkeypatch.setattr(sample, "generate", calls.spy("generate", iter(torch.tensor([[2], [3]]))))
    assert main(["sample", "run", *arguments("sample")]) == 0
    assert calls.of["load"][0] == (Path("run"), "last", torch.device("cpu"))
    (_, prompt, tokens), named = calls.of["generate"]
    assert (prompt.tolist(), tokens) == ([[1, 2]], 5)
    assert named.pop("generator").initial_seed() == 11
    assert named == {"temperature": 0.5, "top_k": 3, "top_p": 0.25, "end": None}
    assert capsys.readouterr().out == "abbc\n"
    monkeypatch.setattr(sample, "generate", calls.spy("generate", iter(torch.tensor([[4]]))))
    assert main(["sample", "run"]) == 0
    assert capsys.readouterr().out == "d\n"  # a prompt that nobody gave is not shown
    assert calls.of["load"][0][1] == "best"


def test_sample_replaces_what_a_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    sample._write("né")
    assert shown.getvalue() == b"n?"


class Chosen(Exception):  # noqa: N818 - ends what was started as soon as it has been looked at
    pass


def test_evaluate(
    calls: Calls, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = text_run(here)
    vocabulary = {"kind": "characters", "characters": " abcdefgh"}
    made = evaluate.TextTask(
        TextConfig("text.txt", "characters", window=7, documents="joined"), Vocabulary.from_dict(vocabulary)
    )
    monkeypatch.setattr(evaluate, "load_trained", calls.spy("load", run._replace(corpus=made.sha256)))
    own = [name for name in OPTIONS["evaluate"] if name.startswith("harness")]
    assert main(["evaluate", "run", *arguments("evaluate", *own)]) == 0
    assert calls.of["load"][0] == (Path("run"), "last", torch.device("cpu"))
    found = json.loads((here / "run" / "evaluation.json").read_text())
    expected = {"checkpoint": "last", "step": 7, "window": 7, **made.evaluate(run.model, max_tokens=9)}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert expected["val_tokens"] == 9
    assert "machine" in found
    monkeypatch.setattr(evaluate, "load_trained", calls.spy("load", run._replace(corpus="another")))
    assert main(["evaluate", "run"]) == 2
    assert "the text or data has changed" in capsys.readouterr().err


def test_evaluate_by_the_harness(
    calls: Calls, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, found = text_run(here), {"piqa": {"acc,none": 0.25, "alias": "piqa"}}
    monkeypatch.setattr(evaluate, "load_trained", calls.spy("load", run))
    harness = SimpleNamespace(evaluate=calls.spy("harness", found))
    monkeypatch.setitem(sys.modules, "minrnn.integrations.harness", harness)
    assert main(["evaluate", "run", *arguments("evaluate", "window", "max_tokens")]) == 0
    assert calls.of["load"][0] == (Path("run"), "last", torch.device("cpu"))
    assert calls.of["harness"] == (
        (run.model, run.vocabulary, ["piqa", "arc_easy"]),
        {"folder": Path("tasks"), "shots": 2, "limit": 3},
    )
    record = json.loads((here / "run" / "harness.json").read_text())
    assert record["tasks"] == found
    assert (record["checkpoint"], record["step"], record["shots"], record["limit"]) == ("last", 7, 2, 3)
    assert "machine" in record
    out = capsys.readouterr().out
    assert "acc,none" in out
    assert "0.2500" in out
    assert main(["evaluate", "run", "--harness", "piqa"]) == 0
    assert calls.of["harness"][1] == {"folder": None, "shots": None, "limit": None}
    monkeypatch.setattr(evaluate, "load_trained", calls.spy("load", run._replace(vocabulary=None)))
    assert main(["evaluate", "run", "--harness", "piqa"]) == 2
    assert "harness takes runs of the text task" in capsys.readouterr().err


class Place:
    """An environment that is only looked at."""

    metadata = {"render_fps": 50}  # noqa: RUF012
    closed = 0

    def close(self) -> None:
        Place.closed += 1


@pytest.mark.parametrize("writable", [True, False])
def test_act(
    writable: bool,
    calls: Calls,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = DecisionConfig(
        ModelConfig(d_model=8, num_layers=1), 3, 1, target_return=2.0, environment="Its-own-v0"
    )
    model = DecisionModel(config)
    played = [
        Rollout(0, 4, 1.0, "time limit"),
        Rollout(1, 5, 2.0, "terminated"),
        Rollout(2, 6, 6.0, "time limit"),
    ]
    made: list[str] = []
    pictures: list[int] = []
    at = [0]

    def progress(*given: Any, **named: Any) -> Iterator[list[Rollout]]:
        calls.of["play"] = given, named
        for steps in range(1, 6):
            at[0] = steps
            yield [replace(played[0], steps=steps, ended="" if steps < 5 else "time limit")]
        yield played

    def make(name: str) -> Place:
        made.append(name)
        return Place()

    monkeypatch.setattr(act, "load_trained", calls.spy("load", Trained(model, None, 7, "")))
    monkeypatch.setattr(act, "play", progress)
    monkeypatch.setattr(act, "make_environment", make)
    monkeypatch.setattr(act, "make_filmed", lambda name: make(f"filmed {name}"))
    monkeypatch.setattr(act, "picture", lambda _: pictures.append(at[0]))
    monkeypatch.setattr(act, "normalized_score", lambda name, mean: (name, mean) == ("Some-v1", 3.0) and 42.0)
    monkeypatch.setattr(act.Film, "write", lambda film: calls.spy("write")(film.path, film.every))
    monkeypatch.setattr(Place, "closed", 0)
    if not writable:
        monkeypatch.setattr(act, "write_json", calls.spy("json", PermissionError(13, "no", "acting.json")))
    assert main(["act", "run", *arguments("act")]) == (0 if writable else 1)
    assert calls.of["load"][0] == (Path("run"), "last", torch.device("cpu"))
    (policy, environments, episodes), named = calls.of["play"]
    assert (policy.target_return, len(environments), episodes, named) == (-7.5, 3, 3, {"seed": 11})
    assert made == ["filmed Some-v1", "Some-v1", "Some-v1"]
    assert Place.closed == 3
    assert pictures == [1, 3]  # of 50 steps a second, until the first episode ends
    said = capsys.readouterr().out
    assert said.count("time limit") == 2  # and are shown where they cannot be written
    assert calls.of["write"][0] == (Path("film.gif"), 2)
    if writable:
        found = json.loads((here / "run" / "acting.json").read_text())
        assert found["score"] == 42.0
        assert (found["mean_return"], found["spread"]) == (3.0, pytest.approx(7**0.5))
        assert (found["seed"], found["step"], found["checkpoint"]) == (11, 7, "last")
        assert (found["returns"], found["lengths"]) == ([1.0, 2.0, 6.0], [4, 5, 6])


def exporting(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let exports end where the program is traced."""
    for name in ("export_step", "export_sequence"):
        monkeypatch.setattr(export, name, calls.spy(name, Chosen()))


@pytest.mark.parametrize(
    ("suffix", "options", "name", "expected"),
    [
        (".onnx", "", "export_step", {"batch": None, "keeps_state": False}),
        (".pt2", "--batch 3", "export_step", {"batch": 3, "keeps_state": False}),
        (".pte", "", "export_step", {"batch": 1, "keeps_state": False}),
        (".onnx", "--keeps-state", "export_step", {"batch": 1, "keeps_state": True}),
        (".onnx", "--form sequence", "export_sequence", {"batch": None, "longest": None}),
        (".pt2", "--form sequence", "export_sequence", {"batch": 1, "longest": None}),
        (".pte", "--form sequence", "export_sequence", {"batch": 1, "longest": 1024}),
        (".pte", "--form sequence --longest 77 --batch 3", "export_sequence", {"batch": 3, "longest": 77}),
    ],
)
def test_export_of_text(
    suffix: str,
    options: str,
    name: str,
    expected: dict[str, Any],
    calls: Calls,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = text_run(here)
    monkeypatch.setattr(export, "load_trained", calls.spy("load", trained))
    exporting(calls, monkeypatch)
    with pytest.raises(Chosen):
        main(["export", "run", f"out{suffix}", "--checkpoint", "last", *options.split()])
    assert calls.of["load"][0] == (Path("run"), "last", torch.device("cpu"))
    (model,), named = calls.of[name]
    assert model is trained.model
    assert trained.vocabulary is not None
    metadata = {"checkpoint": "last", "step": 7, "vocabulary": trained.vocabulary.to_dict()}
    assert named == {**expected, "metadata": metadata}


def test_export_of_a_policy(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DecisionModel(DecisionConfig(ModelConfig(d_model=8, num_layers=1), 3, 1, target_return=2.0))
    monkeypatch.setattr(export, "load_trained", calls.spy("load", Trained(model, None, 7, "")))
    exporting(calls, monkeypatch)
    for said, target in (([], 2.0), (["--target-return", "-7.5"], -7.5)):
        with pytest.raises(Chosen):
            main(["export", "run", "out.onnx", *said])
        (policy,), named = calls.of["export_step"]
        assert (policy.model, policy.target_return) == (model, target)
        assert named["metadata"] == {"checkpoint": "best", "step": 7}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("out.onx", "must end in .onnx, .pte, .pt2, got 'out.onx'; did you mean '.onnx'?"),
        ("nowhere/out.onnx", "nowhere is no directory"),
        ("out.pte --form sequence --keeps-state", "--keeps-state goes with --form step"),
        ("out.onnx --target-return 3", "--target-return goes with a policy"),
        ("out.onnx --batch -1", "--batch must be 0 to 1048576, got -1"),
        ("out.onnx --longest -1", "--longest must be 0 to 16777216, got -1"),
    ],
)
def test_export_refuses_in_one_line(
    said: str,
    message: str,
    calls: Calls,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export, "load_trained", calls.spy("load", text_run(here)))
    exporting(calls, monkeypatch)
    assert main(["export", "run", *said.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_export_writes_and_says_what_the_file_takes(
    calls: Calls, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "load_trained", calls.spy("load", text_run(here)))
    kept = export.FORMATS[".pt2"]._replace(convert=lambda program: program.describe().encode())
    monkeypatch.setitem(export.FORMATS, ".pt2", kept)
    assert main(["export", "run", "out.pt2"]) == 0
    known = json.loads((here / "out.pt2").read_text())
    assert known["vocabulary"]["kind"] == "characters"
    said = capsys.readouterr().out
    assert said.startswith(
        f"out.pt2: AOTInductor, step, {(here / 'out.pt2').stat().st_size:,} bytes; inputs tokens (batch), "
    )
    assert said.endswith("; outputs logits, conv_out, h_out\n")


def test_export_for_transformers_takes_no_return(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "out", "--format", "transformers", "--target-return", "3"]) == 2
    assert "transformers takes language models" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**64 - 4, 2**64 - 3])
def test_every_episode_of_act_has_a_seed(
    seed: int, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(act, "load_trained", calls.spy("load", Chosen()))
    options = ["act", "run", "--episodes", "3", "--seed", str(seed)]
    if seed == 2**64 - 4:  # the last episode's is 2^64 - 2
        with pytest.raises(Chosen):
            main(options)
    else:
        assert main(options) == 2
        assert f"--seed must be 0 to {2**64 - 4}" in capsys.readouterr().err


def test_demo(calls: Calls, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "text.txt").write_text("abc def " * 200)
    (here / "mine.toml").write_text('[task]\nsource = "text.txt"\nwindow = 8\n')

    def finished(args: list[str]) -> int:
        run_dir = Path(args[args.index("--run") + 1])
        (run_dir / "results.json").write_text('{"mixer": "gru", "parameters": 5, "bits_per_byte": 1.5}')
        return calls.spy("train", 0)(args)  # type: ignore[no-any-return]

    monkeypatch.setattr(train, "run", finished)
    monkeypatch.setattr(sample, "run", calls.spy("sample"))
    monkeypatch.setattr(
        demo, "ngram_baseline", calls.spy("baseline", {"bits_per_byte": 2.25, "val_loss": 9.0})
    )
    shown: list[list[str]] = []
    monkeypatch.setattr(
        demo.Output, "print", lambda _, table: shown.append([list(column.cells) for column in table.columns])
    )
    assert main(["demo", "mine.toml", *arguments("demo")]) == 0
    (args,), _ = calls.of["sample"]
    assert args[1:] == ["--tokens", "5", "--temperature", "0.8", "--prompt", "ab"]
    assert calls.of["train"][0][0][0] == "mine.toml"
    assert calls.of["baseline"][0][1] == 3
    assert shown[0][1] == ["2.250", "1.500"]  # type: ignore[comparison-overlap]
    calls.of.clear()
    monkeypatch.setattr(train, "run", calls.spy("train", 143))
    assert main(["demo", "mine.toml"]) == 143  # a training that was stopped is compared with nothing
    assert calls.of.keys() == {"train"}


def test_make_data(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_data, "make_data", calls.spy("make", KeyboardInterrupt()))
    assert main(["make-data", "Some-v1", *arguments("make-data")]) == 130
    (environment, quality, _), named = calls.of["make"]
    expected = {**OPTIONS["make-data"], "output": Path("out.hdf5")}
    assert {"environment": environment, "quality": quality, **named} == {"environment": "Some-v1", **expected}


def test_reproduce(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "reproduce", calls.spy("reproduce"))
    assert main(["reproduce", "locomotion", *arguments("reproduce", "list_trials", "estimate")]) == 0
    (experiment, choice, output, _), named = calls.of["reproduce"]
    assert (experiment.name, output, named) == ("locomotion", Path("out"), {"only": ("a", "b")})
    expected = {**OPTIONS["reproduce"], "mixers": ("mingru",), "envs": ("pendulum",)}
    assert {name: value for name, value in expected.items() if name in vars(choice)} == vars(choice)


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"locomotion"}))
def test_reproduce_asks_the_experiment_what_it_offers(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "reproduce", calls.spy("reproduce"))
    assert main(["reproduce", name, "--data", "d4rl"]) == 2
    assert "leave --envs and --data out" in capsys.readouterr().err
    assert main(["reproduce", name, "--device", "warp"]) == 2
    assert "device must be auto or one that works here" in capsys.readouterr().err
    assert calls.of == {}


@pytest.mark.parametrize(("options", "runs"), [(["--estimate"], False), ([], True)])
def test_at_the_papers_scale_the_time_is_said_before(
    options: list[str],
    runs: bool,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(runner, "reproduce", calls.spy("reproduce"))
    monkeypatch.setattr(runner, "estimate", calls.spy("estimate", 7200.0))
    assert main(["reproduce", "listops", "--scale", "paper", "--output", "out", *options]) == 0
    assert "about 2.0 hours on this machine" in capsys.readouterr().out
    assert ("reproduce" in calls.of) == runs


def test_report(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "write_page", calls.spy("write"))
    assert main(["reproduce", "report", *arguments("report")]) == 0
    assert calls.of["write"] == ((Path("p"), Path("b"), Path("r"), Path("w")), {"changed": True})


@pytest.mark.parametrize("terminal", [True, False])
def test_bench(terminal: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(ScanBench, calls.spy("run"), str)
    monkeypatch.setitem(BENCHES, "scan", BENCHES["scan"])
    monkeypatch.setattr(type(BENCHES["scan"]), "load", lambda _: bench)
    monkeypatch.setattr("minrnn.training.Output.is_terminal", terminal)
    options = ["--shapes", "1x2x3", "--threads", "1", "--packed"]
    assert main(["bench", "scan", *options]) == 0
    (given, rest, console), _ = calls.of["run"]
    assert given == ScanBench(shapes=("1x2x3",), threads=(1,), packed=True)
    assert rest == options  # with which it can be repeated
    assert (console.width == 150) == (not terminal)


def test_train(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "train", calls.spy("train", KeyboardInterrupt()))
    tables = {
        "model": {"d_model": 8, "num_layers": 1},
        "task": {"window": 7, "eval_chunk": 9},
        "train": {"steps": 3, "seed": 11, "device": "cpu"},
    }
    options = [
        text
        for table, values in tables.items()
        for name, value in values.items()
        for text in (f"--{table}.{name.replace('_', '-')}", str(value))
    ]
    assert main(["train", "demo", "--run", "new", *options]) == 130
    (config, run_dir), named = calls.of["train"]
    assert (config.recipe, run_dir, named["resume"]) == ("demo", Path("new"), False)
    assert config == train.load_recipe("demo").override(**tables)
    assert main(["train", "--run", "run", "--resume"]) == 2  # which holds no run
    saved = train.load_recipe("demo").override(**tables)
    (Path("run") / "config.json").write_text(json.dumps(saved.to_dict()))
    assert main(["train", "--run", "run", "--resume", "--train.steps", "4"]) == 130
    (config, run_dir), named = calls.of["train"]
    assert (config, run_dir, named["resume"]) == (saved.override(train={"steps": 4}), Path("run"), True)


def test_a_range_is_inclusive_and_the_option_is_named_as_it_is_typed() -> None:
    for value in (2, 3, 4):
        check_range("act", "some_option", value, 2, 4)
    for value in (1, 5):
        with pytest.raises(ValueError, match=f"act: --some-option must be 2 to 4, got {value}"):
            check_range("act", "some_option", value, 2, 4)


def test_engines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    made = [
        Engine("one", "cpu", True, "compiled"),
        Engine("two", "cuda", False, "no GPU"),
        Engine("three", "any", True, ""),
    ]
    monkeypatch.setattr(engines, "engines", lambda: made)
    assert main(["engines"]) == 0
    rows = [
        line
        for line in capsys.readouterr().out.splitlines()
        if "one" in line or "two" in line or "three" in line
    ]
    assert [" yes " in row for row in rows] == [True, False, True]
    assert [" no " in row.replace("no GPU", "") for row in rows] == [False, True, False]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_has_its_signals_status_and_says_how_it_goes_on(
    signum: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted(signum, "step 3")

    monkeypatch.setattr(train, "train", stopped)
    for run_dir, shown in (("-my run", "'./-my run'"), ("-x", "./-x"), ("a b", "'a b'"), ("plain", "plain")):
        assert main(["train", "demo", f"--run={run_dir}"]) == 128 + signum
        assert f"step 3; resume with: minrnn train --run {shown} --resume\n" in capsys.readouterr().out


def test_an_interrupted_command_has_the_status_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "load_trained", Calls().spy("load", KeyboardInterrupt()))
    assert main(["sample", "run"]) == 130
