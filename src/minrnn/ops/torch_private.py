"""The undocumented parts of torch that the package uses, which may change. No other file names them.

tests/test_torch_private.py checks that each exists, so that a torch version without one fails with its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

__all__ = [
    "FakeTensorMode",
    "SingleLevelFunction",
    "add_batch_dim",
    "associative_scan",
    "below_autograd",
    "compile_errors",
    "compile_package",
    "computes_on_onednn",
    "enable_single_level_autograd_function",
    "forward_mode_is_active",
    "functorch_is_active",
    "has_any_global_hook",
    "has_dispatch_modes",
    "is_batched",
    "jit_tracing_state",
    "load_package",
    "old_vmap_level",
    "process_group",
    "remove_batch_dim",
    "scan_operator",
    "set_forward_mode",
    "storage_use_count",
    "timing_compilation",
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


def process_group(name: str) -> Any:
    """Return the process group of torch.distributed with this name, which graphs hold in its place."""
    return import_module("torch.distributed.distributed_c10d")._resolve_process_group(name)


def associative_scan() -> Any:
    """Import torch's prototype of an associative scan; the import takes a second."""
    return import_module("torch._higher_order_ops").associative_scan


def compile_errors() -> tuple[type[Exception], ...]:
    """Return what torch.compile raises where it cannot compile; the import takes a second."""
    errors = import_module("torch._dynamo.exc")
    return errors.TorchDynamoException, errors.FailOnRecompileLimitHit


@contextmanager
def timing_compilation(add: Callable[[float], object]) -> Iterator[None]:
    """Context manager that calls `add` with the seconds of each compilation by torch.compile in the block."""
    handler = import_module("torch._dynamo.callback").callback_handler
    began: list[float] = []

    def start(_: object) -> None:
        began.append(time.perf_counter())

    def end(_: object) -> None:
        add(time.perf_counter() - began.pop())

    handler.register_start_callback(start)
    handler.register_end_callback(end)
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)


def scan_operator() -> Any:
    """Import torch's prototype of a loop over time as one operator of a graph; the import takes a second.

    Its function of the same purpose would call the compiler, which cannot trace every view.
    """
    return import_module("torch._higher_order_ops.scan").scan_op


def compile_package(program: Any, path: str, metadata: dict[str, str]) -> None:
    """Compile an exported program to machine code in a file; the import takes seconds."""
    settings = {"aot_inductor.metadata": metadata}
    import_module("torch._inductor").aoti_compile_and_package(
        program, package_path=path, inductor_configs=settings
    )


def load_package(path: str) -> Any:
    """Load a file that `compile_package` wrote; calls of the result run it."""
    return import_module("torch._inductor").aoti_load_package(path)
