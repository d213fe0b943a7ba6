"""Runs that can be stopped anywhere: what is saved beside the model, and how signals end a run."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minrnn.files import find_directory, write_directory
from minrnn.models import Model, load_checkpoint
from minrnn.models.checkpoint import load_tensors, save_tensors, write_model
from minrnn.tasks import Vocabulary
from minrnn.training.config import RunConfig, read_config

State = Any  # nested tuples of tensors, as a model's state is

# Settings that a resumed run may change: none alters the steps that are done, nor the shape of what is saved.
CHANGEABLE = frozenset(
    {"steps", "eval_every", "eval_tokens", "checkpoint_every", "log_every", "device", "threads"}
)


@dataclass
class TrainState:
    """Where a run is: what its next step needs beside weights, optimisers and random generators."""

    step: int = 0
    """Optimiser steps that are done."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Wall-clock time spent, over all the sessions of the run."""
    best: dict[str, float] = field(default_factory=dict)
    """`step` and metrics of the evaluation with the lowest val_loss; empty before the first."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of metrics.jsonl."""
    grad_norms: list[float] = field(default_factory=list)
    """Norms of the gradients of the same steps."""
    carry: State = None
    """The model's state at the end of the last window, where the run carries it."""


def save_last(
    directory: Path,
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainState,
    extra: Mapping[str, Any],
) -> None:
    """Write the checkpoint that a run resumes from, whole or not at all.

    The directory is a model's checkpoint with two files more: trainer.safetensors (the optimisers' moments,
    the random generators, the carried state) and trainer.json (the rest of `TrainState`).

    Args:
        directory: where to write; a checkpoint that is already there stays until the new one is complete.
        model: the model.
        optimizers: its optimisers, each of its own parameters.
        state: where the run is.
        extra: JSON values saved with the model.

    Raises:
        OSError: it cannot be written (a full disk, say); the previous checkpoint is still there.
    """
    carry: list[Tensor] = []
    scalars = {entry.name: getattr(state, entry.name) for entry in fields(state) if entry.name != "carry"}
    scalars["carry"] = _flatten(state.carry, carry)
    device = next(model.parameters()).device
    tensors = {
        **{f"optimizer.{name}": value for name, value in _optimizer_tensors(model, optimizers).items()},
        **{f"random.{name}": value for name, value in _random_states(device).items()},
        # Clones: parts of a state may be views of one tensor, which safetensors refuses.
        **{f"carry.{index}": tensor.clone() for index, tensor in enumerate(carry)},
    }
    with write_directory(directory) as folder:
        write_model(folder, model, extra=extra)
        save_tensors(folder / "trainer.safetensors", tensors)
        (folder / "trainer.json").write_text(json.dumps(scalars, indent=1), encoding="utf-8")


def load_last(
    directory: Path, model: Model, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[TrainState, dict[str, Any]]:
    """Put weights, optimisers and random generators back as `save_last` found them.

    Args:
        directory: what `save_last` wrote.
        model: a model of the same configuration, on its device; changed in place.
        optimizers: its optimisers; changed in place.

    Returns:
        Where the run was, and the JSON values that were saved with the model.

    Raises:
        FileNotFoundError: there is no checkpoint, or it lacks a file.
        ValueError: the checkpoint is damaged, or is of another model.
    """
    device = next(model.parameters()).device
    folder = find_directory(directory)
    saved, extra = load_checkpoint(folder)
    model.load_state_dict(saved.state_dict())
    tensors = load_tensors(folder / "trainer.safetensors")
    _restore_optimizers(model, optimizers, _under("optimizer.", tensors))
    _restore_random_states(_under("random.", tensors), device)
    scalars = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    if scalars.keys() != {entry.name for entry in fields(TrainState)}:
        raise ValueError(
            f"resume: {folder / 'trainer.json'} was written by another version of minrnn; use that"
        )
    carry = {int(index): tensor.to(device) for index, tensor in _under("carry.", tensors).items()}
    return TrainState(**scalars | {"carry": _unflatten(scalars["carry"], carry)}), extra


class Trained(NamedTuple):
    """A model that a run has trained, and what is needed to use it."""

    model: Model
    vocabulary: Vocabulary | None
    """Of a model of text; None where its tokens are no text."""
    step: int
    """That the weights are of."""


def load_trained(run_dir: Path, which: str, device: torch.device) -> Trained:
    """Read a run's model.

    Args:
        run_dir: the run's directory.
        which: its checkpoint, best or last.
        device: where the model goes.

    Returns:
        The model, the vocabulary of its tokens (None where they are no text) and its weights' step.

    Raises:
        FileNotFoundError: there is no such run, or it has no such checkpoint yet.
        ValueError: the checkpoint is damaged.
    """
    read_config(run_dir)
    directory = run_dir / "checkpoints" / which
    try:
        folder = find_directory(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{run_dir} has no checkpoint {which!r} yet") from error
    model, extra = load_checkpoint(folder, device=device)
    match extra:
        case {"vocabulary": dict(vocabulary), "step": int(step)}:
            return Trained(model, Vocabulary.from_dict(vocabulary), step)
        case {"vocabulary": None, "step": int(step)}:
            return Trained(model, None, step)
    raise ValueError(f"{directory} names no vocabulary and step: no run wrote it")


def check_unchanged(saved: RunConfig, config: RunConfig) -> None:
    """Refuse to resume a run with settings under which it would not have been the same run.

    Raises:
        ValueError: naming the first setting that differs and is not in `CHANGEABLE`.
    """
    if saved.task.task != config.task.task:
        raise ValueError(
            f"resume: the task is {saved.task.task!r} in this run, got {config.task.task!r}; start a new run"
        )
    for table in ("model", "task", "train"):
        old, new = asdict(getattr(saved, table)), asdict(getattr(config, table))
        for name, value in old.items():
            if new[name] != value and not (table == "train" and name in CHANGEABLE):
                raise ValueError(
                    f"resume: {table}.{name} is {value!r} in this run, got {new[name]!r}; only "
                    f"{', '.join(f'train.{name}' for name in sorted(CHANGEABLE))} can change"
                )


class Interrupted(Exception):  # noqa: N818 - a request that was met, not an error
    """A signal ended the run after its state was saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signum).name}: stopped and saved after step {step}")
        self.signum = signum


@dataclass
class Interruption:
    """Whether a signal has asked the run to stop."""

    signum: int = 0
    """The signal's number; 0 while there was none."""


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Let SIGINT and SIGTERM ask for a stop at the end of the step; a second one stops at once.

    Outside the main thread, where Python delivers no signals, nothing is changed.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        interruption.signum = signum
        signal.signal(signum, previous[signum])
        # The plain system call: print could be interrupted in the middle of another print.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

    previous: dict[int, Any] = {
        signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for signum in previous:
            signal.signal(signum, ask)
        yield interruption
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Name the optimisers' tensors after the parameters that they belong to: `<parameter>/exp_avg`."""
    return {
        f"{name}/{key}": value
        for optimizer in optimizers
        for name, parameter in _names_of(model, optimizer)
        for key, value in optimizer.state[parameter].items()
    }


def _restore_optimizers(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    for optimizer in optimizers:
        for name, parameter in _names_of(model, optimizer):
            of_parameter = _under(f"{name}/", tensors)
            optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in of_parameter.items()
            }


def _names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that an optimiser moves, with their names in the model, in its order."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in moved]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # a run that moves to a GPU draws new dropout masks there
        torch.cuda.set_rng_state(states["cuda"], device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten(state: State, tensors: list[Tensor]) -> Any:
    """Append the tensors of a nested state to the list; return the nesting, with their places in it."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        tensors.append(state)
        return len(tensors) - 1
    return [_flatten(part, tensors) for part in state]


def _unflatten(nesting: Any, tensors: Mapping[int, Tensor]) -> State:
    """Undo `_flatten`: lists become tuples, places become tensors."""
    if nesting is None:
        return None
    if isinstance(nesting, int):
        return tensors[nesting]
    return tuple(_unflatten(part, tensors) for part in nesting)
