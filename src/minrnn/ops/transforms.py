"""What operators need to take part in torch.func's transforms: forward mode and batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["fold", "have_tangents", "unfold"]


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is under way; unlike backward mode, no_grad leaves it on."""
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def fold(info: Any, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[Any]:
    """Every tensor with the dimension that torch.func.vmap maps over moved in front and merged with B.

    Args:
        info: what vmap tells of itself.
        tensors: those that it maps, whose first axis is B, and None for absent ones.
        dims: where their mapped dimension is, None where they have none.
    """

    def fold_one(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        size = info.batch_size
        return (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    return [fold_one(x, dim) for x, dim in zip(tensors, dims, strict=True)]


def unfold(info: Any, x: Tensor) -> Tensor:
    """A result's mapped dimension, in front, taken apart from B."""
    return x.unflatten(0, (info.batch_size, -1))
