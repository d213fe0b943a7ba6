"""Checkpoints: a directory with model.safetensors and config.json <-> a model. The one home of safetensors.

Writing is atomic: whatever happens, and whenever, the directory's name leads to one whole checkpoint, the
old or the new.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from minrnn.models.decision import DecisionConfig, DecisionModel
from minrnn.models.sequence import ModelConfig, SequenceModel

Model = SequenceModel | DecisionModel

KINDS: dict[str, Callable[[Mapping[str, Any]], Model]] = {
    "sequence": lambda values: SequenceModel(ModelConfig.from_dict(values)),
    "decision": lambda values: DecisionModel(DecisionConfig.from_dict(values)),
}
"""What makes a model of each kind from a checkpoint's settings; where no kind is named, it is sequence."""

FORMAT_VERSION = 1
"""Raised when a checkpoint of an older version of the package could not be read as it is."""

CONFIG_FILE = "config.json"
TENSORS_FILE = "model.safetensors"

JSON = None | bool | int | float | str | list[Any] | dict[str, Any]


def save_checkpoint(directory: Path, model: Model, *, extra: Mapping[str, JSON] | None = None) -> None:
    """Write a model as a directory, in place of what is there only once the new one is whole.

    Args:
        directory: made, or replaced as a whole.
        model: what to save: its config and tensors.
        extra: kept beside the config and returned by `load_checkpoint`.

    Raises:
        OSError: the directory cannot be written, or is no checkpoint; what was there before is untouched.
        TypeError: `extra` does not fit into JSON.
    """
    with write_directory(directory) as folder:
        write_model(folder, model, extra=extra)


def load_checkpoint(directory: Path, *, device: torch.device | str = "cpu") -> tuple[Model, dict[str, JSON]]:
    """Read a model that `save_checkpoint` wrote; if it is replaced meanwhile, read the new one instead.

    Args:
        directory: where it lies.
        device: where the model's parameters go.

    Returns:
        The model, in training mode as any new module, and `extra`.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is cut short or altered, written by a newer version, or does not fit its config.
    """
    while True:
        before = _locate(directory)
        try:
            loaded = _load(before[0], device)
        except (FileNotFoundError, ValueError):  # of a mixture of the old files and the new, perhaps
            if _locate(directory) == before:
                raise
        else:
            if _locate(directory) == before:
                return loaded


def _load(folder: Path, device: torch.device | str) -> tuple[Model, dict[str, JSON]]:
    config = _read_config(folder / CONFIG_FILE)
    _check_integrity(folder / TENSORS_FILE, config["files"])
    with torch.device("meta"):  # no memory and no random numbers for values that are replaced below
        model = KINDS[config["kind"]](config["model"])
    tensors = load_tensors(folder / TENSORS_FILE, device=device)
    tensors = {_today(name): tensor for name, tensor in tensors.items()}
    _check_fit(folder / TENSORS_FILE, model, tensors)
    model.load_state_dict(tensors, assign=True)
    return model, config["extra"]


def _today(name: str) -> str:
    """The name of a tensor, which may have had another in an earlier version."""
    return re.sub(r"\bdt_proj\.bias$", "dt_bias", name)


def write_model(folder: Path, model: Model, *, extra: Mapping[str, JSON] | None = None) -> None:
    """Write a checkpoint's files into a folder that is there; in `write_directory`, beside other files."""
    config: dict[str, JSON] = {
        "format_version": FORMAT_VERSION,
        "kind": "decision" if isinstance(model, DecisionModel) else "sequence",
        "model": model.config.to_dict(),
        "extra": dict(extra or {}),
    }
    json.dumps(config)  # before the work, so that an `extra` that is no JSON is reported first
    path = folder / TENSORS_FILE
    save_tensors(path, model.state_dict())
    config["files"] = {TENSORS_FILE: {"bytes": path.stat().st_size, "sha256": _sha256(path)}}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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


def load_tensors(path: Path, *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what `save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole safetensors file.
    """
    try:
        tensors = safetensors.torch.load_file(path, device=str(device))
    except safetensors.SafetensorError as error:
        raise ValueError(f"load_tensors: {path} is not a whole safetensors file ({error})") from error
    # Copies: the library maps the file, where tensors lie at odd addresses; matrix products may round
    # differently there, and a resumed run must repeat the run that was not interrupted bit for bit.
    return {name: tensor.clone() for name, tensor in tensors.items()}


@contextmanager
def write_directory(directory: Path) -> Iterator[Path]:
    """Fill a new directory and put it in place of `directory` at once, if and only if the body succeeds.

        with write_directory(path) as folder:
            (folder / "a.txt").write_text("...")

    The files are written to disk before the names change. If the body fails, the folder is removed and what
    was there before stays. A process killed at any point leaves `directory` whole, or, between two renames,
    the old one under the name that `find_directory` looks for; the next write clears up.

    Args:
        directory: the final name; its parents are made.

    Yields:
        The folder to write into, beside `directory`.

    Raises:
        OSError: writing failed (the disk is full, say), or `directory` is something else than a checkpoint:
            not a directory, or one that is not empty and has no config.json.
    """
    directory = Path(directory)
    folder, aside = _sibling(directory, "partial"), _sibling(directory, "previous")
    try:
        _check_replaceable(directory)
        _clear_up(directory, folder, aside)
        folder.mkdir(parents=True)
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        _swap(directory, folder, aside)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"could not write the checkpoint {directory} ({reason}); nothing that was there before is lost",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_directory(directory: Path) -> Path:
    """Return where the content of `directory` lies: there, or aside where a killed write has left it.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    directory = Path(directory)
    # The first name once more: between the first two looks, a write that is under way may have finished.
    for candidate in (directory, _sibling(directory, "previous"), directory):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(errno.ENOENT, "no checkpoint directory", str(directory))


def _sibling(directory: Path, role: str) -> Path:
    # A fixed name, so that the next write finds what a killed one has left.
    return directory.absolute().with_name(f".{directory.absolute().name}.{role}")


def _locate(directory: Path) -> tuple[Path, int, int]:
    """Find the directory, with what tells it from another that has taken its name."""
    while True:
        folder = find_directory(directory)
        try:
            status = folder.stat()
        except FileNotFoundError:  # renamed just now
            continue
        return folder, status.st_ino, status.st_mtime_ns


def _check_replaceable(directory: Path) -> None:
    """Refuse to remove what is no checkpoint: a mistyped name must not cost a folder of other things."""
    if directory.is_dir():
        names = {path.name for path in directory.iterdir()}
        replaceable = not names or CONFIG_FILE in names
    else:
        replaceable = not directory.exists()
    if not replaceable:
        raise FileExistsError(errno.EEXIST, "there is something else than a checkpoint", str(directory))


def _clear_up(directory: Path, folder: Path, aside: Path) -> None:
    """Finish what a killed write has left."""
    if folder.exists():
        shutil.rmtree(folder)
    if aside.exists() and directory.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        aside.rename(directory)


def _swap(directory: Path, folder: Path, aside: Path) -> None:
    """Put the folder in the directory's place; the old steps aside, as nothing is renamed onto a full one."""
    had_one = directory.exists()
    if had_one:
        directory.rename(aside)
    try:
        folder.rename(directory)
    except OSError:
        if had_one:
            aside.rename(directory)
        raise
    _flush(directory.absolute().parent)
    shutil.rmtree(
        aside, ignore_errors=True
    )  # the new one is in place; what is left here, the next write clears


def _flush(path: Path) -> None:
    """Have the system write a file, or a directory's names, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors are both
        raise ValueError(f"load_checkpoint: {path} is no JSON ({error}); use another copy") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"load_checkpoint: {path} names no format_version; it is no checkpoint of minrnn")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"load_checkpoint: {path} has format version {version}, and this minrnn reads up to "
            f"{FORMAT_VERSION}; upgrade minrnn"
        )
    for key in ("model", "files", "extra"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"load_checkpoint: {path} has no {key!r}; use another copy")
    if config.setdefault("kind", "sequence") not in KINDS:
        raise ValueError(
            f"load_checkpoint: {path} must be of a model among {', '.join(KINDS)}, got {config['kind']!r}; "
            "upgrade minrnn"
        )
    return config


def _check_integrity(path: Path, files: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "the checkpoint lacks its tensors", str(path))
    recorded = files.get(TENSORS_FILE)
    if recorded != {"bytes": path.stat().st_size, "sha256": _sha256(path)}:
        raise ValueError(
            f"load_checkpoint: {path} was cut short or altered: its size or SHA-256 is not the recorded one; "
            "use another copy"
        )


def _check_fit(path: Path, model: Model, tensors: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    misshaped = [
        f"{name} ({tuple(expected[name].shape)} expected, got {tuple(tensors[name].shape)})"
        for name in sorted(expected.keys() & tensors.keys())
        if expected[name].shape != tensors[name].shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
    if found:
        raise ValueError(f"load_checkpoint: the tensors in {path} do not fit its config; {found}")
