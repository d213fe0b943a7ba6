"""Every reader, given files that are almost right: it returns a value, or says in one line what is wrong.

Each target writes a whole file, or a folder of them. A mutant is a function of the target and its number
alone: bytes are flipped, cut, moved, overwritten, or another file's; values of JSON, TOML, HDF5 and .npz are
removed, renamed, swapped, nested, or of another type or size. The reader works in a child process with a
bound on its memory and its time, so that a crash, a hang or a giant allocation is a failure like any other.

`MINRNN_MUTANTS` says how many there are of each target, 1,000 by default.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console

from minrnn.cli.main import main
from minrnn.demonstrations import history as histories
from minrnn.demonstrations import record as recording
from minrnn.demonstrations.behavior import Behavior
from minrnn.experiments.experiment import Record
from minrnn.experiments.results import ResultsFolder
from minrnn.models import checkpoint, load_checkpoint
from minrnn.tasks import ListOpsConfig, SelectiveCopyingConfig, TextConfig
from minrnn.tasks.arrays import write_arrays
from minrnn.tasks.listops import ListOpsTask
from minrnn.tasks.recordings import read_episodes
from minrnn.tasks.sources import find_corpus
from minrnn.tasks.tokens import tokenize
from minrnn.training import RunConfig, RunLog, load_recipe, load_trained, read_config, train
from minrnn.training.log import read_metrics

h5py = pytest.importorskip("h5py", reason="h5py is not installed: the extra rl")

MUTANTS = int(os.environ.get("MINRNN_MUTANTS", "1000"))
SECONDS = 10  # for one mutant; the whole files take milliseconds
MEMORY = 2 << 30  # bytes beside what the process has; the whole files take megabytes
SHOWN = 10  # failures in a message

Mutate = Callable[[random.Random, Path], None]


class Target(NamedTuple):
    """A reader and what it reads."""

    write: Callable[[Path], None]
    """Writes the whole files into a folder."""
    mutate: Mutate
    """Changes one of them."""
    read: Callable[[Path], object]
    """Reads them; for whole files it must succeed."""


# --- mutants of bytes ------------------------------------------------------------------------------------

NUMBERS = (
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\0" * 8,
    struct.pack("<q", 10**12),
    struct.pack("<q", -1),
    b"\1",
)


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Return bytes like these, with one to three changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(len(changed) + 1)
        size = draw.choice((1, 2, 8, 64, 1024))
        match draw.randrange(9):
            case 0 | 1:
                for _ in range(draw.choice((1, 1, 4, 32))):
                    if changed:
                        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = b"\0" * size
            case 4:
                del changed[at : at + size]
            case 5:
                changed[at:at] = changed[at : at + size]
            case 6:
                number = draw.choice(NUMBERS)
                changed[at : at + len(number)] = number
            case 7:
                there = draw.randrange(len(changed) + 1)
                changed[at : at + size], changed[there : there + size] = (
                    changed[there : there + size],
                    changed[at : at + size],
                )
            case 8:
                changed = bytearray(draw.choice(OTHER_FILES)) if draw.random() < 0.3 else changed[at:]
    return bytes(changed)


OTHER_FILES = (
    b"",
    b"\0" * 4096,
    b"[]",
    b"{}",
    b"null",
    b"PK\x03\x04" + b"\0" * 40,
    b"\x89HDF\r\n\x1a\n" + b"\xff" * 64,
    pickle.dumps({"a": 1}),
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"steps = 1\n[train]\n",
    struct.pack("<Q", 10**18) + b'{"a":{}}',
    b"\xff\xfe{\0}\0",
    "nicht aus Zahlen: äöü\n".encode("latin-1"),
)


def bytes_of(*names: str) -> Mutate:
    """Change the bytes of one of these files."""

    def mutate(draw: random.Random, folder: Path) -> None:
        path = folder / draw.choice(names)
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))

    return mutate


# --- mutants of values -----------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 10**7, 10**12, 10**30, -(10**30), 1 << 63, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "\0", "1", "../..", "/etc/passwd", "\ud800", "a" * 5000, "[1]", [], {}, [1],
    [None], [[1]], {"a": 1}, {"": None}, {"name": "text"}, [[]] * 3, deep(50), deep(500),
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container within a value, with every key or index in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(items):
        yield value, key
        yield from places(each)


def mutate_value(draw: random.Random, value: Any) -> Any:
    """Return a value like this of JSON, with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found or draw.random() < 0.02:
            return draw.choice(VALUES)
        inside, key = draw.choice(found)
        match draw.randrange(6):
            case 0:
                del inside[key]
            case 1 if isinstance(inside, dict):
                inside[key + draw.choice(("x", " ", "\0", ""))] = inside.pop(key)
            case 2:
                other, there = draw.choice(found)
                inside[key] = copy.deepcopy(other[there])
            case 3 if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
                inside[key] = draw.choice(
                    (-inside[key], inside[key] * 10**6, inside[key] + 1, float(inside[key]))
                )
            case _:
                inside[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def mutate_json(draw: random.Random, text: bytes) -> bytes:
    """Change a file of JSON: its values, mostly."""
    if draw.random() < 0.3:
        return mutate_bytes(draw, text)
    changed = json.dumps(mutate_value(draw, json.loads(text)))
    if draw.random() < 0.1 and changed.startswith('{"'):  # a key that is there twice
        changed = changed[:-1] + f", {json.dumps(draw.choice(list(json.loads(text))))}: 1}}"
    return changed.encode()


def json_of(*names: str) -> Mutate:
    """Change one of these files of JSON."""

    def mutate(draw: random.Random, folder: Path) -> None:
        path = folder / draw.choice(names)
        path.write_bytes(mutate_json(draw, path.read_bytes()))

    return mutate


def json_lines(draw: random.Random, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if draw.random() < 0.2:
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        return
    at = draw.randrange(len(lines))
    lines[at] = mutate_json(draw, lines[at]) + draw.choice((b"\n", b"\n", b"\r\n", b""))
    path.write_bytes(b"".join(lines))


def to_toml(value: Any) -> str:
    """Write a value as inline TOML; what TOML has no word for as text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {to_toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(str(value), repr(value))
    return '"none"' if value is None else json.dumps(value)


def toml(draw: random.Random, folder: Path) -> None:
    path = folder / "recipe.toml"
    if draw.random() < 0.3:
        path.write_bytes(mutate_bytes(draw, path.read_bytes()))
        return
    lines = toml_lines(mutate_value(draw, RECIPE))
    if draw.random() < 0.1:
        lines.append(draw.choice(lines or ["x"]))  # a key that is there twice
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")


def toml_lines(values: Any) -> list[str]:
    if not isinstance(values, dict):
        return [to_toml(values)]
    return [f"{json.dumps(name)} = {to_toml(each)}" for name, each in values.items()]


def write_recipe(folder: Path) -> None:
    (folder / "recipe.toml").write_text("\n".join(toml_lines(RECIPE)))


# --- targets ---------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {
    "recipe": "custom",
    "model": {"d_model": 16, "num_layers": 1, "mixer": "minlstm", "dropout": 0.1, "normalize": True},
    "task": {"name": "text", "source": "python", "window": 32, "vocabulary": "bytes", "held_out": 0.1},
    "train": {"steps": 10, "learning_rate": 0.001, "optimizer": "muon", "carry_state": True, "seed": 3},
}


def write_config(folder: Path) -> None:
    tasks = (TextConfig(), SelectiveCopyingConfig(), ListOpsConfig())
    for number, task in enumerate(tasks):
        (folder / str(number)).mkdir()
        (folder / str(number) / "config.json").write_text(json.dumps(RunConfig(task=task).to_dict()))


TEXT = "a text of some letters, and of more than one line;\n" * 8
TRAIN = (
    "--task.vocabulary characters --task.window 8 --model.d-model 4 --model.num-layers 1 --train.steps 3 "
    "--train.warmup-steps 1 --train.batch-size 2 --train.carry-state --train.log-every 1 --train.device cpu"
)


def write_run(folder: Path) -> None:
    """Train a little, on a text beside the mutants."""
    os.environ["MINRNN_CACHE"] = str(folder.parent / "cache")
    (folder.parent / "text.txt").write_text(TEXT)
    source = ["--task.source", str(folder.parent / "text.txt")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "demo", "--run", str(folder / "run"), *source, *TRAIN.split()]) == 0
    for name in ("checkpoints/best", "tensorboard", "loss.png"):  # nobody reads them here
        path = folder / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_run(folder: Path) -> object:
    """Go on with the run, which has nothing left to train, but is measured once more."""
    console = Console(file=io.StringIO())
    return train(read_config(folder / "run"), folder / "run", resume=True, log=RunLog(console))


def sign(folder: Path) -> None:
    """Make sizes and digests those of the files that are there, so that what reads the files is reached."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        for name in config["files"]:
            content = (folder / name).read_bytes()
            config["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if "sha256" in config:
            config["sha256"] = checkpoint._digest(config)
        path.write_text(json.dumps(config))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        pass  # not even JSON: nothing to sign


def signed(mutate: Mutate, share: float = 0.9) -> Mutate:
    def mutate_and_sign(draw: random.Random, folder: Path) -> None:
        last = folder / "run" / "checkpoints" / "last"
        mutate(draw, last)
        if draw.random() < share:
            sign(last)

    return mutate_and_sign


def one_of(*mutations: Mutate) -> Mutate:
    return lambda draw, folder: draw.choice(mutations)(draw, folder)


def tensors(name: str) -> Mutate:
    """Change a safetensors file: its bytes, or the values of its header."""

    def mutate(draw: random.Random, folder: Path) -> None:
        path = folder / name
        data = path.read_bytes()
        if draw.random() < 0.4:
            path.write_bytes(mutate_bytes(draw, data))
            return
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(mutate_value(draw, json.loads(data[8 : 8 + size]))).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])

    return mutate


def part_of_config(*keys: str) -> Mutate:
    """Change what lies at a place of a checkpoint's config.json."""

    def mutate(draw: random.Random, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_bytes())
        inside = config
        for key in keys[:-1]:
            inside = inside[key]
        inside[keys[-1]] = mutate_value(draw, inside[keys[-1]])
        (folder / "config.json").write_text(json.dumps(config))

    return mutate


def write_text(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    read_text(folder)


def read_text(folder: Path) -> object:
    os.environ["MINRNN_CACHE"] = str(folder / "cache")
    corpus = tokenize(find_corpus(str(folder / "text.txt"), is_joined=True), "characters")
    assert corpus.vocabulary.decode(np.concatenate([corpus.train, corpus.val])) == TEXT
    return corpus


def cached_file(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(path for path in (folder / "cache").rglob("*") if path.is_file()))
    mutate = mutate_json if path.suffix == ".json" else mutate_bytes
    path.write_bytes(mutate(draw, path.read_bytes()))


LISTOPS = ListOpsConfig(max_length=20, min_length=2, max_depth=3, num_train=20, num_validation=5, num_test=5)


def read_listops(folder: Path) -> object:
    os.environ["MINRNN_CACHE"] = str(folder / "cache")
    task = ListOpsTask(LISTOPS)
    assert task.sha256 == "" or len(task.sha256) == 64
    return task.batch(0, 2, 0)


def write_hdf5(path: Path, fields: dict[str, Any], **settings: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, values in fields.items():
            file.create_dataset(name, data=values, chunks=True, **settings)
        file.attrs["environment"] = "Pendulum-v1"
        file.attrs["about"] = json.dumps({"source": "local", "name": "local/made-up"})


def write_d4rl(folder: Path) -> None:
    N = 40
    draws, last = np.random.default_rng(0), np.arange(1, N + 1) % 8 == 0
    fields = {
        "observations": draws.normal(size=(N, 3)),
        "next_observations": draws.normal(size=(N, 3)),
        "actions": draws.uniform(-1, 1, (N, 1)).astype(np.float32),
        "rewards": draws.normal(size=N),
        "terminals": last,
        "timeouts": ~last & False,
    }
    write_hdf5(folder / "data.hdf5", fields, compression="gzip")


def write_minari(folder: Path) -> None:
    draws = np.random.default_rng(0)
    fields: dict[str, Any] = {}
    for episode in range(3):
        group = f"episode_{episode}"
        fields[f"{group}/observations"] = draws.normal(size=(5, 3))
        fields[f"{group}/actions"] = draws.integers(0, 2, 4)
        fields[f"{group}/rewards"] = draws.normal(size=4)
        fields[f"{group}/terminations"] = np.arange(4) == 3
        fields[f"{group}/truncations"] = np.zeros(4, bool)
    (folder / "data").mkdir()
    write_hdf5(folder / "data" / "main_data.hdf5", fields)
    space = {"type": "Discrete", "dtype": "int64", "start": 0, "n": 2}
    spec = {"id": "CartPole-v1", "entry_point": "gymnasium:none", "kwargs": {}}
    metadata = {
        "dataset_id": "a/b-v0", "algorithm_name": "none", "total_steps": 12, "env_spec": json.dumps(spec),
        "action_space": json.dumps(space), "observation_space": "{}",
    }  # fmt: skip
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))


KINDS = ("f2", "f4", "f8", "i1", "u8", "i8", "c8", "S3", "?")
SHAPES = ((), (0,), (1,), (4,), (40,), (40, 1), (40, 3), (3, 40), (40, 0), (40, 1, 1), (1, 1, 1, 1, 1))


def array(draw: random.Random) -> np.ndarray:
    """Return an array of any type and shape, of numbers that are not always finite."""
    made = np.zeros(draw.choice(SHAPES), "f8")
    made[...] = draw.choice((0, 1, -1, 1e300, np.nan, np.inf, 0.5, 10**12))
    with np.errstate(all="ignore"):
        return made.astype(draw.choice(KINDS))


def values_of_hdf5(name: str) -> Mutate:
    """Replace, remove, move or link a field or an attribute of an HDF5 file."""

    def mutate(draw: random.Random, folder: Path) -> None:
        with h5py.File(folder / name, "a") as file:
            found: list[str] = []
            file.visit(found.append)
            place, other = draw.choice(found), draw.choice(found)
            match draw.randrange(7):
                case 0:
                    file.attrs[draw.choice(("about", "environment", "x"))] = draw.choice(
                        ("", "{}", "[]", "{", '{"num_actions": -1}', '{"name": 3}', 3, 0.5, np.zeros(3),
                         b"\xff", h5py.Empty("f4"), json.dumps(mutate_value(draw, {"num_actions": 2})))
                    )  # fmt: skip
                case 1:
                    del file[place]
                case 2 if not place.startswith(other):
                    file.move(place, f"{place}x")
                case 3:
                    del file[place]
                    kinds = (h5py.SoftLink("/" + other), h5py.ExternalLink("data.hdf5", "/" + other))
                    file[place] = draw.choice(kinds)
                case 4:
                    del file[place]
                    shape = draw.choice((*SHAPES[1:], (10**12,), (10**9, 3), (2, 1 << 40)))
                    chunks = None if 0 in shape else (1,) * len(shape)
                    file.create_dataset(place, shape, draw.choice(KINDS), chunks=chunks)
                case _:
                    del file[place]
                    file[place] = array(draw)

    return mutate


def write_history(folder: Path) -> None:
    draws = np.random.default_rng(0)
    made = histories.History()
    for _ in range(3):
        made.behaviors.append(
            Behavior(draws.normal(size=9), (2, 2, 1), *draws.random((2, 2)), draws.random(1))
        )
        made.steps.append(made.total_steps + 100)
        made.returns.append(1.0)
        made.state = {"weights": draws.normal(size=4), "count": np.array(3.0)}
    made.save(folder / "history.npz")


def write_part(folder: Path) -> None:
    rows, ends = np.zeros((6, 3), np.float32), np.array([2, 6])
    part = recording.Recording(rows, rows[:, :1], rows[:, 0], rows, np.array([True, False]), ends)
    write_arrays(folder / "part.npz", part._asdict())


def values_of_arrays(name: str) -> Mutate:
    """Replace, remove or rename an array of an .npz file; objects are pickled, and compression is allowed."""

    def mutate(draw: random.Random, folder: Path) -> None:
        with np.load(folder / name) as file:
            arrays: dict[str, Any] = dict(file)
        place = draw.choice(list(arrays))
        match draw.randrange(4):
            case 0:
                del arrays[place]
            case 1:
                arrays[f"{place}x"] = arrays.pop(place)
            case 2:
                arrays[place] = np.array([{"a": 1}, None], object)
            case _:
                arrays[place] = array(draw)
        (np.savez if draw.random() < 0.5 else np.savez_compressed)(folder / name, **arrays)

    return mutate


def write_cells(folder: Path) -> None:
    cells = folder / "made-up-small" / "cells"
    cells.mkdir(parents=True)
    record = {
        "format": 1, "experiment": "made-up", "scale": "small", "cell": "a",
        "setting": {"mixer": "mingru", "seed": 0}, "config": RunConfig().to_dict(), "seconds": 1.5,
        "result": {"val_loss": 1.5, "accuracy": 0.5, "step": 3},
        "command": "minrnn reproduce", "device": "cpu", "machine": {"cpu": "x"}, "versions": {"torch": "2"},
        "commit": None, "failed": None,
    }  # fmt: skip
    (cells / "a.json").write_text(json.dumps(record))


def read_cells(folder: Path) -> list[Record]:
    return ResultsFolder(folder, "made-up", "small").records()


def write_metrics(folder: Path) -> None:
    lines = [{"step": step, "loss": 1.0 / step, "seconds": 0.1} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


TARGETS = {
    "run configurations": Target(
        write_config,
        json_of("0/config.json", "1/config.json", "2/config.json"),
        lambda folder: [read_config(folder / str(number)) for number in range(3)],
    ),
    "recipes": Target(write_recipe, toml, lambda folder: load_recipe(str(folder / "recipe.toml"))),
    "checkpoints": Target(
        write_run,
        signed(one_of(json_of("config.json"), part_of_config("model"), tensors("model.safetensors"))),
        lambda folder: load_checkpoint(folder / "run" / "checkpoints" / "last"),
    ),
    "vocabularies": Target(
        write_run,
        signed(one_of(part_of_config("extra"), part_of_config("extra", "vocabulary")), share=1.0),
        lambda folder: load_trained(folder / "run", "last", torch.device("cpu")),
    ),
    "trainer files": Target(
        write_run, signed(one_of(json_of("trainer.json"), tensors("trainer.safetensors"))), read_run
    ),
    "token caches": Target(write_text, cached_file, read_text),
    "listops caches": Target(read_listops, cached_file, read_listops),
    "hdf5": Target(
        write_d4rl,
        one_of(bytes_of("data.hdf5"), bytes_of("data.hdf5"), values_of_hdf5("data.hdf5")),
        lambda folder: read_episodes(folder / "data.hdf5"),
    ),
    "minari": Target(
        write_minari,
        one_of(
            bytes_of("data/main_data.hdf5"),
            json_of("data/metadata.json"),
            values_of_hdf5("data/main_data.hdf5"),
        ),
        lambda folder: read_episodes(folder),
    ),
    "cells": Target(write_cells, json_of("made-up-small/cells/a.json"), read_cells),
    "metrics": Target(write_metrics, json_lines, lambda folder: read_metrics(folder / "metrics.jsonl")),
    "histories": Target(
        write_history,
        one_of(bytes_of("history.npz"), values_of_arrays("history.npz")),
        lambda folder: histories.read_history(folder / "history.npz"),
    ),
    "recorded parts": Target(
        write_part,
        one_of(bytes_of("part.npz"), values_of_arrays("part.npz")),
        lambda folder: recording._read_part(folder / "part.npz"),
    ),
}


# --- the children that read ------------------------------------------------------------------------------


def fault(target: Target, folder: Path) -> str:
    """Read a mutant; return what is wrong with how it was read, or nothing."""
    try:
        target.read(folder)
    except (ValueError, OSError) as error:
        said = f"{error} {getattr(error, 'filename', '')}"
        if "\n" in str(error):
            return f"several lines: {error!r}"
        if "more than fits into memory" in said:
            return f"out of memory: {said}"
        if not any(path.name in said for path in (folder, *folder.rglob("*"))):
            return f"names no file: {error!r}"
        if len(said) > LONGEST:
            return f"{len(said)} characters: {said[:200]!r}"
    except BaseException as error:  # the point of it all: whatever it is, it is not one line
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


LONGEST = 4000  # characters of a message


def read_mutants(name: str, folder: Path, first: int, pipe: int) -> None:
    """Make and read the mutants from one on; tell of each as it begins, and of each that went wrong."""
    target = TARGETS[name]
    with Path("/proc/self/statm").open() as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.modules |= dict.fromkeys(("matplotlib", "torch.utils.tensorboard"))  # pictures take seconds
    os.environ["PATH"] = ""  # and git, which is asked for the commit, milliseconds
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends even what is stuck in a library
    for number in range(first, MUTANTS):
        os.write(pipe, f"{number}\n".encode())
        signal.alarm(SECONDS)
        mutant = folder / "mutant"
        shutil.rmtree(mutant, ignore_errors=True)
        shutil.copytree(folder / "whole", mutant)
        draw = random.Random(f"{name} {number}")
        try:
            target.mutate(draw, mutant)
        except Exception:  # a change that cannot be made, such as of what another one has removed
            continue
        if found := fault(target, mutant):
            os.write(pipe, f"{number} {' '.join(found.split())[:1000]}\n".encode())
    signal.alarm(0)


def faults(name: str, folder: Path) -> list[str]:
    """Read all mutants of a target; where a child dies, say of what, and go on behind it with another."""
    found, first = [], 0
    while first < MUTANTS and len(found) < SHOWN:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(ours)
                read_mutants(name, folder, first, theirs)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(theirs)
        with open(ours, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
            for line in pipe:
                if len(found) >= SHOWN:
                    os.kill(child, signal.SIGKILL)
                    break
                number, _, said = line.rstrip("\n").partition(" ")
                first = int(number) + 1
                found += [f"mutant {number}: {said}"] if said else []
        _, status = os.waitpid(child, 0)
        if len(found) >= SHOWN:
            break
        if os.WIFSIGNALED(status):
            died = signal.Signals(os.WTERMSIG(status)).name
            found.append(f"mutant {first - 1}: the reader died of {died}")
        elif os.WEXITSTATUS(status):
            found.append(f"mutant {first - 1}: the child failed")
    return found


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as threads do not survive a fork; and nothing of the user's."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="children, and bounds on them, are as Linux has them")
@pytest.mark.parametrize("name", TARGETS)
def test_every_mutant_is_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    TARGETS[name].write(whole)
    shutil.copytree(whole, tmp_path / "mutant")
    TARGETS[name].read(tmp_path / "mutant")
    found = faults(name, tmp_path)
    assert not found, "\n".join([f"{name}: {len(found)} and perhaps more", *found])
