"""One step of a model from a carried state: by a Decoder, by the model's own forward, and a GRU's.

    taskset -c 0 python benchmarks/model_step.py --shapes 1x128x3 16x192x4

The models are those of `minrnn train` (convolution, mixer, MLP; float32), with weights as they start; a step
takes a token for each row and gives logits. A Decoder's steps and the model's are first compared with the
model in float64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minrnn.benchmarks.options import parse_shapes
from minrnn.benchmarks.timing import Phases, Task, clock, interleave, old_objects_set_aside, summary
from minrnn.models import Decoder, ModelConfig, SequenceModel
from minrnn.training.provenance import provenance

RESULTS = Path(__file__).parent / "results" / "model-step.json"
CPU = torch.device("cpu")
VOCABULARY = 256
STEPS = 8
"""Steps of a sample, and steps that are compared."""
TOLERANCE = 1e-5

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(tokens (B,), state) -> (logits (B, V), state)."""

SHAPES = ["1x128x3", "1x192x4", "1x512x6", "1x1024x8", "16x128x3", "16x192x4", "16x512x6", "16x1024x8"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x width x layers")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on a system (default: 3)")
    parser.add_argument("--samples", type=int, default=200, help="of a system at most (default: 200)")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file (default: {RESULTS.name})")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = parse_shapes(arguments.shapes, "BDL")
    cases = [measure(shape, arguments.seconds, arguments.samples) for shape in shapes]
    report = {"benchmark": "model-step", "dtype": "float32", "cases": cases, **provenance(CPU)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print("rows x width x layers: milliseconds by a Decoder, by the model's forward, of a GRU in torch")
    for case in cases:
        times = (1e3 * system["seconds"]["median"] for system in case["systems"].values())
        print("x".join(map(str, case["shape"].values())), *(f"{time:.3f}" for time in times))


def measure(shape: tuple[int, ...], seconds: float, samples: int) -> dict[str, Any]:
    """Check and time a minGRU both ways, and a GRU, on one shape."""
    rows, width, layers = shape
    tokens = torch.randint(VOCABULARY, (rows, STEPS), generator=torch.Generator().manual_seed(0))
    model, gru = build("mingru", width, layers), build("gru", width, layers)
    with torch.no_grad():
        exact, _ = build("mingru", width, layers).double()(tokens)
    steps: dict[str, Step] = {"one call": decoder(model), "torch": forward(model), "gru": forward(gru)}
    errors = {name: compare(steps[name], tokens, exact) for name in ("one call", "torch")}
    tasks: dict[str, Task] = {name: partial(take_steps, step, tokens) for name, step in steps.items()}
    with old_objects_set_aside():
        taken = interleave(tasks, seconds, samples, lambda text: print(text, flush=True))
    systems: dict[str, Any] = {
        name: {"error": errors.get(name), "seconds": summary([sample["step"] for sample in taken[name]])}
        for name in tasks
    }
    return {"shape": dict(zip(("rows", "width", "layers"), shape, strict=True)), "systems": systems}


def build(mixer: str, width: int, layers: int) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=VOCABULARY, d_model=width, num_layers=layers, mixer=mixer)
    return SequenceModel(config).eval()


def decoder(model: SequenceModel) -> Step:
    """Return the step of a Decoder, which has to be the engine's."""
    found = Decoder(model)
    if found.backend != "cpp":
        raise RuntimeError(f"the compiled engine must take the steps, but {found.reason}")
    return found.step


def forward(model: SequenceModel) -> Step:
    """Return the step of the model itself."""

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens.unsqueeze(1), state)
        return logits[:, 0], state

    return step


@torch.no_grad()
def compare(step: Step, tokens: Tensor, exact: Tensor) -> float:
    """Return the largest error of the logits, relative to the largest of them."""
    state, logits = None, []
    for now in tokens.unbind(1):
        y, state = step(now, state)
        logits.append(y)
    error = float((torch.stack(logits, dim=1).double() - exact).abs().max() / exact.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"a step differs from the model in float64 by {error:.1e} of the largest logit")
    return error


@torch.inference_mode()
def take_steps(step: Step, tokens: Tensor) -> Phases:
    """Time a step, as the mean of some."""
    pieces, state = tokens.unbind(1), None
    start = clock(CPU)
    for piece in pieces:
        _, state = step(piece, state)
    return {"step": (clock(CPU) - start) / len(pieces)}


if __name__ == "__main__":
    main()
