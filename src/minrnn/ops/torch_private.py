"""The undocumented parts of torch that the package uses, which may change. No other file names them.

tests/test_torch_private.py checks that each exists, so that a torch version without one fails with its name.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "SingleLevelFunction",
    "add_batch_dim",
    "associative_scan",
    "below_autograd",
    "computes_on_onednn",
    "enable_single_level_autograd_function",
    "forward_mode_is_active",
    "functorch_is_active",
    "has_any_global_hook",
    "has_dispatch_modes",
    "is_batched",
    "jit_tracing_state",
    "old_vmap_level",
    "remove_batch_dim",
    "set_forward_mode",
    "storage_use_count",
    "tree_flatten",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
]

SingleLevelFunction = _SingleLevelFunction
"""autograd.Function without its own handling of torch.func's transforms."""

has_any_global_hook = _has_any_global_hook
"""Whether hooks are registered for all modules."""

set_forward_mode = forward_ad._set_fwd_grad_enabled
"""Context manager that switches forward mode on or off."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context manager in which operators are dispatched past autograd."""

functorch_is_active = torch._C._are_functorch_transforms_active
"""Whether one of torch.func's transforms is active."""

jit_tracing_state = torch._C._get_tracing_state
"""The state of torch.jit.trace; None when it is not active."""

remove_batch_dim = torch._remove_batch_dim
add_batch_dim = torch._add_batch_dim


def forward_mode_is_active() -> bool:
    """Whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def has_dispatch_modes() -> bool:
    """Whether a TorchDispatchMode or a TorchFunctionMode is active."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._len_torch_function_stack() > 0


def is_batched(x: Tensor) -> bool:
    """Whether torch.autograd's vmap (not torch.func's) maps over a dimension of x and hides it."""
    return torch._C._dispatch_keys(x).has("Batched")


def old_vmap_level() -> int:
    """Return the active level of torch.autograd's vmap."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def storage_use_count(storage: torch.UntypedStorage) -> int:
    """Return how many tensors and Python objects hold a storage."""
    return torch._C._storage_Use_Count(storage._cdata)


def computes_on_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in a 16-bit dtype on this processor."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    found: bool = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()
    return found


def associative_scan() -> Any:
    """Import torch's prototype of an associative scan; the import takes a second."""
    return import_module("torch._higher_order_ops").associative_scan
