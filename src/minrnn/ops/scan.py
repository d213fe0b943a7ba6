"""The recurrence h[t] = a[t] h[t-1] + b[t]: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.operator import Mode, apply

__all__ = ["FLOATS", "check_like", "gated_scan", "scan"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of inputs."""


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """The first-order linear recurrence, in parallel over batch, channels and (where it pays) time.

        h[t] = a[t] * h[t-1] + b[t],    h[-1] = h0

    The state is carried in float64, whatever the inputs' dtype, so the error does not grow with T.

    Args:
        a: decay, (B, T, D), float32, float64, bfloat16 or float16. Any batch and time strides.
        b: drive, as `a`.
        h0: initial state, (B, D), of the same dtype or float32; zeros when None.
        reverse: run from the last step to the first: h[t] = a[t] * h[t+1] + b[t], h[T] = h0.

    Returns:
        h, (B, T, D), in the inputs' dtype. The final state is h[:, -1] (h[:, 0] when reversed).

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ or are not supported.
        ValueError: a shape or device does not fit.

    >>> import torch
    >>> a, b = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    >>> scan(a, b).flatten().tolist()
    [1.0, 1.5, 1.75]
    >>> scan(a, b, h0=torch.tensor([[2.0]])).flatten().tolist()
    [2.0, 2.0, 2.0]

    Source: Blelloch, "Prefix sums and their applications" (1990), for the operator; Martin and Cundy,
    "Parallelizing linear recurrent neural nets over sequence length" (2018), for its use in cells.
    """
    _check("scan", ("a", "b"), [a, b], h0, None)
    return apply([a, b], h0, None, Mode("identity", "positive", reverse))


def gated_scan(
    gate: str,
    *pre: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    candidate: str = "positive",
) -> Tensor:
    """A gated recurrence in one pass: pre-activations -> gates -> (a, b) -> scan -> h.

        "mingru":                a = 1 - z,        b = z * g(c)
        "minlstm":               a = f / (f + i),  b = i / (f + i) * g(c)
        "minlstm_unnormalised":  a = f,            b = i * g(c)
        "identity":              a, b as given: `scan`, with resets

    where z, f and i are the sigmoids of their pre-activations, c is the candidate's pre-activation, and g is
    "positive" (x + 0.5 for x >= 0, sigmoid(x) below), "linear" (x) or "tanh".

    Gates are computed in float32 at least and the state is carried in float64; only h is rounded to the
    inputs' dtype. Backward saves the inputs and h, and recomputes the gates.

    Args:
        gate: a name in GATES.
        *pre: the gate's k pre-activations, each (B, T, D); or one packed tensor (B, T, k * D) that holds
            them side by side, as a linear layer emits them (no copy is made, and its gradient comes back
            packed). float32, float64, bfloat16 or float16; any batch and time strides.
        h0: initial state, (B, D), of the inputs' dtype or float32; zeros when None.
        reset: (B, T) bool; where True the state is forgotten before that step (document or episode start).
        reverse: run from the last step to the first.
        candidate: the name of g in CANDIDATES.

    Returns:
        h, (B, T, D), in the inputs' dtype. The final state is h[:, -1] (h[:, 0] when reversed).

    Raises:
        TypeError: an argument is not a tensor, or the dtypes differ or are not supported.
        ValueError: an unknown gate or candidate, a wrong number of pre-activations, or a shape or device
            that does not fit.

    >>> import torch
    >>> z, c = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> gated_scan("mingru", z, c).flatten().tolist()  # half old, half 1 + 0.5
    [0.75, 1.125]

    Source: Feng et al., "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2.
    """
    _check_name("gate", gate, GATES)
    _check_name("candidate", candidate, CANDIDATES)
    names = GATES[gate].pre
    if candidate != "positive" and not GATES[gate].has_candidate:
        raise ValueError(
            f"gated_scan: gate {gate!r} has no candidate, got candidate={candidate!r}; leave it out"
        )
    if len(pre) not in (1, len(names)):
        raise ValueError(
            f"gated_scan: gate {gate!r} takes {len(names)} pre-activations ({', '.join(names)}) "
            f"or one packed tensor, got {len(pre)}"
        )
    _check("gated_scan", names if len(pre) > 1 else ("pre",), list(pre), h0, reset, packed=len(names))
    return apply(list(pre), h0, reset, Mode(gate, candidate, reverse))


# ----------------------------------------------------------------------------------------------------------
# Checks: once, at this border.


def _check_name(what: str, name: str, table: dict[str, Any]) -> None:
    if name not in table:
        near = get_close_matches(str(name), table, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"gated_scan: {what} must be one of {', '.join(table)}, got {name!r}{hint}")


def _check(
    function: str,
    names: Sequence[str],
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    packed: int = 1,
) -> None:
    for name, x in zip((*names, "h0", "reset"), (*pre, h0, reset), strict=True):
        if not isinstance(x, Tensor) and not (x is None and name in ("h0", "reset")):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")
    first = pre[0]
    if first.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {names[0]} must be float32, float64, bfloat16 or float16, got {first.dtype}"
        )
    if first.dim() != 3 or 0 in first.shape:
        raise ValueError(
            f"{function}: {names[0]} must be of shape (B, T, D), all at least 1, got {tuple(first.shape)}"
        )
    for name, x in zip(names[1:], pre[1:], strict=True):
        check_like(function, name, x, tuple(first.shape), first.dtype, first.device, names[0])
    B, T, D = first.shape
    if len(pre) == 1:
        if D % packed:
            raise ValueError(
                f"{function}: a packed pre needs a multiple of {packed} channels, got {tuple(first.shape)}"
            )
        D //= packed
    if h0 is not None:
        dtype = torch.float32 if h0.dtype == torch.float32 and first.dtype != torch.float64 else first.dtype
        check_like(function, "h0", h0, (B, D), dtype, first.device, names[0])
    if reset is not None:
        check_like(function, "reset", reset, (B, T), torch.bool, first.device, names[0])


def check_like(
    function: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    first: str,
) -> None:
    """Raise unless x has this shape, dtype and device, to go with the argument called `first`."""
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{function}: {name} must be of shape {shape} to go with {first}, got {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {dtype} to go with {first}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{function}: {name} must be on {device} like {first}, got {x.device}")
