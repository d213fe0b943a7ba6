"""`minrnn export`: write a trained model for another runtime or library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minrnn.cli.arguments import check_range, parse
from minrnn.export import FORMATS, Exported, export_sequence, export_step, format_of
from minrnn.files import NoEffect, warn_without_effect
from minrnn.models import DecisionModel, Policy, SequenceModel
from minrnn.training import load_trained, read_config

MOST_ROWS = 1 << 20
LONGEST = 1 << 24

PLANNED = 1024
"""The longest sequence of a format whose memory is planned in advance, unless --longest is given."""

WITHOUT_EFFECT = (
    NoEffect("longest", "form", lambda s: s["form"] == "step"),
    *(
        NoEffect(name, "format", lambda s: s["format"] == "transformers")
        for name in ("form", "batch", "longest", "keeps_state")
    ),
)


@dataclass(frozen=True)
class ExportCommand:
    """Export a language model or a policy as a file that needs no minrnn where it runs: .onnx for
    onnxruntime, .pte for ExecuTorch, .pt2 for torch without Python (AOTInductor); or a language model as a
    directory for transformers, which needs minrnn.

    Inputs, outputs, the state's first values and a language model's vocabulary stand in the file's metadata.
    """

    run: tyro.conf.Positional[Path]
    """Run directory."""
    output: tyro.conf.Positional[Path]
    """File to write, whose suffix is the format: .onnx, .pte or .pt2; or the new directory."""
    format: Literal["suffix", "transformers"] = "suffix"
    """The format that the output's suffix names, or a directory for transformers."""
    form: Literal["step", "sequence"] = "step"
    """One step from a given state, or sequences of any length."""
    batch: int = 0
    """Fixed number of rows (0: any where the format allows it, else 1)."""
    longest: int = 0
    """Steps of the longest sequence (0: any where the format allows it, else 1024)."""
    keeps_state: bool = False
    """Keep the state in the file's memory instead of passing it; an input `reset` clears it. For .pte."""
    target_return: float | None = None
    """Return that a policy is conditioned on (None: that of its run)."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn export`."""
    command = parse(ExportCommand, "export", args)
    check_range("export", "batch", command.batch, 0, MOST_ROWS)
    check_range("export", "longest", command.longest, 0, LONGEST)
    if command.format == "suffix":
        format_of(command.output)
    if command.keeps_state and command.form != "step":
        raise ValueError("export: --keeps-state goes with --form step")
    warn_without_effect(ExportCommand, vars(command), WITHOUT_EFFECT)
    if command.format == "transformers":
        return _export_pretrained(command)
    if not command.output.absolute().parent.is_dir():  # seconds before it would be noticed
        raise FileNotFoundError(f"export: {command.output.parent} is no directory")
    model, vocabulary, step, _ = load_trained(command.run, command.checkpoint, torch.device("cpu"))
    metadata: dict[str, Any] = {"checkpoint": command.checkpoint, "step": step}
    if vocabulary is not None:
        metadata["vocabulary"] = vocabulary.to_dict()
    exported = _export(_with_target(model, command), command, metadata)
    exported.save(command.output)
    print(_conclusion(exported, command.output))
    return 0


def _export_pretrained(command: ExportCommand) -> int:
    if command.target_return is not None:
        raise ValueError("export: --target-return goes with a policy, and transformers takes language models")
    from minrnn.integrations.transformers import check_free, export_pretrained

    check_free(command.output)  # seconds before it would be noticed
    trained = load_trained(command.run, command.checkpoint, torch.device("cpu"))
    export_pretrained(trained, read_config(command.run), command.output)
    size = sum(path.stat().st_size for path in command.output.iterdir())
    print(
        f"{command.output}: transformers, {size:,} bytes; without the state of the optimizer, random "
        "generators and carried state: `minrnn train --resume` needs the run itself"
    )
    return 0


def _with_target(model: SequenceModel | DecisionModel, command: ExportCommand) -> SequenceModel | Policy:
    if isinstance(model, DecisionModel):
        return Policy(model, target_return=command.target_return)
    if command.target_return is not None:
        raise ValueError("export: --target-return goes with a policy, got a run of another task")
    return model


def _export(model: SequenceModel | Policy, command: ExportCommand, metadata: dict[str, Any]) -> Exported:
    kind = FORMATS[command.output.suffix]
    fixed = command.keeps_state or command.form not in kind.free_batch
    batch = command.batch or (1 if fixed else None)
    if command.form == "step":
        return export_step(model, batch=batch, keeps_state=command.keeps_state, metadata=metadata)
    longest = command.longest or (None if kind.free_length else PLANNED)
    return export_sequence(model, batch=batch, longest=longest, metadata=metadata)


def _conclusion(exported: Exported, path: Path) -> str:
    """Return the file's inputs and outputs in one line."""
    inputs = ", ".join(f"{port.name} ({', '.join(map(str, port.axes))})" for port in exported.inputs)
    size = path.stat().st_size
    title = FORMATS[path.suffix].title
    outputs = ", ".join(exported.outputs)
    return f"{path}: {title}, {exported.form}, {size:,} bytes; inputs {inputs}; outputs {outputs}"
