"""A traced and decomposed program with named inputs and outputs, to be saved as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from minrnn.export.quiet import quiet
from minrnn.models.evaluation import evaluation_mode
from minrnn.ops.decompositions import decompositions

FORMS = ("step", "sequence")
"""A program of one step (T = 1), and one of sequences of any length."""

KEY = "minrnn"
"""The key under which a file holds `Program.describe`; in ExecuTorch, the method that returns it."""

FREE = {"batch": 2, "time": 5}
"""Names of axes of any size, and their sizes while a program is traced; torch would fix a size of 1."""

Axes = tuple[int | str, ...]
"""A tensor's axes: sizes, and names of those that may have any size."""


class Carried(NamedTuple):
    """How an input that is a state goes from call to call."""

    initial: float
    """The number that fills it before the first step."""
    output: str
    """The output that is passed in at the next call."""
    batch_axis: int


@dataclass(frozen=True)
class Port:
    """A named input of a program."""

    name: str
    example: Tensor
    """The tensor that it is traced with."""
    axes: Axes
    """The example's shape, with a name for each axis of any size."""
    carried: Carried | None = None
    """Of a state: its first value and its output."""

    def describe(self) -> dict[str, Any]:
        """Return name, dtype and axes, and of a state its first value and its output, as JSON."""
        found = {"name": self.name, "dtype": _dtype_name(self.example.dtype), "shape": list(self.axes)}
        if self.carried is None:
            return found
        return {**found, "initial": self.carried.initial, "next": self.carried.output}


@dataclass(frozen=True)
class Program:
    """A program in torch's own operations, with the names of its inputs and outputs."""

    program: ExportedProgram
    """What torch.export made, without operators of minrnn."""
    form: str
    """A name in FORMS."""
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    longest: int | None = None
    """The largest size of the axis "time"; None: any."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else a user of the file should know, as JSON: the vocabulary of a language model, for example."""

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        form: str,
        inputs: Sequence[Port],
        outputs: Sequence[str],
        *,
        longest: int | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self:
        """Trace a module in evaluation mode, and replace minrnn's operators by torch's.

        Args:
            module: called with the inputs' tensors; returns tensors, in tuples or not.
            form: a name in FORMS.
            inputs: its inputs.
            outputs: the names of its outputs.
            longest, metadata: see above.

        Raises:
            ValueError: the number of outputs differs, or a step has a loop over time.
            NotImplementedError: a mixer cannot be exported.
        """
        dims = {name: Dim(name, max=longest if name == "time" else None) for name in FREE}
        shapes = tuple({i: dims[axis] for i, axis in enumerate(port.axes) if axis in dims} for port in inputs)
        examples = tuple(port.example for port in inputs)
        with evaluation_mode(module), torch.no_grad(), quiet():
            program = torch.export.export(_Positional(module), examples, dynamic_shapes=(shapes,))
            program = program.run_decompositions(decompositions())
        found = len(_outputs(program))
        if found != len(outputs):
            raise ValueError(
                f"export_{form}: outputs must name the module's {found} tensors, got {len(outputs)} names"
            )
        if form == "step" and any(str(node.target) == "scan" for node in program.graph.nodes):
            raise ValueError("export_step: inputs must be of one step, got a sequence; see export_sequence")
        return cls(program, form, tuple(inputs), tuple(outputs), longest, dict(metadata or {}))

    @property
    def examples(self) -> tuple[Tensor, ...]:
        """The tensors that the program was traced with."""
        return tuple(port.example for port in self.inputs)

    @property
    def is_stateful(self) -> bool:
        """Whether the program keeps its state in buffers of its own."""
        return bool(self.program.graph_signature.buffers_to_mutate)

    @property
    def has_complex(self) -> bool:
        """Whether it computes with complex numbers, which few runtimes have."""
        values = (node.meta.get("val") for node in self.program.graph.nodes)
        return any(isinstance(value, Tensor) and value.is_complex() for value in values)

    @property
    def free(self) -> set[str]:
        """The names of the axes of any size."""
        return {axis for port in self.inputs for axis in port.axes if isinstance(axis, str)}

    def describe(self) -> str:
        """Return what the file's metadata hold, as one line of JSON.

        `inputs` and `outputs` are lists of name, dtype and shape, in which a name stands for any size. Of a
        state, `initial` fills it before the first step, and `next` names the output that replaces it.
        """
        outputs = [
            {"name": name, "dtype": _dtype_name(value.dtype), "shape": self._axes(value)}
            for name, value in zip(self.outputs, _outputs(self.program), strict=True)
        ]
        known = {"form": self.form, "inputs": [port.describe() for port in self.inputs], "outputs": outputs}
        return json.dumps({**self.metadata, **known})

    def call(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program in torch; a program with buffers starts from its first state."""
        with torch.no_grad():
            found = self.program.module()(*inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def _axes(self, value: Tensor) -> list[int | str]:
        names: dict[str, int | str] = {}
        for port, given in zip(self.inputs, _placeholders(self.program), strict=True):
            names |= {str(size): axis for size, axis in zip(given.shape, port.axes, strict=True)}
        return [size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape]


class _Positional(nn.Module):
    """A module whose arguments have no names, so that one form of shapes describes those of any module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _outputs(program: ExportedProgram) -> list[Tensor]:
    """Return the values of the outputs, which have shapes and no numbers; buffers are none."""
    names = set(program.graph_signature.user_outputs)
    return [node.meta["val"] for node in program.graph.output_node().args[0] if node.name in names]


def _placeholders(program: ExportedProgram) -> list[Tensor]:
    """Return the values of the inputs, which have shapes and no numbers."""
    names = set(program.graph_signature.user_inputs)
    return [
        node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
