"""A causal depthwise convolution over time that can be stopped and resumed anywhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.mixer import read_part, sequence_start
from minrnn.ops.operators import Composite
from minrnn.ops.transforms import is_plain, is_traced


class CausalConv(nn.Module):
    """Mix each channel with its own last few inputs.

        y[t] = bias + sum_j weight[j] * x[t - j],   j = 0 .. width - 1

    It starts as the identity and a little of each lag: weight[0] = 1, the rest from U(-1 / width, 1 / width).
    (Measured on tiny Shakespeare, 500 steps, two seeds: about 0.02 nats lower than from the identity alone,
    0.06 lower than from torch's U(-1 / sqrt(width), 1 / sqrt(width)).) The state is the window of the last
    width - 1 inputs `(B, width - 1, D)`, zeros before the sequence's start.

    Args:
        channels: D.
        width: taps, the current input included.
        bias: whether there is a bias per channel.
    """

    def __init__(self, channels: int, width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.uniform_(self.weight, -1 / width, 1 / width)
        nn.init.ones_(self.weight[0])

    def forward(
        self, x: Tensor, window: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve x `(B, T, D)`, from the window that an earlier call returned.

        Where reset `(B, T)` is True, the window is cleared before that step.

        Returns:
            y `(B, T, D)` and the window after the last step.

        Raises:
            TypeError: something of the window would be lost in the dtype of x.
            ValueError: the window has another shape.
        """
        B, T, D = x.shape
        past = self.width - 1
        if window is None:
            window = x.new_zeros(B, past, D)
        else:
            window = read_part("CausalConv: window", window, B, ((past, D), x.dtype))
        padded = torch.cat([window.to(x.dtype), x], dim=1)  # (B, past + T, D)
        if reset is None:
            return _convolve(padded, self.weight, self.bias), padded[:, T:].clone()
        start = sequence_start(reset, torch.zeros_like(reset[:, 0], dtype=torch.int64), past)  # (B, T)
        y = _sum_taps(self._lags_within(padded, start), self.weight, self.bias)
        stale = torch.arange(T, T + past, device=x.device) < start[:, -1:]  # (B, past)
        return y, padded[:, T:].masked_fill(stale.unsqueeze(2), 0)

    def _lags_within(self, padded: Tensor, start: Tensor) -> list[Tensor]:
        """View the inputs of each lag, zero before the step's `start` `(B, T)`, an index into padded."""
        at = torch.arange(self.width - 1, padded.shape[1], device=start.device)
        lags = _lags(padded, self.width)
        return [x.masked_fill((at - lag < start).unsqueeze(2), 0) for lag, x in enumerate(lags)]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, width={self.width}, bias={self.bias is not None}"


def last_inputs(x: Tensor, count: int, reset: Tensor | None) -> Tensor:
    """Return the last `count` inputs of x `(B, T, D)`, zero before the start of the last sequence."""
    T = x.shape[1]
    last = x[:, T - count :]
    if reset is None:
        return last
    start = sequence_start(reset, torch.zeros_like(reset[:, 0], dtype=torch.int64), 0)[:, -1:]
    stale = torch.arange(T - count, T, device=x.device) < start  # (B, count)
    return last.masked_fill(stale.unsqueeze(2), 0)


class _Taps(Composite):
    """y[t] = bias + sum_j weight[j] * padded[t + width - 1 - j], channels last.

    The faster form is due to its backward, which sums the weights' gradient over batch and time as one flat
    axis. Forward and backward at width 4, on one core, against what else torch offers:

        (B, T, D)         this     autograd of the same products   conv1d     conv2d, channels last
        (12, 64, 192)     0.7 ms   1.1 ms                          2.6 ms     1.4 ms
        (1, 4096, 192)    3.1 ms   8.1 ms                          8.5 ms     7.6 ms
        (64, 256, 384)    61 ms    118 ms                          102 ms     56 ms
    """

    def compose(self, settings: None, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _sum_taps(_lags(padded, weight.shape[0]), weight, bias)

    def compute(self, settings: None, tensors: Sequence[Any], *, record: bool) -> tuple[Tensor, list[Tensor]]:
        padded, weight, bias = tensors
        now, *before = _lags(padded, weight.shape[0])
        y = now * weight[0] if bias is None else torch.addcmul(bias, now, weight[0])
        for lag, x in enumerate(before, start=1):
            y.addcmul_(x, weight[lag])  # in place: at large sizes fresh memory would double the time
        return y, []

    def gradients(
        self,
        settings: None,
        needs: Sequence[bool],
        gradient: Tensor,
        tensors: Sequence[Any],
        kept: Sequence[Tensor],
    ) -> list[Tensor | None]:
        padded, weight, _ = tensors
        dpadded = dweight = dbias = None
        if needs[0]:
            past = weight.shape[0] - 1
            around = functional.pad(gradient, (0, 0, past, past))
            dpadded, _ = self.compute(None, (around, weight.flip(0), None), record=False)
        if needs[1]:
            dweight = _correlate(_lags(padded, weight.shape[0]), gradient)
        if needs[2]:
            dbias = gradient.flatten(0, 1).sum(0)
        return [dpadded, dweight, dbias]


_TAPS = _Taps()


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # A compiler fuses the composition; nested transforms keep all their levels in it.
    fast = not is_traced() and is_plain(padded, weight, bias)
    return _TAPS(None, padded, weight, bias) if fast else _TAPS.compose(None, padded, weight, bias)


def _lags(padded: Tensor, width: int) -> list[Tensor]:
    """View the inputs `(B, T, D)` of every lag 0 .. width - 1 in padded `(B, width - 1 + T, D)`."""
    T = padded.shape[1] - width + 1
    return [padded.narrow(1, width - 1 - lag, T) for lag in range(width)]


def _sum_taps(lags: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum the inputs of each lag times its weight, in operations that torch can transform."""
    y = lags[0] * weight[0] if bias is None else torch.addcmul(bias, lags[0], weight[0])
    for lag, x in enumerate(lags[1:], start=1):
        y = torch.addcmul(y, x, weight[lag])
    return y


def _correlate(lags: list[Tensor], dy: Tensor) -> Tensor:
    """Sum dy times the inputs of each lag over batch and time: `(width, D)`."""
    sums = []
    product: Tensor | None = None
    for x in lags:
        product = torch.mul(dy, x, out=product)  # one piece of memory for all products
        sums.append(product.flatten(0, 1).sum(0))
    return torch.stack(sums)
