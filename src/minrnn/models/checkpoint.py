"""Checkpoints: save a model to, and load it from, a directory with model.safetensors and config.json.

Writing is atomic: after an interruption at any time, the directory holds either the old checkpoint or the new
one, complete.
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
from torch.overrides import TorchFunctionMode

from minrnn.files import (
    check_kind,
    convert,
    find_directory,
    locate,
    naming,
    nearest,
    read_json,
    shown,
    write_directory,
)
from minrnn.files.writing import CONFIG_FILE
from minrnn.models.decision import DecisionConfig, DecisionModel
from minrnn.models.pretrained import is_pretrained, own_names, read_settings, read_table
from minrnn.models.rebuilding import describe, misfits, tensors_to_keep, unwrap
from minrnn.models.sequence import ModelConfig, SequenceModel
from minrnn.models.shards import gathered, is_first, is_sharded

Model = SequenceModel | DecisionModel
"""What a checkpoint can hold."""

KINDS: dict[str, Callable[[Mapping[str, Any]], Model]] = {
    "sequence": lambda values: SequenceModel(ModelConfig.from_dict(values)),
    "decision": lambda values: DecisionModel(DecisionConfig.from_dict(values)),
}
"""The builder of each kind of model from a checkpoint's settings; without a kind, it is a sequence model."""

FORMAT_VERSION = 2
"""Incremented when older versions of minrnn cannot read or verify newer checkpoints. Since format 2,
config.json lists every file of the checkpoint and holds a digest of itself. Format 1, which listed the
model's tensors only, can still be read."""

TENSORS_FILE = "model.safetensors"

CPU = torch.device("cpu")

LONGEST = 200
"""Most characters of the library's message that an error repeats."""

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]


def save_checkpoint(
    directory: Path | str,
    model: Model,
    *,
    extra: Mapping[str, JSON] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Save a model as a directory; an existing checkpoint is replaced when the new one is complete.

    Where torch's `fully_shard` has divided weights over ranks, all of them call this function. The first one
    writes, one tensor after the other; no rank ever holds the whole model.

    Args:
        directory: the directory to create or replace.
        model: the model, whose config and tensors are saved. Wrappers such as those of torch.compile and
            DistributedDataParallel are removed.
        extra: JSON values saved beside the config, which `load_checkpoint` returns.
        files: names and texts of further files, which config.json lists with their digests.

    Raises:
        OSError: the directory cannot be written, or is not a checkpoint; it is left unchanged.
        TypeError: `model` is not a SequenceModel or DecisionModel, or `extra` is not JSON.
        ValueError: the model differs from what its config builds, so that it could not be loaded: modules or
            methods were replaced, or modules were parametrized, pruned or quantized. Hooks are not saved, as
            in a state_dict.
    """
    contents = _Contents(model, extra)  # before anything is written: it checks that the model can be loaded
    if not is_first(contents.tensors.values()):
        send_tensors(contents.tensors)
        return
    with write_directory(Path(directory).expanduser()) as folder:
        write_texts(folder, files or {})
        contents.write(folder)


def load_checkpoint(
    directory: Path | str, *, device: torch.device | str | int = "cpu"
) -> tuple[Model, dict[str, JSON]]:
    """Load a model that `save_checkpoint` wrote. If it is replaced meanwhile, the new one is loaded.

    Args:
        directory: the checkpoint, or a directory that `minrnn export` wrote for transformers, or
            transformers' `save_pretrained` for its model.
        device: device of the model's parameters; on meta they have no values.

    Returns:
        The model, in training mode like any new module, and `extra`.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is truncated or altered, written by a newer version, or does not match its config.
        TypeError: device is not a device of torch.
    """
    device = _read_device(device)
    directory = Path(directory).expanduser()
    while True:
        before = locate(directory)
        try:
            loaded = _load(before[0], device)
        except (FileNotFoundError, ValueError):  # perhaps a mixture of old and new files
            if locate(directory) == before:
                raise
        else:
            if locate(directory) == before:
                return loaded


def map_checkpoint(directory: Path) -> tuple[Model, dict[str, JSON]]:
    """As `load_checkpoint`, for copying: tensors lie in the file and are read when they are used."""
    return _load(find_directory(directory), CPU, is_mapped=True)


def _read_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise TypeError(
            f"load_checkpoint: device must be one of torch's, got {device!r} ({reason})"
        ) from error


def _load(folder: Path, device: torch.device, *, is_mapped: bool = False) -> tuple[Model, dict[str, JSON]]:
    config = _read_config(folder / CONFIG_FILE)
    path = folder / TENSORS_FILE
    _check_integrity(path, config["files"])
    tensors = map_tensors(path) if is_mapped else load_tensors(path, device=device)
    if config["files"] is None:
        tensors = own_names(tensors)
    with naming(f"load_checkpoint: {folder / CONFIG_FILE}"):
        _check_layers(config["model"], len(tensors))
        model = _build(config)
    _fill(model, path, tensors)
    return model, config["extra"]


def write_texts(folder: Path, files: Mapping[str, str]) -> None:
    """Write text files into a new checkpoint, before `write_model`."""
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def write_model(folder: Path, model: Model, *, extra: Mapping[str, JSON] | None = None) -> None:
    """Write a checkpoint's files into an existing folder, inside `write_directory`.

    Files that are already there become part of the checkpoint: they are listed with their sizes and digests.
    """
    _Contents(model, extra).write(folder)


def send_model(model: nn.Module) -> None:
    """Take part in a `write_model` of the first of the ranks over which the model's weights are divided."""
    send_tensors(_Contents(model, None).tensors)


class _Contents:
    """The contents of a new checkpoint."""

    def __init__(self, model: nn.Module, extra: Mapping[str, JSON] | None) -> None:
        check_kind("save_checkpoint", "model", model, nn.Module)
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
    """Return `extra` after checking that it survives JSON; called first, so that errors come early."""
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
    """Raise if a dict at any depth has a key that is not a string: JSON would convert it to one."""
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
    """Build the model of a config on the meta device, without allocating or drawing initial values."""
    with torch.device("meta"), _Uninitialized():
        return KINDS[config["kind"]](config["model"])


class _Uninitialized(TorchFunctionMode):
    """A context in which functions of torch.nn.init leave tensors as they are.

    To draw normal values on the meta device, torch imports its compiler, which takes seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file.

    Tensors that are divided over ranks are gathered one after the other; the other ranks call `send_tensors`
    with theirs.

    Raises:
        OSError: the file cannot be written.
    """
    if any(map(is_sharded, tensors.values())):
        _stream_tensors(path, tensors)
        return
    packed = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(packed, path)
    except safetensors.SafetensorError as error:  # the library wraps OSError
        raise OSError(errno.EIO, str(error), str(path)) from error
    make_readable(path)


def send_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Take part in a `save_tensors` of the first of the ranks over which these tensors are divided."""
    for name in _order(tensors):
        gathered(tensors[name])


def _stream_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file tensor by tensor; the library's function takes all of them at once.

    The form: the header's length, 8 bytes; the header, JSON; the numbers, each tensor's where it says.
    """
    header, end = {}, 0
    for name in _order(tensors):
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        form = {"dtype": _code(tensor.dtype), "shape": list(tensor.shape)}
        header[name] = {**form, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            numbers = gathered(tensors[name]).detach().cpu().contiguous()
            file.write(numbers.flatten().view(torch.uint8).numpy().data)


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of their tensors in a file: the widest numbers first, all aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))


def _code(dtype: torch.dtype) -> str:
    """Return the name of a dtype in safetensors, as the library itself writes it."""
    written = safetensors.torch.save({"one": torch.empty(0, dtype=dtype)})
    code: str = json.loads(written[8:])["one"]["dtype"]
    return code


def make_readable(path: Path) -> None:
    """Give a file of tensors the usual permissions: the library creates it for its owner alone."""
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def load_tensors(path: Path, *, device: torch.device = CPU) -> dict[str, Tensor]:
    """Read the named tensors that `save_tensors` wrote.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a complete safetensors file.
    """
    # Copies, because tensors are not aligned in the file. Matrix products may round differently there, and a
    # resumed run must equal the uninterrupted run bit for bit.
    return {name: tensor.to(device, copy=True) for name, tensor in map_tensors(path).items()}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """As `load_tensors`, for copying: tensors lie in the file and are read when they are used."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"load_tensors: {path} is not a whole safetensors file ({str(error)[:LONGEST]})"
        ) from error


def check_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Check further files of a checkpoint, not the model's own, against the listed sizes and digests.

    Args:
        folder: the checkpoint.
        names: names of the files.

    Returns:
        The files that could not be checked, because the checkpoint is of format 1, which did not list them.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not listed, or is truncated or altered.
    """
    config = _read_config(folder / CONFIG_FILE)
    if config["format_version"] == 1:
        return [name for name in names if name not in (config["files"] or {})]
    for name in names:
        _check_integrity(folder / name, config["files"])
    return []


class _File(TypedDict):
    """The entry of a file in config.json."""

    bytes: int
    sha256: str


def _measured(path: Path) -> _File:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(config: Mapping[str, Any]) -> str:
    """Return the digest of the other entries of config.json."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class _Config(TypedDict):
    """The keys of config.json."""

    format_version: int
    kind: NotRequired[str]
    model: dict[str, Any]
    files: dict[str, _File] | None
    """None in a directory of transformers."""
    extra: dict[str, Any]
    sha256: NotRequired[str]


def _read_config(path: Path) -> _Config:
    with naming("load_checkpoint"):
        values = read_json(path, dict[str, Any])
        if is_pretrained(values):
            with naming(path):
                return _read_pretrained(values)
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


def _read_pretrained(values: Mapping[str, Any]) -> _Config:
    return {
        "format_version": FORMAT_VERSION,
        "kind": "sequence",
        "model": read_settings(values),
        "files": None,
        "extra": read_table(values)["extra"],
    }


def _check_integrity(path: Path, files: Mapping[str, _File] | None) -> None:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "the checkpoint lacks this file", str(path))
    if files is not None and files.get(path.name) != _measured(path):
        raise ValueError(
            f"load_checkpoint: {path} was cut short or altered: its size or SHA-256 is not the recorded one; "
            "use another copy"
        )


def _check_layers(settings: Mapping[str, Any], count: int) -> None:
    """Raise if a config claims more layers than there are tensors, before so many modules are built."""
    trunk = settings.get("trunk", settings)
    layers = trunk.get("num_layers", 0) if isinstance(trunk, Mapping) else 0
    if isinstance(layers, int) and layers > count:
        raise ValueError(f"num_layers must be at most the number of tensors, {count}, got {layers}")


def _fill(model: Model, path: Path, tensors: dict[str, Tensor]) -> None:
    """Load the tensors of `path` into the model; modules convert the names of earlier versions."""
    faults = misfits(model.state_dict(), tensors)
    if not faults["of another shape"]:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
        faults = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    if text := describe(faults):
        raise ValueError(f"load_checkpoint: the tensors in {path} do not fit its config; {text}")
