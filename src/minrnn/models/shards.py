"""Tensors whose rows are divided over ranks (DTensor), as torch's `fully_shard` makes them of parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

# To import torch.distributed.tensor takes a second. Commands on one process, which never need it, do not
# pay for that: a divided tensor is known by its method, and a divided module by a module that is loaded.


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is divided over ranks."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, in the same memory; all of it if it is not divided."""
    return cast(Any, tensor).to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor; of a divided one all ranks do so together."""
    return cast(Any, tensor).full_tensor() if is_sharded(tensor) else tensor


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole tensor, if another tensor of its shape is divided; or itself.

    Args:
        tensor: the whole tensor, on every rank; no more than this rank's part of its memory is read.
        like: the tensor that is divided, or not.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    return distribute_tensor(tensor, place.device_mesh, place.placements, src_data_rank=None)


def is_first(tensors: Iterable[Tensor]) -> bool:
    """Whether this is the first of the ranks over which tensors are divided; True if none is."""
    for tensor in tensors:
        if is_sharded(tensor):
            mesh: Any = cast(Any, tensor).device_mesh
            return bool(mesh.get_rank() == mesh.mesh.flatten()[0])
    return True


def is_sharded_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was called with this module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def runs_for(module: nn.Module, method: str) -> bool:
    """Whether the weights of a sharded module are gathered for a method as they are for a call."""
    return is_sharded_module(module) and method in vars(module)  # register_fsdp_forward_method replaces it


def class_before(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before `fully_shard` replaced it."""
    kind = type(module)
    if not is_sharded_module(module):
        return kind
    _, _, before, *_ = kind.__mro__  # the class that fully_shard makes, FSDPModule, the class before
    return before
