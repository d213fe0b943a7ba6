"""Checkpoints: a directory with model.safetensors and config.json <-> a model. The one home of safetensors.

Writing is atomic: whatever happens, and whenever, the directory's name leads to one whole checkpoint, the
old or the new.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from minrnn.files import convert, locate, naming, nearest, read_json, shown, write_directory
from minrnn.files.writing import CONFIG_FILE
from minrnn.models.decision import DecisionConfig, DecisionModel
from minrnn.models.rebuilding import describe, misfits, tensors_to_keep, unwrap
from minrnn.models.sequence import ModelConfig, SequenceModel

Model = SequenceModel | DecisionModel

KINDS: dict[str, Callable[[Mapping[str, Any]], Model]] = {
    "sequence": lambda values: SequenceModel(ModelConfig.from_dict(values)),
    "decision": lambda values: DecisionModel(DecisionConfig.from_dict(values)),
}
"""What makes a model of each kind from a checkpoint's settings; where no kind is named, it is sequence."""

FORMAT_VERSION = 2
"""Raised when an older minrnn cannot read, or does not check, what a newer one writes. Since 2 config.json
lists every file of the checkpoint, and has a digest of its own; 1, which listed the model's tensors alone, is
read."""

TENSORS_FILE = "model.safetensors"

CPU = torch.device("cpu")

LONGEST = 200
"""Characters that a message takes over from the library."""

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]


def save_checkpoint(directory: Path, model: Model, *, extra: Mapping[str, JSON] | None = None) -> None:
    """Write a model as a directory, in place of what is there only once the new one is whole.

    Args:
        directory: made, or replaced as a whole.
        model: what to save: its config and tensors. What torch.compile or DistributedDataParallel have put
            around it is left out.
        extra: kept beside the config and returned by `load_checkpoint`.

    Raises:
        OSError: the directory cannot be written, or is no checkpoint; what was there before is untouched.
        TypeError: `model` is no SequenceModel or DecisionModel, or `extra` does not fit into JSON.
        ValueError: the model is another one by now than its config builds, so that it could not be loaded:
            parts or methods were replaced, or parts parametrized, pruned, quantised or sharded. Hooks are not
            kept, as a state_dict keeps none.
    """
    contents = _Contents(model, extra)  # nothing is written of what cannot be read
    with write_directory(Path(directory).expanduser()) as folder:
        contents.write(folder)


def load_checkpoint(
    directory: Path, *, device: torch.device | str | int = "cpu"
) -> tuple[Model, dict[str, JSON]]:
    """Read a model that `save_checkpoint` wrote; if it is replaced meanwhile, read the new one instead.

    Args:
        directory: where it lies.
        device: where the model's parameters go: any of torch's; with meta they have no values.

    Returns:
        The model, in training mode as any new module, and `extra`.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is cut short or altered, written by a newer version, or does not fit its config.
        TypeError: device is none of torch's.
    """
    device = _read_device(device)
    directory = Path(directory).expanduser()
    while True:
        before = locate(directory)
        try:
            loaded = _load(before[0], device)
        except (FileNotFoundError, ValueError):  # of a mixture of the old files and the new, perhaps
            if locate(directory) == before:
                raise
        else:
            if locate(directory) == before:
                return loaded


def _read_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"load_checkpoint: device must be one of torch's, got {device!r} ({reason})"
        ) from error


def _load(folder: Path, device: torch.device) -> tuple[Model, dict[str, JSON]]:
    config = _read_config(folder / CONFIG_FILE)
    _check_integrity(folder / TENSORS_FILE, config["files"])
    path = folder / TENSORS_FILE
    tensors = load_tensors(path, device=device)
    with naming(f"load_checkpoint: {folder / CONFIG_FILE}"):
        _check_layers(config["model"], len(tensors))
        model = _build(config)
    _fill(model, path, tensors)
    return model, config["extra"]


def write_model(folder: Path, model: Model, *, extra: Mapping[str, JSON] | None = None) -> None:
    """Write a checkpoint's files into a folder that is there, in `write_directory`.

    Files that lie there already are part of the checkpoint: they are listed with their sizes and digests.
    """
    _Contents(model, extra).write(folder)


class _Contents:
    """What a checkpoint will hold."""

    def __init__(self, model: nn.Module, extra: Mapping[str, JSON] | None) -> None:
        whole = unwrap(model)
        if not isinstance(whole, Model):
            kind = type(whole).__name__
            raise TypeError(f"save_checkpoint: model must be a SequenceModel or DecisionModel, got {kind}")
        self.config: dict[str, JSON] = {
            "format_version": FORMAT_VERSION,
            "kind": "decision" if isinstance(whole, DecisionModel) else "sequence",
            "model": whole.config.to_dict(),
            "extra": _read_extra(extra or {}),
        }
        self.tensors = tensors_to_keep(whole, _build(self.config))

    def write(self, folder: Path) -> None:
        save_tensors(folder / TENSORS_FILE, self.tensors)
        config = {
            **self.config,
            "files": {path.name: dict(_measured(path)) for path in sorted(folder.iterdir())},
        }
        config["sha256"] = _digest(config)
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_extra(extra: Any) -> dict[str, JSON]:
    """Return `extra`, if JSON keeps it; before the work, so that what is none is reported first."""
    if not isinstance(extra, Mapping):
        raise TypeError(f"save_checkpoint: extra must be a dict or None, got {type(extra).__name__}")
    values = dict(extra)
    _check_keys(values)
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"save_checkpoint: extra must fit into JSON; {error}") from error
    return values


def _check_keys(value: Any) -> None:
    """Raise where a dict has a key that is no string, at any depth: JSON would make it one."""
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(
                    f"save_checkpoint: extra must have strings as keys, got {key!r} ({type(key).__name__})"
                )
    if isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            _check_keys(part)


def _build(config: Mapping[str, Any]) -> Model:
    """Build the model of a config, without memory and random numbers for values that will be replaced."""
    with torch.device("meta"):
        return KINDS[config["kind"]](config["model"])


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file.

    Raises:
        OSError: the file cannot be written.
    """
    packed = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(packed, path)
    except safetensors.SafetensorError as error:  # the library wraps the system's error in its own
        raise OSError(errno.EIO, str(error), str(path)) from error
    path.chmod(0o666 & ~_umask())  # the library makes files that only their owner can read


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def load_tensors(path: Path, *, device: torch.device = CPU) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole safetensors file.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"load_tensors: {path} is not a whole safetensors file ({str(error)[:LONGEST]})"
        ) from error
    # Copies: the library maps the file, where tensors lie at odd addresses; matrix products may round
    # differently there, and a resumed run must repeat the run that was not interrupted bit for bit.
    return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}


def check_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Check files of a checkpoint, beside the model's own, against the sizes and digests that it lists.

    Args:
        folder: the checkpoint.
        names: of the files.

    Returns:
        Those that could not be checked, as the checkpoint is of format 1, which did not list them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not listed, or was cut short or altered.
    """
    config = _read_config(folder / CONFIG_FILE)
    if config["format_version"] == 1:
        return [name for name in names if name not in config["files"]]
    for name in names:
        _check_integrity(folder / name, config["files"])
    return []


class _File(TypedDict):
    """What is recorded of a file."""

    bytes: int
    sha256: str


def _measured(path: Path) -> _File:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(config: Mapping[str, Any]) -> str:
    """Return the digest of what config.json holds beside it."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Config(TypedDict):
    """What config.json holds."""

    format_version: int
    kind: NotRequired[str]
    model: dict[str, Any]
    files: dict[str, _File]
    extra: dict[str, Any]
    sha256: NotRequired[str]


def _read_config(path: Path) -> _Config:
    with naming("load_checkpoint"):
        values = read_json(path, dict[str, Any])
        version = values.get("format_version")
        if type(version) is not int:
            raise ValueError(f"{path} names no format_version; it is no checkpoint of minrnn")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, and this minrnn reads up to {FORMAT_VERSION}; "
                "upgrade minrnn"
            )
        with naming(path):
            config = convert(values, _Config)
        if version > 1 and config.get("sha256") != _digest(values):
            raise ValueError(
                f"{path} was cut short or altered: its SHA-256 is not the recorded one; use another copy"
            )
        kind = config.setdefault("kind", "sequence")
        if kind not in KINDS:
            raise ValueError(
                f"{path} must be of a model among {', '.join(KINDS)}, got {shown(kind)}"
                f"{nearest(kind, KINDS)}; upgrade minrnn"
            )
    return config


def _check_integrity(path: Path, files: Mapping[str, _File]) -> None:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "the checkpoint lacks this file", str(path))
    if files.get(path.name) != _measured(path):
        raise ValueError(
            f"load_checkpoint: {path} was cut short or altered: its size or SHA-256 is not the recorded one; "
            "use another copy"
        )


def _check_layers(settings: Mapping[str, Any], count: int) -> None:
    """Refuse a claim of more layers than there are tensors before so many modules are made."""
    trunk = settings.get("trunk", settings)
    layers = trunk.get("num_layers", 0) if isinstance(trunk, Mapping) else 0
    if isinstance(layers, int) and layers > count:
        raise ValueError(f"num_layers must be at most the number of tensors, {count}, got {layers}")


def _fill(model: Model, path: Path, tensors: dict[str, Tensor]) -> None:
    """Give the model the tensors of `path`; modules may know the names that they had in earlier versions."""
    faults = misfits(model.state_dict(), tensors)
    if not faults["of another shape"]:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        faults = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    if text := describe(faults):
        raise ValueError(f"load_checkpoint: the tensors in {path} do not fit its config; {text}")
