"""The operator `minrnn::gated_scan` and its derivatives of every order.

Its tensors are (*pre, h0, reset), where `pre` is the gate's k tensors or one packed tensor. Arguments are not
checked here: recurrence.py does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.operators import Operator, Tensors
from minrnn.ops.reference import output_like, split, state_dtype
from minrnn.ops.registry import ENGINES, serving

__all__ = ["GATED_SCAN", "MODULES", "Mode", "following", "linear_scan", "new_output"]


MODULES = {name: module for name, (module, _, _) in ENGINES.items()}
"""The modules that implement the gated scan, by engine name."""


class Mode(NamedTuple):
    """The kind of recurrence: the trailing arguments of the operators."""

    gate: str
    """A name in GATES."""
    candidate: str
    """A name in CANDIDATES."""
    signed: bool
    """Whether decays lie in (-1, 1)."""
    reverse: bool
    """Whether to run from the last step to the first."""


_MODE = "str gate, str candidate, bool signed, bool reverse"


class GatedScan(Operator):
    """The operator behind `minrnn.ops.gated_scan`."""

    name = "gated_scan"
    schema = f"(Tensor[] pre, Tensor? h0, Tensor? reset, {_MODE}) -> Tensor"
    backward_schema = f"(Tensor dh, Tensor[] pre, Tensor h, Tensor? h0, Tensor? reset, {_MODE}) -> Tensor[]"
    modules = MODULES

    def pack(self, tensors: Tensors, mode: Mode, record: bool) -> tuple[Any, ...]:
        *pre, h0, reset = tensors
        return pre, h0, reset, *mode

    def unpack(self, arguments: Sequence[Any]) -> tuple[tuple[Any, ...], Mode]:
        pre, h0, reset, *mode = arguments
        return (*pre, h0, reset), Mode(*mode)

    def pack_backward(
        self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Mode
    ) -> tuple[Any, ...]:
        *pre, h0, reset = tensors
        return gradients[0], pre, kept, h0, reset, *mode

    def unpack_backward(self, arguments: Sequence[Any]) -> tuple[Tensors, Any, tuple[Any, ...], Mode]:
        dh, pre, h, h0, reset, *mode = arguments
        return (dh,), h, (*pre, h0, reset), Mode(*mode)

    def fake(self, *arguments: Any) -> Tensor:
        (*pre, _, _), mode = self.unpack(arguments)
        return output_like(pre[0], split(mode.gate, pre)[0].shape[2])

    def fake_backward(self, *arguments: Any) -> list[Tensor]:
        _, h, (*pre, _, _), _ = self.unpack_backward(arguments)
        dh0 = h.new_empty(h.shape[0], h.shape[2], dtype=state_dtype(h.dtype))
        return [*(output_like(x, x.shape[2]) for x in pre), dh0]

    # Both derivatives of a scan are scans, so that derivatives of all orders are made of this operator.

    def differentiable_gradients(
        self, gradients: Tensors, kept: Tensor, tensors: Tensors, mode: Mode
    ) -> list[Tensor]:
        """g[t] = dh[t] + a[t+1] g[t+1];  da[t] = g[t] h[t-1];  db[t] = g[t];  dh0 = a[0] g[0]."""
        (dh,), pre, reset = gradients, tensors[:-2], tensors[-1]
        parts, a, h_prev = _linearize(tensors, kept, mode)
        reset_next = None if reset is None else following(reset, reverse=mode.reverse)
        a_next = following(a, reverse=mode.reverse)
        g = linear_scan(a_next, dh.to(a.dtype), None, reset_next, reverse=not mode.reverse)
        dparts = GATES[mode.gate].pullback(
            CANDIDATES[mode.candidate], parts, g * h_prev, g, signed=mode.signed
        )
        dpre = [torch.cat(dparts, -1)] if len(pre) == 1 else dparts
        start = -1 if mode.reverse else 0
        dh0 = a[:, start] * g[:, start]
        if reset is not None:
            dh0 = dh0.masked_fill(reset[:, start].unsqueeze(-1), 0)
        return [*(d.to(x.dtype) for d, x in zip(dpre, pre, strict=True)), dh0]

    def tangents(self, tangents: Tensors, kept: Tensor, tensors: Tensors, mode: Mode) -> tuple[Tensor]:
        """dh[t] = a[t] dh[t-1] + (da[t] h[t-1] + db[t])."""
        pre, (dpre, dh0) = tensors[:-2], (tangents[: len(tensors) - 2], tangents[len(tensors) - 2])
        parts, a, h_prev = _linearize(tensors, kept, mode)
        filled = [torch.zeros_like(x) if d is None else d for d, x in zip(dpre, pre, strict=True)]
        dparts = [d.to(a.dtype) for d in split(mode.gate, filled)]
        da, db = GATES[mode.gate].pushforward(CANDIDATES[mode.candidate], parts, dparts, signed=mode.signed)
        dh0 = None if dh0 is None else dh0.to(a.dtype)
        dh = linear_scan(a, da * h_prev + db, dh0, tensors[-1], reverse=mode.reverse)
        return (dh.to(kept.dtype),)


def _linearize(tensors: Tensors, h: Tensor, mode: Mode) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return separate pre-activations, decays, and previous states after resets, in at least float32."""
    *pre, h0, reset = tensors
    dtype = torch.promote_types(h.dtype, torch.float32)
    parts = [x.to(dtype) for x in split(mode.gate, pre)]
    a, _ = GATES[mode.gate].equations(CANDIDATES[mode.candidate], *parts, signed=mode.signed)
    h = h.to(dtype)
    first = torch.zeros_like(h[:, :1]) if h0 is None else h0.to(dtype).unsqueeze(1)
    h_prev = torch.cat([h[:, 1:], first] if mode.reverse else [first, h[:, :-1]], 1)
    if reset is not None:
        h_prev = h_prev.masked_fill(reset.unsqueeze(-1), 0)
    return parts, a, h_prev


GATED_SCAN = GatedScan()


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None, reset: Tensor | None = None, *, reverse: bool
) -> Tensor:
    """Compute h[t] = a[t] h[t-1] + b[t], without checks of the arguments."""
    return GATED_SCAN((a, b, h0, reset), Mode("identity", "positive", False, reverse))


def following(x: Tensor, *, reverse: bool = False) -> Tensor:
    """Return x (B, T, ...) at the next step of the recurrence, zero after the last."""
    zero = torch.zeros_like(x[:, :1])
    return torch.cat([zero, x[:, :-1]] if reverse else [x[:, 1:], zero], 1)


def new_output(like: Tensor, D: int) -> Tensor:
    """Allocate an uninitialized (B, T, D) tensor with the layout of `like`, as the CPU engine does."""
    return _new_output()(like, D)


@cache
def _new_output() -> Callable[[Tensor, int], Tensor]:
    return getattr(serving("cpp", MODULES), "new_output", output_like)
