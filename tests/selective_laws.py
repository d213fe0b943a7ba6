"""What the tests of the selective scan's engines share: inputs, and comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from minrnn.ops.selective import reference
from minrnn.ops.selective.reference import Inputs

__all__ = ["NAMES", "TOLERANCE", "cast", "compare", "draw", "gradients_like", "relative_error"]

# Largest error relative to the largest value, of values; of gradients 2.5 times as much.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = ("u", "delta_pre", "A", "B", "C", "D", "z", "delta_bias", "h0")


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    assert actual.isfinite().all(), "the engine left or produced a value that is not finite"
    if not actual.numel():
        return 0.0
    largest = expected.double().abs().max().clamp(min=1e-30)
    return float((actual.double() - expected.double()).abs().max() / largest)


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
    for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
        assert relative_error(ours, theirs) < 2.5 * TOLERANCE[dtype], name


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, torch fills uninitialised memory with NaN, so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
