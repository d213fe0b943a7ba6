"""Causal self-attention with a carried state, over all tokens or a sliding window."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.mixers.arguments import read_flag, read_size
from minrnn.mixers.graphs import may_vary
from minrnn.mixers.mixer import Mixer, PartForm, State, sequence_start
from minrnn.ops.devices import widest_float

QUERY_BLOCK = 512
"""Queries per block where a mask is needed (or the window, if that is longer), so that no mask is T x T."""

ROTARY_BASE = 10_000.0


class AttentionMixer(Mixer):
    """Causal multi-head attention with rotary positions, without the output projection.

        y[t] = sum_s softmax_s(<R(t) q[t], R(s) k[s]> / sqrt(d_head)) v[s],   s = max(0, t - window + 1) ..
        t

    q, k and v are linear in x, each d_model -> d_hidden, split into heads; y holds the heads side by side.
    The state is the keys and values `(B, S, d_hidden)` of the S tokens before; length `(B,)`, how many of the
    last of them belong to the row's current sequence (a reset shortens it); and position `(B,)`, how many
    tokens the row has read. Keys are rotated once, when they are computed. A stream may have any length:
    scores depend on differences of positions only, and angles are computed in float64.

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

    state_names = ("keys", "values", "length", "position")

    def __init__(
        self, d_model: int, d_hidden: int, *, num_heads: int = 4, window: int = 0, bias: bool = True
    ) -> None:
        super().__init__(d_model, d_hidden)
        d_model, d_hidden = self.d_model, self.d_hidden  # Python's: numpy's may overflow
        self.num_heads = num_heads = read_size("AttentionMixer", "num_heads", num_heads)
        self.window = read_size("AttentionMixer", "window", window, least=0)
        if d_hidden % (2 * num_heads):
            raise ValueError(
                f"AttentionMixer: num_heads must divide d_hidden={d_hidden} into even widths, got {num_heads}"
            )
        self.qkv = nn.Linear(d_model, 3 * d_hidden, bias=read_flag("AttentionMixer", "bias", bias))

    def state_form(self, dtype: torch.dtype) -> tuple[PartForm, ...]:
        token: PartForm = ((None, self.d_hidden), dtype)
        return token, token, ((), torch.int64), ((), torch.int64)

    def empty_state(self, batch: int, like: Tensor) -> State:
        keys, values, length, position = super().empty_state(batch, like)
        shape = batch, max(self.window - 1, 0), self.d_hidden
        return keys.new_zeros(shape), values.new_zeros(shape), length, position

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        B, T, _ = x.shape
        q, new_keys, new_values = self.qkv(x).chunk(3, dim=-1)  # (B, T, d_hidden) each
        at = torch.arange(T, device=x.device)  # all rows that start here share one table of angles
        if state is None:
            empty, none = q.new_empty(B, 0, self.d_hidden), x.new_zeros(B, dtype=torch.int64)
            state = (empty, empty, none, none)
        else:
            if state[0].shape[1] != state[1].shape[1]:
                raise ValueError(
                    "AttentionMixer: keys and values of a state must have the same number of steps, got "
                    f"{state[0].shape[1]} and {state[1].shape[1]}"
                )
            at = state[3].unsqueeze(1) + at  # (B, T)
        q, new_keys = self._rotate(q, at), self._rotate(new_keys, at)
        keys = torch.cat([state[0].to(q.dtype), new_keys], dim=1)  # (B, S + T, d_hidden)
        values = torch.cat([state[1].to(q.dtype), new_values], dim=1)
        S = keys.shape[1] - T
        kept_from = S - state[2]  # (B,)
        oldest = (
            kept_from.unsqueeze(1).expand(-1, T) if reset is None else sequence_start(reset, kept_from, S)
        )
        simple = S == 0 and reset is None and (self.window == 0 or self.window >= T)
        y = self._attend(q, keys, values, None if simple else oldest)
        keys, values, length = self._keep(keys, values, length=S + T - oldest[:, -1])
        return y, (keys, values, length, (at[..., -1] + 1).expand(B).clone())

    def _rotate(self, x: Tensor, at: Tensor) -> Tensor:
        """Rotate queries or keys `(B, T, d_hidden)`, each head, to positions `(T,)` or `(B, T)`."""
        heads = x.unflatten(-1, (self.num_heads, -1))  # (B, T, heads, d_head)
        cos, sin = _rotary_table(at, heads.shape[-1], x.dtype)
        left, right = heads.chunk(2, dim=-1)  # channel j turns with channel j + d_head / 2
        return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype).flatten(2)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, oldest: Tensor | None) -> Tensor:
        """Attend to `oldest[b, t]` .. t; None is everything up to t, without a mask."""
        q, k, v = self._split(q), self._split(keys), self._split(values)  # (B, heads, S + T, d_head)
        if oldest is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = self._attend_in_blocks(q, k, v, oldest)
        return y.transpose(1, 2).flatten(2)

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, oldest: Tensor) -> Tensor:
        """Attend with a mask, one block of queries at a time, to the keys that the block can see."""
        T, S = q.shape[2], k.shape[2] - q.shape[2]
        outputs = []
        for start, stop in self._query_blocks(T):
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

    def _query_blocks(self, T: int) -> list[tuple[int, int]]:
        """Split T queries into blocks; return the start and the end of each."""
        if may_vary(T):  # a graph for all lengths has no loop
            return [(0, T)]
        size = max(QUERY_BLOCK, self.window)
        return [(start, min(start + size, T)) for start in range(0, T, size)]

    def _keep(self, keys: Tensor, values: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the part of the state that the next query can see."""
        limit = self.window - 1
        if self.window == 0 or keys.shape[1] <= limit:
            return keys, values, length
        first = keys.shape[1] - limit
        # Copies: views would keep the whole call's keys alive for as long as the state.
        return keys[:, first:].clone(), values[:, first:].clone(), length.clamp(max=limit)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, d_head)


def _rotary_table(at: Tensor, d_head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of the angles at positions `(..., T)`: `(..., T, 1, d_head / 2)`, float32 at least.

    Angles are computed in the device's widest dtype: at position 65,536 a float32 angle is off by 4e-3.
    """
    wide = widest_float(at.device)
    pairs = torch.arange(0, d_head, 2, dtype=wide, device=at.device)
    angles = at[..., None, None].to(wide) * ROTARY_BASE ** (-pairs / d_head)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)
