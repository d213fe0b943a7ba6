"""What tests of exported files share: models, inputs of any size, and processes without minrnn."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minrnn.export import Exported
from minrnn.models import DecisionConfig, DecisionModel, ModelConfig, SequenceModel

V = 11

BLOCKER = """
import json, sys
for name in {blocked}:
    sys.modules[name] = None  # an import of it fails
import numpy as np
given = np.load(sys.argv[2])
inputs = [given[name] for name in given.files]
"""

RUNNERS = {
    ".onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
known = json.loads(session.get_modelmeta().custom_metadata_map["minrnn"])
names = [port["name"] for port in known["inputs"]]
found = session.run(None, dict(zip(names, inputs, strict=True)))
""",
    ".pte": """
import torch
from executorch.runtime import Runtime
program = Runtime.get().load_program(sys.argv[1])
known = json.loads(program.load_method("minrnn").execute([])[0])
found = [x.numpy() for x in program.load_method("forward").execute([torch.from_numpy(x) for x in inputs])]
""",
    ".pt2": """
import torch
from torch._inductor import aoti_load_package
package = aoti_load_package(sys.argv[1])
known = json.loads(package.get_metadata()["minrnn"])
found = package(*map(torch.from_numpy, inputs))
found = [x.numpy() for x in ([found] if isinstance(found, torch.Tensor) else found)]
""",
}
"""A program for each format: it loads the file, reads its metadata, and runs it."""

WRITER = """
np.savez(sys.argv[3], *found)
print(json.dumps(known))
assert not [name for name in sys.modules if name.split(".")[0] in {blocked} and sys.modules[name]]
"""


def run_elsewhere(path: Path, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """Run a file in a process without minrnn, an ONNX file without torch too; return outputs and metadata."""
    blocked = repr(("minrnn", "torch") if path.suffix == ".onnx" else ("minrnn",))
    program = (BLOCKER + RUNNERS[path.suffix] + WRITER).replace("{blocked}", blocked)
    given, found = path.with_name("inputs.npz"), path.with_name("outputs.npz")
    np.savez(given, **{f"in{index:02}": x.numpy() for index, x in enumerate(inputs)})
    done = subprocess.run(
        [sys.executable, "-c", program, str(path), str(given), str(found)],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )
    assert done.returncode == 0, done.stderr
    outputs = np.load(found)
    return [torch.from_numpy(outputs[name]) for name in outputs.files], json.loads(
        done.stdout.splitlines()[-1]
    )


def language_model(mixer: str = "mingru", **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    options = {"window": 4, **options} if mixer == "attention" else options
    return SequenceModel(ModelConfig(vocab_size=V, d_model=16, num_layers=2, mixer=mixer, **options)).eval()


def decision_model(mixer: str = "mingru", **options: Any) -> DecisionModel:
    """A policy of 5 observed numbers and 3 actions, with statistics of its data."""
    torch.manual_seed(0)
    trunk = ModelConfig(d_model=16, num_layers=2, mixer=mixer, mlp_ratio=1.0)
    model = DecisionModel(
        DecisionConfig(trunk, 5, 3, **{"target_return": 30.0, "return_scale": 10.0, **options})
    )
    model.set_statistics(torch.arange(5.0), torch.arange(1.0, 6.0), torch.tensor([0.5, 1.0, 2.0]))
    return model.eval()


def draw(exported: Exported, sizes: Mapping[str, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Return inputs of the sizes that the free axes have here."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for port in exported.inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in port.axes)
        dtype = port.example.dtype
        if dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator, dtype=dtype))
        elif port.name in ("length", "position") or dtype == torch.bool:
            found.append(torch.zeros(shape, dtype=dtype))
        else:
            found.append(torch.randint(3, shape, generator=generator))
    return tuple(found)


def first_states(exported: Exported, batch: int) -> dict[str, Tensor]:
    """Return the states' inputs before the first step, as a user of the file makes them from its metadata."""
    known = json.loads(exported.describe())["inputs"]
    return {
        port["name"]: torch.full(
            [batch if axis == "batch" else axis for axis in port["shape"]],
            port["initial"],
            dtype=getattr(torch, port["dtype"]),
        )
        for port in known
        if "next" in port
    }


def follow(
    exported: Exported,
    run: Callable[[Sequence[Tensor]], Sequence[Any]],
    steps: Sequence[Mapping[str, Tensor]],
) -> list[Tensor]:
    """Run a step's program over steps, with its state handed on; return the first output of each."""
    known = json.loads(exported.describe())
    batch = len(next(iter(steps[0].values())))
    values: dict[str, Any] = dict(first_states(exported, batch))
    outputs = []
    for step in steps:
        values |= step
        given = [values[port.name] for port in exported.inputs]
        found = dict(zip(exported.outputs, map(torch.as_tensor, run(given)), strict=True))
        values |= {port["name"]: found[port["next"]] for port in known["inputs"] if "next" in port}
        outputs.append(found[exported.outputs[0]])
    return outputs


def relative(ours: Any, theirs: Tensor) -> float:
    """Return the largest difference relative to the largest number."""
    ours, theirs = torch.as_tensor(ours).detach(), theirs.detach()
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30))
