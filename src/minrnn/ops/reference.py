"""The specification: a plain loop over time, for any device and dtype. Every other engine must equal it.

All arithmetic is done in the widest floating type the device has, so that its error is that of rounding
the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES

__all__ = [
    "backward",
    "carry_dtype",
    "contiguous",
    "contiguous_channels",
    "forward",
    "initial_state",
    "measured",
    "output_like",
    "output_strides",
    "split",
    "state_dtype",
]


def carry_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which gates and state are computed: float64, or float32 on devices that lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which dh0 leaves an engine: float32 at least, so that 16-bit states can be kept wider."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(gate: str, pre: list[Tensor]) -> list[Tensor]:
    """The gate's pre-activations as separate (B, T, D) views, whether they came packed or not."""
    num_pre = GATES[gate].num_pre
    return list(pre[0].chunk(num_pre, -1)) if len(pre) == 1 else pre


def output_strides(pre: Tensor, D: int) -> tuple[int, int, int]:
    """Strides of a (B, T, D) output: batch-major or time-major, as `pre` is."""
    B, T = pre.shape[:2]
    return (D, B * D, 1) if pre.stride(0) < pre.stride(1) else (T * D, D, 1)


def output_like(pre: Tensor, D: int) -> Tensor:
    """An uninitialised (B, T, D) tensor, laid out as `pre` is, and no view of another."""
    B, T = pre.shape[:2]
    return pre.new_empty_strided((B, T, D), output_strides(pre, D))


def contiguous_channels(x: Tensor) -> Tensor:
    """x itself where its channels are contiguous and its values are stored as they read; else a copy."""
    if x.is_neg():
        x = measured(x).resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else measured(x).contiguous()


def contiguous(x: Tensor) -> Tensor:
    """x itself where it is contiguous and its values are stored as they read; else a copy."""
    return x if x.is_contiguous() and not x.is_neg() else measured(x).resolve_neg().contiguous()


def measured(x: Tensor) -> Tensor:
    """x, to be copied. torch reads it without looking how long its storage is, which may have been freed.

    Raises:
        RuntimeError: its storage is shorter than it is.
    """
    return x.as_strided(x.shape, x.stride(), x.storage_offset())


def initial_state(h0: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """h0 as an engine for inputs of `dtype` reads it: see `state_dtype` and `contiguous_channels`."""
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
    """h[t] = a[t] h[t-1] + b[t], h[-1] = h0, one step after another."""
    parts = [_in_order(x.to(carry_dtype(x.device)), reverse) for x in split(gate, pre)]
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
    """Gradients of every tensor in `pre`, then of h0. The adjoint of a scan is a scan run backwards.

    g[t] = dh[t] + a[t+1] g[t+1];  da[t] = g[t] h[t-1];  db[t] = g[t];  dh0 = a[0] g[0].
    """
    dtype = carry_dtype(h.device)
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


def _in_order(x: Tensor, reverse: bool) -> Tensor:
    """The steps in the order in which the recurrence visits them."""
    return x.flip(1) if reverse else x


def _forget(reset: Tensor | None, reverse: bool) -> Tensor | None:
    """(B, T, 1) bool in the order of the recurrence."""
    return None if reset is None else _in_order(reset, reverse).unsqueeze(-1)


def _initial(h0: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like[:, 0]) if h0 is None else h0.to(like.dtype)
