"""Runs among other processes: pairs on one directory, and kills at random moments, MINRNN_KILLS of them.

Processes are forked from a server that has imported torch, so that a kill costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minrnn.models import ModelConfig, SequenceModel, load_checkpoint, save_checkpoint
from minrnn.tasks import TextConfig
from minrnn.training import RunConfig, RunLog, TrainConfig, load_trained, read_config, read_metrics, train
from minrnn.training.config import OPTIMIZERS, OptimizerName

KILLS = int(os.environ.get("MINRNN_KILLS", "20"))
"""Of each optimiser."""

PAIRS = int(os.environ.get("MINRNN_PAIRS", "20"))
EACH = 5
"""Kills of one run, before it is left to end."""

# What differs between two runs that are the same: the checkout may be worked in while this runs.
OTHER = ("tokens_per_second", "seconds", "commit")

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="forks processes"
)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A place that processes are forked from, with torch already there and one thread each."""
    with pytest.MonkeyPatch.context() as patch:  # of this process and of those that it starts
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MINRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield started_server()


def started_server() -> Any:
    """Return the context whose server runs; it keeps the environment that it is started with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "matplotlib.backends.backend_agg",
            "minrnn.cli.train",
            "minrnn.experiments.runner",
            "torch._dynamo",  # which every optimiser imports
            "torch.utils.tensorboard",
        ]
    )
    first = context.Process(target=os.getpid)  # starts the server
    first.start()
    first.join()
    return context


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(corpus: Path, **settings: Any) -> RunConfig:
    """A short run that carries a state and drops out, saves and evaluates all the time."""
    schedule = {"log_every": 2, "eval_every": 5, "checkpoint_every": 3, "eval_tokens": 100}
    kept = {"steps": 25, "batch_size": 3, "warmup_steps": 3, "device": "cpu", "learning_rate": 1e-2}
    return RunConfig(
        recipe="test",
        model=ModelConfig(d_model=16, num_layers=2, dropout=0.1),
        task=TextConfig(source=str(corpus), window=16),
        train=TrainConfig(**{**schedule, **kept, "carry_state": True, "threads": 1, **settings}),
    )


def run(config: RunConfig, run_dir: Path) -> None:
    """Train, or go on, in a process that the caller may kill."""
    with contextlib.suppress(OSError):
        os.setsid()
    train(config, run_dir, resume=(run_dir / "config.json").is_file(), log=RunLog())


def command(args: list[str], out: Path, barrier: Any) -> None:
    """Run a command of the command line as soon as another process does, its output in a file."""
    from minrnn.cli.main import main

    handle = os.open(out, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(handle, number)
    barrier.wait()
    sys.exit(main(args))


# --- kills -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(0)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_killed_at_random_moments_and_resumed_is_never_killed(
    optimizer: OptimizerName, corpus: Path, tmp_path: Path, processes: Any
) -> None:
    config = config_of(corpus, optimizer=optimizer)
    began = time.monotonic()
    whole = processes.Process(target=run, args=(config, tmp_path / "whole"))
    whole.start()
    whole.join()
    assert whole.exitcode == 0
    takes = time.monotonic() - began
    draw = random.Random(0)
    kills, runs, steps = 0, 0, Counter[int]()
    while kills < KILLS:
        runs += 1
        run_dir = tmp_path / f"run{runs}"
        for _ in range(min(EACH, KILLS - kills)):
            kills += killed(processes, config, run_dir, draw.uniform(0, takes))
            steps[saved_step(run_dir)] += 1
            if (run_dir / "results.json").is_file():  # it has ended
                break
        process = processes.Process(target=run, args=(config, run_dir))
        process.start()
        process.join()
        assert process.exitcode == 0, f"run {runs} does not go on after its kills"
        assert_same(tmp_path / "whole", run_dir)
    print(f"\n{optimizer}: {kills} kills in {runs} runs; last saved step: {dict(sorted(steps.items()))}")


def killed(processes: Any, config: RunConfig, run_dir: Path, after: float) -> bool:
    """Let a run go on for some seconds, and kill it; return whether it had not ended before."""
    process = processes.Process(target=run, args=(config, run_dir))
    process.start()
    process.join(after)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def saved_step(run_dir: Path) -> int:
    try:
        return int(load_checkpoint(run_dir / "checkpoints" / "last")[1]["step"])  # type: ignore[arg-type]
    except FileNotFoundError:
        return 0


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in OTHER} for record in records]


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments, random states and carry to the last bit; metrics; and the same files."""
    for name in (
        "best/model.safetensors",
        "last/model.safetensors",
        "last/trainer.safetensors",
    ):
        expected, found = (load_file(place / "checkpoints" / name) for place in (one, other))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), f"{other}: {name}: {key}"
    assert timeless(read_metrics(one / "metrics.jsonl")) == timeless(read_metrics(other / "metrics.jsonl"))
    results = [json.loads((place / "results.json").read_text()) for place in (one, other)]
    assert timeless([results[0]]) == timeless([results[1]])
    files = [
        {path.relative_to(place) for path in place.rglob("*") if "tensorboard" not in path.parts}
        for place in (one, other)
    ]
    assert files[0] == files[1]


# --- pairs -----------------------------------------------------------------------------------------------


def pair(processes: Any, tmp_path: Path, commands: list[list[str]]) -> tuple[list[int], list[str]]:
    """Run commands at the same moment; return their statuses and what they said."""
    barrier = processes.Barrier(len(commands))
    outs = [tmp_path / f"out{number}" for number in range(len(commands))]
    started = [
        processes.Process(target=command, args=(args, out, barrier))
        for args, out in zip(commands, outs, strict=True)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    texts = [out.read_text() for out in outs]
    for out in outs:
        out.unlink()
    assert not any("Traceback" in text for text in texts), texts
    return [int(process.exitcode or 0) for process in started], texts


def write_recipe(folder: Path, corpus: Path) -> str:
    recipe = folder / "tiny.toml"
    recipe.write_text(
        f"[model]\nd_model = 16\nnum_layers = 1\n[task]\nsource = '{corpus}'\nwindow = 16\n[train]\n"
        "steps = 20\nbatch_size = 2\nwarmup_steps = 2\nlog_every = 1\neval_every = 5\ncheckpoint_every = 2\n"
        "device = 'cpu'\n"
    )
    return str(recipe)


@pytest.mark.timeout(0)
def test_of_two_trainings_on_one_directory_one_is_refused(
    corpus: Path, tmp_path: Path, processes: Any
) -> None:
    recipe, said = write_recipe(tmp_path, corpus), Counter[str]()
    for number in range(PAIRS):
        run_dir = tmp_path / f"run{number}"
        settings = [["--train.seed", "1"], ["--train.seed", "2", "--model.d-model", "24"]]
        statuses, texts = pair(
            processes, tmp_path, [["train", recipe, "--run", str(run_dir), *more] for more in settings]
        )
        assert sorted(status == 0 for status in statuses) == [False, True], texts
        refused = texts[statuses.index(0) ^ 1]
        (line,) = [line for line in refused.splitlines() if line.startswith("minrnn: error: ")]
        said[
            re.sub(
                r"process \d+ on .* since .*;",
                "process N on HOST since TIME;",
                line.partition(": error: ")[2],
            )
        ] += 1
        config, winner = read_config(run_dir), statuses.index(0)
        assert (config.train.seed, config.model.d_model) == ((1, 16), (2, 24))[winner]
        assert load_trained(run_dir, "last", torch.device("cpu")).step == 20
        metrics = read_metrics(run_dir / "metrics.jsonl")
        assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 21))
        train(
            RunConfig.from_dict(config.to_dict() | {"train": config.to_dict()["train"] | {"steps": 22}}),
            run_dir,
            resume=True,
            log=RunLog(),
        )
    print(f"\n{PAIRS} pairs: {sum(said.values())} refused: {said}")


@pytest.mark.timeout(0)
def test_of_two_that_resume_one_directory_one_is_refused_and_readers_are_not(
    corpus: Path, tmp_path: Path, processes: Any
) -> None:
    recipe, run_dir = write_recipe(tmp_path, corpus), tmp_path / "run"
    statuses, _ = pair(processes, tmp_path, [["train", recipe, "--run", str(run_dir)]])
    assert statuses == [0]
    for number in range(1, 1 + PAIRS // 4):
        resume = ["train", "--run", str(run_dir), "--resume", "--train.steps", str(20 + 100 * number)]
        read = [["sample", str(run_dir), "--tokens", "20"], ["evaluate", str(run_dir)]]
        statuses, texts = pair(processes, tmp_path, [resume, resume, *read])
        assert 0 in statuses[:2], texts
        assert statuses[2:] == [0, 0], texts
        assert json.loads((run_dir / "evaluation.json").read_text())["val_loss"] > 0


@pytest.mark.timeout(0)
def test_four_of_one_second_have_directories_of_their_own(
    corpus: Path, tmp_path: Path, processes: Any
) -> None:
    recipe = write_recipe(tmp_path, corpus)
    statuses, texts = pair(processes, tmp_path, [["train", recipe]] * 4)
    assert statuses == [0] * 4, texts
    assert len(list(Path("runs").iterdir())) == 4
    assert len({text.split()[-1] for text in texts}) == 4


@pytest.mark.timeout(0)
def test_two_that_reproduce_share_the_cells(tmp_path: Path, processes: Any) -> None:
    args = ["reproduce", "stability", "--scale", "tiny", "--device", "cpu"]
    statuses, texts = pair(
        processes, tmp_path, [[*args, "--mixers", "mingru", "minlstm"], [*args, "--mixers", "minlstm"]]
    )
    assert statuses == [0, 0], texts
    begun = Counter(re.findall(r"^\d+/\d+ (\S+)", "\n".join(texts), re.MULTILINE))
    names = {path.stem for path in Path("results", "stability-tiny", "cells").iterdir()}
    assert {name.rstrip(",") for name in begun} == names
    assert set(begun.values()) == {1}, begun
    config = json.loads(Path("results", "stability-tiny", "config.json").read_text())
    assert config["cells"].keys() == names
    assert {path.name for path in Path("results", "stability-tiny").iterdir()} == {
        "cells",
        "config.json",
        "plot.png",
        "plot.svg",
        "tables.md",
    }


def save_often(directory: Path, seed: int, barrier: Any) -> None:
    torch.manual_seed(seed)
    model = SequenceModel(ModelConfig(vocab_size=7, d_model=8, num_layers=1))
    barrier.wait()
    for _ in range(20):
        save_checkpoint(directory, model, extra={"seed": seed})


@pytest.mark.timeout(0)
def test_two_that_save_one_checkpoint_never_leave_a_torn_one(tmp_path: Path, processes: Any) -> None:
    directory, barrier = tmp_path / "last", processes.Barrier(3)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(SequenceModel(ModelConfig(vocab_size=7, d_model=8, num_layers=1)).state_dict())
    save_checkpoint(
        directory, SequenceModel(ModelConfig(vocab_size=7, d_model=8, num_layers=1)), extra={"seed": 2}
    )
    started = [processes.Process(target=save_often, args=(directory, seed, barrier)) for seed in range(2)]
    for process in started:
        process.start()
    barrier.wait()
    seen: Counter[int] = Counter()
    same: Callable[..., bool] = lambda one, other: all(torch.equal(one[name], other[name]) for name in one)  # noqa: E731
    while any(process.is_alive() for process in started):
        model, extra = load_checkpoint(directory)
        seed = int(extra["seed"])  # type: ignore[arg-type]
        seen[seed] += 1
        assert seed == 2 or same(models[seed], model.state_dict())
    assert [process.exitcode for process in started] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    print(f"\nread {sum(seen.values())} times: {dict(seen)}")
