"""The cross-entropy of a large vocabulary, whose logits are never held all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
"""Logits that are held at once, 64 MiB in float32."""


def linear_loss(
    y: Tensor, weight: Tensor, targets: Tensor, reduction: str, ignore_index: int
) -> Tensor | None:
    """Return the cross-entropy of logits `y @ weight.T` by torch's own function, which works in chunks.

    Gradients are computed in the forward pass, so that no product is computed twice. Its result has the dtype
    of its arguments, which half precision would cost most of its digits.

    Args:
        y: `(N, d_model)`.
        weight: `(V, d_model)`.
        targets: `(N,)`, int64.
        reduction: mean or sum.
        ignore_index: target of rows that have none.

    Returns:
        The loss, a scalar; None where this torch has no such function, or the dtype has not enough digits.
    """
    options = getattr(nn, "LinearCrossEntropyOptions", None)  # torch 2.13 has it; earlier ones may not
    is_exact = y.dtype == weight.dtype and y.dtype.itemsize >= 4
    if options is None or not is_exact or torch.is_autocast_enabled(y.device.type):
        return None
    return functional.linear_cross_entropy(
        y, weight, targets, reduction=reduction, ignore_index=ignore_index, options=options()
    )


def chunked_loss(
    predict: Callable[[Tensor], Tensor],
    y: Tensor,
    targets: Tensor,
    vocab_size: int,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """Return the cross-entropy of logits `predict(y)`, computed in chunks, and again in the backward pass.

    Args:
        predict: maps `(N, d_model)` to logits `(N, V)`.
        y: `(N, d_model)`.
        targets: `(N,)`, int64.
        vocab_size: V.
        reduction: mean or sum.
        ignore_index: target of rows that have none.

    Returns:
        The loss, a scalar in at least float32.
    """
    size = max(1, CHUNK_LOGITS // vocab_size)
    part = partial(_chunk_loss, predict, ignore_index)
    run = partial(checkpoint, part, use_reentrant=False) if torch.is_grad_enabled() else part
    parts = [run(*chunk) for chunk in zip(y.split(size), targets.split(size), strict=True)]
    total = torch.stack(parts).sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def _chunk_loss(predict: Callable[[Tensor], Tensor], ignore_index: int, y: Tensor, targets: Tensor) -> Tensor:
    logits = predict(y)
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    return functional.cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_index)
