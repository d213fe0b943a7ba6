"""The portable engine of the selective scan: torch's operations, for any device (see ops/spans.py).

Time is divided into blocks. The states of a block are held for all its steps, those of other blocks are not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from minrnn.ops.reference import output_like, state_dtype
from minrnn.ops.selective.reference import CHUNK, Inputs, empty_borders, silu_slope
from minrnn.ops.spans import Rule, back_over_steps, in_three_passes, over_steps, steps_at_once

__all__ = ["backward", "forward"]


def forward(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.forward`."""
    dtype = state_dtype(given.u.dtype)
    y, borders = output_like(given.u, given.u.shape[2]), empty_borders(given, save)
    last = given.u.new_zeros(given.u.shape[0], *given.A.shape, dtype=dtype)
    if given.h0 is not None:
        last = given.h0.to(dtype)
    for times in _blocks(given):
        block = _Block(given, times, dtype)
        h, following = block.states(last)
        y[:, times] = block.ungated(h) if block.x.z is None else block.ungated(h) * silu(block.x.z)
        if save:
            before = torch.cat([last.unsqueeze(1), h[:, CHUNK - 1 : -1 : CHUNK]], 1)
            _borders(borders, times, given).copy_(before.mT)
        last = following  # not h[:, -1], which is h before it, rounded in each step of a span
    return y, last.clone(), borders


def backward(dy: Tensor, dlast: Tensor, borders: Tensor, given: Inputs) -> list[Tensor]:
    """Compute `reference.backward`."""
    dtype, channels = borders.dtype, given.u.shape[2]
    whole = _Sequences(
        u=output_like(given.u, channels),
        delta_pre=output_like(given.u, channels),
        B=given.B.new_empty(given.B.shape),
        C=given.C.new_empty(given.C.shape),
        z=None if given.z is None else output_like(given.u, channels),
    )
    reaching, sums = dlast.to(dtype), []
    for times in reversed(_blocks(given)):
        block = _Block(given, times, dtype)
        start = _borders(borders, times, given)[:, 0].mT
        part, some, reaching = block.gradients(dy[:, times].to(dtype), start, reaching)
        for x, d in zip(whole, part, strict=True):
            if x is not None and d is not None:
                x[:, times] = d
        sums.append(some)
    # The sum of few sums is as exact as they are; one running sum would round at every step.
    total = _Sums(*(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)))
    return [
        whole.u,
        whole.delta_pre,
        total.A,
        whole.B,
        whole.C,
        given.A.new_empty(0, dtype=dtype) if given.D is None else total.D,
        given.u.new_empty(0) if whole.z is None else whole.z,
        given.A.new_empty(0, dtype=dtype) if given.delta_bias is None else total.delta_bias,
        reaching,
    ]


class _Sequences(NamedTuple):
    """The gradients of sequences."""

    u: Tensor
    delta_pre: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


class _Sums(NamedTuple):
    """The gradients of parameters, summed over steps."""

    A: Tensor
    D: Tensor
    delta_bias: Tensor


class _Block:
    """The inputs of some steps, `biased` in the dtype of the state, and their decays."""

    def __init__(self, given: Inputs, times: slice, dtype: torch.dtype) -> None:
        u, delta_pre, B, C = (x[:, times] for x in (given.u, given.delta_pre, given.B, given.C))
        z, reset = (None if x is None else x[:, times] for x in (given.z, given.reset))
        parts = given._replace(u=u, delta_pre=delta_pre, B=B, C=C, z=z, reset=reset, h0=None)
        self.x = parts.biased(dtype)
        self.delta = softplus(self.x.delta_pre)
        exponent = self.delta.unsqueeze(-1) * self.x.A
        self.a, self.loss = exponent.exp(), exponent.expm1_().neg_()

    def states(self, start: Tensor) -> tuple[Tensor, Tensor]:
        """Compute h, (B, steps, D, N), and the state after the block."""
        term = (self.delta * self.x.u).unsqueeze(-1) * self.x.B.unsqueeze(2)
        return _scan_channels(self, over_steps, term, start, reverse=False)

    def ungated(self, h: Tensor) -> Tensor:
        """Compute y before its gate."""
        y = torch.einsum("btdn,btn->btd", h, self.x.C)
        return y if self.x.D is None else y.addcmul(self.x.D, self.x.u)

    def gradients(self, dy: Tensor, start: Tensor, reaching: Tensor) -> tuple[_Sequences, _Sums, Tensor]:
        """Compute the gradients of the block's sequences, its sums, and a[t] g[t] of its first step.

        Args:
            dy: gradient of the output.
            start: the state before the block, (B, D, N).
            reaching: a[t] g[t] of the first step after the block.
        """
        x, delta = self.x, self.delta
        h, _ = self.states(start)
        dz = None
        if x.z is not None:
            dz = dy * self.ungated(h) * silu_slope(x.z)
            dy = dy * silu(x.z)
        inflow = dy.unsqueeze(-1) * x.C.unsqueeze(2)
        g, reaching = _scan_channels(self, back_over_steps, inflow, reaching, reverse=True)
        before = torch.cat([start.unsqueeze(1), h[:, :-1]], 1)
        if x.reset is not None:
            before = before.masked_fill(x.reset[:, :, None, None], 0)
        to_exponent = before.mul_(self.a).mul_(g)
        to_term = torch.einsum("btdn,btn->btd", g, x.B)
        to_delta = torch.einsum("btdn,dn->btd", to_exponent, x.A) + to_term * x.u
        ddelta_pre = to_delta * torch.sigmoid(x.delta_pre)
        sequences = _Sequences(
            u=to_term * delta if x.D is None else to_term * delta + dy * x.D,
            delta_pre=ddelta_pre,
            B=torch.einsum("btdn,btd->btn", g, delta * x.u),
            C=torch.einsum("btd,btdn->btn", dy, h),
            z=dz,
        )
        sums = _Sums(
            # Not einsum: the error of a matrix product, which adds step after step, grows with T.
            A=to_exponent.mul_(delta.unsqueeze(-1)).sum((0, 1)),
            D=(dy * x.u).sum((0, 1)),
            delta_bias=ddelta_pre.sum((0, 1)),
        )
        return sequences, sums, reaching


def _scan_channels(
    block: _Block, rule: Rule, b: Tensor, start: Tensor, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Scan all N numbers of all channels at once."""
    a, loss, term = (x.flatten(2) for x in (block.a, block.loss, b))
    h, last = in_three_passes(a, loss, term, start.flatten(1), block.x.reset, rule=rule, reverse=reverse)
    return h.unflatten(2, b.shape[2:]), last.unflatten(1, b.shape[2:])


def _blocks(x: Inputs) -> list[slice]:
    """Divide time into blocks of whole chunks."""
    batch, T, channels = x.u.shape
    steps = CHUNK * max(1, steps_at_once(batch * channels * x.A.shape[1], x.u.device) // CHUNK)
    return [slice(start, min(start + steps, T)) for start in range(0, T, steps)]


def _borders(borders: Tensor, times: slice, x: Inputs) -> Tensor:
    """Return a view of the saved states before a block's chunks, (B, chunks, N, D)."""
    chunks = -(-(times.stop - times.start) // CHUNK)
    return borders.unflatten(1, (-1, x.A.shape[1])).narrow(1, times.start // CHUNK, chunks)
