"""Workloads that several benchmarks time: a training step, repeated calls, copies of memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minrnn.benchmarks.timing import Phases, Workload, clock

__all__ = [
    "Step",
    "calls_in_a_row",
    "copies",
    "forward_step",
    "keeping_time",
    "run_steps",
    "steps_in_a_row",
    "training_step",
]

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(x, state) -> (y, state), for one step; state None is the empty state."""

ROW_SECONDS = 2e-3
"""Seconds of a run of calls, which makes the time to read the clock negligible."""


def training_step(call: Callable[[], Tensor], leaves: Sequence[Tensor], dy: Tensor) -> Workload:
    """Return a workload that times forward, and backward to the leaves given the gradient of the output.

    Args:
        call: the forward pass.
        leaves: the tensors whose gradients are computed.
        dy: gradient of the output.
    """
    device = dy.device

    def step() -> Phases:
        start = clock(device)
        y = call()
        middle = clock(device)
        gradients = torch.autograd.grad(y, leaves, dy)
        end = clock(device)
        del y, gradients  # after the clock was read
        return {"forward": middle - start, "backward": end - middle, "step": end - start}

    return step


def calls_in_a_row(calls: Mapping[str, Callable[[int], object]], device: torch.device) -> Workload:
    """Return a workload that times each call as the mean of many successive ones, whose launches overlap.

    Args:
        calls: by phase; a call gets its index in the run.
        device: device of the computations.
    """
    counts: dict[str, int] = {}

    def sample() -> Phases:
        if not counts:
            for name, call in calls.items():
                _mean_seconds(call, 2, device)  # compiles
                counts[name] = 1 + int(ROW_SECONDS / max(_mean_seconds(call, 3, device), 1e-7))
        return _with_step({name: _mean_seconds(call, counts[name], device) for name, call in calls.items()})

    return sample


@torch.inference_mode()
def run_steps(step: Step, x: Tensor) -> Tensor:
    """Run x, (B, T) or (B, T, D), step by step from the empty state; return all outputs."""
    ys, state = [], None
    for x_t in x.split(1, 1):
        y, state = step(x_t, state)
        ys.append(y)
    return torch.cat(ys, 1)


def steps_in_a_row(step: Step, x: Tensor) -> Workload:
    """Return a workload that times successive steps with the same input and a carried state."""
    state: Any = None

    def call(index: int) -> None:
        nonlocal state
        _, state = step(x, state)

    return torch.inference_mode()(calls_in_a_row({"step": call}, x.device))


def forward_step(model: Callable[..., tuple[Tensor, Any]]) -> Step:
    """Return the step of a language model's forward, (B,) -> (B, V) like a Decoder's."""

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = model(tokens.unsqueeze(1), state)
        return logits[:, 0], state

    return step


def keeping_time(step: Step) -> Step:
    """Convert a step from (B,) -> (B, V) to (B, 1) -> (B, 1, V)."""

    def stepped(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = step(tokens[:, 0], state)
        return logits.unsqueeze(1), state

    return stepped


def copies(moved: Mapping[str, int], device: torch.device) -> Workload:
    """Return a workload that times copies between existing buffers; a copy of n bytes moves 2 n.

    Args:
        moved: bytes to move, by phase.
        device: device of the buffers.
    """
    buffers = {}
    for phase, size in moved.items():
        source = torch.ones(max(1, size // 8), device=device)  # float32, half of the bytes
        buffers[phase] = source, torch.zeros_like(source)

    def copy() -> Phases:
        taken = {}
        for phase, (source, target) in buffers.items():
            start = clock(device)
            target.copy_(source)
            taken[phase] = clock(device) - start
        return _with_step(taken)

    return copy


def _with_step(phases: Phases) -> Phases:
    return phases if "step" in phases else phases | {"step": sum(phases.values())}


def _mean_seconds(call: Callable[[int], object], count: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(count):
            call(i)
        return (time.perf_counter() - start) / count
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    for i in range(count):
        call(i)
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / count
