"""The reference engine of the selective scan: a plain loop over time, for any device and dtype.

All arithmetic is done in the device's widest floating type, vectorized over (B, D, N). The arguments and
results of `forward` and `backward` are those of every engine of the selective scan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from minrnn.ops.devices import widest_float
from minrnn.ops.reference import state_dtype

__all__ = [
    "CHUNK",
    "Inputs",
    "backward",
    "discretize",
    "empty_borders",
    "forward",
    "num_chunks",
    "silu_slope",
]

CHUNK = 32
"""Steps between the states that forward saves; backward recomputes the states in between."""


class Inputs(NamedTuple):
    """The inputs of the scan, in the order of every function here."""

    u: Tensor
    """(B, T, D)."""
    delta_pre: Tensor
    """(B, T, D)."""
    A: Tensor
    """(D, N)."""
    B: Tensor
    """(B, T, N)."""
    C: Tensor
    """(B, T, N)."""
    D: Tensor | None
    """(D,)."""
    z: Tensor | None
    """(B, T, D)."""
    delta_bias: Tensor | None
    """(D,)."""
    h0: Tensor | None
    """(B, D, N)."""
    reset: Tensor | None
    """(B, T), bool."""

    def widened(self, dtype: torch.dtype) -> Inputs:
        """Return the inputs with all floating tensors in this dtype."""
        *tensors, reset = self
        return Inputs(*[None if x is None else x.to(dtype) for x in tensors], reset)  # type: ignore

    def biased(self, dtype: torch.dtype) -> Inputs:
        """Return the `widened` inputs, with delta_bias added to delta_pre."""
        x = self.widened(dtype)
        return (
            x if x.delta_bias is None else x._replace(delta_pre=x.delta_pre + x.delta_bias, delta_bias=None)
        )


def num_chunks(T: int) -> int:
    """Return the number of chunks of CHUNK steps in T steps; the last one may be shorter."""
    return (T + CHUNK - 1) // CHUNK


def empty_borders(x: Inputs, save: bool) -> Tensor:
    """Allocate the states before every chunk, (B, num_chunks * N, D), or an empty tensor if not `save`.

    Channels come last, because engines compute neighboring channels together. Chunks and N share an axis,
    because torch's tracing specializes axes whose length can be 1.
    """
    batch, T, channels = x.u.shape
    chunks = num_chunks(T) if save else 0
    return x.u.new_empty(batch, chunks * x.A.shape[1], channels, dtype=state_dtype(x.u.dtype))


def discretize(x: Inputs) -> tuple[Tensor, Tensor]:
    """Compute the decay exp(delta A) and the input term delta B u of `biased` inputs, without resets."""
    delta = softplus(x.delta_pre).unsqueeze(-1)
    return (delta * x.A).exp(), delta * x.B.unsqueeze(2) * x.u.unsqueeze(-1)


def silu_slope(z: Tensor) -> Tensor:
    """Compute the derivative of silu, z sigmoid(z)."""
    share = torch.sigmoid(z)
    return share + z * share * torch.sigmoid(-z)


def forward(given: Inputs, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (B, T, D), the final state (B, D, N), and the states before each chunk.

    Args:
        given: the inputs.
        save: whether to return the states before each chunk; otherwise the third tensor has no elements.

    Returns:
        y in u's dtype; the final state and the borders (see `empty_borders`) in at least float32.
    """
    x = given.biased(widest_float(given.u.device))
    h = _initial(x)
    borders = empty_borders(given, save)
    y = torch.empty_like(x.u)
    for t in range(x.u.shape[1]):
        if save and t % CHUNK == 0:
            _border(borders, t // CHUNK, h.shape[2]).copy_(h.mT)
        h = _step(x, t, h)
        y[:, t] = _read(x, t, h)
    return y.to(given.u.dtype), h.to(borders.dtype), borders


def backward(dy: Tensor, dlast: Tensor, borders: Tensor, given: Inputs) -> list[Tensor]:
    """Compute the gradients of u, delta_pre, A, B, C, D, z, delta_bias and h0, empty for absent inputs.

        g[t] = dy[t] C[t] + a[t+1] g[t+1];  dC[t] = sum_d dy h;  dB[t] = sum_d g delta u
        d(delta u)[t] = sum_n g B;  d(delta A)[t] = g a h[t-1];  dh0 = a[0] g[0]
        d(delta_bias) = sum_t d(delta_pre)[t]

    where dy is the gradient of the output before the gate z. Each chunk's states are recomputed from its
    border.

    Args:
        dy: gradient of y.
        dlast: gradient of the final state.
        borders: the states that forward saved.
        given: the inputs.

    Returns:
        The gradients: of sequences in u's dtype, of A, D, delta_bias and h0 in at least float32.
    """
    x = given.biased(widest_float(given.u.device))
    d = _Gradients(x)
    g = dlast.to(x.u.dtype)
    for chunk in reversed(range(num_chunks(x.u.shape[1]))):
        times = range(chunk * CHUNK, min((chunk + 1) * CHUNK, x.u.shape[1]))
        states = [_border(borders, chunk, g.shape[2]).mT.to(g.dtype)]
        for t in times:
            states.append(_step(x, t, states[-1]))
        for t, h_prev, h in zip(reversed(times), states[-2::-1], states[:0:-1], strict=True):
            g = d.add(x, t, h_prev, h, dy[:, t].to(x.u.dtype), g)
    narrow, wide = given.u.dtype, state_dtype(given.u.dtype)
    sequences = [d.u, d.delta_pre, d.B, d.C, d.z]
    du, ddelta_pre, dB, dC, dz = (s.to(narrow) for s in sequences)
    dbias = d.u.new_empty(0) if given.delta_bias is None else d.delta_pre.sum((0, 1))
    return [du, ddelta_pre, d.A.to(wide), dB, dC, d.D.to(wide), dz, dbias.to(wide), g.to(wide)]


class _Gradients:
    """The gradients, accumulated from the last step to the first."""

    def __init__(self, x: Inputs) -> None:
        self.u, self.delta_pre = torch.empty_like(x.u), torch.empty_like(x.u)
        self.B, self.C = torch.empty_like(x.B), torch.empty_like(x.C)
        self.A = torch.zeros_like(x.A)
        self.D = x.u.new_zeros(0 if x.D is None else x.u.shape[2])
        self.z = torch.empty_like(x.u) if x.z is not None else x.u.new_empty(0)

    def add(self, x: Inputs, t: int, h_prev: Tensor, h: Tensor, dy: Tensor, carried: Tensor) -> Tensor:
        """Add step t, given a[t+1] g[t+1]; return a[t] g[t]."""
        u, delta_pre = x.u[:, t], x.delta_pre[:, t]
        if x.z is not None:
            z = x.z[:, t]
            self.z[:, t] = dy * _ungated(x, t, h) * silu_slope(z)
            dy = dy * silu(z)
        delta = softplus(delta_pre)
        a = (delta.unsqueeze(-1) * x.A).exp()
        g = dy.unsqueeze(-1) * x.C[:, t].unsqueeze(1) + carried
        forget = None if x.reset is None else x.reset[:, t, None, None]
        if forget is not None:
            h_prev = h_prev.masked_fill(forget, 0)
        to_exponent = g * a * h_prev
        to_term = torch.einsum("bdn,bn->bd", g, x.B[:, t])
        self.C[:, t] = torch.einsum("bd,bdn->bn", dy, h)
        self.B[:, t] = torch.einsum("bdn,bd->bn", g, delta * u)
        self.A += torch.einsum("bdn,bd->dn", to_exponent, delta)
        self.u[:, t] = to_term * delta if x.D is None else to_term * delta + dy * x.D
        if x.D is not None:
            self.D += (dy * u).sum(0)
        to_delta = torch.einsum("bdn,dn->bd", to_exponent, x.A) + to_term * u
        self.delta_pre[:, t] = to_delta * torch.sigmoid(delta_pre)
        return a * g if forget is None else (a * g).masked_fill(forget, 0)


def _border(borders: Tensor, chunk: int, N: int) -> Tensor:
    return borders.narrow(1, chunk * N, N)


def _initial(x: Inputs) -> Tensor:
    return x.u.new_zeros(x.u.shape[0], *x.A.shape) if x.h0 is None else x.h0


def _step(x: Inputs, t: int, h: Tensor) -> Tensor:
    delta = softplus(x.delta_pre[:, t]).unsqueeze(-1)  # (B, D, 1)
    if x.reset is not None:
        h = h.masked_fill(x.reset[:, t, None, None], 0)
    return (delta * x.A).exp() * h + delta * x.u[:, t].unsqueeze(-1) * x.B[:, t].unsqueeze(1)


def _ungated(x: Inputs, t: int, h: Tensor) -> Tensor:
    y = torch.einsum("bdn,bn->bd", h, x.C[:, t])
    return y if x.D is None else y + x.D * x.u[:, t]


def _read(x: Inputs, t: int, h: Tensor) -> Tensor:
    y = _ungated(x, t, h)
    return y if x.z is None else y * silu(x.z[:, t])
