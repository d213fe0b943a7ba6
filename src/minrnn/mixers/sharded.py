"""Layers, convolutions and mixers whose sequence is divided over ranks: consecutive parts of the time axis.

Each takes this rank's part of the input and of `reset`, and returns this rank's part of the output. A state
that is passed in is that before the whole sequence, read on the first rank; the state that is returned is
that after the whole sequence, on every rank. All ranks call a module, and differentiate it, together.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minrnn.mixers.attention import AttentionMixer
from minrnn.mixers.classic import ClassicMixer
from minrnn.mixers.convolution import CausalConv, last_inputs
from minrnn.mixers.layer import MinRNNBase, MinRNNMixer
from minrnn.mixers.mixer import Mixer
from minrnn.ops import sharded_scan
from minrnn.ops.exchange import gather, size_and_rank
from minrnn.ops.joined import Joined
from minrnn.ops.operators import needs_gradients
from minrnn.ops.projected import project

M = TypeVar("M", bound=nn.Module)


class ShardedConv(CausalConv):
    """A convolution whose window is that of the rank before."""

    _group: str

    def forward(
        self, x: Tensor, window: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        past = self.width - 1
        if x.shape[1] < past:
            raise ValueError(
                f"CausalConv: each rank must have at least {past} steps, as the width is {self.width}, got "
                f"{x.shape[1]}"
            )
        windows = gather(last_inputs(x, past, reset), self._group)
        _, rank = size_and_rank(self._group)
        y, _ = super().forward(x, windows[rank - 1] if rank else window, reset=reset)
        return y, windows[-1].clone()


class ShardedRNN(MinRNNBase):
    """Stacked layers of gated scans over ranks."""

    _group: str

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return super().forward(*arguments, **options)  # overridden: a call is not that of a plain layer

    def _run_direction(
        self,
        x: Tensor,
        suffix: str,
        *,
        h0: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
        time_major: bool,
        joined: Joined | None,
    ) -> tuple[Tensor, Tensor]:
        if joined is not None:
            raise ValueError(
                f"{type(self).__name__}: input must be one plain tensor of a part of the sequence, with "
                "`reset` where documents start, got packed, jagged or joined sequences"
            )
        if reverse and reset is not None:
            reset = self._before_next(reset)
        weight, bias = self._weights(x, suffix)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None) -> tuple[Tensor, Tensor]:
            pre = project(x, weight, bias)
            return sharded_scan(
                self.gate,
                pre.transpose(0, 1) if time_major else pre,
                h0=h0,
                reset=reset,
                reverse=reverse,
                candidate=self.candidate,
                signed=self.signed,
                group=self._group,
            )

        if self.recompute and needs_gradients(x, weight, bias, h0):
            h, end = checkpoint(run, x, weight, bias, h0, use_reentrant=False, preserve_rng_state=False)
        else:
            h, end = run(x, weight, bias, h0)
        return h, end.to(h.dtype)

    def _before_next(self, reset: Tensor) -> Tensor:
        """Move resets `(B, T)` from a sequence's first step to the step that a reversed scan meets first."""
        size, rank = size_and_rank(self._group)
        firsts = gather(reset[:, :1].to(torch.uint8), self._group)
        following = firsts[rank + 1] if rank + 1 < size else torch.zeros_like(firsts[0])
        return torch.cat([reset[:, 1:], following.bool()], 1)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    CausalConv: ShardedConv,
    MinRNNBase: ShardedRNN,
}
"""What a module becomes, by its class."""

_NOT_LINEAR = (
    "each step of it is more than a product with the state before, so that no part can be read ahead"
)
_ALL_KEYS = "its state is every key and value of its window"

REFUSED: dict[type[nn.Module], str] = {
    nn.RNNBase: _NOT_LINEAR,
    ClassicMixer: _NOT_LINEAR,
    AttentionMixer: _ALL_KEYS,
    nn.MultiheadAttention: _ALL_KEYS,
}
"""Why a sequence cannot be divided for a module."""


def shard(model: nn.Module, group: str) -> None:
    """Turn each module of a model that mixes steps into its form over ranks, in place.

    Raises:
        ValueError: there is none; one has no such form, for the reason named; or one is divided already.
            The model is then unchanged.
    """
    found = [
        (name, module, _form_of(name, module))
        for name, module in model.named_modules()
        if not isinstance(module, MinRNNMixer)  # its layer is
    ]
    chosen = [(module, form) for _, module, form in found if form is not None]
    if not chosen:
        raise ValueError("sequence_parallel: the model must have a layer over time, got none")
    for module, form in chosen:
        module.__class__ = _sharded_class(type(module), form)
        module._group = group  # type: ignore[assignment]


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return a module's class before `shard`."""
    kind: type[nn.Module] = getattr(type(module), "_whole", type(module))
    return kind


def _form_of(name: str, module: nn.Module) -> type[nn.Module] | None:
    what = f"sequence_parallel: {name or 'the model'} ({type(module).__name__})"
    if class_of(module) is not type(module):
        raise ValueError(f"{what} is divided over ranks already")
    for kind, reason in REFUSED.items():
        if isinstance(module, kind):
            raise ValueError(f"{what} cannot be divided over ranks: {reason}")
    for kind, form in FORMS.items():
        if isinstance(module, kind):
            return form
    if isinstance(module, Mixer):
        raise ValueError(f"{what} cannot be divided over ranks: it has no such form")
    return None


@lru_cache
def _sharded_class(kind: Any, form: Any) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_whole": kind}
    return type(kind.__name__, (form, kind), names)
