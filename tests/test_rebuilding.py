"""What is saved can be loaded: wrappers are taken off, and what no config builds is refused at save time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

import minrnn.models.checkpoint as checkpoint
from minrnn.files import find_directory, replace_text, write_json
from minrnn.mixers import MIXERS
from minrnn.models import (
    DecisionConfig,
    DecisionModel,
    Model,
    ModelConfig,
    SequenceModel,
    Steps,
    load_checkpoint,
    save_checkpoint,
)
from minrnn.models.dropout import Dropout
from minrnn.models.rebuilding import describe, tensors_to_keep

MODELS = [*MIXERS, "tied", "policy"]
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str = "mingru") -> Model:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 8, "num_layers": 2, "dropout": 0.1}
    if name == "policy":
        return DecisionModel(DecisionConfig(ModelConfig(**sizes), 5, 3)).eval()
    if name == "tied":
        return SequenceModel(ModelConfig(vocab_size=7, tie_embeddings=True, **sizes)).eval()
    return SequenceModel(ModelConfig(vocab_size=7, mixer=name, **sizes)).eval()


def run(model: nn.Module, name: str) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    if name == "policy":
        ones = torch.ones(2, 4, 5, dtype=dtype)
        return model(Steps(ones[..., 0], ones, ones[..., :3], torch.arange(4).expand(2, 4)))[0]
    return model(torch.arange(8).reshape(2, 4) % 7)[0]


def in_place_compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_a_part_compiled(model: Any) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.norm = nn.DataParallel(model.norm)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "compile": in_place_compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),  # type: ignore[arg-type]
    "averaged": AveragedModel,
    "a part": with_a_part_compiled,
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
}


@every_model
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_was_saved_computes_the_same(tmp_path: Path, name: str, wrapper: str) -> None:
    model = build(name)
    wrapped = WRAPPERS[wrapper](model)
    expected = run(model, name) if wrapper in ("float64", "bfloat16") else run(build(name), name)
    save_checkpoint(tmp_path / "c", wrapped)  # type: ignore[arg-type]
    loaded, _ = load_checkpoint(tmp_path / "c")
    assert type(loaded) is type(model)
    assert torch.equal(run(loaded.eval(), name), expected)
    assert loaded.state_dict().keys() == build(name).state_dict().keys()


class Adapter(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.low = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.low(x)


class Sub(SequenceModel):
    pass


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def set_twice(model: Any) -> None:
    model.head.__class__ = Twice


def change_class(model: Any) -> None:
    model.__class__ = Sub


def on_meta(model: Any) -> None:
    model.norm.to("meta")


def tie(model: Any) -> None:
    model.head.weight = model.embedding.weight


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "parametrized": (
        lambda model: parametrizations.weight_norm(model.head),
        "missing: head.weight; unexpected: head.parametrizations.weight.original0",
    ),
    "weight-normed": (lambda model: torch.nn.utils.weight_norm(model.head), "unexpected: head.weight_g"),
    "spectral-normed": (lambda model: torch.nn.utils.spectral_norm(model.head), "head.weight_orig"),
    "pruned": (
        lambda model: prune.l1_unstructured(model.blocks[1].down, "weight", 0.5),
        "missing: blocks.1.down.weight; unexpected: blocks.1.down.weight_mask, blocks.1.down.weight_orig",
    ),
    "adapted": (
        lambda model: setattr(model, "head", Adapter(model.head)),
        r"missing: head.weight; .*of another class: head \(Adapter for Linear\)",
    ),
    "a class": (change_class, r"of another class: the whole \(Sub for SequenceModel\)"),
    "a part's class": (set_twice, r"of another class: head \(Twice for Linear\)"),
    "a parameter": (
        lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
        "unexpected: more",
    ),
    "a buffer": (
        lambda model: model.blocks[0].register_buffer("more", torch.ones(1), persistent=False),
        "unexpected: blocks.0.more",
    ),
    "a block": (lambda model: model.blocks.append(Dropout()), "added or left out: blocks.2;"),
    "on meta": (on_meta, "no plain numbers: norm.weight, norm.bias"),
    "tied": (tie, "one memory: embedding.weight and head.weight"),
    "another shape": (
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.ones(9, 8))),
        r"of another shape: head.weight \(\(7, 8\) expected, got \(9, 8\)\)",
    ),
    "a setting": (lambda model: setattr(model.blocks[0].dropout, "p", 0.5), "settings: blocks.0.dropout.p"),
    "no residual": (lambda model: setattr(model.blocks[1], "residual", False), "settings: blocks.1.residual"),
    "checkpointed": (
        lambda model: model.blocks.__setitem__(0, checkpoint_wrapper(model.blocks[0])),
        "CheckpointWrapper for Block",
    ),
    "a forward": (
        lambda model: setattr(model.head, "forward", lambda x: x),
        r"methods replaced: head\.forward;",
    ),
    "the forward": (
        lambda model: setattr(model, "forward", lambda *_: None),
        r"methods replaced: the whole\.forward;",
    ),
    "a method": (
        lambda model: setattr(model.blocks[0].mixer, "mix", lambda *_: None),
        r"methods replaced: blocks\.0\.mixer\.mix;",
    ),
    "whole numbers": (
        lambda model: setattr(model.norm, "weight", nn.Parameter(torch.ones(8).int(), requires_grad=False)),
        "no plain numbers: norm.weight",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_no_config_builds_is_refused_and_nothing_is_lost(tmp_path: Path, change: str) -> None:
    save_checkpoint(tmp_path / "c", build("rnn"))
    model = build()
    function, message = CHANGES[change]
    function(model)
    with pytest.raises(ValueError, match=message) as caught:
        save_checkpoint(tmp_path / "c", model)
    assert "\n" not in str(caught.value)
    assert load_checkpoint(tmp_path / "c")[0].config == build("rnn").config
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def refused(model: nn.Module, rebuilt: nn.Module) -> str:
    with pytest.raises(ValueError, match="the model is not what its config builds") as caught:
        tensors_to_keep(model, rebuilt)
    return str(caught.value)


@every_model
def test_each_setting_that_differs_is_named(name: str) -> None:
    model, rebuilt = build(name), build(name).to("meta")
    count = 0
    for path, part in model.named_modules():
        for setting, value in list(vars(part).items()):
            if setting == "training" or setting.startswith("_") or type(value) not in (bool, int, float, str):
                continue
            setattr(
                part, setting, not value if isinstance(value, bool) else value * 2 if value else value + 1
            )
            assert f"of other settings: {path}.{setting};" in refused(model, rebuilt)
            setattr(part, setting, value)
            count += 1
    assert count > 10
    tensors_to_keep(model, rebuilt)


@every_model
def test_each_part_that_is_left_out_or_added_is_named(name: str) -> None:
    model, rebuilt = build(name), build(name).to("meta")
    for path, part in list(model.named_modules())[1:]:
        parent, _, child = path.rpartition(".")
        if [*part.parameters(), *part.buffers()] or child.isdigit():
            continue  # its tensors show it
        model.get_submodule(parent)._modules[child] = None
        assert f"added or left out: {path};" in refused(model, rebuilt)
        model.get_submodule(parent)._modules[child] = part
        part.add_module("another", nn.ReLU())
        assert f"added or left out: {path}.another;" in refused(model, rebuilt)
        del part._modules["another"]
    tensors_to_keep(model, rebuilt)


def test_a_wrapper_with_parameters_of_its_own_is_no_wrapper(tmp_path: Path) -> None:
    wrapper = nn.Module()
    wrapper.module = build()
    save_checkpoint(tmp_path / "a", wrapper)  # type: ignore[arg-type]
    wrapper.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="must be a SequenceModel or DecisionModel, got Module"):
        save_checkpoint(tmp_path / "a", wrapper)  # type: ignore[arg-type]


def test_of_many_faults_the_first_are_named_and_the_others_counted() -> None:
    assert describe({"missing": list("abcdefg"), "unexpected": []}) == "missing: a, b, c, d and 3 more"
    assert describe({"missing": list("abcd"), "unexpected": ["e"]}) == "missing: a, b, c, d; unexpected: e"
    assert describe({"missing": [], "unexpected": []}) == ""


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(build())
    with pytest.raises(ValueError, match=r"missing: .*blocks.0.down.weight"):
        save_checkpoint(tmp_path / "c", model)
    assert not (tmp_path / "c").exists()


def test_other_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a SequenceModel or DecisionModel, got Linear"):
        save_checkpoint(tmp_path / "c", nn.Linear(2, 2))  # type: ignore[arg-type]


def test_hooks_are_not_saved_and_hinder_nothing(tmp_path: Path) -> None:
    """As with torch's state_dict: what watches a training must not cost its checkpoint."""
    model, seen = build(), []
    model.head.register_forward_hook(lambda *arguments: seen.append(arguments))  # type: ignore[union-attr]
    model.blocks[1].register_forward_pre_hook(lambda *arguments: seen.append(arguments))
    model.blocks[0].register_full_backward_hook(lambda *_: None)
    model.requires_grad_(False)
    save_checkpoint(tmp_path / "c", model)
    assert torch.equal(run(load_checkpoint(tmp_path / "c")[0].eval(), "mingru"), run(model, "mingru"))
    assert seen


def test_modules_find_their_tensors_under_earlier_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that was renamed says so in `_load_from_state_dict`, as torch's modules do."""
    model = build()
    monkeypatch.setattr(checkpoint, "tensors_to_keep", lambda *_: earlier)
    earlier = {name.replace("head.weight", "weight"): x for name, x in model.state_dict().items()}
    save_checkpoint(tmp_path / "c", model)
    with pytest.raises(ValueError, match=r"missing: head\.weight; unexpected: weight"):
        load_checkpoint(tmp_path / "c")

    def load(self: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        state[f"{prefix}head.weight"] = state.pop(f"{prefix}weight")
        nn.Module._load_from_state_dict(self, state, prefix, *arguments)

    monkeypatch.setattr(SequenceModel, "_load_from_state_dict", load)
    assert torch.equal(run(load_checkpoint(tmp_path / "c")[0].eval(), "mingru"), run(model, "mingru"))


# --- links ------------------------------------------------------------------------------------------------


def link(where: Path, kind: str) -> tuple[Path, Path]:
    """A symbolic link, or a path through one, and where it leads."""
    (where / "real").mkdir()
    target = where / "real" / "target"
    if kind == "parent":
        (where / "link").symlink_to(where / "real")
        return where / "link" / "target", target
    if kind == "deep":
        target = where / "real" / "a" / "target"
    (where / "link").symlink_to(Path("real/target") if kind == "relative" else target)
    if kind == "twice":
        (where / "second").symlink_to("link")
        return where / "second", target
    return where / "link", target


LINKS = ("absolute", "relative", "parent", "deep", "twice")


@pytest.mark.parametrize("kind", LINKS)
def test_checkpoints_are_written_through_links(tmp_path: Path, kind: str) -> None:
    path, target = link(tmp_path, kind)
    links = [p for p in tmp_path.iterdir() if p.is_symlink()]
    for mixer in ("gru", "mingru", "rnn"):  # the first time nothing is there
        save_checkpoint(path, build(mixer))
        assert all(p.is_symlink() for p in links)
        assert target.is_dir()
        assert not target.is_symlink()
        for place in (path, target):
            assert load_checkpoint(place)[0].config.mixer == mixer  # type: ignore[union-attr]
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]


def test_a_link_still_leads_to_what_a_killed_write_has_left(tmp_path: Path) -> None:
    path, target = link(tmp_path, "absolute")
    save_checkpoint(path, build())
    target.rename(target.with_name(".target.previous"))
    assert find_directory(path) == target.with_name(".target.previous")
    load_checkpoint(path)
    save_checkpoint(path, build("gru"))
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]


@pytest.mark.parametrize("kind", ["absolute", "relative", "parent", "twice"])
def test_files_are_written_through_links(tmp_path: Path, kind: str) -> None:
    path, target = link(tmp_path, kind)
    for text in ("one", "two"):
        replace_text(path, text)
        assert target.read_text() == text
        assert path.is_symlink() == (kind != "parent")
    write_json(path, {"a": 1})
    assert target.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in target.parent.iterdir()] == ["target"]
