"""What a run resumes from is checked, all of it: digests, tensors, counts, and whose it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import assert_same_run, run_config, trained

from minrnn.mixers import MIXERS
from minrnn.models import checkpoint
from minrnn.tasks import TASKS
from minrnn.training import RunConfig, RunLog, read_config, train
from minrnn.training.config import OPTIMIZERS, OptimizerName
from minrnn.training.loop import Run
from minrnn.training.resume import _check_counts, _form, _places, _unflatten

pytestmark = pytest.mark.usefixtures("cache")

FILES = ("config.json", "model.safetensors", "trainer.json", "trainer.safetensors")


def config_of(corpus: Path, optimizer: OptimizerName = "adamw", **settings: Any) -> RunConfig:
    return run_config(corpus, optimizer=optimizer, steps=7, carry_state=True, **settings)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each optimiser, and one of another seed, that nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINRNN_CACHE", str(tmp_path_factory.getbasetemp() / "minrnn-cache"))
        for optimizer in OPTIMIZERS:
            trained(config_of(corpus, optimizer), folder / optimizer)
        trained(config_of(corpus, seed=1), folder / "other")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def run_dir(runs: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs["adamw"], tmp_path / "run"))


def last(run_dir: Path, name: str = "") -> Path:
    return run_dir / "checkpoints" / "last" / name


def list_again(run_dir: Path) -> None:
    """Give a checkpoint's files the digests that they now have, as if they had been written so."""
    path = last(run_dir, "config.json")
    config = json.loads(path.read_text())
    config["files"] = {name: dict(checkpoint._measured(last(run_dir, name))) for name in FILES[1:]}
    path.write_text(json.dumps(config | {"sha256": checkpoint._digest(config)}))


def refused(run_dir: Path, name: str, message: str | None = None) -> None:
    """Resuming fails in one line that names the file, and nothing is changed by it."""
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message) as refusal:
        trained(read_config(run_dir), run_dir, resume=True)
    assert str(last(run_dir, name) if name in FILES else run_dir / name) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


# --- files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_in_any_file_is_refused(run_dir: Path, name: str, place: float) -> None:
    path = last(run_dir, name)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    refused(run_dir, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run_dir: Path, name: str) -> None:
    last(run_dir, name).unlink()
    with pytest.raises(FileNotFoundError) as missing:
        trained(read_config(run_dir), run_dir, resume=True)
    assert missing.value.filename == str(last(run_dir, name))


def test_a_run_that_has_lost_its_last_checkpoint_is_not_started_anew(run_dir: Path) -> None:
    """Its best weights and its metrics would be overwritten."""
    shutil.rmtree(last(run_dir))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for _ in range(2):  # with its results, and without them
        with pytest.raises(
            FileNotFoundError, match=r"checkpoints.last is missing, though step \d+ was reached"
        ):
            trained(read_config(run_dir), run_dir, resume=True)
        assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
        before.pop(run_dir / "results.json", None)
        (run_dir / "results.json").unlink(missing_ok=True)


def test_files_of_another_run_are_refused(run_dir: Path, runs: dict[str, Path]) -> None:
    for name in FILES[2:]:
        shutil.copy(last(runs["other"], name), last(run_dir))
        refused(run_dir, name, "cut short or altered")
        shutil.copy(last(runs["adamw"], name), last(run_dir))
    shutil.rmtree(last(run_dir))
    shutil.copytree(last(runs["other"]), last(run_dir))
    refused(run_dir, "trainer.json", r"train\.seed is 1 in this run, got 0")


def test_files_that_are_not_listed_are_refused(run_dir: Path) -> None:
    """The best checkpoint lists its own alone: no trainer's files go with it."""
    best = run_dir / "checkpoints" / "best"
    for name in FILES[:2]:
        shutil.copy(best / name, last(run_dir))
    refused(run_dir, "trainer.safetensors", "its size or SHA-256 is not the recorded one")


def test_a_run_of_format_1_goes_on_and_says_what_was_not_checked(
    corpus: Path, run_dir: Path, tmp_path: Path
) -> None:
    path = last(run_dir, "config.json")
    config = json.loads(path.read_text())
    files = {"model.safetensors": config["files"]["model.safetensors"]}
    del config["sha256"]
    path.write_text(json.dumps(config | {"format_version": 1, "files": files}))
    state = json.loads(last(run_dir, "trainer.json").read_text())
    for name in ("run", "unwritten"):
        del state[name]
    last(run_dir, "trainer.json").write_text(json.dumps(state))
    notes: list[str] = []

    class Notes(RunLog):
        def note(self, text: str) -> None:
            notes.append(text)

    longer = config_of(corpus)
    longer = dataclasses.replace(longer, train=dataclasses.replace(longer.train, steps=9))
    train(longer, run_dir, resume=True, log=Notes())
    assert any("trainer.safetensors and trainer.json: not checked" in note for note in notes)
    trained(config_of(corpus), tmp_path / "whole")
    trained(longer, tmp_path / "whole", resume=True)
    assert_same_run(tmp_path / "whole", run_dir)


def test_what_a_kill_left_beside_the_checkpoints_is_cleared(run_dir: Path) -> None:
    """After the last save nothing else would: a resumed run does, before it goes on."""
    folder = run_dir / "checkpoints"
    for which in ("best", "last"):
        shutil.copytree(folder / which, folder / f".{which}.previous")
        (folder / f".{which}.lock").touch()
    trained(read_config(run_dir), run_dir, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last"]


# --- what they hold --------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(run_dir: Path) -> None:
        path = last(run_dir, "trainer.safetensors")
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return edit


def change_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(run_dir: Path) -> None:
        path = last(run_dir, "trainer.json")
        state = json.loads(path.read_text())
        change(state)
        path.write_text(json.dumps(state))

    return edit


def change_extra(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(run_dir: Path) -> None:
        path = last(run_dir, "config.json")
        config = json.loads(path.read_text())
        change(config["extra"])
        path.write_text(json.dumps(config))

    return edit


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


TENSORS = {
    "no moment": (lambda t: t.pop(first(t, "/exp_avg_sq")), "missing: optimizer.*exp_avg_sq"),
    "no moments of a parameter": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer.embedding.weight/")],
        "missing: optimizer.embedding.weight/exp_avg, ",
    ),
    "another moment": (lambda t: t.update({"optimizer.x/exp_avg": torch.ones(2)}), "unexpected: optimizer.x"),
    "another shape": (
        lambda t: t.update({first(t, "/exp_avg"): torch.ones(2)}),
        r"of another form: optimizer.*\(float32 \(.*\) expected, got float32 \(2,\)\)",
    ),
    "another dtype": (
        lambda t: t.update({first(t, "/exp_avg"): t[first(t, "/exp_avg")].double()}),
        "of another form: .*got float64",
    ),
    "another count": (lambda t: t[first(t, "/step")].add_(1), "/step is 8, and the run has taken 7 steps"),
    "no random state": (lambda t: t.pop("random.cpu"), "missing: random.cpu"),
    "half a random state": (
        lambda t: t.update({"random.cpu": t["random.cpu"][:100].clone()}),
        "of another form: random.cpu",
    ),
    "no carry": (lambda t: t.pop("carry.0"), "missing: carry.0"),
    "more carry": (lambda t: t.update({"carry.9": torch.ones(1)}), "unexpected: carry.9"),
}


def moved(nesting: Any) -> Any:
    """Return a nesting of indices that are one too large."""
    return [moved(part) for part in nesting] if isinstance(nesting, list) else nesting + 1


STATES = {
    "null carry": (lambda s: s.update(carry=None), "trainer.safetensors", "unexpected: carry.0"),
    "flat carry": (lambda s: s.update(carry=_places(s["carry"])), "trainer.json", "as the model carries it"),
    "a carry twice": (lambda s: s.update(carry=[s["carry"], 0]), "trainer.safetensors", "missing: carry"),
    "a carry beyond": (
        lambda s: s.update(carry=moved(s["carry"])),
        "trainer.json",
        "carry must name each of its tensors once",
    ),
    "no carry at all": (lambda s: s.update(carry="x"), "trainer.safetensors", "lists of indices, got 'x'"),
    "another step": (lambda s: s.update(step=6), "trainer.json", "is of step 6, .* are of step 7"),
    "no step": (lambda s: s.pop("step"), "trainer.json", "must hold best, carry"),
    "a step in words": (lambda s: s.update(step="7"), "trainer.json", "step must be int, got '7'"),
    "negative tokens": (lambda s: s.update(tokens=-1), "trainer.json", "must be 0 or more"),
    "no loss of a norm": (
        lambda s: s.update(losses=[1.0], grad_norms=[]),
        "trainer.json",
        "as many losses as norms",
    ),
    "another run": (
        lambda s: s["run"]["train"].update(seed=5),
        "trainer.json",
        "train.seed is 5 in this run",
    ),
    "no run": (lambda s: s.update(run=3), "trainer.json", "run must be a table, got 3"),
    "more steps pending": (
        lambda s: s.update(losses=[1.0], grad_norms=[1.0]),
        "metrics.jsonl",
        "up to step 6, as the checkpoint of step 7",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_are_exactly_those_of_the_run(run_dir: Path, fault: str) -> None:
    change, message = TENSORS[fault]
    change_tensors(change)(run_dir)
    list_again(run_dir)
    refused(run_dir, "trainer.safetensors", message)


@pytest.mark.parametrize("fault", STATES)
def test_counts_agree_and_the_carry_is_the_models(run_dir: Path, fault: str) -> None:
    change, name, message = STATES[fault]
    change_state(change)(run_dir)
    list_again(run_dir)
    refused(run_dir, name, message)


def test_a_null_carry_without_its_tensors_is_refused(run_dir: Path) -> None:
    change_state(lambda state: state.update(carry=None))(run_dir)
    change_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("carry.")])(run_dir)
    list_again(run_dir)
    refused(run_dir, "trainer.json", "got nothing; use another copy")


def test_muon_has_one_moment_of_each_matrix(runs: dict[str, Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(runs["muon"], tmp_path / "run"))
    change_tensors(lambda t: t.pop(first(t, "/momentum_buffer")))(run_dir)
    list_again(run_dir)
    refused(run_dir, "trainer.safetensors", "missing: optimizer.blocks.*momentum_buffer")


def test_the_weights_step_is_the_runs(run_dir: Path) -> None:
    change_extra(lambda extra: extra.update(step=3))(run_dir)
    list_again(run_dir)
    refused(run_dir, "trainer.json", "is of step 7, and the weights beside it are of step 3")


def test_metrics_of_another_run_are_refused_and_missing_ones_said(run_dir: Path) -> None:
    path = run_dir / "metrics.jsonl"
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:2]))
    refused(run_dir, "metrics.jsonl", "it belongs to another run, or was truncated")
    path.write_text(text.replace('"step"', '"stop"'))
    refused(run_dir, "metrics.jsonl", "step is missing")
    path.unlink()
    trained(read_config(run_dir), run_dir, resume=True)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", '{"train": []}', '{"task": {"name": 3}}'])
def test_a_configuration_that_is_none_is_refused(run_dir: Path, content: str) -> None:
    (run_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.config\.json"):
        train(RunConfig(), run_dir, resume=True, log=RunLog())


# --- laws ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_a_model_carries_after_many_steps_has_the_form_of_one_and_two(
    corpus: Path, tmp_path: Path, mixer: str
) -> None:
    from minrnn.training.resume import _fits

    run = Run(run_config(corpus, mixer=mixer, carry_state=True), tmp_path, RunLog())
    examples = [_form(run._carried(steps)) for steps in (1, 2)]
    for _ in range(3):
        run.step()
        assert _fits(_form(run.state.carry), *examples)
        assert not _fits(None, *examples)
        assert not _fits((_form(run.state.carry),), *examples)


def test_every_parameter_of_every_model_has_moments_after_a_step(corpus: Path, tmp_path: Path) -> None:
    """What `resume` expects: a parameter that no gradient reaches would have none."""
    for mixer in MIXERS:
        run = Run(run_config(corpus, mixer=mixer), tmp_path, RunLog())
        run.step()
        moved = {id(parameter) for optimizer in run.optimizers for parameter in optimizer.state}
        assert moved == {id(parameter) for parameter in run.model.parameters()}, mixer
    assert TASKS  # their models are of these mixers; policies are in test_decisions_task


def test_counts_of_steps_end_where_float32_ends() -> None:
    for step, counted in ((3, 3), (1 << 24, 1 << 24), ((1 << 24) + 5, 1 << 24)):
        _check_counts({"a/step": torch.tensor(float(counted))}, step)
    with pytest.raises(ValueError, match="a/step is 4, and the run has taken 3 steps"):
        _check_counts({"a/step": torch.tensor(4.0)}, 3)


def test_places_are_those_that_a_nesting_names() -> None:
    nesting = [0, [None, [1, 2]], []]
    assert _places(nesting) == [0, 1, 2]
    tensors = {index: torch.ones(index) for index in range(3)}
    assert _form(_unflatten(nesting, tensors))[1][1][1].shape == (2,)
