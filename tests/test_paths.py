"""`~` means the user's home in every path that a user gives, on the command line and elsewhere."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minrnn.cli import train
from minrnn.cli.arguments import parse
from minrnn.cli.bench import BENCHES
from minrnn.cli.main import COMMANDS
from minrnn.models import ModelConfig, SequenceModel, load_checkpoint, save_checkpoint
from minrnn.tasks.downloads import cache_folder, supplied_file
from minrnn.tasks.locomotion import minari_folder
from minrnn.training import load_recipe


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def holds_path(hint: Any) -> bool:
    return hint is Path or any(map(holds_path, typing.get_args(hint)))


def path_options() -> Iterator[tuple[type, str]]:
    """Yield every option of every verb that is a path: the dataclass that is read, and the field."""
    kinds = {bench.load().options for bench in BENCHES.values()}
    for command in COMMANDS.values():
        found = vars(import_module(command.module)).values()
        kinds |= {kind for kind in found if isinstance(kind, type) and kind.__module__ == command.module}
    for kind in sorted(filter(dataclasses.is_dataclass, kinds), key=lambda kind: kind.__name__):
        for name, hint in typing.get_type_hints(kind, include_extras=False).items():
            if holds_path(hint):
                yield kind, name


OPTIONS = [option for option in path_options() if option[0] is not train.TrainCommand]


def test_there_are_such_options() -> None:
    assert len(OPTIONS) >= 8
    assert len(list(path_options())) == len(OPTIONS) + 1  # --run, below


@pytest.mark.parametrize(("kind", "name"), OPTIONS, ids=lambda part: getattr(part, "__name__", part))
def test_every_path_option_expands_the_home_folder(kind: type, name: str, home: Path) -> None:
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if (field.default, field.default_factory) == (dataclasses.MISSING, dataclasses.MISSING)
    ]
    args = ["~/here" if each == name else "Pendulum-v1" for each in required]
    args += [] if name in required else [f"--{name.replace('_', '-')}=~/here"]
    assert getattr(parse(kind, "verb", args), name) == home / "here"


def test_runs_recipes_and_resumed_runs_are_found_at_home(home: Path) -> None:
    (home / "mine.toml").write_text("[train]\nsteps = 7\n")
    config = load_recipe("~/mine.toml")
    assert config.train.steps == 7
    assert train._parse(["--run=~/a"], config, "demo").run == home / "a"
    assert train._resumed_run(["--run=~/a", "--resume"]) == home / "a"


def test_checkpoints_are_written_and_read_at_home(home: Path) -> None:
    save_checkpoint("~/a", SequenceModel(ModelConfig(vocab_size=3, d_model=4, num_layers=1)))  # type: ignore[arg-type]
    assert (home / "a" / "config.json").is_file()
    load_checkpoint("~/a")  # type: ignore[arg-type]


def test_folders_of_the_environment_are_found_at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINRNN_CACHE", "MINRNN_DATA", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(name, f"~/{name}")
    assert cache_folder() == home / "MINRNN_CACHE"
    assert minari_folder("a/b-v0") == home / "MINARI_DATASETS_PATH" / "a" / "b-v0"
    (home / "MINRNN_DATA").mkdir()
    (home / "MINRNN_DATA" / "a.txt").touch()
    assert supplied_file("a.txt") == (home / "MINRNN_DATA" / "a.txt").resolve()
