"""A directory for transformers reads back as a run's checkpoint, whoever wrote it, without transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minrnn.cli.main import main
from minrnn.models import ModelConfig, SequenceModel, load_checkpoint, save_checkpoint
from minrnn.models.checkpoint import save_tensors
from minrnn.models.pretrained import SETTINGS
from minrnn.tasks import TextConfig
from minrnn.tasks.vocabulary import ByteVocabulary
from minrnn.training import RunConfig, TrainConfig, load_trained, read_config

CONFIG = ModelConfig(vocab_size=257, d_model=16, num_layers=2)
CPU = torch.device("cpu")


def table(config: RunConfig) -> dict[str, Any]:
    extra = {"vocabulary": ByteVocabulary().to_shared(), "step": 7, "corpus": "0" * 64}
    run = {name: value for name, value in config.to_dict().items() if name != "model"}
    return {"format_version": 1, "extra": extra, "run": run}


def run_config(**settings: Any) -> RunConfig:
    return RunConfig("mine", CONFIG, TextConfig(source="text", window=16), TrainConfig(steps=9, **settings))


def write(folder: Path, model: SequenceModel, **changes: Any) -> None:
    """Write the directory that transformers would, with these keys of config.json changed."""
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", {f"model.{name}": x for name, x in model.state_dict().items()})
    config = {
        "model_type": "minrnn",
        "architectures": ["MinRNNForCausalLM"],
        **model.config.to_dict(),
        "minrnn": table(run_config()),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def model() -> SequenceModel:
    torch.manual_seed(0)
    return SequenceModel(CONFIG).eval()


@pytest.fixture
def folder(model: SequenceModel, tmp_path: Path) -> Path:
    write(tmp_path / "out", model)
    return tmp_path / "out"


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"mixer": "minlstm", "signed": True}])
def test_the_model_is_read(settings: dict[str, Any], tmp_path: Path) -> None:
    model = SequenceModel(ModelConfig(vocab_size=257, d_model=8, **settings)).eval()
    write(tmp_path / "out", model)
    found, extra = load_checkpoint(tmp_path / "out")
    assert found.config == model.config
    assert extra == table(run_config())["extra"]
    tokens = torch.arange(9)[None]
    assert torch.equal(found.eval()(tokens)[0], model(tokens)[0])


def test_a_run_is_read(folder: Path) -> None:
    trained = load_trained(folder, "best", CPU)
    assert (trained.vocabulary, trained.step, trained.corpus) == (ByteVocabulary(), 7, "0" * 64)
    assert read_config(folder) == run_config()
    assert set(SETTINGS) <= json.loads((folder / "config.json").read_text()).keys()


def test_the_model_in_the_configuration_is_the_one_that_is_there(tmp_path: Path) -> None:
    """Its settings stand at the top alone, where transformers changes them."""
    model = SequenceModel(ModelConfig(vocab_size=257, d_model=24, num_layers=1))
    write(tmp_path / "out", model)
    assert read_config(tmp_path / "out").model == model.config


def test_a_run_is_sampled_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(folder), "--prompt", "ab", "--tokens", "3", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minrnn": None}, "minrnn must be a table"),
        ({"minrnn": {"extra": {}}}, "minrnn.format_version is missing"),
        (
            {"minrnn": {"format_version": 2, "extra": {}}},
            "is 2, and this minrnn reads up to 1; upgrade minrnn",
        ),
        ({"d_model": -4}, "d_model must be positive"),
        ({"d_model": 8}, "do not fit its config"),
        ({"mixer": "mingur"}, "mixer must be one of"),
        ({"num_layers": 4000}, "num_layers must be at most the number of tensors"),
    ],
)
def test_a_damaged_directory_is_refused_in_one_line(
    change: dict[str, Any], message: str, model: SequenceModel, tmp_path: Path
) -> None:
    write(tmp_path / "out", model, **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "out") in str(caught.value)


def test_a_file_that_is_missing_or_cut_short_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load_checkpoint(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_checkpoint(folder)


def test_a_model_that_no_run_trained_is_a_checkpoint_but_no_run(model: SequenceModel, tmp_path: Path) -> None:
    write(tmp_path / "out", model, minrnn={"format_version": 1, "extra": {}})
    load_checkpoint(tmp_path / "out")
    with pytest.raises(ValueError, match="names no run"):
        load_trained(tmp_path / "out", "best", CPU)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    """Tokens that were added in transformers have no text here."""
    write(tmp_path / "out", SequenceModel(ModelConfig(vocab_size=300, d_model=8)))
    with pytest.raises(ValueError, match="must have the model's 300 tokens, got 257"):
        load_trained(tmp_path / "out", "best", CPU)


def test_there_is_one_checkpoint(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint 'last'"):
        load_trained(folder, "last", CPU)


def test_it_is_not_resumed_nor_overwritten(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for index in range(10):
        Path("text", f"{index}.txt").write_text("some text " * 20)
    before = (folder / "config.json").read_bytes()
    assert main(["train", "--run", str(folder), "--resume"]) == 2
    assert "is a directory for transformers, which has no optimizer's state" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before


def test_checkpoints_of_minrnn_are_still_compared_with_their_digests(
    model: SequenceModel, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoint", model)
    path = tmp_path / "checkpoint" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cut short or altered"):
        load_checkpoint(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("version", "message"),
    [(None, "transformers is not installed"), ("5.16.1", "transformers must be 5.17 or newer, got 5.16.1")],
)
def test_without_transformers_exporting_says_what_to_install(
    version: str | None,
    message: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    there = None if version is None else ModuleType("transformers")
    if there is not None:
        there.__version__ = version  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("minrnn.integrations.transformers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", there)
    assert main(["export", str(folder), str(folder.with_name("new")), "--format", "transformers"]) == 1
    assert f"{message}; install it with: pip install 'minrnn[transformers]'\n" in capsys.readouterr().err
    assert not folder.with_name("new").exists()
