"""Graphs that are traced once and serve all sizes, and what cannot become one."""

import torch


def may_vary(size: int) -> bool:
    """Whether a size is a symbol: code that looks at its value would make of the graph one for that value."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    return not has_static_value(size)


def refuse_export(reason: str) -> None:
    """Raise if a program is being exported, which cannot be this one; torch's own reason would name no cause.

    Raises:
        NotImplementedError: it is.
    """
    if torch.compiler.is_exporting():
        raise NotImplementedError(reason)
