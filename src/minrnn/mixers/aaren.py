"""Aaren: attention with a learned query, computed as a recurrence: a minGRU whose gate is a softmax."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.arguments import read_flag, read_size
from minrnn.mixers.calls import is_plain
from minrnn.mixers.mixer import Mixer, PartForm, State
from minrnn.ops import gated_scan
from minrnn.ops.devices import widest_float
from minrnn.ops.transforms import without_autocast

EMPTY = -(2.0**100)
"""The running logsumexp of no scores: exp(EMPTY - s) is 0 for any score s, and of EMPTY itself, unlike of
-inf, 1. A power of two: rounded to float32, as `_running_max` rounds, it stays what it is."""

FIRST = 100.0
"""The gate's logit at the first step of a sequence: 1 - z is 4e-44, so z is 1 in every floating dtype."""


class AarenMixer(Mixer):
    """Multi-head attention of one learned query to all steps so far, as a recurrence with a fixed-size state.

        s[t] = <q, k[t]> / sqrt(d_head),   lse[t] = logsumexp(s[0..t])
        o[t] = (1 - z[t]) o[t-1] + z[t] v[t],   z[t] = exp(s[t] - lse[t]) = sigmoid(s[t] - lse[t-1])

    k and v are linear in x, each d_model -> d_hidden, split into heads; each head has a query q of its own,
    and y holds the heads' o side by side. By the last equality this is a minGRU with a linear candidate, and
    it uses the same scan: z and 1 - z are two sigmoids of one logit, so neither loses digits where the other
    is near 1. The running logsumexp is a scan too, of each head's sum of exp(s - running maximum).

    Only the product of query and key is needed, so q and W_k are multiplied first: d_model * num_heads
    products a step instead of d_model * d_hidden. (If `key` is another module or has hooks, it is called.)
    Keys have no bias, which would shift all scores alike.

    The state is o `(B, d_hidden)` and lse `(B, num_heads)`, float64 on devices that have it: at step t it
    grows by about 1 / t, which float32 starts to round away within some ten thousand steps. Scores are
    computed in float32 at least, also under autocast.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output, over all heads.
        num_heads: attention heads; must divide d_hidden.
        bias: whether the projection to v has a bias.

    Raises:
        ValueError: the heads do not divide d_hidden.

    Source: Feng et al., "Attention as an RNN" (arXiv 2405.13956), sections 3.1 to 3.3. The query is
    learned there too, and not computed from the input; where it is projected first, q is the result.
    """

    state_names = ("o", "lse")

    def __init__(self, d_model: int, d_hidden: int, *, num_heads: int = 4, bias: bool = True) -> None:
        super().__init__(d_model, d_hidden)
        d_model, d_hidden = self.d_model, self.d_hidden  # Python's: numpy's may overflow
        self.num_heads = num_heads = read_size("AarenMixer", "num_heads", num_heads)
        if d_hidden % num_heads:
            raise ValueError(f"AarenMixer: num_heads must divide d_hidden={d_hidden}, got {num_heads}")
        self.query = nn.Parameter(torch.randn(num_heads, d_hidden // num_heads))
        self.key = nn.Linear(d_model, d_hidden, bias=False)
        self.value = nn.Linear(d_model, d_hidden, bias=read_flag("AarenMixer", "bias", bias))

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        (o,) = super().state_form(dtype)
        return o, ((self.num_heads,), torch.float64)

    def empty_state(self, batch: int, like: Tensor) -> State:
        o, lse = super().empty_state(batch, like)
        return o, lse.fill_(EMPTY)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        v = self.value(x)  # (B, T, d_hidden)
        o0, lse0 = (None, None) if state is None else state
        previous, lse = self._logsumexps(scores := self._scores(x), lse0, reset)
        z_pre = (scores - previous).clamp(max=FIRST)  # (B, T, num_heads)
        dtype = torch.promote_types(v.dtype, torch.float32)
        z_pre = z_pre.to(dtype).repeat_interleave(self.d_hidden // self.num_heads, dim=-1)
        o, last = self._mean(z_pre, v.to(dtype), None if o0 is None else o0.to(dtype), reset)
        # Copies: views would keep the whole call's outputs alive for as long as the state.
        return o.to(v.dtype), (last.clone(), lse.clone())

    def _logsumexps(
        self, scores: Tensor, carried: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the logsumexp of the scores before each step, and that after the last, `(B, heads)`."""
        previous, after = running_logsumexp(scores, carried, reset)
        return previous, after[:, -1]

    def _mean(
        self, z_pre: Tensor, v: Tensor, o0: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return o after each step, and after the last."""
        o = gated_scan("mingru", z_pre, v, h0=o0, reset=reset, candidate="linear")
        return o, o[:, -1]

    def _scores(self, x: Tensor) -> Tensor:
        """<q, k[t]> / sqrt(d_head) of every head, `(B, T, num_heads)`, in the device's widest dtype."""
        dtype, wide = torch.promote_types(x.dtype, torch.float32), widest_float(x.device)
        query = self.query.to(dtype) / math.sqrt(self.query.shape[1])
        keys = None if is_plain(self.key, nn.Linear) and self.key.bias is None else self.key(x)
        with without_autocast(x):
            if keys is not None:
                keys = keys.to(dtype).unflatten(-1, (self.num_heads, -1))
                return torch.einsum("hd,bthd->bth", query, keys).to(wide)
            key = self.key.weight.to(dtype).unflatten(0, (self.num_heads, -1))
            rows = torch.einsum("hd,hdm->hm", query, key)
            return functional.linear(x.to(dtype), rows).to(wide)


def running_logsumexp(scores: Tensor, carried: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the logsumexp of each sequence's scores, before and after every step.

    Args:
        scores: `(B, T, heads)`, in the device's widest dtype.
        carried: `(B, heads)`: the logsumexp of the scores before the call, or None.
        reset: `(B, T)`, bool, or None.

    Returns:
        The logsumexp of the scores before each step, -inf where there are none, and up to and with each step,
        both `(B, T, heads)`.
    """
    starts = None if reset is None else reset.unsqueeze(-1)
    before = scores.new_full((scores.shape[0], scores.shape[2]), -math.inf) if carried is None else carried
    before = before.to(scores.dtype).unsqueeze(1)
    # The maximum only keeps the sum in range. It cancels, so it needs no gradient.
    top = _running_max(torch.cat([before, scores], dim=1).detach(), starts)  # (B, T + 1, heads)
    rescale = torch.exp(top[:, :-1] - top[:, 1:])
    total = gated_scan(
        "identity",
        rescale if starts is None else rescale.masked_fill(starts, 0),
        torch.exp(scores - top[:, 1:]),
        h0=None if carried is None else torch.exp(before - top[:, :1])[:, 0],
        reset=reset,
    )
    after = top[:, 1:] + total.log()
    previous = torch.cat([before, after], dim=1)[:, :-1]
    return previous if starts is None else previous.masked_fill(starts, -math.inf), after


def _running_max(x: Tensor, starts: Tensor | None) -> Tensor:
    """Return each sequence's running maximum along time, rounded to float32 where `starts` is given.

    torch has no cummax with resets. The bits of floats, read as integers, have the floats' order; with the
    sequence's number in the bits above them, no later maximum can come from an earlier sequence.

    Args:
        x: `(B, 1 + T, heads)`: the carried value, then T steps.
        starts: `(B, T, 1)`, bool: where a sequence starts, or None.
    """
    if starts is None:
        return x.cummax(dim=1).values
    band = functional.pad(starts, (0, 0, 1, 0)).cumsum(dim=1) << 32  # (B, 1 + T, 1), int64
    ordered = _flip_negative(x.float().view(torch.int32))
    highest = (ordered + band).cummax(dim=1).values - band
    return _flip_negative(highest.to(torch.int32)).view(torch.float32).to(x.dtype)


def _flip_negative(bits: Tensor) -> Tensor:
    """Map the bits of float32 to int32 of the same order, and back: flip all but the sign of negatives."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
