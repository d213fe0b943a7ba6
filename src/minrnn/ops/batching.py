"""Batching rules of operators, for torch.func's vmap and for the older one of torch.autograd.

The older one is used by is_grads_batched=True, vectorize=True and gradcheck's check_batched_grad; it does not
support operators with lists of tensors by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.torch_private import (
    add_batch_dim,
    old_vmap_level,
    remove_batch_dim,
    tree_flatten,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = ["fold_batch", "for_any_size", "for_old_vmap", "one_by_one", "unfold_batch"]


class _Mapped(NamedTuple):
    """The `info` argument of a rule for torch.func.vmap."""

    batch_size: int


def fold_batch(
    info: Any, tensors: Sequence[Any], dims: Sequence[int | None], shared: frozenset[int] = frozenset()
) -> list[Any]:
    """Move the mapped dimension of every tensor to the front and merge it with the batch."""

    def fold(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        size = info.batch_size
        return (x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    pairs = zip(tensors, dims, strict=True)
    return [x if index in shared else fold(x, dim) for index, (x, dim) in enumerate(pairs)]


def unfold_batch(info: Any, outputs: Any) -> tuple[Any, Any]:
    """Split the mapped dimension from the batch, at the front of each output; return it with the outputs."""
    return (
        tree_map(lambda x: x.unflatten(0, (info.batch_size, -1)), outputs),
        tree_map(lambda _: 0, outputs),
    )


def one_by_one(
    function: Callable[..., Any], info: Any, in_dims: Sequence[Any], arguments: Sequence[Any]
) -> tuple[Any, Any]:
    """Call the function for each index of the mapped dimension, and stack its outputs."""

    def at(index: int) -> Any:
        return tree_map(
            lambda x, dim: x if dim is None else x.select(dim, index), tuple(arguments), tuple(in_dims)
        )

    results = [function(*at(index)) for index in range(info.batch_size)]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    outputs = stacked if isinstance(results[0], list) else tuple(stacked)
    return outputs, tree_map(lambda _: 0, outputs)


def for_any_size(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Extend a vmap rule to mapped dimensions of size 0."""

    def rule_for_any_size(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if info.batch_size:
            return rule(info, in_dims, *arguments)

        def widen(x: Any, dim: int | None) -> Any:
            return x if dim is None else x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])

        results, out_dims = rule(_Mapped(1), in_dims, *tree_map(widen, arguments, in_dims))
        return tree_map(lambda x: x[:0], results), out_dims

    return rule_for_any_size


def for_old_vmap(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Convert a rule for torch.func.vmap to a kernel for the dispatch key Batched."""

    def kernel(*arguments: Any) -> Any:
        level = old_vmap_level()
        leaves, structure = tree_flatten(arguments)
        mapped = [isinstance(x, Tensor) for x in leaves]
        # Tensors that are not mapped get a dimension of size 1.
        found = [
            remove_batch_dim(x, level, 1, 0) if is_tensor else x
            for x, is_tensor in zip(leaves, mapped, strict=True)
        ]
        size = max(x.shape[0] for x in found if isinstance(x, Tensor))
        whole = [x.expand(size, *x.shape[1:]) if isinstance(x, Tensor) else x for x in found]
        dims = tree_unflatten([0 if is_tensor else None for is_tensor in mapped], structure)
        results, _ = rule(_Mapped(size), dims, *tree_unflatten(whole, structure))
        return tree_map_only(Tensor, lambda x: add_batch_dim(x, 0, level), results)

    return kernel
