"""Weights that are divided over ranks: each rank holds its rows of every matrix, gradient and moment."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from minrnn.models.block import Block
from minrnn.models.shards import is_sharded_module


def shard_weights(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the weights of a model over the ranks of a mesh, in place, by torch's `fully_shard`.

    A block's weights are gathered while it computes; what lies outside of blocks, while the model does. The
    gradient is the mean over the ranks. Everything is in the dtype of the parameters.

    Args:
        model: the model; moved to the mesh's kind of device.
        mesh: the ranks, of one axis.
    """
    # To import it takes a second, which runs without it do not pay.
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # States are views, which nothing writes into: torch warns in case something does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor", category=UserWarning)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if hasattr(model, "loss"):
        register_fsdp_forward_method(model, "loss")


@contextmanager
def unsynchronized(model: nn.Module) -> Iterator[None]:
    """A context in which each rank adds up whole gradients by itself; the next ones are exchanged with them.

    Args:
        model: a model whose weights are divided, perhaps in a wrapper.
    """
    root = cast(Any, next(module for module in model.modules() if is_sharded_module(module)))
    root.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)


def release(model: nn.Module) -> None:
    """Let go of the weights that a call without gradients has left whole."""
    if is_sharded_module(model):
        cast(Any, model).reshard()
