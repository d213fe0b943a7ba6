"""Numbers that no file and no user can mean are refused in a line, before memory or minutes are spent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import typing
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from minrnn.mixers import MIXERS
from minrnn.models import (
    DecisionConfig,
    ModelConfig,
    SequenceModel,
    checkpoint,
    decision,
    load_checkpoint,
    save_checkpoint,
    sequence,
)
from minrnn.tasks import TASKS
from minrnn.training import RunConfig

UNBOUNDED = {"data_seed", "seed"}
"""Any of 2^64 numbers: they cost nothing."""


def whole_numbers(kind: type) -> list[str]:
    """Return the fields of a configuration that are sizes or counts."""
    hints = typing.get_type_hints(kind)
    return [
        field.name
        for field in dataclasses.fields(kind)
        if int in (hints[field.name], *typing.get_args(hints[field.name])) and field.name not in UNBOUNDED
    ]


@pytest.mark.parametrize("value", [-1, -(10**12), 10**12, 10**30])
def test_no_size_may_be_negative_or_beyond_all_measure(value: int) -> None:
    for name in (*whole_numbers(ModelConfig), "expansion", "mlp_ratio"):
        mixers = [each for each, mixer in MIXERS.items() if name in signature(mixer).parameters] or ["mingru"]
        for mixer in mixers:
            settings = {"mixer": mixer, "d_model": 8, "num_layers": 1, name: value}
            with pytest.raises(ValueError, match=name), torch.device("meta"):
                SequenceModel(ModelConfig.from_dict(settings))
    for task, kind in TASKS.items():
        for name in whole_numbers(kind.config_type):
            with pytest.raises(ValueError, match=name):
                RunConfig.from_dict({"task": {"name": task, name: value}})
    for name in whole_numbers(DecisionConfig):
        sizes = {"observation_size": 2, "action_size": 2, name: value}
        with pytest.raises(ValueError, match=name):
            DecisionConfig(ModelConfig(), **sizes)


def test_the_largest_sizes_are_still_taken() -> None:
    for name, most in sequence.LARGEST.items():
        mixer = next((each for each, kind in MIXERS.items() if name in signature(kind).parameters), "mingru")
        assert getattr(ModelConfig(mixer=mixer, **{name: most}), name) == most
        with pytest.raises(ValueError, match=f"{name} must be at most {most}, got {most + 1}"):
            ModelConfig(mixer=mixer, **{name: most + 1})
    for name, most in decision.LARGEST.items():
        sizes = {"observation_size": 2, "action_size": 2}
        assert getattr(DecisionConfig(ModelConfig(), **{**sizes, name: most}), name) == most
        with pytest.raises(ValueError, match=f"{name} must be at most {most}, got {most + 1}"):
            DecisionConfig(ModelConfig(), **{**sizes, name: most + 1})


# --- checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "a", SequenceModel(ModelConfig(vocab_size=5, d_model=4, num_layers=2)))
    return tmp_path / "a"


def sign(folder: Path, **model: Any) -> None:
    """Let a checkpoint claim this of its model, with sizes and digests that are right."""
    config = json.loads((folder / "config.json").read_text())
    config["model"] |= model
    content = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    config["files"]["model.safetensors"] = {"bytes": len(content), "sha256": digest}
    if "sha256" in config:
        config["sha256"] = checkpoint._digest(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"num_layers": 10**7}, "num_layers must be at most the number of tensors, .* got 10000000"),
        ({"num_layers": 30}, r"do not fit its config; missing: blocks.* and \d+ more"),
        ({"num_layers": -1}, "num_layers must be positive, got -1"),
        ({"d_model": 10**9}, "d_model must be at most 65536, got 1000000000"),
        ({"d_model": 60000}, r"of another shape: .*60000.* and \d+ more"),
        ({"vocab_size": 10**12}, "vocab_size must be at most"),
        ({"expansion": 1e300}, "expansion must be at most"),
        ({"num_layers": [2]}, "num_layers must be int, got"),
        ({"mixer": "m" * 10_000}, "mixer must be one of"),
    ],
)
def test_a_checkpoint_that_claims_more_than_its_tensors_is_refused(
    saved: Path, claim: dict[str, Any], message: str
) -> None:
    sign(saved, **claim)
    with pytest.raises(ValueError, match=message) as refused:
        load_checkpoint(saved)
    assert "config" in str(refused.value)
    assert len(str(refused.value)) < 1000


def header_of(tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 10**18) + b"{}",
        struct.pack("<Q", 1 << 63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        header_of({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 64]}}),
        header_of({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**18]}}),
        header_of({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        header_of({name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for name in "ab"}),
        header_of({"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 64]}}),
        header_of({"a": {"dtype": "F32", "shape": [1]}}),
        b"",
    ],
)
def test_a_header_that_claims_what_the_file_does_not_hold_is_refused(saved: Path, header: bytes) -> None:
    (saved / "model.safetensors").write_bytes(header + b"\0" * 64)
    sign(saved)
    with pytest.raises(ValueError, match=r"model.safetensors is not a whole safetensors file"):
        load_checkpoint(saved)
