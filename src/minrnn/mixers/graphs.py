"""Tracing: graphs for any size, and errors for what cannot be exported."""

import torch


def may_vary(size: int) -> bool:
    """Whether a size is symbolic; code that branches on it would specialize the graph to one value."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    return not has_static_value(size)


def refuse_export(reason: str) -> None:
    """Raise while a program is being exported; torch's own error would not name the cause.

    Raises:
        NotImplementedError: a program is being exported.
    """
    if torch.compiler.is_exporting():
        raise NotImplementedError(reason)
