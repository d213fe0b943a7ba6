"""Checkpoints for resuming a run: the training state next to the model, and its validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minrnn.distributed import Ranks
from minrnn.files import convert, find_directory, naming, read_json, write_directory
from minrnn.models import Model, SequenceModel, load_checkpoint, map_state
from minrnn.models.checkpoint import (
    check_files,
    map_checkpoint,
    map_tensors,
    save_tensors,
    send_model,
    send_tensors,
    write_model,
    write_texts,
)
from minrnn.models.pretrained import holds_pretrained
from minrnn.models.shards import divided_like, is_first
from minrnn.tasks import Vocabulary
from minrnn.training.config import RunConfig, read_config
from minrnn.training.optim import MOMENTS

CarriedState = Any  # nested tuples of tensors, or None

# Settings that a resumed run may change: they affect neither completed steps nor the checkpoint's shapes.
CHANGEABLE = frozenset(
    {
        "steps",
        "eval_every",
        "eval_tokens",
        "final_eval_tokens",
        "checkpoint_every",
        "log_every",
        "compile",
        "device",
        "threads",
        "sequence_ranks",
        "timeout",
        "weights",
    }
)

TENSORS_FILE, STATE_FILE = "trainer.safetensors", "trainer.json"

NEW_IN_FORMAT_2 = frozenset({"unwritten", "run"})
"""Keys of trainer.json since format 2 of checkpoints."""

MOST_COUNTED = 1 << 24
"""The float32 step counter of AdamW saturates here."""


@dataclass
class TrainState:
    """The state of a run, apart from weights, optimizers and random generators."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Wall-clock time of all sessions of the run."""
    best: dict[str, int | float] = field(default_factory=dict)
    """`step` and metrics of the evaluation with the lowest val_loss; empty before the first."""
    losses: list[float] = field(default_factory=list)
    """Losses of the steps since the last line of metrics.jsonl."""
    grad_norms: list[float] = field(default_factory=list)
    """Norms of the gradients of the same steps."""
    unwritten: list[dict[str, Any]] = field(default_factory=list)
    """Lines of metrics.jsonl that could not be written (the disk was full); resuming writes them."""
    carry: CarriedState = None
    """The model's hidden state after the last step, if the run carries it."""


def save_last(
    directory: Path,
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    state: TrainState,
    config: RunConfig,
    extra: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Write the checkpoint for resuming a run, atomically.

    It is a model's checkpoint with two more files: trainer.safetensors (the states of the optimizers and the
    random generators, and the carried state) and trainer.json (the rest of `TrainState`, and the settings of
    the run that may not change). The ranks over which weights are divided all call this function, and the
    first of them writes.

    Args:
        directory: the directory; an existing checkpoint is kept until the new one is complete.
        model: the model.
        optimizers: its optimizers.
        state: the state of the run.
        config: the configuration of the run.
        extra: JSON values saved with the model, `step` among them.
        files: names and texts of further files, such as a tokenizer.

    Raises:
        OSError: the checkpoint cannot be written (a full disk, for example); the previous one is intact.
    """
    carry: list[Tensor] = []
    scalars = {entry.name: getattr(state, entry.name) for entry in fields(state) if entry.name != "carry"}
    scalars["carry"] = _flatten(state.carry, carry)
    scalars["run"] = _lasting(config)
    device = next(model.parameters()).device
    tensors = {
        **{f"optimizer.{name}": value for name, value in _optimizer_tensors(model, optimizers).items()},
        **{f"random.{name}": value for name, value in _random_states(device).items()},
        # Clones: parts of a state may share memory, which safetensors rejects.
        **{f"carry.{index}": tensor.clone() for index, tensor in enumerate(carry)},
    }
    if not is_first(model.parameters()):
        send_tensors(tensors)
        send_model(model)
        return
    with write_directory(directory) as folder:
        save_tensors(folder / TENSORS_FILE, tensors)
        (folder / STATE_FILE).write_text(json.dumps(scalars, indent=1), encoding="utf-8")
        write_texts(folder, files)
        write_model(folder, model, extra=extra)  # last, as it lists all files


def load_last(
    directory: Path,
    model: Model,
    optimizers: Sequence[torch.optim.Optimizer],
    config: RunConfig,
    say: Callable[[str], object],
) -> tuple[TrainState, dict[str, Any]]:
    """Restore weights, optimizers and random generators from a checkpoint written by `save_last`.

    All files are validated before anything is changed: sizes and digests; names, shapes and dtypes of the
    tensors; consistent step counts; and the settings of the run. The carried state is validated by
    `check_carry`. Of weights that are divided over ranks, and their moments, each rank reads its part.

    Args:
        directory: the checkpoint.
        model: a model of the same configuration, on its device; changed in place.
        optimizers: its optimizers; changed in place.
        config: the configuration of the run.
        say: called with one line about files without digests, in a checkpoint of an earlier format.

    Returns:
        The state of the run, and the JSON values that were saved with the model.

    Raises:
        FileNotFoundError: there is no checkpoint, or a file is missing.
        ValueError: the checkpoint is damaged, or of another run or model; the message names the file.
    """
    device = next(model.parameters()).device
    folder = find_directory(directory)
    saved, extra = map_checkpoint(folder)
    if unchecked := check_files(folder, [TENSORS_FILE, STATE_FILE]):
        say(f"{directory} has an earlier format without digests of {' and '.join(unchecked)}: not checked")
    state, nesting = _read_state(folder / STATE_FILE, config, is_old=bool(unchecked))
    if extra.get("step") != state.step:
        raise ValueError(
            f"resume: {folder / STATE_FILE} is of step {state.step}, and the weights beside it are of step "
            f"{extra.get('step')}; use another copy"
        )
    tensors = map_tensors(folder / TENSORS_FILE)
    with naming(f"resume: {folder / TENSORS_FILE}"):
        carried = _places(nesting)
        _check_tensors(tensors, _expected_tensors(model, optimizers, device, len(carried)))
        _check_counts(tensors, state.step)
    with naming(f"resume: {folder / STATE_FILE}"):
        if sorted(carried) != list(range(len(carried))):
            raise ValueError(f"carry must name each of its tensors once, got {carried}")
    ours = model.state_dict()
    model.load_state_dict({name: divided_like(x, ours[name]) for name, x in saved.state_dict().items()})
    _restore_optimizers(model, optimizers, _under("optimizer.", tensors))
    _restore_random_states(_under("random.", tensors), device)
    carry = {int(index): tensor.to(device, copy=True) for index, tensor in _under("carry.", tensors).items()}
    state.carry = _unflatten(nesting, carry)
    return state, extra


def check_carry(path: Path, carry: CarriedState, examples: Sequence[CarriedState]) -> None:
    """Check that a carried state is one of the run's model.

    Args:
        path: the checkpoint, for the error message.
        carry: the carried state of the checkpoint.
        examples: the states of the model after one step and after two, or None if the run carries none. A
            size that differs between them grows with the sequence (attention's keys), and may be any.

    Raises:
        ValueError: the state has another structure, shape or dtype.
    """
    forms = [_form(state) for state in (carry, *examples)]
    if not _fits(*forms):
        raise ValueError(
            f"resume: the state in {path / STATE_FILE} must be {_shown(forms[1])}, as the model carries it, "
            f"got {_shown(forms[0])}; use another copy"
        )


def gather_carry(state: TrainState, ranks: Ranks, rows: int) -> TrainState:
    """Return the state of a run with the carried state of all ranks, on the first of them.

    Args:
        state: the state, with the carried state of this rank's rows.
        ranks: the ranks of the run.
        rows: number of rows on all ranks.
    """
    if state.carry is None:
        return state
    return replace(state, carry=map_state(lambda part: ranks.gather_rows(part, rows), state.carry))


def take_carry(state: TrainState, ranks: Ranks, rows: int) -> None:
    """Keep this rank's rows of a carried state: the inverse of `gather_carry`, for any number of ranks.

    Args:
        state: the state of the run, with the carried state of all ranks; changed in place.
        ranks: the ranks of the run.
        rows: number of rows on all ranks.
    """
    if state.carry is not None and ranks.size > 1:
        state.carry = map_state(lambda part: part[ranks.rows(rows)].clone(), state.carry)


class Trained(NamedTuple):
    """The model of a run, with its vocabulary and provenance."""

    model: Model
    vocabulary: Vocabulary | None
    """The vocabulary of a text model; None for other models."""
    step: int
    """Step of the weights."""
    corpus: str
    """Digest of the training data, as `Task.sha256`."""


def load_trained(run_dir: Path | str, which: str, device: torch.device | str) -> Trained:
    """Load the model of a run.

    Args:
        run_dir: the run's directory, or one for transformers that it was exported to.
        which: the checkpoint, best or last.
        device: device of the model.

    Returns:
        The model, its vocabulary, the step of its weights, and the digest of the training data.

    Raises:
        FileNotFoundError: there is no such run, or no such checkpoint yet.
        ValueError: the checkpoint is damaged.
    """
    read_config(run_dir)
    directory = _checkpoint(Path(run_dir).expanduser(), which)
    try:
        folder = find_directory(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{run_dir} has no checkpoint {which!r} yet") from error
    model, extra = load_checkpoint(folder, device=device)
    match extra:
        case {"vocabulary": dict(vocabulary), "step": int(step), "corpus": str(corpus)}:
            with naming(directory):
                return Trained(model, _vocabulary(vocabulary, folder, model), step, corpus)
        case {"vocabulary": None, "step": int(step), "corpus": str(corpus)}:
            return Trained(model, None, step, corpus)
    raise ValueError(f"{directory} must have vocabulary, step and corpus in its config.json; no run wrote it")


def _checkpoint(run_dir: Path, which: str) -> Path:
    """Return the directory of a run's checkpoint; a directory of transformers is one."""
    if not holds_pretrained(run_dir):
        return run_dir / "checkpoints" / which
    if which != "best":
        raise ValueError(
            f"{run_dir} has no checkpoint {which!r}: a directory for transformers holds one, read as 'best'"
        )
    return run_dir


def _vocabulary(saved: Mapping[str, str], folder: Path, model: Model) -> Vocabulary:
    vocabulary = Vocabulary.from_dict(saved, folder)
    size = model.config.vocab_size if isinstance(model, SequenceModel) else vocabulary.size
    if vocabulary.size != size:
        raise ValueError(
            f"the vocabulary must have the model's {size} tokens, got {vocabulary.size}; one was resized"
        )
    return vocabulary


def check_resumable(run_dir: Path) -> None:
    """Check that a directory is a run's.

    Raises:
        ValueError: it is one for transformers, which holds no more of a run than weights and settings.
    """
    if holds_pretrained(run_dir):
        raise ValueError(
            f"resume: {run_dir} is a directory for transformers, which has no optimizer's state, random "
            "generators and carried state; train it with transformers, or resume the run it came from"
        )


def check_unchanged(saved: RunConfig, config: RunConfig) -> None:
    """Check that the settings of a resumed run are unchanged, except those in `CHANGEABLE`.

    Raises:
        ValueError: a setting differs; the message names it.
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


def _lasting(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run as JSON values, without those in `CHANGEABLE`."""
    values = config.to_dict()
    return values | {"train": {name: v for name, v in values["train"].items() if name not in CHANGEABLE}}


def _read_state(path: Path, config: RunConfig, is_old: bool) -> tuple[TrainState, Any]:
    """Return the state in trainer.json, without the carried tensors, and their nesting."""
    values = read_json(path, dict[str, Any])
    names = {entry.name for entry in fields(TrainState)} | NEW_IN_FORMAT_2
    if is_old:
        names -= NEW_IN_FORMAT_2
    if values.keys() != names:
        raise ValueError(
            f"resume: {path} must hold {', '.join(sorted(names))}, got {', '.join(sorted(values))}; it was "
            "written by another version of minrnn; use that version"
        )
    nesting, run = values.pop("carry"), values.pop("run", None)
    with naming(f"resume: {path}"):
        state = convert(values, TrainState)
        if min(state.step, state.tokens, state.seconds) < 0 or len(state.losses) != len(state.grad_norms):
            raise ValueError("its counts must be 0 or more, and it must have as many losses as norms")
        if run is not None:
            check_unchanged(RunConfig.from_record(convert(run, dict[str, Any], "run")), config)
    return state, nesting


class _Form(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Form:
        return cls(tuple(tensor.shape), tensor.dtype)


def _expected_tensors(
    model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], device: torch.device, carried: int
) -> dict[str, _Form | None]:
    """Return the forms of the tensors of a run after a step, by name; None for any form."""
    expected: dict[str, _Form | None] = {
        f"random.{name}": _Form.of(value) for name, value in _random_states(device).items()
    }
    expected |= {f"carry.{index}": None for index in range(carried)}
    for optimizer in optimizers:
        for name, parameter in _names_of(model, optimizer):
            expected |= {f"optimizer.{name}/{key}": _Form.of(parameter) for key in MOMENTS[type(optimizer)]}
            if isinstance(optimizer, torch.optim.AdamW):
                expected[f"optimizer.{name}/step"] = _Form((), torch.float32)
    return expected


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, _Form | None]) -> None:
    # A run that is moved between CPU and GPU has no, or an unused, state of the GPU's generator.
    optional = {"random.cuda"}
    missing = sorted(expected.keys() - tensors.keys() - optional)
    unexpected = sorted(tensors.keys() - expected.keys() - optional)
    other = [
        f"{name} ({_shown(form)} expected, got {_shown(_Form.of(tensors[name]))})"
        for name, form in sorted(expected.items())
        if form is not None and name in tensors and _Form.of(tensors[name]) != form
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another form": other}
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
    if found:
        raise ValueError(f"its tensors are not those of this run; {found}; use another copy")


def _check_counts(tensors: Mapping[str, Tensor], step: int) -> None:
    for name, value in tensors.items():
        if name.endswith("/step") and value.item() != min(step, MOST_COUNTED):
            raise ValueError(
                f"{name} is {value.item():g}, and the run has taken {step} steps; use another copy"
            )


def _optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the state tensors of the optimizers by name: `<parameter>/exp_avg`."""
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
                key: (divided_like(value, parameter) if key in MOMENTS[type(optimizer)] else value).to(
                    parameter.device, copy=True
                )
                for key, value in of_parameter.items()
            }


def _names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of an optimizer with their names, in the model's order."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in moved]


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:  # missing if the run was moved to a GPU
        torch.cuda.set_rng_state(states["cuda"], device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with the prefix, with the prefix removed."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten(state: CarriedState, tensors: list[Tensor]) -> Any:
    """Append the tensors of a nested state to `tensors`; return the nesting of their indices in it."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        tensors.append(state)
        return len(tensors) - 1
    return [_flatten(part, tensors) for part in state]


def _places(nesting: Any) -> list[int]:
    """Return the indices in a nesting; raise ValueError if it is invalid."""
    if nesting is None:
        return []
    if type(nesting) is int:
        return [nesting]
    if not isinstance(nesting, list):
        raise ValueError(f"carry must be lists of indices, got {nesting!r}")
    return [place for part in nesting for place in _places(part)]


def _form(state: CarriedState) -> Any:
    """Return a nested state with each tensor replaced by its form."""
    if state is None or isinstance(state, Tensor):
        return None if state is None else _Form.of(state)
    return tuple(_form(part) for part in state)


def _fits(form: Any, one: Any, two: Any) -> bool:
    """Whether a form equals two others, except for sizes that differ between those."""
    if form is None or one is None:
        return form is None and one is None
    if isinstance(one, _Form):
        if not isinstance(form, _Form) or form.dtype != one.dtype or len(form.shape) != len(one.shape):
            return False
        sizes = zip(form.shape, one.shape, two.shape, strict=True)
        return all(size == first or first != second for size, first, second in sizes)
    if isinstance(form, _Form) or len(form) != len(one):
        return False
    return all(map(_fits, form, one, two))


def _shown(form: Any) -> str:
    """Format a form for an error message.

    >>> _shown((_Form((2, 3), torch.float32), None))
    '(float32 (2, 3), nothing)'
    """
    if form is None:
        return "nothing"
    if isinstance(form, _Form):
        return f"{str(form.dtype).removeprefix('torch.')} {form.shape}"
    return f"({', '.join(map(_shown, form))})"


def _unflatten(nesting: Any, tensors: Mapping[int, Tensor]) -> CarriedState:
    """Invert `_flatten`: lists become tuples, indices become tensors."""
    if nesting is None:
        return None
    if isinstance(nesting, int):
        return tensors[nesting]
    return tuple(_unflatten(part, tensors) for part in nesting)
