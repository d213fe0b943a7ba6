"""Sequences that are divided over ranks: consecutive parts of the time axis."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from minrnn.distributed.ranks import share
from minrnn.files import check_kind
from minrnn.mixers.sharded import shard

M = TypeVar("M", bound=nn.Module)


def sequence_parallel(model: M, mesh: DeviceMesh) -> M:
    """Divide the sequences of a model over the ranks of a mesh, in place.

    Each rank calls the model with its part of the time axis, `shard_sequence(x, mesh)`, and gets its part of
    the outputs. A state that is passed in is that before the whole sequence, read on the first rank; the
    state that is returned is that after the whole sequence, on every rank. So are `reset` and a state that is
    carried from window to window used as on one process. In every call, and every backward pass, each layer
    exchanges its state and the window of its convolution, whose sizes do not depend on the sequence's length.

    All ranks must call the model, and differentiate it, together. Gradients are those of the sum of the
    ranks' losses with respect to this rank's parameters: they are to be summed over the ranks; or averaged,
    as DistributedDataParallel does, where each loss is multiplied by the number of ranks.

    Supported are minGRU, minLSTM and minEMA, layers and mixers, Aaren, S4D and Mamba, and their convolution.
    torch's own RNNs and attention are refused.

    Args:
        model: a model or layer; what does not mix steps may be anything.
        mesh: the ranks, in the order of the parts: a device mesh of one axis, such as `mesh["sequence"]`.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has several axes; nothing in the model mixes steps; or a module cannot be
            divided, for the reason named. The model is then unchanged.
    """
    shard(model, _check("sequence_parallel", mesh).get_group().group_name)
    return model


def shard_sequence(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """Return this rank's part of a whole sequence: steps T r / N to T (r + 1) / N, rounded down.

    Args:
        x: the whole sequence, on every rank.
        mesh: the ranks, a device mesh of one axis.
        dim: the time axis.

    Raises:
        ValueError: there are fewer steps than ranks, or the mesh has several axes.
    """
    size, rank, T = _check("shard_sequence", mesh).size(), mesh.get_local_rank(), x.shape[dim]
    if size > T:
        raise ValueError(f"shard_sequence: x must have at least {size} steps, the number of ranks, got {T}")
    part = share(T, rank, size)
    return x.narrow(dim, part.start, part.stop - part.start)


def _check(function: str, mesh: DeviceMesh) -> DeviceMesh:
    check_kind(function, "mesh", mesh, DeviceMesh)
    if mesh.ndim != 1:
        axes = mesh.mesh_dim_names or mesh.ndim
        raise ValueError(f"{function}: mesh must have one axis, that of the sequences' parts, got {axes}")
    return mesh
