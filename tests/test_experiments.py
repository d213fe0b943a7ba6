"""The frame that experiments stand in: trials, interruption and continuation, records, tables, the report."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from episode_files import MISSING, write_pendulum_data
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from minrnn.benchmarks.loops import LOOPS
from minrnn.benchmarks.plots import save_figure
from minrnn.cli.main import main
from minrnn.cli.reproduce import _Bar
from minrnn.experiments import (
    EXPERIMENTS,
    formal_languages,
    listops,
    locomotion,
    runner,
    scores,
    selective_copying,
    shakespeare,
    stability,
)
from minrnn.experiments.experiment import SCALES, Choice, Experiment, Record, Table, Trial, Watch
from minrnn.experiments.page import experiments, write_page
from minrnn.experiments.parameters import FORMULAS, count_weights, parameter_table
from minrnn.experiments.published import LABELS, Published, shown
from minrnn.experiments.records import duration, spread
from minrnn.experiments.results import ResultsFolder
from minrnn.experiments.runner import command_of, estimate, forecast, interleaved, pick, reproduce
from minrnn.experiments.timed import TimedExperiment, exponent, growth
from minrnn.experiments.trained import (
    LONGEST_PROBE,
    PROBE_SEQUENCES,
    TrainedExperiment,
    step_seconds,
    training,
    training_seconds,
)
from minrnn.experiments.variants import VARIANTS, every_mixer
from minrnn.files import InUseError
from minrnn.mixers import MIXERS
from minrnn.ops import GATES
from minrnn.training import Interrupted, NonFiniteLossError, RunConfig, load_recipe, read_config
from minrnn.training.threads import cpu_threads

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks" / "results"
# What differs between two runs that are the same: the checkout may be worked in meanwhile.
TIMES = ("seconds", "training_seconds", "curve", "commit", "changes")


@pytest.fixture(autouse=True)
def workplace(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path_factory.getbasetemp() / "minrnn-cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))


@pytest.fixture(params=EXPERIMENTS)
def experiment(request: pytest.FixtureRequest) -> Experiment:
    return EXPERIMENTS[request.param].load()


class SelectiveCopying(selective_copying.SelectiveCopying):
    """Six steps, so that there is something to interrupt."""

    tiny = selective_copying.SelectiveCopying.sizes["tiny"]
    sizes = {"tiny": dataclasses.replace(tiny, train={**tiny.train, "steps": 6})}  # noqa: RUF012


CHOICE = Choice("tiny", seeds=1, mixers=("mingru",), device="cpu")


class Silence(Watch):
    """Shows nothing."""


class StopAt(Silence):
    """A watch that sends this process a signal when a trial is half done."""

    def __init__(self, trial: int) -> None:
        self.trial, self.number = trial, 0

    def begin(self, name: str, number: int, total: int) -> None:
        self.number = number

    def progress(self, fraction: float, text: str, left: float | None) -> None:
        if self.number == self.trial and fraction == 0.5:
            self.number = 0  # a second signal would not wait for the end of the step
            os.kill(os.getpid(), signal.SIGINT)


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def published_in(value: Any) -> Iterator[Published]:
    if isinstance(value, Published):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from published_in(part)


SINGLE = {"shakespeare-best", "documents"}
"""No table of mixers: one run of our best and one of a rival; ways to read text with one mixer."""

# --- the table of experiments ----------------------------------------------------------------------------


def test_every_experiment_is_named_as_it_is(experiment: Experiment) -> None:
    assert EXPERIMENTS[experiment.name].load() is experiment
    for text in (experiment.title, experiment.question, experiment.changes):
        assert len(text) > 10
    assert "cpu" in experiment.changes


@pytest.mark.parametrize("scale", SCALES)
def test_trials_are_json_have_names_of_their_own_and_are_always_the_same(
    experiment: Experiment, scale: Any
) -> None:
    trials = experiment.trials(Choice(scale))
    assert len(trials) > 1
    assert len({trial.name for trial in trials}) == len(trials)
    for trial in trials:
        assert re.fullmatch(r"[A-Za-z0-9.-]+", trial.name)
        assert json.loads(json.dumps(trial.config)) == trial.config
        assert dict(trial.setting).keys() >= {"B"} or {"mixer", "seed"} <= trial.setting.keys()
    assert trials == experiment.trials(Choice(scale))
    if isinstance(experiment, TrainedExperiment):
        for trial in trials:
            config = RunConfig.from_dict(trial.config)
            assert config.train.seed == trial.setting["seed"]
            assert {"device", "threads"}.isdisjoint(trial.config["train"])


def test_seeds_and_mixers_choose_trials(experiment: Experiment) -> None:
    everything = experiment.trials(Choice("cpu"))
    names = ("mingru",) if experiment.name in SINGLE else ("mingru", "minlstm")
    ours = experiment.trials(Choice("cpu", mixers=names))
    assert ours
    if isinstance(experiment, TrainedExperiment):
        assert {trial.setting["mixer"] for trial in ours} == set(names)
        assert {trial.name for trial in ours} <= {trial.name for trial in everything}
        by_seed = [experiment.trials(Choice("cpu", seeds=n, mixers=("mingru",))) for n in (1, 4)]
        assert len(by_seed[1]) == 4 * len(by_seed[0])
        seeds = [c.setting["seed"] for c in everything if c.setting["mixer"] in ("mingru", "minlstm")]
        assert experiment.name in SINGLE or max(seeds) >= 2  # three of ours at least
    else:
        assert {tuple(trial.config["systems"]) for trial in ours} == {("mingru", "minlstm")}
    with pytest.raises(ValueError, match=r"mixers must be among .*; did you mean 'mingru'"):
        experiment.trials(Choice("cpu", mixers=("mingur",)))


def test_environments_and_data_choose_trials_of_locomotion() -> None:
    experiment = locomotion.EXPERIMENT
    everything = experiment.trials(Choice("cpu"))
    assert {trial.setting["data"] for trial in everything} == {"local"}
    assert len(everything) == 6 * (3 * 4 + len(MIXERS) - 3)
    hopper = experiment.trials(Choice("cpu", envs=("hopper",)))
    assert hopper == [trial for trial in everything if trial.setting["env"] == "hopper"]
    named = {
        data: {
            trial.config["task"]["data"]
            for trial in experiment.trials(Choice("cpu", envs=("hopper",), data=data))
        }
        for data in scores.QUALITIES
    }
    assert named == {
        "local": {"local/Hopper-v5-medium", "local/Hopper-v5-medium-replay"},
        "d4rl": {"hopper-medium-v2", "hopper-medium-replay-v2", "hopper-medium-expert-v2"},
        "minari": {"mujoco/hopper/simple-v0", "mujoco/hopper/medium-v0", "mujoco/hopper/expert-v0"},
    }
    with pytest.raises(
        ValueError, match=r"envs must be among hopper, .*, got 'hoper'; did you mean 'hopper'"
    ):
        experiment.check(Choice("cpu", envs=("hoper",)))
    with pytest.raises(ValueError, match="data must be among local, d4rl, minari, got 'd4r'"):
        experiment.check(Choice("cpu", data="d4r"))


def test_experiments_of_one_set_of_data_leave_no_choice_of_it(experiment: Experiment) -> None:
    for choice in (Choice("tiny", envs=("hopper",)), Choice("tiny", data="d4rl")):
        if experiment.name != "locomotion":
            with pytest.raises(ValueError, match=f"{experiment.name} has one set of data"):
                experiment.check(choice)
    experiment.check(Choice("tiny"))


def test_recurrent_policies_carry_and_all_see_as_much() -> None:
    for trial in locomotion.EXPERIMENT.trials(Choice("cpu", seeds=1, envs=("hopper",))):
        config = RunConfig.from_dict(trial.config)
        assert config.resolved() == config
        assert config.train.batch_size * config.task.window == 64 * 20  # type: ignore[union-attr]
        assert config.task.carry == (trial.setting["mixer"] not in ("attention", "bc"))  # type: ignore[union-attr]


def test_every_mixer_takes_part_where_all_are_compared() -> None:
    for name in EXPERIMENTS.keys() - SINGLE - {"stability"}:
        experiment = EXPERIMENTS[name].load()
        taking = {
            mixer
            for trial in experiment.trials(Choice("tiny"))
            for mixer in ([trial.setting["mixer"]] if "mixer" in trial.setting else trial.config["systems"])
        }
        assert taking >= MIXERS.keys(), name


def test_signed_gates_are_shown_on_formal_languages() -> None:
    signed = [name for name, gate in GATES.items() if gate.can_be_signed]
    mixers = formal_languages.EXPERIMENT.mixers()
    assert ("mingru-signed" in mixers) == ("minlstm-signed" in mixers) == bool(signed)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"scale": "huge"}, "scale must be one of cpu, paper, tiny, got 'huge'"),
        ({"seeds": 0}, "seeds must be 1 to 10000, got 0"),
        ({"threads": -1}, "threads must be 0 to 1024, got"),
    ],
)
def test_choices_out_of_range_are_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Choice(**choice)


def test_variants_of_settings_that_models_lack_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "mingru-odd", {"mixer": "mingru", "oddness": 3})
    assert every_mixer("mingru-odd", "transformer") == [*MIXERS, "transformer"]


def test_a_recipe_for_several_mixers_is_the_recipe() -> None:
    for trial in shakespeare.CPU.trials(Choice("cpu")):
        setting = trial.setting
        recipe = load_recipe("shakespeare-cpu").override(
            model={"mixer": setting["mixer"]}, train={"seed": setting["seed"]}
        )
        assert RunConfig.from_dict(trial.config) == recipe


def test_documents_are_read_by_two_recipes_and_joined() -> None:
    demo, subwords = load_recipe("demo"), load_recipe("python-bpe")
    expected = {"bytes": demo, "joined": demo.override(task={"documents": "joined"}), "subwords": subwords}
    for trial in EXPERIMENTS["documents"].load().trials(Choice("cpu")):
        recipe = expected[trial.name.split("-")[0]].override(train={"seed": trial.setting["seed"]})
        assert RunConfig.from_dict(trial.config) == recipe


def test_settings_of_a_scale_come_after_those_of_all_scales_and_after_the_recipes() -> None:
    experiment = SelectiveCopying()
    experiment.common_train = {"steps": 5, "learning_rate": 0.5, "precision": "bfloat16-products"}
    size = dataclasses.replace(experiment.tiny, train={"steps": 9}, model={"d_model": 24}, task={})
    config = experiment.config(size, "mingru")
    assert (config.train.steps, config.train.learning_rate, config.model.d_model) == (9, 0.5, 24)
    assert config.task == load_recipe(experiment.recipe).task
    precisions = [experiment.config(size, mixer).train.precision for mixer in ("mingru", "attention")]
    assert precisions == ["bfloat16-products", "float32"]
    assert experiment.config(size, "mingru-signed").model.signed


def test_runs_are_evaluated_and_saved_at_the_same_steps() -> None:
    same = {"eval_every": 12, "checkpoint_every": 12}
    assert training(every=12, logs=4, steps=7) == {**same, "log_every": 3, "steps": 7}
    assert training(every=12, logs=24) == {**same, "log_every": 1}


@pytest.mark.parametrize("scale", ["cpu", "paper"])
def test_matched_models_have_nearly_as_many_parameters(scale: Any) -> None:
    size = shakespeare.EXPERIMENT.sizes[scale]
    wanted = shakespeare.count(shakespeare.EXPERIMENT.config(size, "mingru").model)
    for mixer in shakespeare.EXPERIMENT.mixers():
        model = shakespeare.EXPERIMENT.config(size, mixer).model
        width = shakespeare.width_of(model, wanted, 2 * size.num_heads)
        found = shakespeare.count(dataclasses.replace(model, d_model=width))
        assert found == pytest.approx(wanted, rel=0.06), mixer


# --- running, stopping, going on -------------------------------------------------------------------------


def test_interrupted_and_continued_is_uninterrupted(tmp_path: Path) -> None:
    experiment = SelectiveCopying()
    whole = reproduce(experiment, CHOICE, tmp_path / "whole", Silence())
    with pytest.raises(Interrupted):
        reproduce(experiment, CHOICE, tmp_path / "parts", StopAt(trial=2))
    parts = ResultsFolder(tmp_path / "parts", experiment.name, "tiny")
    assert [record["cell"] for record in parts.records()] == ["mingru-layers1-seed0"]
    assert (parts.path / "tables.md").is_file()  # of what there was
    unfinished = parts.path / "unfinished" / "mingru-layers2-seed0" / "run"
    assert read_config(unfinished).train.steps == 6
    first = (parts.path / "cells" / "mingru-layers1-seed0.json").stat().st_mtime_ns
    reproduce(experiment, CHOICE, tmp_path / "parts", Silence())
    assert (parts.path / "cells" / "mingru-layers1-seed0.json").stat().st_mtime_ns == first
    assert not (parts.path / "unfinished").exists()
    assert timeless(parts.records()) == [
        {**timeless(record), "command": found["command"]}
        for record, found in zip(whole.records(), parts.records(), strict=True)
    ]
    names = {path.name for path in parts.path.iterdir()}
    assert names == {"cells", "config.json", "tables.md", "plot.png", "plot.svg"}


def test_a_trial_that_was_killed_before_its_first_step_starts_over(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, "selective-copying", "tiny")
    (trial, *_) = SelectiveCopying().trials(CHOICE)
    (folder.unfinished(trial) / "run").mkdir(parents=True)
    (folder.unfinished(trial) / "run" / "config.json.partial").write_text("{")
    reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence(), only=[trial.name])
    assert [record["cell"] for record in folder.records()] == [trial.name]


def test_trials_run_alone_in_any_order_and_add_up(tmp_path: Path) -> None:
    experiment = SelectiveCopying()
    names = [trial.name for trial in experiment.trials(CHOICE)]
    for name in reversed(names):
        folder = reproduce(experiment, CHOICE, tmp_path, Silence(), only=[name])
    other = dataclasses.replace(CHOICE, mixers=("gru",))
    folder = reproduce(experiment, other, tmp_path, Silence(), only=["gru-layers1-seed0"])
    assert [record["cell"] for record in folder.records()] == ["gru-layers1-seed0", *names]
    assert json.loads((folder.path / "config.json").read_text())["cells"].keys() == {
        *names,
        "gru-layers1-seed0",
    }
    assert "| gru |" in (folder.path / "tables.md").read_text()


class Notes(Silence):
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_two_in_one_folder_compute_each_trial_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that finds nothing else to do leaves the other's trial to it, and says so."""
    computed: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def measure(self: Experiment, trial: Trial, *_: object) -> dict[str, Any]:
        computed.append(trial.name)
        if not begun.is_set():
            begun.set()
            assert go_on.wait(60)
        return {}

    monkeypatch.setattr(stability.Stability, "measure", measure)
    monkeypatch.setattr(stability.Stability, "tables", lambda *_: [])
    monkeypatch.setattr(stability.Stability, "draw", lambda *_: None)
    one, two = (
        Choice("tiny", seeds=2, mixers=mixers, device="cpu")
        for mixers in (("mingru", "minlstm"), ("mingru",))
    )
    first = threading.Thread(target=reproduce, args=(stability.EXPERIMENT, one, tmp_path, Silence()))
    first.start()
    assert begun.wait(60)
    watch = Notes()
    folder = reproduce(stability.EXPERIMENT, two, tmp_path, watch)
    (left,) = [note for note in watch.notes if "left to others (in use by process" in note]
    assert left.startswith(computed[0])
    go_on.set()
    first.join()
    names = [trial.name for trial in stability.EXPERIMENT.trials(one)]
    assert sorted(computed) == sorted(names)
    assert {record["cell"] for record in folder.records()} == set(names)
    assert json.loads((folder.path / "config.json").read_text())["cells"].keys() == set(names)
    assert not (folder.path / "unfinished").exists()


def test_trials_are_numbered_once_though_some_are_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of four is another process's at first, which then abandons it; the first is finished."""
    begun: list[tuple[str, int, int]] = []

    class Numbers(Silence):
        def begin(self, name: str, number: int, total: int) -> None:
            begun.append((name, number, total))

    choice = Choice("tiny", seeds=4, mixers=("mingru",), device="cpu")
    names = [trial.name for trial in stability.EXPERIMENT.trials(choice)][:4]
    monkeypatch.setattr(stability.Stability, "measure", lambda *_: {})
    monkeypatch.setattr(stability.Stability, "tables", lambda *_: [])
    monkeypatch.setattr(stability.Stability, "draw", lambda *_: None)
    reproduce(stability.EXPERIMENT, choice, tmp_path, Silence(), only=names[:1])
    claimed, refused = runner.claim, [names[1]]

    def claim(folder: Path, say: Any) -> Any:
        if folder.name in refused:
            refused.clear()
            raise InUseError(errno.EBUSY, "in use", str(folder))
        return claimed(folder, say)

    monkeypatch.setattr(runner, "claim", claim)
    reproduce(stability.EXPERIMENT, choice, tmp_path, Numbers(), only=names)
    assert begun == [(names[2], 3, 4), (names[3], 4, 4), (names[1], 4, 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "it must be a table, got "),
        ("{", "is not valid JSON"),
        ("{}", "format is missing"),
        ({"format": 2}, "is no record of this version"),
        ({"setting": []}, "setting must be a table"),
        ({"seconds": "long"}, "seconds must be float"),
        ({"result": None}, "must hold either a result or why it failed"),
        ({"versions": {"torch": 2}}, "versions.torch must be str"),
    ],
)
def test_a_trial_without_its_keys_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    choice = Choice("tiny", seeds=1, mixers=("mingru",), device="cpu")
    trial = stability.EXPERIMENT.trials(choice)[0]
    folder = reproduce(stability.EXPERIMENT, choice, tmp_path, Silence(), only=[trial.name])
    path = folder.path / "cells" / f"{trial.name}.json"
    record = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps(record | content))
    with pytest.raises(ValueError, match=message) as refusal:
        folder.records()
    assert str(path) in str(refusal.value)
    assert "remove it to have it made again" in str(refusal.value)


@pytest.mark.parametrize("part", ["tables", "draw"])
def test_tables_and_plots_that_fail_are_said_and_cost_no_trial(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a figure")

    monkeypatch.setattr(stability.Stability, part, fail)
    watch = Notes()
    folder = reproduce(
        stability.EXPERIMENT, Choice("tiny", seeds=1, mixers=("mingru",), device="cpu"), tmp_path, watch
    )
    assert len(folder.records()) == 3
    said = {"tables": "no tables: KeyError: 'a figure'", "draw": "no plot: KeyError: 'a figure'"}
    assert said[part] in watch.notes
    other = folder.path / ("plot.png" if part == "tables" else "tables.md")
    assert other.is_file()


def test_a_record_says_all_that_is_needed_to_repeat_it(tmp_path: Path) -> None:
    folder = reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence(), only=["mingru-layers1-seed0"])
    (record,) = folder.records()
    expected = {"format", "experiment", "scale", "cell", "setting", "config", "result", "failed", "seconds"}
    assert record.keys() == expected | {"command", "device", "machine", "versions", "commit", "changes"}
    assert RunConfig.from_dict(record["config"]).train.steps == 6
    assert record["command"] == (
        "minrnn reproduce selective-copying --scale tiny --seeds 1 --mixers mingru --device cpu --trial "
        f"mingru-layers1-seed0 --output {tmp_path}"
    )
    assert len((folder.path / "cells" / "mingru-layers1-seed0.json").read_text().splitlines()) == 1


def test_results_of_other_settings_are_not_taken_for_these(tmp_path: Path) -> None:
    reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence(), only=["mingru-layers1-seed0"])
    with pytest.raises(ValueError, match=r"got train.steps = 6 in place of 2; remove it, or choose another"):
        reproduce(selective_copying.EXPERIMENT, CHOICE, tmp_path, Silence())
    path = tmp_path / "selective-copying-tiny" / "cells" / "mingru-layers1-seed0.json"
    record = json.loads(path.read_text())
    del record["config"]["model"]["window"]  # as if that setting were newer than the record
    path.write_text(json.dumps(record))
    folder = reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence(), only=["mingru-layers1-seed0"])
    assert folder.records() == [record]
    record["config"]["model"]["oddness"] = 3
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"unknown key 'model\.oddness'"):
        reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence())
    for damaged in ("{", "[]", '{"format": 0}'):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="remove it to have it made again"):
            reproduce(SelectiveCopying(), CHOICE, tmp_path, Silence())


def test_training_that_diverges_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*arguments: Any) -> None:
        raise NonFiniteLossError("training diverged at step 3")

    said: list[str] = []

    class Ear(Silence):
        def note(self, text: str) -> None:
            said.append(text)

    choice = dataclasses.replace(CHOICE, seeds=2)
    trials = [trial.name for trial in stability.EXPERIMENT.trials(choice)]
    reproduce(stability.EXPERIMENT, choice, tmp_path, Silence(), only=trials[::2])
    monkeypatch.setattr(stability.Stability, "measure", diverge)
    folder = reproduce(stability.EXPERIMENT, choice, tmp_path, Ear())
    assert f"{trials[1]} failed: training diverged at step 3" in said
    failed = [record["cell"] for record in folder.records() if record["failed"] is not None]
    assert failed == sorted(trials[1::2])
    rows = (folder.path / "tables.md").read_text().splitlines()
    assert sum(row.startswith("| mingru | ") for row in rows) == 3
    for row in rows:
        if row.startswith("| mingru | "):
            assert row.split(" | ")[2:4] == ["2", "2"]  # one diverged, the other has learnt nothing
    monkeypatch.undo()
    page = experiments(_as_cpu(folder), tmp_path)
    assert f"Diverged: {', '.join(sorted(trials[1::2]))}." in page


def test_a_trial_is_looked_up_by_its_name() -> None:
    trials = [Trial(name, {}, {}) for name in ("mingru-seed0", "gru-seed0")]
    assert pick(trials, []) == trials
    assert pick(trials, ["gru-seed0"]) == trials[1:]
    with pytest.raises(ValueError, match=r"that --list-trials names .*; did you mean 'mingru-seed0'"):
        pick(trials, ["mingru-seed1"])


def test_trials_are_of_one_kind_if_their_seeds_alone_differ() -> None:
    kinds = {
        Trial("", {"mixer": mixer, "layers": 2, "seed": seed}, {}).kind for mixer in "ab" for seed in (0, 1)
    }
    assert kinds == {(("mixer", "a"), ("layers", 2)), (("mixer", "b"), ("layers", 2))}


def test_the_time_left_is_that_of_the_most_similar_trials() -> None:
    def record(mixer: str, layers: int, seconds: float) -> Record:
        return {"setting": {"mixer": mixer, "layers": layers, "seed": 0}, "seconds": seconds}

    known = [record("gru", 1, 10.0), record("gru", 2, 30.0), record("rnn", 2, 2.0)]
    assert forecast(Trial("", {"mixer": "gru", "layers": 2, "seed": 5}, {}), known) == 30.0
    assert forecast(Trial("", {"mixer": "gru", "layers": 3, "seed": 0}, {}), known) == 20.0
    assert forecast(Trial("", {"mixer": "lstm", "layers": 3, "seed": 0}, {}), known) == 14.0
    assert forecast(Trial("", {"mixer": "lstm"}, {}), []) is None


def test_the_time_left_of_a_trial_that_goes_on_is_that_of_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float | None] = []

    class Ear(Silence):
        def progress(self, fraction: float, text: str, left: float | None) -> None:
            heard.append(left)

    now = 0.0
    monkeypatch.setattr(runner.time, "perf_counter", lambda: now)
    clock = runner._Clock(Trial("", {}, {}), [Trial("", {}, {})], [], Ear())
    for now, fraction in ((0.0, 0.0), (5.0, 0.5), (15.0, 0.75), (25.0, 1.0)):  # noqa: B007 - the clock reads it
        clock(fraction, "")
    assert heard == [None, None, pytest.approx(0.25 * 40 + 40), pytest.approx(40)]


def test_estimates_are_of_every_kind_of_trial(experiment: Experiment) -> None:
    if experiment.name == "locomotion":
        if MISSING:
            pytest.skip(MISSING)
        write_pendulum_data()
    kinds = {trial.kind: trial for trial in experiment.trials(CHOICE)}
    for trial in kinds.values():
        assert experiment.estimate(trial, CHOICE) > 0


# --- numbers ---------------------------------------------------------------------------------------------


def busy(times: Mapping[int, float], noise: float, every: int) -> Any:
    """Return what takes a step: times by size, each `every`-th of which something else makes longer."""
    calls = iter(range(1000))

    def seconds(sequences: int) -> float:
        return times[sequences] + (noise if next(calls) % every == 0 else 0.0)

    return seconds


def test_a_step_is_estimated_without_its_first_and_without_what_disturbs_a_few() -> None:
    times = {4: 0.02, 8: 0.03, 64: 0.17}
    assert step_seconds(busy(times, 1000.0, 3), 64) == pytest.approx(0.17)  # the first of all among them
    assert step_seconds(busy({2: 0.5}, 0.0, 1), 2) == 0.5


def test_what_a_step_costs_without_sequences_is_not_multiplied() -> None:
    """3 seconds of which sequences are a tenth: in proportion, a step of 64 would be 58 seconds."""
    assert step_seconds(busy({4: 3.6, 8: 4.2, 64: 12.6}, 0.0, 1), 64) == pytest.approx(12.6)  # by a line
    assert step_seconds(busy({4: 3.6, 8: 4.2, 64: 99.0}, 0.0, 1), 64) == pytest.approx(12.6)
    assert step_seconds(busy({4: 3.0, 8: 3.0, 64: 9.0}, 0.0, 1), 64) == 9.0  # measured, as the line is short
    assert step_seconds(busy({4: 20.0, 8: 12.0, 64: 99.0}, 0.0, 1), 64) == 20.0  # never below what was seen
    assert PROBE_SEQUENCES == 4
    assert LONGEST_PROBE == 10.0


def test_estimates_are_asked_for_in_turns_and_the_lowest_taken() -> None:
    asked: list[str] = []
    values = {"a": iter([900.0, 1.0, 2.0, 3.0, 800.0]), "b": iter([5.0, 5.0, 700.0, 5.0, 5.0])}

    def ask(name: str) -> Any:
        def one() -> float:
            asked.append(name)
            return next(values[name])

        return one

    assert interleaved({name: ask(name) for name in values}, lambda: 0.0) == {"a": 1.0, "b": 5.0}
    assert asked == ["a", "b"] * 5
    late = iter([0.0, 61.0])
    values["a"] = iter([7.0])
    assert interleaved({"a": ask("a")}, late.__next__) == {"a": 7.0}
    assert interleaved({}, lambda: 0.0) == {}


def test_finished_trials_of_this_machine_say_best_how_long_others_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice("tiny", seeds=2, mixers=("mingru",), device="cpu")
    asked: list[str] = []

    def ask(self: Experiment, trial: Trial, choice: Choice) -> float:
        asked.append(trial.name)
        return 1000.0

    monkeypatch.setattr(stability.Stability, "estimate", ask)
    trials = stability.EXPERIMENT.trials(choice)  # three kinds
    folder = reproduce(stability.EXPERIMENT, choice, tmp_path, Silence(), only=[trials[0].name])
    (record,) = folder.records()
    whole = estimate(stability.EXPERIMENT, trials, choice, [record], asked.append, lambda: 0.0)
    assert whole == pytest.approx(2 * record["seconds"] + 4 * 1000.0)
    assert trials[0].name not in asked
    several = [record | {"seconds": seconds} for seconds in (90.0, 10.0, 20.0)]
    assert estimate(stability.EXPERIMENT, trials, choice, several, asked.append, lambda: 0.0) == 4040.0
    elsewhere = record | {"machine": {**record["machine"], "processor": "another"}}
    assert estimate(stability.EXPERIMENT, trials, choice, [elsewhere], asked.append, lambda: 0.0) == 6000.0


@pytest.mark.parametrize("threads", [1, 2])
def test_estimates_are_made_with_the_threads_that_trials_have(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        stability.Stability, "estimate", lambda *_: seen.append(torch.get_num_threads()) or 1.0
    )
    choice = Choice("tiny", mixers=("mingru",), device="cpu", threads=threads)
    estimate(stability.EXPERIMENT, stability.EXPERIMENT.trials(choice), choice, [], print, lambda: 0.0)
    assert set(seen) == {threads}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_record_says_the_threads_that_its_trial_had(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spy(*_: object) -> dict[str, Any]:
        return {"threads": torch.get_num_threads()}

    for kind in (TimedExperiment, TrainedExperiment):
        monkeypatch.setattr(kind, "measure", spy)
    monkeypatch.setattr("minrnn.experiments.runner.write_summary", lambda *_: None)
    experiment = EXPERIMENTS[name].load()
    choice = Choice("tiny", device="cpu")
    with cpu_threads(3):
        reproduce(experiment, choice, tmp_path, Silence(), only=[experiment.trials(choice)[0].name])
        assert torch.get_num_threads() == 3
    (record,) = ResultsFolder(tmp_path, name, "tiny").records()
    assert record["machine"]["threads"] == record["result"]["threads"] == (1 if name == "acting" else 3)


def test_threads_that_an_experiment_does_not_have_are_refused(tmp_path: Path) -> None:
    acting = EXPERIMENTS["acting"].load()
    with pytest.raises(ValueError, match=r"acting is measured with --threads 1, got 2"):
        reproduce(acting, Choice("tiny", threads=2), tmp_path, Silence())
    acting.check(Choice("tiny", threads=1))


@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_the_recurrences_that_torch_compiles(name: str) -> None:
    torch.manual_seed(0)
    loop = LOOPS[name](3, 5).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    y, expected = loop(x), loop.rnn(x)[0]
    torch.testing.assert_close(y, expected)
    leaves = [x, *loop.parameters()]
    dy = torch.randn_like(y)
    for found, wanted in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    assert name not in MIXERS


@given(power=st.floats(-1, 3), factor=st.floats(1e-3, 1e3), count=st.integers(3, 9))
def test_growth_is_the_exponent(power: float, factor: float, count: int) -> None:
    line = [(2.0**n, factor * 2.0 ** (n * power)) for n in range(count)]
    assert exponent(line) == pytest.approx(power, abs=1e-6)
    assert exponent(line[:2]) is None


def test_growth_looks_at_the_upper_half() -> None:
    assert exponent([(1, 5), (2, 5), (4, 5), (8, 8), (16, 16), (32, 32)]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "text"), [((1, 1, 0.999), "0.00"), ((1, 2, 4), "1.00"), ((4, 2, 1), "-1.00"), ((1, 2), "")]
)
def test_growth_is_never_a_negative_zero(values: tuple[float, ...], text: str) -> None:
    assert growth([(2**n, value) for n, value in enumerate(values)]) == text


@pytest.mark.parametrize("mixer", FORMULAS)
@pytest.mark.parametrize(("d_x", "d_h"), [(3, 3), (4, 10), (7, 2)])
def test_weights_are_as_many_as_the_papers_formula_says(mixer: str, d_x: int, d_h: int) -> None:
    assert count_weights(mixer, d_x, d_h) == FORMULAS[mixer].weights(d_x, d_h)


def test_the_table_of_parameters_holds_every_mixer() -> None:
    table = parameter_table()
    assert [row[0] for row in table.rows] == list(MIXERS)
    assert "33% of gru" in table.markdown()
    assert "38% of lstm" in table.markdown()


def test_a_count_that_is_not_the_formulas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMULAS, "mingru", FORMULAS["gru"])
    with pytest.raises(RuntimeError, match="mingru must have"):
        parameter_table()


def test_seconds_of_training_leave_evaluations_out() -> None:
    lines = [
        {"step": 2, "loss": 1.0, "tokens": 100, "tokens_per_second": 50.0, "seconds": 2.0},
        {"step": 2, "val_loss": 1.0},
        {"step": 4, "loss": 0.9, "tokens": 200, "tokens_per_second": 25.0, "seconds": 99.0},
    ]
    assert training_seconds(lines) == [(2, 2.0), (4, 6.0)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_spread_has_a_deviation_where_there_are_several(values: list[float]) -> None:
    assert ("±" in spread(values)) == (len(values) > 1)


# --- published figures -----------------------------------------------------------------------------------


def test_every_published_figure_is_labelled() -> None:
    modules = (selective_copying, shakespeare, formal_languages, listops, scores)
    found = [
        figure for module in modules for value in vars(module).values() for figure in published_in(value)
    ]
    assert len(found) > 30
    for figure in found:
        assert figure.certainty in LABELS
        assert str(figure) == f"{figure.text} ({LABELS[figure.certainty]})"
        assert "arXiv" in figure.source
    assert shown(None) == ""


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (selective_copying.TABLE_1["mingru", 3], "99.5 ± 0.2 (as published)"),
        (selective_copying.TABLE_1["minlstm", 2], "85.7 ± 5.8 (as recalled, unconfirmed)"),
        (shakespeare.PUBLISHED["minlstm"], "1.555 at step 625 (as published)"),
        (formal_languages.PUBLISHED["minLSTM"]["majority"], "0.93 (as recalled, unconfirmed)"),
        (listops.TABLE_6["mlp"], "0.52 (as recalled, unconfirmed)"),
        (scores.TABLE_3["hopper-medium"]["minLSTM"], "85.0 ± 4.4 (as recalled, unconfirmed)"),
    ],
)
def test_published_figures_are_those_of_the_paper(figure: Published, text: str) -> None:
    assert str(figure) == text


# --- tables, plots, the page -----------------------------------------------------------------------------


def test_a_table_is_markdown() -> None:
    table = Table("What", ["a", "b"], [["1", "2"]], "Note.")
    assert table.markdown() == "**What**\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n\nNote."
    assert Table("", ["a"], []).markdown() == "| a |\n| --- |"


def test_without_matplotlib_there_is_no_plot_and_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = save_figure(lambda: pytest.fail("drawn all the same"), tmp_path)
    assert reason is not None
    assert "pip install" in reason


def _as_cpu(folder: ResultsFolder) -> Path:
    """Let results of the tiny scale pass for those of the cpu scale, in a folder of their own."""
    root = folder.path.parent / "as-cpu"
    shutil.copytree(folder.path, root / f"{folder.name}-cpu")
    return root


def test_the_page_holds_tables_plots_commands_and_machines(tmp_path: Path) -> None:
    folder = reproduce(SelectiveCopying(), CHOICE, tmp_path / "results", Silence())
    target = tmp_path / "RESULTS.md"
    page = REPOSITORY / "docs" / "results.md.template"
    write_page(page, BENCHMARKS, _as_cpu(folder), target, changed=True)
    text = target.read_text()
    assert "## Selective copying (tables 1 and 2)" in text
    assert "](results/as-cpu/selective-copying-cpu/plot.png)" in text
    assert "99.5 ± 0.2 (as published)" in text
    assert "minrnn reproduce selective-copying --scale paper" in text
    assert re.search(r"2 trials, \d+ seconds of computing in all, on .*, torch ", text)
    assert "## Parameters" in text
    assert "`runtime` (figure 1)" in text.partition("## Not measured yet")[2]
    assert "{" not in text


def test_trials_of_several_machines_are_told_apart(tmp_path: Path) -> None:
    root = _as_cpu(reproduce(SelectiveCopying(), CHOICE, tmp_path / "results", Silence()))
    trial = next(iter(sorted(root.glob("*/cells/*.json"))))
    record = json.loads(trial.read_text())
    mixer, record["machine"]["processor"] = record["setting"]["mixer"], "Abacus"
    trial.write_text(json.dumps(record))
    (tmp_path / "page.md").write_text("{experiments}")
    write_page(tmp_path / "page.md", BENCHMARKS, root, tmp_path / "R.md", changed=True)
    said = (tmp_path / "R.md").read_text().partition("several machines, whose times do not compare (")[2]
    assert re.search(rf"Abacus \(\d+ threads?\), torch [^:]+: {mixer}[;)]", said)


def test_a_page_that_names_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("{experiment}")
    with pytest.raises(ValueError, match=r"page.md must name tables among .*experiments, got 'experiment'"):
        write_page(tmp_path / "page.md", BENCHMARKS, tmp_path, tmp_path / "R.md", changed=True)
    assert not (tmp_path / "R.md").exists()


# --- the command line ------------------------------------------------------------------------------------


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["reproduce", *args]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"minrnn: error: [^\n]+\n", error), error
    return error


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from minrnn.cli.main import main\ntry: main(['reproduce', '--help'])\nexcept SystemExit "
        "as stop: sys.exit(stop.code or ', '.join({'torch', 'numpy'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(
        f"  {name} " in done.stdout and entry.help in done.stdout for name, entry in EXPERIMENTS.items()
    )


@pytest.mark.parametrize("name", [*EXPERIMENTS, "report"])
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: minrnn reproduce {name}")
    options = re.split(r"\n\W+(?=--[a-z])", text.partition("help message and exit")[2])[1:]
    assert len(options) >= 4
    for option in options:
        assert re.search(r"[a-z]{2,}.*\. \(default:", re.sub(r"\s*│?\n│?\s*", " ", option)), option


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown experiment 'runtme'; did you mean 'runtime'?" in error_of(capsys, "runtme")
    assert "did you mean 'gru-loop'" in error_of(capsys, "runtime", "--mixers", "gru-lop")
    assert "'cpu', 'paper', 'tiny'" in error_of(capsys, "runtime", "--scale", "big")
    assert "--seeds" in error_of(capsys, "runtime", "--seed", "3")
    assert "did you mean 'B2-D8-T" in error_of(capsys, "runtime", "--scale", "tiny", "--trial", "B2-D8-T")
    assert "device must be" in error_of(capsys, "runtime", "--device", "gpu")
    assert "runtime has one set of data" in error_of(capsys, "runtime", "--envs", "hopper")
    assert "data must be among local" in error_of(capsys, "locomotion", "--data", "own")
    assert "--list takes no other arguments" in error_of(capsys, "--list", "runtime")
    assert "results.md.template: No such file" in error_of(capsys, "report")
    assert list(Path.cwd().iterdir()) == []


def test_the_list_of_trials_is_a_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["listops", "--scale", "tiny", "--mixers", "minlstm", "--output", "mine", "--device", "cpu"]
    assert main(["reproduce", *chosen, "--list-trials"]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 4
    assert commands[1] == (
        "minrnn reproduce listops --scale tiny --mixers minlstm --device cpu --trial minlstm-conv-seed0 "
        "--output mine"
    )
    assert main(commands[1].split()[1:]) == 0
    assert "results: mine/listops-tiny" in capsys.readouterr().out
    assert main(["reproduce", *chosen, "--list-trials"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[1] == f"# finished: {commands[1]}"
    assert [again[0], *again[2:]] == [commands[0], *commands[2:]]
    # As committed records have it, whose commands are of earlier versions.
    assert main(["reproduce", *chosen, "--list-trials", "--cell", "minlstm-conv-seed0"]) == 0
    assert capsys.readouterr().out.splitlines() == [again[1]]


def test_commands_choose_the_same_trials() -> None:
    choice = Choice("paper", 2, ("mingru", "gru"), "cuda", 3, ("hopper", "walker2d"), "d4rl")
    assert command_of("locomotion", choice, Path("results")) == (
        "minrnn reproduce locomotion --scale paper --seeds 2 --mixers mingru gru --device cuda --threads 3 "
        "--envs hopper walker2d --data d4rl"
    )


def test_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all(re.search(r"cpu: \d+ trials; paper: \d+ trials$", line) for line in lines)


def test_an_estimate_prints_the_command_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "listops", "--scale", "tiny", "--mixers", "minlstm", "--estimate"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == "minrnn reproduce listops --scale tiny --mixers minlstm"
    assert lines[-1].startswith("about ")
    assert all(line.startswith("the machine is busy") for line in lines[1:-1])
    assert "4 trials, evaluations not counted" in said
    assert not Path("results").exists()


def test_an_interrupted_command_says_so_and_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["reproduce", "stability", "--scale", "tiny", "--seeds", "1", "--mixers", "mingru"]

    def stop(*arguments: Any) -> None:
        raise Interrupted(signal.SIGTERM, "step 1")

    with monkeypatch.context() as patch:
        patch.setattr(stability.Stability, "measure", stop)
        assert main(command) == 128 + signal.SIGTERM
    assert "SIGTERM: stopped and saved after step 1; the same command resumes" in capsys.readouterr().out
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "stability: 0 of 3 trials are finished" in said
    assert "3/3 mingru-bias3-seed0" in said
    assert main(command) == 0
    assert "3 of 3 trials are finished" in capsys.readouterr().out


def test_a_terminal_shows_a_bar_with_the_time_left() -> None:
    box = io.StringIO()
    with _Bar(Console(file=box, force_terminal=True, width=100)) as watch:
        watch.begin("mingru-seed0", 2, 9)
        watch.progress(0.5, "loss 1.234", 7200.0)
        watch.note("a line above")
    shown_text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", box.getvalue())
    assert "2/9 mingru-seed0" in shown_text
    assert "50%" in shown_text
    assert "loss 1.234  2.0 hours left" in shown_text
    assert "a line above" in shown_text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 seconds"), (300, "5.0 minutes"), (4000, "1.1 hours"), (1e6, "11.6 days")]
)
def test_durations_have_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
