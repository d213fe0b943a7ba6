"""Layers, convolutions and mixers whose sequence is divided over ranks: consecutive parts of the time axis.

Each takes this rank's part of the input and of `reset`, and returns this rank's part of the output. A state
that is passed in is that before the whole sequence, read on the first rank; the state that is returned is
that after the whole sequence, on every rank. All ranks call a module, and differentiate it, together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from minrnn.mixers.aaren import EMPTY, AarenMixer, running_logsumexp
from minrnn.mixers.attention import AttentionMixer
from minrnn.mixers.classic import ClassicMixer
from minrnn.mixers.convolution import CausalConv, last_inputs
from minrnn.mixers.layer import MinRNNBase, MinRNNMixer
from minrnn.mixers.mamba import MambaMixer
from minrnn.mixers.mixer import Mixer
from minrnn.mixers.s4d import S4DMixer
from minrnn.ops import selective_scan, sharded_scan
from minrnn.ops.devices import widest_float
from minrnn.ops.exchange import before, gather, size_and_rank
from minrnn.ops.joined import Joined
from minrnn.ops.operators import needs_gradients
from minrnn.ops.projected import project
from minrnn.ops.sharded import carry_over


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
        start = x.new_zeros(windows.shape[1:]) if window is None else window
        y, _ = super().forward(x, before(windows, start, self._group), reset=reset)
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


class ShardedAaren(AarenMixer):
    """An attention of one query over ranks: the logsumexp of each part is exchanged, then o."""

    _group: str

    def _logsumexps(
        self, scores: Tensor, carried: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, rank = size_and_rank(self._group)
        own, fresh = scores, torch.zeros_like(scores[:, 0])
        if reset is not None:
            number = reset.cumsum(dim=1).unsqueeze(2)  # (B, T, 1): of each step's sequence
            own = scores.masked_fill(number < number[:, -1:], -math.inf)
            fresh = fresh + (number[:, -1] > 0)
        total = own.logsumexp(1)  # (B, heads), of the last sequence
        if rank == 0 and carried is not None:
            total = torch.where(fresh > 0, total, torch.logaddexp(carried.to(total.dtype), total))
        totals, freshes = gather(torch.stack([total, fresh]), self._group).unbind(1)
        after = [totals[0]]
        for total, fresh in zip(totals[1:], freshes[1:], strict=True):
            after.append(torch.where(fresh > 0, total, torch.logaddexp(after[-1], total)))
        start = torch.full_like(after[0], EMPTY) if carried is None else carried
        previous, _ = running_logsumexp(scores, before(torch.stack(after), start, self._group), reset)
        return previous, after[-1]

    def _mean(
        self, z_pre: Tensor, v: Tensor, o0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return sharded_scan("mingru", z_pre, v, h0=o0, reset=reset, candidate="linear", group=self._group)


class ShardedS4D(S4DMixer):
    """A diagonal state space over ranks: its decays are powers that every rank knows."""

    _group: str

    def _run(self, x: Tensor, h0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        T, (_, rank) = x.shape[1], size_and_rank(self._group)
        u, end = super()._run(x, None, reset)
        number = torch.zeros(x.shape[:2], device=x.device) if reset is None else reset.cumsum(dim=1)
        response = self._response(T, x.dtype)
        steps = torch.where(number[:, -1] > 0, -1.0, float(T))  # -1 where the part has a reset
        steps = gather(steps.to(response.rate.real.dtype), self._group)[..., None, None]  # (ranks, B, 1, 1)
        decays = (response.rate * steps.clamp(min=0)).exp()  # (ranks, B, d_model, d_state / 2)
        decays = decays.masked_fill(steps < 0, 0)
        h = None if h0 is None else torch.view_as_complex(h0.contiguous()).to(decays.dtype)
        own = torch.view_as_complex(end.contiguous()).to(decays.dtype)
        if rank == 0 and h is not None:
            own = decays[0] * h + own
        ends = torch.view_as_complex(gather(torch.view_as_real(own), self._group))
        after = [ends[0]]
        for decay, each in zip(decays[1:], ends[1:], strict=True):
            after.append(decay * after[-1] + each)
        entering = before(torch.stack(after), torch.zeros_like(own) if h is None else h, self._group)
        entering = entering.to(torch.promote_types(x.dtype, torch.complex64))
        free = response.to_state(entering.transpose(0, 1))  # (d_model, B, T)
        u = u + free.permute(1, 2, 0).masked_fill(number.unsqueeze(2) > 0, 0)
        return u, torch.view_as_real(after[-1])


class ShardedMamba(MambaMixer):
    """A selective state space over ranks; a part is scanned twice, from zero and from the state before it."""

    _group: str

    def _scan(
        self, inputs: Sequence[Tensor], *, h0: Tensor | None, reset: Tensor | None, **options: Tensor
    ) -> tuple[Tensor, Tensor]:
        u, delta_pre, A, B, C, _ = inputs
        bias = options["delta_bias"]
        _, end = selective_scan(u, delta_pre, A, B, C, delta_bias=bias, reset=reset)
        delta = functional.softplus(delta_pre.to(end.dtype) + bias)
        total = delta.sum(1, dtype=widest_float(u.device))  # (batch, channels)
        decay = (total.unsqueeze(2) * A).exp().to(end.dtype)
        if reset is not None:
            decay = decay.masked_fill(reset.any(1)[:, None, None], 0)
        start = None if h0 is None else h0.flatten(1)
        entering, last = carry_over(decay.flatten(1), end.flatten(1), start, self._group)
        y, _ = selective_scan(*inputs, h0=entering.view_as(end), reset=reset, **options)
        return y, last.view_as(end)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    CausalConv: ShardedConv,
    MinRNNBase: ShardedRNN,
    AarenMixer: ShardedAaren,
    S4DMixer: ShardedS4D,
    MambaMixer: ShardedMamba,
}
"""What a module becomes, by its class."""

_NOT_LINEAR = "a step of it is more than a product with the state before, so that no part can be read ahead"
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
        kind: Any = type(module)
        chosen_form: Any = form
        module.__class__ = _sharded_class(kind, chosen_form)
        module._group = group


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """A context in which the modules that `shard` divided compute whole sequences, each rank by itself."""
    divided = [(module, type(module)) for module in model.modules() if class_of(module) is not type(module)]
    for module, _ in divided:
        module.__class__ = cast(Any, class_of(module))
    try:
        yield
    finally:
        for module, kind in divided:
            module.__class__ = cast(Any, kind)


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


@lru_cache  # of classes, which mypy does not take for hashable
def _sharded_class(kind: Any, form: Any) -> Any:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_whole": kind}
    return type(kind.__name__, (form, kind), names)
