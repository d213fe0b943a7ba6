"""The reference engine: a plain loop over time, for any device and dtype. Other engines must agree with it.

All arithmetic is done in the device's widest floating type, so that the error is that of rounding the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.devices import widest_float
from minrnn.ops.gates import CANDIDATES, GATES

__all__ = [
    "backward",
    "contiguous",
    "contiguous_channels",
    "forward",
    "initial_state",
    "measured",
    "output_like",
    "output_strides",
    "prefix",
    "prefix_backward",
    "split",
    "state_dtype",
]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of an engine's dh0: at least float32, so that 16-bit states can be kept wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(gate: str, pre: list[Tensor]) -> list[Tensor]:
    """Return the gate's pre-activations, packed or not, as separate (B, T, D) views."""
    num_pre = GATES[gate].num_pre
    return list(pre[0].chunk(num_pre, -1)) if len(pre) == 1 else pre


def output_strides(pre: Tensor, D: int) -> tuple[int, int, int]:
    """Return the strides of a (B, T, D) output: batch-major or time-major, as `pre` is."""
    B, T = pre.shape[:2]
    return (D, B * D, 1) if pre.stride(0) < pre.stride(1) else (T * D, D, 1)


def output_like(pre: Tensor, D: int) -> Tensor:
    """Return an uninitialized (B, T, D) tensor with the memory layout of `pre`; it is not a view."""
    B, T = pre.shape[:2]
    return pre.new_empty_strided((B, T, D), output_strides(pre, D))


def contiguous_channels(x: Tensor) -> Tensor:
    """Return x if its channels are contiguous and it has no lazy negation, else a copy."""
    if x.is_neg():
        x = measured(x).resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else measured(x).contiguous()


def contiguous(x: Tensor) -> Tensor:
    """Return x if it is contiguous and has no lazy negation, else a copy."""
    return x if x.is_contiguous() and not x.is_neg() else measured(x).resolve_neg().contiguous()


def measured(x: Tensor) -> Tensor:
    """Return a view of x whose bounds are checked, to be copied: torch copies a tensor without checking them.

    Raises:
        RuntimeError: the storage was freed, or is smaller than x.
    """
    return x.as_strided(x.shape, x.stride(), x.storage_offset())


def initial_state(h0: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert h0 for an engine whose inputs are of `dtype`: see `state_dtype` and `contiguous_channels`."""
    if h0 is None:
        return None
    wide = state_dtype(dtype)
    return contiguous_channels(h0 if h0.dtype == wide else measured(h0).to(wide))


def forward(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """Compute h[t] = a[t] h[t-1] + b[t], h[-1] = h0, step by step."""
    parts = [_in_order(x.to(widest_float(x.device)), reverse) for x in split(gate, pre)]
    a, b = GATES[gate].equations(CANDIDATES[candidate], *parts, signed=signed)
    forget = _forget(reset, reverse)
    h = torch.empty_like(b)
    carry = _initial(h0, a)
    for t in range(a.shape[1]):
        carry = a[:, t] * (carry if forget is None else carry.masked_fill(forget[:, t], 0)) + b[:, t]
        h[:, t] = carry
    return output_like(pre[0], a.shape[2]).copy_(_in_order(h, reverse))


def backward(
    dh: Tensor,
    pre: list[Tensor],
    h: Tensor,
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> list[Tensor]:
    """Compute the gradients of every tensor in `pre` and of h0; the adjoint of a scan is a reverse scan.

    g[t] = dh[t] + a[t+1] g[t+1];  da[t] = g[t] h[t-1];  db[t] = g[t];  dh0 = a[0] g[0]
    """
    dtype = widest_float(h.device)
    parts = [_in_order(x.to(dtype), reverse) for x in split(gate, pre)]
    a, b = GATES[gate].equations(CANDIDATES[candidate], *parts, signed=signed)
    forget = _forget(reset, reverse)
    h_prev = torch.cat([_initial(h0, a).unsqueeze(1), _in_order(h.to(dtype), reverse)[:, :-1]], 1)
    if forget is not None:
        h_prev = h_prev.masked_fill(forget, 0)
    g = torch.empty_like(b)
    carry = torch.zeros_like(b[:, 0])
    for t in reversed(range(a.shape[1])):
        g[:, t] = _in_order(dh, reverse)[:, t].to(dtype) + carry
        carry = a[:, t] * g[:, t]
        if forget is not None:
            carry = carry.masked_fill(forget[:, t], 0)
    dparts = GATES[gate].pullback(CANDIDATES[candidate], parts, g * h_prev, g, signed=signed)
    dparts = [_in_order(d, reverse) for d in dparts]
    dpre = [torch.cat(dparts, -1)] if len(pre) == 1 else dparts
    return [*(d.to(x.dtype) for d, x in zip(dpre, pre, strict=True)), carry.to(state_dtype(h.dtype))]


def prefix(
    pre: list[Tensor], reset: Tensor | None, gate: str, candidate: str, signed: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Compute what all steps together do to the state before them: h -> decay * h + end.

    Returns:
        The product of the decays, zero where there is a reset, and the last state from zero; (B, D) each, of
        `state_dtype`.
    """
    parts = [_in_order(x.to(widest_float(x.device)), reverse) for x in split(gate, pre)]
    a, b = GATES[gate].equations(CANDIDATES[candidate], *parts, signed=signed)
    forget = _forget(reset, reverse)
    decay, end = torch.ones_like(a[:, 0]), torch.zeros_like(b[:, 0])
    for t in range(a.shape[1]):
        if forget is not None:
            decay, end = decay.masked_fill(forget[:, t], 0), end.masked_fill(forget[:, t], 0)
        decay, end = a[:, t] * decay, a[:, t] * end + b[:, t]
    wide = state_dtype(pre[0].dtype)
    return decay.to(wide), end.to(wide)


def prefix_backward(
    dh: Tensor,
    pre: list[Tensor],
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    """Compute the gradient of the state before all steps, given that of every state: `backward`'s last."""
    return backward(dh, pre, torch.zeros_like(dh), None, reset, gate, candidate, signed, reverse)[-1]


def _in_order(x: Tensor, reverse: bool) -> Tensor:
    """Return the steps in the order of the recurrence."""
    return x.flip(1) if reverse else x


def _forget(reset: Tensor | None, reverse: bool) -> Tensor | None:
    """Return the resets as (B, T, 1), bool, in the order of the recurrence."""
    return None if reset is None else _in_order(reset, reverse).unsqueeze(-1)


def _initial(h0: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like[:, 0]) if h0 is None else h0.to(like.dtype)
