"""The recurrence h[t] = a[t] h[t-1] + b[t]: the public functions and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minrnn.files import nearest
from minrnn.ops.gated import GATED_SCAN, Mode, linear_scan
from minrnn.ops.gates import CANDIDATES, GATES

__all__ = ["FLOATS", "STARTS", "check_like", "check_tensor", "gated_scan", "read_arguments", "scan"]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The supported dtypes of inputs."""

STARTS = {
    dtype: [x for x in FLOATS if torch.promote_types(x, wide) == wide]
    for dtype in FLOATS
    for wide in [torch.promote_types(dtype, torch.float32)]
}
"""The dtypes of h0 that are allowed for inputs of each dtype: those that convert to the state's without
loss."""


def scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """Compute a first-order linear recurrence, in parallel over batch, channels and (if it is faster) time.

        h[t] = a[t] * h[t-1] + b[t],    h[-1] = h0

    The state is carried in a wider format than h (float64 in the reference; pairs of floats in the compiled
    engines), so that the error does not grow with T.

    Args:
        a: decay, (B, T, D), B may be 0, float32, float64, bfloat16 or float16. Any batch and time strides.
        b: input term, as `a`.
        h0: initial state, (B, D), of the same dtype, float32 or narrower; zeros when None.
        reverse: run from the last step to the first: h[t] = a[t] * h[t+1] + b[t], h[T] = h0.

    Returns:
        h, (B, T, D), in the inputs' dtype. The final state is h[:, -1] (h[:, 0] when reversed).

    Raises:
        TypeError: an argument is not a tensor, a flag is not a bool, or a dtype differs or is not supported.
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
    _check("scan", ("a", "b"), (a, b), h0, None)
    return linear_scan(a, b, h0, reverse=_read_flag("scan", "reverse", reverse))


def gated_scan(
    gate: str,
    *pre: Tensor,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    candidate: str = "positive",
    signed: bool = False,
) -> Tensor:
    """Compute a gated recurrence in one pass: pre-activations -> gates -> (a, b) -> scan -> h.

        "mingru":                a = 1 - z,        b = z * g(c)
        "minlstm":               a = f / (f + i),  b = i / (f + i) * g(c)
        "minlstm_unnormalized":  a = f,            b = i * g(c)
        "minema":                a = 1 - alpha * delta,  b = alpha * g(c)
        "identity":              a, b as given: `scan`, with resets

    where z, f, i, alpha and delta are sigmoids of their pre-activations, c is the candidate's pre-activation,
    and g is "positive" (x + 0.5 for x >= 0, sigmoid(x) below), "linear" (x) or "tanh". With signed, a is
    replaced by 2 a - 1: minGRU's decay is 1 - 2 z, minLSTM's (f - i) / (f + i).

    Gates are computed in at least float32. The state is carried in a wider format than h (float64 in the
    reference; pairs of floats in the compiled engines), so that the error does not grow with T; only h is
    rounded to the inputs' dtype. Backward saves the inputs and h, and recomputes the gates.

    Args:
        gate: a name in GATES.
        *pre: the gate's k pre-activations, each (B, T, D); or one packed tensor (B, T, k * D), their
            concatenation along the channels, as a linear layer returns it (it is not copied, and its gradient
            is packed too). float32, float64, bfloat16 or float16; any batch and time strides.
        h0: initial state, (B, D), of the inputs' dtype, float32 or narrower; zeros when None.
        reset: (B, T) bool; where True the state is set to zero before that step (document or episode start).
        reverse: run from the last step to the first.
        candidate: the name of g in CANDIDATES.
        signed: decays lie in (-1, 1); for "mingru" and "minlstm".

    Returns:
        h, (B, T, D), in the inputs' dtype. The final state is h[:, -1] (h[:, 0] when reversed).

    Raises:
        TypeError: an argument is not a tensor, a flag is not a bool, or a dtype differs or is not supported.
        ValueError: an unknown gate or candidate, a gate that has no signed form, a wrong number of
            pre-activations, or a shape or device that does not fit.

    >>> import torch
    >>> z, c = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    >>> gated_scan("mingru", z, c).flatten().tolist()  # half old, half 1 + 0.5
    [0.75, 1.125]

    Source: Feng et al., "Were RNNs All We Needed?" (arXiv 2410.01201), sections 3.1 and 3.2; Grazzi et al.,
    "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" (arXiv 2411.12537), for the signed.
    """
    mode = read_arguments("gated_scan", gate, pre, h0, reset, reverse, candidate, signed)
    return GATED_SCAN((*pre, h0, reset), mode)


# ----------------------------------------------------------------------------------------------------------
# Argument checks, made here only. They are fast, as a single step (T = 1) takes 20 microseconds in all.


def read_arguments(
    function: str,
    gate: str,
    pre: Sequence[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    reverse: Any,
    candidate: str,
    signed: Any,
) -> Mode:
    """Check the arguments of `gated_scan`, or of `function`, which messages name; return its mode."""
    if not isinstance(gate, str) or gate not in GATES:
        raise _unknown(function, "gate", gate, GATES)
    if not isinstance(candidate, str) or candidate not in CANDIDATES:
        raise _unknown(function, "candidate", candidate, CANDIDATES)
    names = GATES[gate].pre
    if candidate != "positive" and not GATES[gate].has_candidate:
        raise ValueError(
            f"{function}: gate {gate!r} has no candidate, got candidate={candidate!r}; leave it out"
        )
    if len(pre) not in (1, len(names)):
        raise ValueError(
            f"{function}: gate {gate!r} takes {len(names)} pre-activations ({', '.join(names)}) "
            f"or one packed tensor, got {len(pre)}"
        )
    _check(function, names if len(pre) > 1 else ("pre",), pre, h0, reset, packed=len(names))
    signed, reverse = _read_flag(function, "signed", signed), _read_flag(function, "reverse", reverse)
    if signed and not GATES[gate].can_be_signed:
        raise ValueError(f"{function}: gate {gate!r} has no signed form, got signed=True; leave it out")
    return Mode(gate, candidate, signed, reverse)


def _unknown(function: str, what: str, name: str, table: dict[str, Any]) -> ValueError:
    hint = nearest(str(name), table)
    plain = str(name).removesuffix("_signed")
    if plain != name and plain in table:
        hint = f"; did you mean {plain!r} with signed=True?"
    return ValueError(f"{function}: {what} must be one of {', '.join(table)}, got {name!r}{hint}")


def _check(
    function: str,
    names: Sequence[str],
    pre: Sequence[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    packed: int = 1,
) -> None:
    first = pre[0]
    check_tensor(function, names[0], first)
    dtype, shape, device = first.dtype, first.shape, first.device
    if dtype not in FLOATS:
        raise TypeError(f"{function}: {names[0]} must be float32, float64, bfloat16 or float16, got {dtype}")
    if len(shape) != 3 or 0 in shape[1:]:
        raise ValueError(
            f"{function}: {names[0]} must be of shape (B, T, D), T and D at least 1, got {tuple(shape)}"
        )
    B, T, D = shape
    if len(pre) > 1:
        for name, x in zip(names[1:], pre[1:], strict=True):
            check_like(function, name, x, (B, T, D), dtype, device, names[0])
    elif D % packed:
        raise ValueError(
            f"{function}: a packed pre needs a multiple of {packed} channels, got {tuple(shape)}"
        )
    else:
        D //= packed
    if h0 is not None:
        check_tensor(function, "h0", h0)
        expected = h0.dtype if h0.dtype in STARTS[dtype] else dtype
        check_like(function, "h0", h0, (B, D), expected, device, names[0])
    if reset is not None:
        check_like(function, "reset", reset, (B, T), torch.bool, device, names[0])


def _read_flag(function: str, name: str, value: Any) -> bool:
    """Return a flag, a Python or NumPy bool, as a Python bool."""
    if isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", None)) == "bool" and value.shape == ():
        return bool(value)
    raise TypeError(f"{function}: {name} must be a bool, got {type(value).__name__}")


def check_tensor(function: str, name: str, x: Any) -> None:
    """Raise unless x is a tensor; the message starts with `function` and `name`, the argument."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(x).__name__}")


def check_like(
    function: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    first: str,
) -> None:
    """Raise unless x is a tensor of this shape, dtype and device, which match the argument `first`."""
    check_tensor(function, name, x)
    if x.shape != shape:
        raise ValueError(
            f"{function}: {name} must be of shape {shape} to go with {first}, got {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {dtype} to go with {first}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{function}: {name} must be on {device} like {first}, got {x.device}")
