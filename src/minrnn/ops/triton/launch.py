"""Launch helpers of both GPU engines: the number of multiprocessors, and tensors as kernel arguments."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["REALS", "Sequence", "flags", "processors", "strided"]

REALS = {torch.float32: tl.float32, torch.float64: tl.float64}
"""The dtype in which kernels compute, by `reference.state_dtype` of their inputs."""

Sequence = tuple[Tensor, int, int]
"""A (batch, time, channels) tensor with contiguous channels: (tensor, batch stride, time stride)."""


def processors(device: torch.device) -> int:
    """Return the number of the device's multiprocessors; 1 where kernels are interpreted on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def strided(x: Tensor) -> Sequence:
    """Return the tensor with its batch and time strides."""
    return x, x.stride(0), x.stride(1)


def flags(reset: Tensor | None) -> Sequence | None:
    """Return the resets as bytes, with their strides."""
    return None if reset is None else strided(reset.view(torch.uint8))
