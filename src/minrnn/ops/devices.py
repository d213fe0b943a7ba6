"""What devices lack."""

from __future__ import annotations

import torch

__all__ = ["widest_float"]

WITHOUT_FLOAT64 = ("mps", "hpu")
"""Types of devices without float64."""


def widest_float(device: torch.device, dtype: torch.dtype = torch.float64) -> torch.dtype:
    """Return a dtype, or float32 where that is float64 and the device lacks it."""
    if dtype != torch.float64:
        return dtype
    if device.type in WITHOUT_FLOAT64 or (device.type == "xpu" and not _xpu_has_float64(device)):
        return torch.float32
    return dtype


def _xpu_has_float64(device: torch.device) -> bool:
    return bool(torch.xpu.get_device_properties(device).has_fp64)
