"""The operators in torch's own operations, for programs that run where minrnn is not installed."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minrnn.ops.gated import GATED_SCAN, Mode
from minrnn.ops.gates import CANDIDATES, GATES
from minrnn.ops.reference import split, state_dtype
from minrnn.ops.selective.operator import SELECTIVE_SCAN
from minrnn.ops.selective.reference import Inputs
from minrnn.ops.torch_private import scan_operator

__all__ = ["MOST_UNROLLED", "decompositions"]

MOST_UNROLLED = 4
"""Steps up to which a program of a fixed length holds each step by itself, and no loop."""

Step = Callable[..., tuple[Tensor, Tensor]]
"""(state, *a step's inputs) -> (state after the step, a step's output)."""


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return minrnn's operators in torch's own operations, for `ExportedProgram.run_decompositions`.

        program = torch.export.export(module, arguments).run_decompositions(decompositions())

    A scan becomes the gate's equations and h[t] = a[t] h[t-1] + b[t]: for a single step one multiplication
    and one addition, for a sequence the operator `torch.ops.higher_order.scan`. It is computed in float32 at
    least; unlike minrnn's engines it does not keep a wider state between steps. So does `torch.cummax`, which
    Aaren uses and few other runtimes have. Derivatives are not decomposed: the program is one of inference.

    Returns:
        A table from torch's operators to functions, to which others may be added.

    >>> import torch
    >>> from minrnn import MinGRU
    >>> program = torch.export.export(MinGRU(4, 8), (torch.zeros(1, 2, 4),))
    >>> program = program.run_decompositions(decompositions())
    >>> any("minrnn" in str(node.target) for node in program.graph.nodes)
    False
    """
    return {
        GATED_SCAN.forward_op: _gated_scan,
        SELECTIVE_SCAN.forward_op: _selective_scan,
        torch.ops.aten.cummax.default: _cummax,
    }


def _gated_scan(
    pre: list[Tensor],
    h0: Tensor | None,
    reset: Tensor | None,
    gate: str,
    candidate: str,
    signed: bool,
    reverse: bool,
) -> Tensor:
    mode, narrow = Mode(gate, candidate, signed, reverse), pre[0].dtype
    dtype = torch.promote_types(narrow, torch.float32)
    parts = [x.to(dtype) for x in split(mode.gate, pre)]
    a, b = GATES[mode.gate].equations(CANDIDATES[mode.candidate], *parts, signed=mode.signed)
    if reset is not None:
        a = a.masked_fill(reset.unsqueeze(-1), 0)
    start = torch.zeros_like(b[:, 0]) if h0 is None else h0.to(dtype)
    _, h = _over_time(_advance, start, (a, b), reverse=mode.reverse)
    return h.to(narrow)


def _advance(h: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = a * h + b
    return h, h


def _selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, _ = arguments
    given = Inputs(*tensors)
    narrow = given.u.dtype
    x = given.biased(torch.promote_types(narrow, torch.float32))
    delta = functional.softplus(x.delta_pre)
    # N times as large as the inputs; but exporters take no loop with constants, as A would be in it.
    a = (delta.unsqueeze(-1) * x.A).exp()
    if x.reset is not None:
        a = a.masked_fill(x.reset[..., None, None], 0)
    start = torch.zeros_like(a[:, 0]) if x.h0 is None else x.h0
    # Copies, as B and C may be views of one tensor: the loop takes none that share memory.
    last, y = _over_time(_select, start, (a, delta * x.u, x.B.clone(), x.C.clone()), reverse=False)
    y = y if x.D is None else y + x.D * x.u
    y = y if x.z is None else y * functional.silu(x.z)
    borders = given.u.new_empty(given.u.shape[0], 0, given.u.shape[2], dtype=state_dtype(narrow))
    return y.to(narrow), last.to(state_dtype(narrow)), borders


def _select(h: Tensor, a: Tensor, inflow: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    h = a * h + inflow.unsqueeze(-1) * B.unsqueeze(1)
    return h, (h * C.unsqueeze(1)).sum(-1)


def _cummax(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    highest = _running_max(x, dim)
    is_new = (x == highest) | x.isnan() if x.is_floating_point() else x == highest
    at = torch.arange(x.shape[dim], device=x.device).view([-1] + [1] * (x.dim() - 1)).movedim(0, dim)
    return highest, _running_max(torch.where(is_new, at, 0), dim)


def _running_max(x: Tensor, dim: int) -> Tensor:
    def advance(highest: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        highest = torch.maximum(highest, now)
        return highest, highest

    by_time = x.movedim(dim, 0).unsqueeze(0)  # (1, T, ...)
    least = -inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    start = x.new_full((1, *by_time.shape[2:]), least)
    return _over_time(advance, start, (by_time,), reverse=False)[1].squeeze(0).movedim(0, dim)


def _over_time(
    step: Step, start: Tensor, inputs: tuple[Tensor, ...], *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the state after the last step, and all outputs (B, T, ...), of inputs (B, T, ...)."""
    T = inputs[0].shape[1]
    if isinstance(T, int) and T == 1:
        last, y = step(start, *(x.squeeze(1) for x in inputs))
        return last, y.unsqueeze(1)
    if isinstance(T, int) and T <= MOST_UNROLLED:
        h, outputs = start, []
        for t in reversed(range(T)) if reverse else range(T):
            h, y = step(h, *(x[:, t] for x in inputs))
            outputs.append(y)
        return h, torch.stack(outputs[::-1] if reverse else outputs, 1)

    def combine(h: Tensor, *terms: Tensor) -> list[Tensor]:
        h, y = step(h, *terms)
        return [h, y.clone()]  # the operator's outputs must not share memory

    by_time = [x.movedim(1, 0).flip(0) if reverse else x.movedim(1, 0) for x in inputs]
    last, y = scan_operator()(combine, [start], by_time, ())
    return last, (y.flip(0) if reverse else y).movedim(0, 1)
