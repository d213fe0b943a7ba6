"""What operators need to take part in torch's transforms: gradients, forward mode and batching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "at_level",
    "fold",
    "have_tangents",
    "in_autocast",
    "is_mapped_by_old_vmap",
    "is_observed",
    "is_plain",
    "is_traced",
    "is_transformed",
    "join",
    "needs_gradients",
    "register_vmap",
    "separate",
    "unfold",
    "without_autocast",
]


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record what becomes of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; some, as meta, have none, and torch raises if asked."""
    return is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Leave autocast for the device of x, if there is any, for the length of a with statement."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if is_autocast_available(device) else nullcontext()


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is writing down what is called."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_transformed() -> bool:
    """Whether one of torch.func's transforms, or forward-mode differentiation, is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Whether something beside autograd sees torch's operations or changes them.

    That is a compiler, a tracer, a transform, autocast, or a mode that counts or replaces operations.
    """
    return (
        is_traced()
        or is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch.is_autocast_enabled("cpu")
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are torch's own tensors, and their numbers and gradients are all that is wanted.

    What is computed from them may then be written in place.
    """
    return not is_transformed() and all(x is None or type(x) in (Tensor, Parameter) for x in tensors)


LEVEL = 0
"""Forward mode's level in torch, which has no other; torch.autograd.forward_ad does not see compiled graphs
enter it."""


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is under way; unlike backward mode, no_grad leaves it on."""
    return any(x is not None and forward_ad.unpack_dual(x, level=LEVEL).tangent is not None for x in tensors)


def separate(tensors: Sequence[Tensor | None]) -> tuple[list[Any], list[Tensor | None]]:
    """Take dual tensors apart: their primals, and their tangents, None where there is none."""
    pairs = [(None, None) if x is None else forward_ad.unpack_dual(x, level=LEVEL) for x in tensors]
    return [primal for primal, _ in pairs], [tangent for _, tangent in pairs]


def join(primal: Tensor, tangent: Tensor) -> Tensor:
    """Make a dual tensor."""
    return forward_ad.make_dual(primal, tangent, level=LEVEL)


def at_level(function: type[_SingleLevelFunction]) -> Any:
    """Make of an autograd.Function one for an operator's Autograd kernel, at any level of nested transforms.

    A Function's forward records nothing, at no level; here the levels below, whose turn comes within it, do.
    Its jvp is for tensors that have gradients and tangents at one level, as torch.autograd.forward_ad has
    them: what backward computes with then has tangents too. Elsewhere it would lose the levels below.
    """

    class AtLevel(function):  # type: ignore[misc, valid-type]
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                outputs = function.forward(ctx, *arguments)
            ctx.save_for_forward(*ctx.to_save)
            return outputs

        @classmethod
        def apply(cls, *arguments: Any) -> Any:
            with enable_single_level_autograd_function():
                return super().apply(*arguments)

    return AtLevel


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


def register_vmap(
    library: torch.library.Library, operator: str, rule: Callable[..., tuple[Any, Any]]
) -> None:
    """Register an operator's rule for torch.func.vmap, and for the vmap of torch.autograd.

    Args:
        library: where the operator is defined.
        operator: its name.
        rule: (info, in_dims, *arguments) -> (results, out_dims), with all out_dims 0, for a mapped dimension
            of at least 1.
    """

    def rule_for_any_size(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if info.batch_size:
            return rule(info, in_dims, *arguments)

        def widen(x: Any, dim: int | None) -> Any:
            return x if dim is None else x.new_zeros(*x.shape[:dim], 1, *x.shape[dim + 1 :])

        results, out_dims = rule(_Mapped(1), in_dims, *tree_map(widen, arguments, in_dims))
        return tree_map(lambda x: x[:0], results), out_dims

    torch.library.register_vmap(f"{library.ns}::{operator}", rule_for_any_size, lib=library)
    library.impl(operator, _for_old_vmap(rule), "Batched")


# ----------------------------------------------------------------------------------------------------------
# torch.autograd has a vmap of its own, older than torch.func's: behind is_grads_batched=True, vectorize=True
# and gradcheck's check_batched_grad. It cannot map over operators that take lists of tensors by itself.


class _Mapped(NamedTuple):
    """What a rule of torch.func.vmap wants to know."""

    batch_size: int


def is_mapped_by_old_vmap(x: Tensor) -> bool:
    """Whether the vmap of torch.autograd maps over a dimension of x, which hides it."""
    return torch._C._dispatch_keys(x).has("Batched")


def _for_old_vmap(rule: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
    """Make of a rule for torch.func.vmap a kernel for the dispatch key Batched."""

    def kernel(*arguments: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        leaves, structure = tree_flatten(arguments)
        mapped = [isinstance(x, Tensor) for x in leaves]
        # A tensor that is not mapped gets a dimension of 1.
        found = [
            torch._remove_batch_dim(x, level, 1, 0) if is_tensor else x
            for x, is_tensor in zip(leaves, mapped, strict=True)
        ]
        size = max(x.shape[0] for x in found if isinstance(x, Tensor))
        whole = [x.expand(size, *x.shape[1:]) if isinstance(x, Tensor) else x for x in found]
        dims = tree_unflatten([0 if is_tensor else None for is_tensor in mapped], structure)
        results, _ = rule(_Mapped(size), dims, *tree_unflatten(whole, structure))
        return tree_map_only(Tensor, lambda x: torch._add_batch_dim(x, 0, level), results)

    return kernel
