"""Mamba's selective scan: the public function and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from minrnn.ops.recurrence import FLOATS, check_like
from minrnn.ops.selective.operator import SELECTIVE_SCAN
from minrnn.ops.selective.reference import Inputs

__all__ = ["selective_scan"]


def selective_scan(
    u: Tensor,
    delta_pre: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    h0: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute Mamba's recurrence, in which decay, input term and output projection depend on the input.

        delta[t] = softplus(delta_pre[t] + delta_bias)
        h[t, d, n] = exp(delta[t, d] A[d, n]) h[t-1, d, n] + delta[t, d] B[t, n] u[t, d],    h[-1] = h0
        y[t, d] = (sum_n C[t, n] h[t, d, n] + D[d] u[t, d]) silu(z[t, d])

    The state is never stored for all steps: engines save it before every chunk, and backward recomputes the
    steps in between. It is carried in a wider format than y (float64 in the reference; pairs of floats in the
    compiled engines), so that its error does not grow with T. First derivatives use the engine's fused pass;
    higher derivatives and forward mode allocate (batch, T, channels, N) tensors.

    The symbols are the paper's: B and D are tensors here, and axes are written out.

    Args:
        u: input, (batch, T, channels), float32, float64, bfloat16 or float16. Any batch and time strides,
            as for all sequences here.
        delta_pre: step size before its bias and the softplus, as u.
        A: rates, (channels, N), zero or negative, in u's dtype or float32.
        B: input projection, (batch, T, N), in u's dtype.
        C: output projection, (batch, T, N), in u's dtype.
        D: skip connection, (channels,), in A's possible dtypes; none when None.
        z: gate of the output before its silu, as u; none when None.
        delta_bias: bias of the step size, (channels,), in A's possible dtypes; zeros when None. In 16 bits
            delta_pre could not hold it: between -8 and -4, where small steps are, they are 1/32 apart.
        h0: initial state, (batch, channels, N), in A's possible dtypes; zeros when None.
        reset: (batch, T) bool; where True the state is set to zero before that step.

    Returns:
        y (batch, T, channels) in u's dtype, and the final state (batch, channels, N) in at least float32.

    Raises:
        TypeError: an argument is not a tensor, or its dtype does not fit.
        ValueError: a shape or device does not fit.

    >>> import torch
    >>> one = torch.ones(1, 3, 1)
    >>> delta_pre = torch.full((1, 3, 1), 1.0).expm1().log()  # softplus of it is 1
    >>> y, h = selective_scan(one, delta_pre, torch.tensor([[-1.0]]), one, one)
    >>> [round(v, 4) for v in y.flatten().tolist()]
    [1.0, 1.3679, 1.5032]

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (arXiv 2312.00752),
    section 3. A is discretized exactly, B by its first-order (Euler) form, as in the authors' code.
    """
    inputs = Inputs(u, delta_pre, A, B, C, D, z, delta_bias, h0, reset)
    _check(inputs)
    y, last, _ = SELECTIVE_SCAN(inputs, False)
    return y, last


def _check(x: Inputs) -> None:
    name = "selective_scan"
    for field, value in (("u", x.u), ("A", x.A)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {field} must be a tensor, got {type(value).__name__}")
    dtype, shape, device = x.u.dtype, tuple(x.u.shape), x.u.device
    if dtype not in FLOATS:
        raise TypeError(f"{name}: u must be float32, float64, bfloat16 or float16, got {dtype}")
    if len(shape) != 3 or 0 in shape[1:]:
        raise ValueError(
            f"{name}: u must be of shape (batch, T, channels), T and channels at least 1, got {shape}"
        )
    if x.A.dim() != 2 or x.A.shape[1] == 0:
        raise ValueError(f"{name}: A must be of shape (channels, N), N at least 1, got {tuple(x.A.shape)}")
    (batch, T, channels), N = shape, x.A.shape[1]
    check_like(name, "delta_pre", x.delta_pre, shape, dtype, device, "u")
    check_like(name, "B", x.B, (batch, T, N), dtype, device, "u")
    check_like(name, "C", x.C, (batch, T, N), dtype, device, "u")
    if x.z is not None:
        check_like(name, "z", x.z, shape, dtype, device, "u")
    if x.reset is not None:
        check_like(name, "reset", x.reset, (batch, T), torch.bool, device, "u")
    for field, wide, expected in (
        ("A", x.A, (channels, N)),
        ("D", x.D, (channels,)),
        ("delta_bias", x.delta_bias, (channels,)),
        ("h0", x.h0, (batch, channels, N)),
    ):
        if wide is not None:
            single = getattr(wide, "dtype", None) == torch.float32 and dtype != torch.float64
            check_like(name, field, wide, expected, torch.float32 if single else dtype, device, "u")
