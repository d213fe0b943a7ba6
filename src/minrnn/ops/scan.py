"""The recurrence h[t] = a[t] h[t-1] + b[t]: public functions, checks, derivatives and registration.

Eager calls go through an autograd.Function (its overhead is a quarter of a registered operator's autograd);
graphs that torch.compile or torch.export trace hold the operator `minrnn::gated_scan` itself. Both share the
checks, the backward, and the rule for batching below, so there is one law and two doors.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from minrnn.ops.engines import ENGINES, forced, load
from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.reference import output_like, split

__all__ = ["gated_scan", "scan"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    return _apply([a, b], h0, None, "identity", "positive", reverse)


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
    return _apply(list(pre), h0, reset, gate, candidate, reverse)


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
    if first.dtype not in _FLOATS:
        raise TypeError(
            f"{function}: {names[0]} must be float32, float64, bfloat16 or float16, got {first.dtype}"
        )
    if first.dim() != 3 or 0 in first.shape:
        raise ValueError(
            f"{function}: {names[0]} must be of shape (B, T, D), all at least 1, got {tuple(first.shape)}"
        )
    for name, x in zip(names[1:], pre[1:], strict=True):
        _check_like(function, name, x, tuple(first.shape), first.dtype, first.device, names[0])
    B, T, D = first.shape
    if len(pre) == 1:
        if D % packed:
            raise ValueError(
                f"{function}: a packed pre needs a multiple of {packed} channels, got {tuple(first.shape)}"
            )
        D //= packed
    if h0 is not None:
        dtype = torch.float32 if h0.dtype == torch.float32 and first.dtype != torch.float64 else first.dtype
        _check_like(function, "h0", h0, (B, D), dtype, first.device, names[0])
    if reset is not None:
        _check_like(function, "reset", reset, (B, T), torch.bool, first.device, names[0])


def _check_like(
    function: str,
    name: str,
    x: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    first: str,
) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{function}: {name} must be of shape {shape} to go with {first}, got {tuple(x.shape)}"
        )
    if x.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {dtype} to go with {first}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{function}: {name} must be on {device} like {first}, got {x.device}")


# ----------------------------------------------------------------------------------------------------------
# Operators. `pre` holds the gate's k tensors, or one packed tensor.

_LIBRARY = torch.library.Library("minrnn", "DEF")
_LIBRARY.define(
    "gated_scan(Tensor[] pre, Tensor? h0, Tensor? reset, str gate, str candidate, bool reverse) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "gated_scan_backward(Tensor dh, Tensor[] pre, Tensor h, Tensor? h0, Tensor? reset, "
    "str gate, str candidate, bool reverse) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_forward_op = torch.ops.minrnn.gated_scan.default
_backward_op = torch.ops.minrnn.gated_scan_backward.default


def _register_engines() -> None:
    chosen = forced()
    for name, (_, _, key) in ENGINES.items():
        if chosen not in (None, name) and name != "reference":
            continue
        module = load(name)
        if isinstance(module, ImportError):
            if chosen == name:
                raise RuntimeError(f"MINRNN_ENGINE={name}, but that engine cannot load: {module}") from module
            continue
        _LIBRARY.impl("gated_scan", module.forward, key)
        _LIBRARY.impl("gated_scan_backward", module.backward, key)


_register_engines()


@torch.library.register_fake("minrnn::gated_scan", lib=_LIBRARY)
def _forward_fake(
    pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, gate: str, candidate: str, reverse: bool
) -> Tensor:
    return output_like(pre[0], split(gate, pre)[0].shape[2])


@torch.library.register_fake("minrnn::gated_scan_backward", lib=_LIBRARY)
def _backward_fake(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> list[Tensor]:
    dh0 = h.new_empty(
        h.shape[0], h.shape[2], dtype=torch.float64 if h.dtype == torch.float64 else torch.float32
    )
    return [*(output_like(x, x.shape[2]) for x in pre), dh0]


def _apply(
    pre: list[Tensor], h0: Tensor | None, reset: Tensor | None, gate: str, candidate: str, reverse: bool
) -> Tensor:
    if torch.compiler.is_compiling():
        return _forward_op(pre, h0, reset, gate, candidate, reverse)
    return _GatedScan.apply(gate, candidate, reverse, h0, reset, *pre)


# ----------------------------------------------------------------------------------------------------------
# Derivatives. A scan's backward and forward derivatives are scans, so all orders close over this file.


def _backward(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """Gradients of (pre, h0): the engine's fused pass, or differentiable scans if those will be asked for."""
    if torch.is_grad_enabled():  # create_graph=True, or a functorch transform
        dpre, dh0 = _differentiable_backward(dh, pre, h, h0, reset, gate, candidate, reverse)
    else:
        *dpre, dh0 = _backward_op(dh, pre, h, h0, reset, gate, candidate, reverse)
    return dpre, None if h0 is None else dh0.to(h0.dtype)


def _differentiable_backward(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> tuple[list[Tensor], Tensor]:
    """g[t] = dh[t] + a[t+1] g[t+1];  da[t] = g[t] h[t-1];  db[t] = g[t];  dh0 = a[0] g[0]."""
    parts, a, h_prev = _linearise(pre, h, h0, reset, gate, candidate, reverse)
    zero = torch.zeros_like(a[:, :1])
    a_next = torch.cat([zero, a[:, :-1]] if reverse else [a[:, 1:], zero], 1)
    g = scan(a_next, dh.to(a.dtype), reverse=not reverse)
    dparts = GATES[gate].pullback(CANDIDATES[candidate], parts, g * h_prev, g)
    dpre = [torch.cat(dparts, -1)] if len(pre) == 1 else dparts
    start = -1 if reverse else 0
    return [d.to(x.dtype) for d, x in zip(dpre, pre, strict=True)], a[:, start] * g[:, start]


def _tangent(
    tangents: list[Tensor | None],
    dh0: Tensor | None,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> Tensor:
    """The forward-mode derivative: dh[t] = a[t] dh[t-1] + (da[t] h[t-1] + db[t])."""
    parts, a, h_prev = _linearise(pre, h, h0, reset, gate, candidate, reverse)
    filled = [torch.zeros_like(x) if d is None else d for d, x in zip(tangents, pre, strict=True)]
    dparts = [d.to(a.dtype) for d in split(gate, filled)]
    da, db = GATES[gate].pushforward(CANDIDATES[candidate], parts, dparts)
    return scan(a, da * h_prev + db, None if dh0 is None else dh0.to(a.dtype), reverse=reverse).to(h.dtype)


def _linearise(
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Separate pre-activations, decays and previous states, resets applied, in float32 or wider."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    parts = [x.to(dtype) for x in split(gate, pre)]
    a, _ = GATES[gate].equations(CANDIDATES[candidate], *parts)
    h = h.to(dtype)
    first = torch.zeros_like(h[:, :1]) if h0 is None else h0.to(dtype).unsqueeze(1)
    h_prev = torch.cat([h[:, 1:], first] if reverse else [first, h[:, :-1]], 1)
    if reset is not None:
        a, h_prev = (x.masked_fill(reset.unsqueeze(-1), 0) for x in (a, h_prev))
    return parts, a, h_prev


class _GatedScan(torch.autograd.Function):
    """The eager door: apply(gate, candidate, reverse, h0, reset, *pre) -> h."""

    @staticmethod
    def forward(
        gate: str, candidate: str, reverse: bool, h0: Tensor | None, reset: Tensor | None, *pre: Tensor
    ) -> Tensor:
        return _forward_op(list(pre), h0, reset, gate, candidate, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gate, ctx.candidate, ctx.reverse, h0, reset, *pre = inputs
        ctx.save_for_backward(h0, reset, output, *pre)
        ctx.save_for_forward(h0, reset, output, *pre)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
        h0, reset, h, *pre = ctx.saved_tensors
        dpre, dh0 = _backward(dh, pre, h, h0, reset, ctx.gate, ctx.candidate, ctx.reverse)
        return None, None, None, dh0, None, *dpre

    @staticmethod
    def jvp(
        ctx: Any, _gate: None, _candidate: None, _reverse: None, dh0: Any, _reset: Any, *dpre: Any
    ) -> Tensor:
        h0, reset, h, *pre = ctx.saved_tensors
        return _tangent(list(dpre), dh0, pre, h, h0, reset, ctx.gate, ctx.candidate, ctx.reverse)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        gate: str,
        candidate: str,
        reverse: bool,
        h0: Tensor | None,
        reset: Tensor | None,
        *pre: Tensor,
    ) -> tuple[Tensor, int]:
        h0, reset, *pre = (
            _fold(x, dim, info.batch_size) for x, dim in zip((h0, reset, *pre), in_dims[3:], strict=True)
        )
        h = _GatedScan.apply(gate, candidate, reverse, h0, reset, *pre)
        return h.unflatten(0, (info.batch_size, -1)), 0


def _fold(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The batched dimension, moved in front and merged with B."""
    if x is None:
        return None
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pre, h0, reset, ctx.gate, ctx.candidate, ctx.reverse = inputs
    ctx.save_for_backward(h0, reset, output, *pre)


def _operator_backward(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    h0, reset, h, *pre = ctx.saved_tensors
    dpre, dh0 = _backward(dh, pre, h, h0, reset, ctx.gate, ctx.candidate, ctx.reverse)
    return dpre, dh0, None, None, None, None


def _operator_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> tuple[Tensor, int]:
    flat_dims = (None, None, None, in_dims[1], in_dims[2], *in_dims[0])
    return _GatedScan.vmap(info, flat_dims, gate, candidate, reverse, h0, reset, *pre)


torch.library.register_autograd(
    "minrnn::gated_scan", _operator_backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_vmap("minrnn::gated_scan", _operator_vmap, lib=_LIBRARY)


def _backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    reverse: bool,
) -> tuple[list[Tensor], list[int]]:
    """Batched gradients (torch.autograd.grad with is_grads_batched) of a scan that was not batched itself."""
    dims = (in_dims[0], in_dims[2], in_dims[3], in_dims[4], *in_dims[1])
    dh, h, h0, reset, *pre = (
        _fold(x, dim, info.batch_size) for x, dim in zip((dh, h, h0, reset, *pre), dims, strict=True)
    )
    gradients = _backward_op(dh, pre, h, h0, reset, gate, candidate, reverse)
    return [d.unflatten(0, (info.batch_size, -1)) for d in gradients], [0] * len(gradients)


torch.library.register_vmap("minrnn::gated_scan_backward", _backward_vmap, lib=_LIBRARY)
