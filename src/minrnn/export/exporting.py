"""`export_step` and `export_sequence`: from a module to a program that needs no minrnn where it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minrnn.export.buffers import keep_state
from minrnn.export.formats import format_of
from minrnn.export.models import Interface, interface_of
from minrnn.export.program import Port, Program
from minrnn.files import write_file
from minrnn.models.acting import Policy


class Exported(Program):
    """A program in torch's own operations, which `save` writes as a file."""

    def save(self, path: Path | str) -> None:
        """Write the program as .onnx (ONNX), .pte (ExecuTorch) or .pt2 (AOTInductor), complete or not at all.

        The file is first run on the examples that the program was traced with, and compared with it.

        Raises:
            ValueError: the suffix is another, or the format cannot hold this program.
            RuntimeError: an extra is missing, the format lacks an operation of the program, or the file
                computes something else.
            OSError: the file cannot be written; what was there before is unchanged.
        """
        path = Path(path)
        contents = format_of(path).convert(self)
        with write_file(path) as partial:
            partial.write_bytes(contents)


def export_step(
    module: nn.Module | Policy,
    inputs: Mapping[str, Tensor] | None = None,
    outputs: Sequence[str] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    batch: int | None = None,
    keeps_state: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Export one step of a module, in torch's own operations: gate equations and one multiply-add a layer.

    A SequenceModel takes tokens `(B,)` and its state, and returns logits `(B, V)` and the state. A policy
    takes obs `(B, S)` and its state, and returns actions and the state; if it is conditioned on a return, it
    also takes the reward of the previous action. Observations are standardized, returns summed and scaled,
    and actions bounded inside. A state is one tensor for each of its parts, `(blocks, B, ...)`; each has an
    input `<name>_in` and an output `<name>_out`, and starts from the number that the metadata name.

    Any other module may hold minrnn's layers, cells and mixers; its inputs are then named here.

    Args:
        module: a SequenceModel, a DecisionModel, a Policy, or any module that returns tensors.
        inputs: of any other module, a name and an example for each argument of its forward, of one step.
        outputs: of any other module, a name for each tensor that it returns, in order.
        dynamic: of any other module, its inputs' axes of any size: {"x": {0: "batch"}, "h_in": {1: "batch"}}.
        batch: of a model, a fixed batch; None: any.
        keeps_state: of a model with a fixed batch: the state is kept in the program's buffers instead of
            being passed, and a further input `reset`, `(B,)` bool, clears it.
        metadata: what else the file's metadata should hold, as JSON.

    Returns:
        The program; its `save` writes a file.

    Raises:
        TypeError: inputs are missing.
        ValueError: an argument does not fit the module, or its state grows with each step.
        NotImplementedError: a mixer cannot be exported.

    >>> import torch
    >>> from minrnn import MinGRU
    >>> layer = MinGRU(4, 8, batch_first=True)
    >>> inputs = {"x": torch.zeros(2, 1, 4), "h_in": torch.zeros(1, 2, 8)}
    >>> axes = {"x": {0: "batch"}, "h_in": {1: "batch"}}
    >>> step = export_step(layer, inputs, ["y", "h_out"], dynamic=axes)
    >>> [tuple(x.shape) for x in step.call(torch.ones(7, 1, 4), torch.zeros(1, 7, 8))]
    [(7, 1, 8), (1, 7, 8)]
    """
    interface = _interface("step", module, inputs, outputs, dynamic, batch)
    if keeps_state:
        if batch is None or inputs is not None:
            raise ValueError("export_step: keeps_state needs one of minrnn's models and a fixed batch")
        interface = keep_state(interface)
    return _export("step", interface, metadata)


def export_sequence(
    module: nn.Module | Policy,
    inputs: Mapping[str, Tensor] | None = None,
    outputs: Sequence[str] | None = None,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    batch: int | None = None,
    longest: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Export a module over sequences of any length, with a scan over time for each layer.

    A SequenceModel takes tokens `(B, T)` and its state, and returns logits `(B, T, V)` and the state after
    the last step. A policy takes obs `(B, T, S)`, the returns still to come, the previous actions and the
    state, and returns actions. The state is as in `export_step`.

    Args:
        module, inputs, outputs, batch, metadata: as in `export_step`, with examples of 2 or more steps.
        dynamic: as in `export_step`; an axis of time is named "time".
        longest: the most steps of a sequence; None: any.

    Returns:
        The program; its `save` writes a file.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `export_step`.
    """
    interface = _interface("sequence", module, inputs, outputs, dynamic, batch)
    return _export("sequence", interface, metadata, longest=longest)


def _export(
    form: str, interface: Interface, metadata: Mapping[str, Any] | None, longest: int | None = None
) -> Exported:
    described = {**interface.metadata, **(metadata or {})}
    return Exported.trace(
        interface.module, form, interface.inputs, interface.outputs, longest=longest, metadata=described
    )


def _interface(
    form: str,
    module: nn.Module | Policy,
    inputs: Mapping[str, Tensor] | None,
    outputs: Sequence[str] | None,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    batch: int | None,
) -> Interface:
    if inputs is None:
        if outputs is not None or dynamic is not None:
            raise ValueError(f"export_{form}: outputs and dynamic go with inputs, got no inputs")
        return interface_of(module, form, batch)
    if isinstance(module, Policy) or outputs is None or batch is not None:
        raise ValueError(f"export_{form}: inputs go with outputs and a module, and not with a batch")
    axes = dict(dynamic or {})
    if unknown := axes.keys() - inputs.keys():
        raise ValueError(f"export_{form}: dynamic must name inputs, got {', '.join(sorted(unknown))}")
    ports = tuple(_port(form, name, x, axes.get(name, {})) for name, x in inputs.items())
    return Interface(module, ports, tuple(outputs), {"kind": "module"})


def _port(form: str, name: str, example: Tensor, free: Mapping[int, str]) -> Port:
    for axis, size in free.items():
        if size not in ("batch", "time") or not 0 <= axis < example.dim():
            raise ValueError(
                f"export_{form}: dynamic must map axes of {name} to 'batch' or 'time', got {axis}: {size!r}"
            )
    return Port(name, example, tuple(free.get(axis, size) for axis, size in enumerate(example.shape)))
