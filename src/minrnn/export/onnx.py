"""ONNX files, for onnxruntime and all that reads its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minrnn.export.converting import Run, check, converting, require
from minrnn.export.program import KEY, Program

SUFFIX = ".onnx"
EXTRA = "export"

OPSET = 20
"""The first operator set that has Gelu; newer runtimes read it too."""

LARGEST = (1 << 31) - 1
"""Bytes of the largest file: protobuf's limit."""


def convert(program: Program, opset: int = OPSET) -> bytes:
    """Return the file's bytes, checked by onnx and run by onnxruntime.

    Raises:
        RuntimeError: the extra is missing, ONNX lacks an operation, or the file computes something else.
        ValueError: the program keeps a state of its own, or is too large.
    """
    if program.is_stateful:
        raise ValueError(f"export: {SUFFIX} cannot keep a state between calls; use an explicit state")
    if program.has_complex:
        raise ValueError(
            f"export: {SUFFIX} has no complex numbers, with which S4D computes sequences; export a step"
        )
    require(SUFFIX, EXTRA, "onnx", "onnxscript", "onnxruntime")
    import onnx

    with converting(SUFFIX, torch.onnx.OnnxExporterError):
        made = torch.onnx.export(
            program.program,
            program.examples,
            opset_version=opset,
            dynamo=True,
            verbose=False,
            input_names=[port.name for port in program.inputs],
            output_names=list(program.outputs),
        )
        assert made is not None
        model = made.model_proto
    _name_axes(model, program)
    for node in _nodes(model.graph):
        del node.metadata_props[:]  # torch's traces of the source, with its paths: half of a small file
    model.metadata_props.add(key=KEY, value=program.describe())
    if (size := model.ByteSize()) > LARGEST:
        raise ValueError(f"export: {SUFFIX} must be smaller than 2 GiB, got {size} bytes")
    onnx.checker.check_model(model, full_check=True)
    contents = model.SerializeToString()
    check(SUFFIX, program, load(contents, program))
    return contents


def load(contents: bytes, program: Program) -> Run:
    """Load a file in onnxruntime, on the CPU and with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in program.inputs]

    def run(inputs: Sequence[Tensor]) -> Sequence[Any]:
        return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})

    return run


def _name_axes(model: Any, program: Program) -> None:
    """Give free axes the names that the program has for them, in place of torch's symbols."""
    names: dict[str, str] = {}
    for value, port in zip(model.graph.input, program.inputs, strict=True):
        for dim, axis in zip(value.type.tensor_type.shape.dim, port.axes, strict=True):
            if isinstance(axis, str):
                names[dim.dim_param] = axis
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _nodes(graph: Any) -> Iterator[Any]:
    """Yield all nodes, those of loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
