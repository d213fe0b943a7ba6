"""Directories that transformers reads and writes: what their config.json says, as a checkpoint says it.

Its keys are the fields of ModelConfig, those of transformers' own, and TABLE, a table with the rest. It has
no digests, as transformers writes config.json and the tensors anew each time.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from minrnn.files import convert, read_json
from minrnn.files.writing import CONFIG_FILE
from minrnn.models.sequence import ModelConfig

MODEL_TYPE = "minrnn"
"""What config.json calls the model."""

TABLE = "minrnn"
"""The key in config.json of a table for minrnn alone."""

TABLE_VERSION = 1
"""Incremented when older versions of minrnn cannot read newer directories."""

PREFIX = "model."
"""The beginning of the tensors' names."""

SETTINGS = tuple(field.name for field in fields(ModelConfig))
"""The keys in config.json of the model's settings."""


class Table(TypedDict):
    """The table TABLE of config.json."""

    format_version: int
    extra: dict[str, Any]
    """What a checkpoint holds beside the model."""
    run: NotRequired[dict[str, Any] | None]
    """The configuration of the run, without its model."""


def is_pretrained(config: Mapping[str, Any]) -> bool:
    """Whether config.json is one of transformers."""
    return config.get("model_type") == MODEL_TYPE


def holds_pretrained(folder: Path) -> bool:
    """Whether a folder is a directory of transformers."""
    return is_pretrained(read_json(folder / CONFIG_FILE, dict[str, Any]))


def read_table(config: Mapping[str, Any]) -> Table:
    """Return the table of config.json.

    Raises:
        ValueError: it is missing, malformed or of a newer version.
    """
    table = convert(config.get(TABLE), Table, TABLE)
    if table["format_version"] > TABLE_VERSION:
        raise ValueError(
            f"{TABLE}.format_version is {table['format_version']}, and this minrnn reads up to "
            f"{TABLE_VERSION}; upgrade minrnn"
        )
    return table


def read_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the model in config.json, for `ModelConfig.from_dict`."""
    return {name: config[name] for name in SETTINGS if name in config}


def run_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the run that trained the model, as its own config.json says it.

    Raises:
        ValueError: no run did.
    """
    run = read_table(config).get("run")
    if run is None:
        raise ValueError("it names no run: `minrnn export` did not write this directory")
    return {**run, "model": read_settings(config)}


def own_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return tensors by the names that they have in a SequenceModel."""
    return {name.removeprefix(PREFIX): value for name, value in tensors.items()}
