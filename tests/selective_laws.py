"""What the tests of the selective scan's engines share: inputs, and comparison with the reference."""

from __future__ import annotations

from types import ModuleType

import torch
from laws import TOLERANCE, poisoned, relative_error
from torch import Tensor

from minrnn.ops.selective import reference
from minrnn.ops.selective.reference import Inputs

__all__ = ["NAMES", "cast", "compare", "draw", "gradients_like"]

NAMES = ("u", "delta_pre", "A", "B", "C", "D", "z", "delta_bias", "h0")
SHARED = ("A", "D", "delta_bias", "h0")
"""Those without a time axis, whose gradients are in at least float32."""


def draw(
    batch: int, T: int, channels: int, N: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Inputs:
    """Inputs with decays from 0 to nearly 1, an initial state and sparse resets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = Inputs(
        u=normal(batch, T, channels),
        delta_pre=2 * normal(batch, T, channels) - 2,
        A=-torch.exp(normal(channels, N)),
        B=normal(batch, T, N),
        C=normal(batch, T, N),
        D=normal(channels),
        z=normal(batch, T, channels),
        delta_bias=normal(channels),
        h0=normal(batch, channels, N),
        reset=torch.rand(batch, T, generator=generator) < 0.1,
    )
    return cast(x, dtype)


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    *tensors, reset = x
    return Inputs(*(None if t is None else t.to(dtype) for t in tensors), reset)


def gradients_like(x: Inputs, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the final state."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, channels = x.u.shape
    dy = torch.randn(x.u.shape, generator=generator, dtype=torch.float64)
    dlast = torch.randn(batch, channels, x.A.shape[1], generator=generator, dtype=torch.float64)
    return dy.to(x.u.dtype), dlast.to(torch.promote_types(x.u.dtype, torch.float32))


def compare(module: ModuleType, x: Inputs) -> None:
    """Hold an engine to the reference in float64, with poisoned output buffers."""
    dtype = x.u.dtype
    dy, dlast = (d.to(x.u.device) for d in gradients_like(x))
    exact = cast(x, torch.float64)
    y, last, borders = reference.forward(exact, True)
    expected = reference.backward(dy.double(), dlast.double(), borders, exact)
    with poisoned():
        found, found_last, found_borders = module.forward(x, True)
        assert module.forward(x, False)[2].numel() == 0
        actual = module.backward(dy, dlast, found_borders, x)
    assert found.dtype == dtype
    assert relative_error(found, y) < TOLERANCE[dtype]
    assert relative_error(found_last, last) < min(TOLERANCE[dtype], TOLERANCE[torch.float32])
    assert relative_error(found_borders, borders) < min(TOLERANCE[dtype], TOLERANCE[torch.float32])
    assert len({id(gradient) for gradient in actual}) == len(NAMES)  # an operator returns no tensor twice
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        assert ours.dtype == (found_last.dtype if name in SHARED else dtype), name
        assert relative_error(ours, theirs) < 2.5 * TOLERANCE[dtype], name
