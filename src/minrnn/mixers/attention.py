"""Causal self-attention with a carried state: the baseline that remembers every token, or the last few."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.mixer import Mixer, State, sequence_start

QUERY_BLOCK = 512
"""Queries handled at once where a mask is needed, or a window of them if longer: no mask is T x T."""

ROTARY_BASE = 10_000.0


class AttentionMixer(Mixer):
    """Causal multi-head attention with rotary positions, y without the projection back.

        y[t] = sum_s softmax_s(<R(t) q[t], R(s) k[s]> / sqrt(d_head)) v[s],   s = max(0, t - window + 1) ..
        t

    q, k and v are linear in x, each d_model -> d_hidden, split into heads; y holds the heads side by side.
    The state is keys and values `(B, S, d_hidden)` of the S tokens before, and length `(B,)`: how many of
    them, counted from the last, belong to each row's present sequence (a reset shortens it). Keys are kept
    before their rotation and positions count from the oldest key kept, so a stream may run on for ever: the
    products depend on differences of position alone.

    Args:
        d_model: channels of the input.
        d_hidden: channels of the output, over all heads.
        num_heads: attention heads; must divide d_hidden into even widths.
        window: tokens that a query sees, itself included; 0 is all of them. With a window the state holds
            at most window - 1 tokens.
        bias: whether the projection to q, k and v has a bias.

    Raises:
        ValueError: the heads do not divide d_hidden into even widths, or the window is negative.

    Source: "Attention Is All You Need", section 3.2; rotary positions: "RoFormer", section 3.4.2.
    """

    state_names = ("keys", "values", "length")

    def __init__(
        self, d_model: int, d_hidden: int, *, num_heads: int = 4, window: int = 0, bias: bool = True
    ) -> None:
        super().__init__(d_model, d_hidden)
        if num_heads <= 0 or d_hidden % (2 * num_heads):
            raise ValueError(
                f"AttentionMixer: num_heads must split d_hidden={d_hidden} into even widths, got {num_heads}"
            )
        if window < 0:
            raise ValueError(f"AttentionMixer: window must be 0 (all) or a number of tokens, got {window}")
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(d_model, 3 * d_hidden, bias=bias)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        B, T, _ = x.shape
        q, new_keys, new_values = self.qkv(x).chunk(3, dim=-1)  # (B, T, d_hidden) each
        if state is None:
            state = (q.new_empty(B, 0, self.d_hidden), q.new_empty(B, 0, self.d_hidden), _no_length(x))
        keys = torch.cat([state[0].to(q.dtype), new_keys], dim=1)  # (B, S + T, d_hidden)
        values = torch.cat([state[1].to(q.dtype), new_values], dim=1)
        S = keys.shape[1] - T
        kept_from = S - state[2]  # (B,)
        oldest = (
            kept_from.unsqueeze(1).expand(-1, T) if reset is None else sequence_start(reset, kept_from, S)
        )
        simple = S == 0 and reset is None and (self.window == 0 or self.window >= T)
        y = self._attend(q, keys, values, None if simple else oldest)
        return y, self._keep(keys, values, length=S + T - oldest[:, -1])

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, oldest: Tensor | None) -> Tensor:
        """Attend to `oldest[b, t]` .. t; None is everything up to t, without a mask."""
        T, total = q.shape[1], keys.shape[1]
        cos, sin = _rotary_table(total, self.d_hidden // self.num_heads, q)
        k, v = _rotate(self._split(keys), cos, sin), self._split(values)  # (B, heads, S + T, d_head)
        q = _rotate(self._split(q), cos[total - T :], sin[total - T :])
        if oldest is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = self._attend_in_blocks(q, k, v, oldest)
        return y.transpose(1, 2).flatten(2)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, oldest: Tensor) -> Tensor:
        """Attend under a mask, a block of queries at a time against the keys that the block can reach."""
        T, S = q.shape[2], k.shape[2] - q.shape[2]
        size = max(QUERY_BLOCK, self.window)
        outputs = []
        for start in range(0, T, size):
            stop = min(start + size, T)
            first_key = max(0, S + start - self.window + 1) if self.window else 0
            reach = slice(first_key, S + stop)
            query_at = torch.arange(S + start, S + stop, device=q.device).unsqueeze(1)
            key_at = torch.arange(first_key, S + stop, device=q.device)
            mask = (key_at <= query_at) & (key_at >= oldest[:, start:stop, None])  # (B, queries, keys)
            if self.window:
                mask &= key_at > query_at - self.window
            outputs.append(
                functional.scaled_dot_product_attention(
                    q[:, :, start:stop], k[:, :, reach], v[:, :, reach], attn_mask=mask.unsqueeze(1)
                )
            )
        return torch.cat(outputs, dim=2)

    def _keep(self, keys: Tensor, values: Tensor, length: Tensor) -> State:
        """Cut the state to what the next query can see."""
        limit = self.window - 1
        if self.window == 0 or keys.shape[1] <= limit:
            return keys, values, length
        first = keys.shape[1] - limit
        # Copies: views would keep the whole call's keys alive for as long as the state.
        return keys[:, first:].clone(), values[:, first:].clone(), length.clamp(max=limit)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, d_head)


def _no_length(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)


def _rotary_table(length: int, d_head: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Make cos and sin of every position's angles, `(length, d_head / 2)` each, in float32 at least.

    Angles are computed in double precision: at position 65,536 a float32 angle is off by 4e-3.
    """
    pairs = torch.arange(0, d_head, 2, dtype=torch.float64, device=like.device)
    positions = torch.arange(length, dtype=torch.float64, device=like.device)
    angles = torch.outer(positions, ROTARY_BASE ** (-pairs / d_head))
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (channel j, j + d_head / 2) of x `(B, heads, T, d_head)` by each position's angle."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)
