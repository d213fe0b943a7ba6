"""A scan in parallel over time, in torch's own operations: the algorithm of the portable engine.

Time is cut into spans of RADIX steps, which are computed side by side in three passes:

1. in every span, from an empty state: the last state, the product of decays, and 1 minus that product;
2. the states between spans, by a scan over spans, which recursively has this form too;
3. in every span, from the state before it: every state.

All arithmetic is in float32, or float64 for float64 inputs; many devices lack float64. Two things keep the
error from growing with T. A state is rounded RADIX times at each of log(T) / log(RADIX) levels, not T times.
And what a span forgets is known to as many digits as what it keeps: 1 minus the product of decays is
c[t] = a[t] c[t-1] + (1 - a[t]), of which nothing cancels. A state that loses a millionth in each step loses
it with six digits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RADIX",
    "Advance",
    "Block",
    "Rule",
    "Spans",
    "ThreePasses",
    "back_over_steps",
    "in_three_passes",
    "over_steps",
    "steps_at_once",
]

RADIX = 8
"""Steps of a span. More of them make fewer spans, but more operations that wait for each other."""

BLOCK = {"cpu": 2**18}
"""Numbers of a tensor that are computed at once, by type of device: a CPU's cache holds a few of them."""

LARGE_BLOCK = 2**21
"""The same for other devices, where it bounds the memory of intermediate results."""

Steps = Sequence[Tensor]
"""A tensor for each step."""

Advance = Callable[..., Tensor]
"""advance(k, state, out=None): the state after the k-th step of every span; a state of None is zero."""

Rule = Callable[[Steps, Steps, Steps | None], Advance]
"""rule(a, b, forget): how a state advances, given each step's decay, input, and whether it forgets."""


class Block(NamedTuple):
    """Steps that are computed at once."""

    times: slice
    spans: slice | None
    """Their spans; None for the last steps of the recurrence, if they do not fill a span."""


class Spans(NamedTuple):
    """What spans do to the state before them: h -> decay h + end. Each tensor is (B, spans, D)."""

    decay: Tensor
    """The product of decays."""
    loss: Tensor
    """1 - decay, with digits of its own."""
    sign: Tensor
    """The sign of decay, which an infinite state still has where the product is too small for its dtype."""
    end: Tensor
    """The state after the span if the one before it is zero."""


class ThreePasses:
    """A scan whose inputs are given block by block: `add` every block, `join`, `walk` every block.

    Args:
        like: a (B, T, D) tensor.
        dtype: the dtype of all that is computed.
        rule: how a state advances.
        start: (B, D), the state before the first step; zeros when None.
        reset: (B, T), bool: where a state is forgotten; nowhere when None.
        reverse: whether the recurrence runs from the last step to the first.

    `last` is the state after the last step, once every block was walked.
    """

    def __init__(
        self,
        like: Tensor,
        dtype: torch.dtype,
        rule: Rule,
        start: Tensor | None,
        reset: Tensor | None,
        *,
        reverse: bool,
    ) -> None:
        B, T, D = like.shape
        self._start = like.new_zeros(B, D, dtype=dtype) if start is None else start.to(dtype)
        self.blocks = _blocks(T, B * D, like.device, reverse)
        self._rule, self._reverse = rule, reverse
        self._reset = None if reset is None else reset.unsqueeze(-1)
        self._spans = Spans(*(like.new_empty(B, T // RADIX, D, dtype=dtype) for _ in Spans._fields))

    def add(self, block: Block, a: Tensor, loss: Tensor, b: Tensor) -> None:
        """Read a block's decays, 1 minus these, and inputs."""
        if block.spans is None:
            return
        decays = _views(a, self._reverse)
        advance = self._rule(decays, _views(b, self._reverse), self._forgets(block))
        for whole, part in zip(
            self._spans, _summary(advance, decays, _views(loss, self._reverse)), strict=True
        ):
            whole[:, block.spans] = part

    def join(self) -> None:
        """Compute the states between spans, after all blocks were added."""
        count, forget = self._spans.end.shape[1], None
        if self._reset is not None and count:
            first = self.blocks[0].times.start
            forget = _grouped(self._reset[:, first : first + count * RADIX]).any(2)
        self._states = _between(self._spans, self._start, forget, self._reverse)
        self.last = self._states[:, 0 if self._reverse else -1]

    def walk(self, block: Block, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """Compute a block's steps into `out`, which may be b, and return it; the blocks in their order."""
        state = self.last
        if block.spans is not None:
            shift = int(self._reverse)
            state = self._states[:, block.spans.start + shift : block.spans.stop + shift]
        advance = self._rule(self._order(block, a), self._order(block, b), self._forgets(block))
        for k, to in enumerate(self._order(block, out)):
            state = advance(k, state, out=to)
        if block.spans is None:
            self.last = state
        return out

    def _order(self, block: Block, x: Tensor) -> Steps:
        if block.spans is not None:
            return _views(x, self._reverse)
        return x.unbind(1)[::-1] if self._reverse else x.unbind(1)

    def _forgets(self, block: Block) -> Steps | None:
        return None if self._reset is None else self._order(block, self._reset[:, block.times])


def in_three_passes(
    a: Tensor,
    loss: Tensor,
    b: Tensor,
    start: Tensor | None,
    reset: Tensor | None,
    *,
    rule: Rule,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Compute a scan whose inputs are given at once: what is written for each step, and the last state."""
    passes = ThreePasses(b, b.dtype, rule, start, reset, reverse=reverse)
    for block in passes.blocks:
        passes.add(block, *(x[:, block.times] for x in (a, loss, b)))
    passes.join()
    out = torch.empty_like(b)
    for block in passes.blocks:
        passes.walk(block, *(x[:, block.times] for x in (a, b, out)))
    return out, passes.last


def steps_at_once(width: int, device: torch.device) -> int:
    """Return how many steps of `width` numbers are computed at once."""
    return BLOCK.get(device.type, LARGE_BLOCK) // max(width, 1)


def over_steps(a: Steps, b: Steps, forget: Steps | None) -> Advance:
    """h[t] = a[t] h[t-1] + b[t]; the state is h."""

    def advance(k: int, state: Tensor | None, out: Tensor | None = None) -> Tensor:
        if state is None:
            return b[k]
        if forget is not None:
            state = state.masked_fill(forget[k], 0)
        return torch.addcmul(b[k], a[k], state, out=out)

    return advance


def back_over_steps(a: Steps, dh: Steps, forget: Steps | None) -> Advance:
    """g[t] = dh[t] + s[t+1], s[t] = a[t] g[t]: the adjoint; the state is s, and g is written to `out`."""

    def advance(k: int, state: Tensor | None, out: Tensor | None = None) -> Tensor:
        g = dh[k] if state is None else torch.add(dh[k], state, out=out)
        s = a[k] * g
        return s if forget is None else s.masked_fill_(forget[k], 0)

    return advance


def _over_spans(parts: Sequence[Any]) -> Advance:
    """h -> (decay + low) h + end, or sign h + end where h is not finite."""
    decay, low, sign, end, forget = parts

    def advance(k: int, state: Tensor | None, out: Tensor | None = None) -> Tensor:
        if state is None:
            return end[k]
        if forget is not None:
            state = state.masked_fill(forget[k], 0)
        finite = state.nan_to_num(0, 0, 0)
        h = torch.addcmul(end[k], low[k], finite)
        h = torch.addcmul(h, decay[k], finite)
        return torch.addcmul(h, sign[k], state - finite, out=out)

    return advance


def _blocks(T: int, width: int, device: torch.device, reverse: bool) -> list[Block]:
    """Divide T steps of `width` numbers into blocks, the last of which in the recurrence is the last here."""
    spans, rest = divmod(T, RADIX)
    size = max(1, steps_at_once(width, device) // RADIX)
    first = rest if reverse else 0
    blocks = []
    for start in range(0, spans, size):
        stop = min(start + size, spans)
        blocks.append(Block(slice(first + RADIX * start, first + RADIX * stop), slice(start, stop)))
    if rest:
        blocks.append(Block(slice(0, rest) if reverse else slice(T - rest, T), None))
    return blocks


def _grouped(x: Tensor) -> Tensor:
    return x.unflatten(1, (x.shape[1] // RADIX, RADIX))


def _views(x: Tensor, reverse: bool) -> Steps:
    """Return the k-th steps of all spans, for every k in the order of the recurrence."""
    steps = _grouped(x).unbind(2)
    return steps[::-1] if reverse else steps


def _summary(advance: Advance, decays: Steps, losses: Steps) -> Spans:
    """Compute what spans do."""
    decay, loss, end = decays[0], losses[0], advance(0, None)
    for k in range(1, RADIX):
        end = advance(k, end)
        loss = torch.addcmul(losses[k], decays[k], loss)
        decay = decay * decays[k]
    return Spans(decay, loss, decay.sign(), end)


def _between(spans: Spans, start: Tensor, forget: Tensor | None, reverse: bool) -> Tensor:
    """Compute the states before the first span, between all, and after the last, (B, spans + 1, D).

    Args:
        spans: what they do.
        start: (B, D), the state before all.
        forget: (B, spans, 1), bool: which of them forget the state before them; none when None.
        reverse: whether the last of them is the first in the recurrence. States are in the order of time.
    """
    B, count, D = spans.end.shape
    states = start.new_empty(B, count + 1, D)
    before, after = (states[:, 1:], states[:, :-1]) if reverse else (states[:, :-1], states[:, 1:])
    states[:, -1 if reverse else 0] = start
    # Of a decay near 1, the loss knows more than the product: low is what 1 - loss, rounded, lacks.
    near = spans.loss.abs() < 0.5
    decay = torch.where(near, 1 - spans.loss, spans.decay)
    low = (1 - decay - spans.loss).masked_fill_(~near, 0)
    given = [decay, low, spans.sign, spans.end, forget]
    groups = count // RADIX if count > 2 * RADIX else 0
    rest = count - groups * RADIX
    if groups:
        inner = slice(rest, count) if reverse else slice(0, groups * RADIX)
        advance = _over_spans([None if x is None else _views(x[:, inner], reverse) for x in given])
        summary = _summary(advance, *(_views(x[:, inner], reverse) for x in (decay, spans.loss)))
        summary = summary._replace(sign=_grouped(spans.sign[:, inner]).prod(2))
        forgetting = None if forget is None else _grouped(forget[:, inner]).any(2)
        found = _between(summary, start, forgetting, reverse)
        state = found[:, 1:] if reverse else found[:, :-1]
        for k, out in enumerate(_views(after[:, inner], reverse)):
            state = advance(k, state, out=out)
    advance = _over_spans([None if x is None else x.unbind(1) for x in given])
    for k in range(rest - 1, -1, -1) if reverse else range(count - rest, count):
        advance(k, before[:, k], out=after[:, k])
    return states
