"""Every mixer against its paper's equations, written out one step after another in float64.

An oracle is given the mixer's parameters, its options and one sequence, and shares no code with the package.
"""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from gated import RECURRENCES
from torch import Tensor

from minrnn.mixers import MIXERS, Mixer

Weights = dict[str, Tensor]

B, T, D_MODEL, D_HIDDEN = 2, 50, 6, 8


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def affine(w: Weights, name: str, x: Tensor, parts: int = 1) -> list[Tensor]:
    """Return W x + b in parts; in the name, * stands for weight and for bias, which there may be none of."""
    weight, bias = w[name.replace("*", "weight")], w.get(name.replace("*", "bias"))
    y = weight @ x if bias is None else weight @ x + bias
    return list(y.chunk(parts))


# --- "Were RNNs All We Needed?", sections 3.1 and 3.2, with the candidate of appendix B ---------------------
# --- Signed decays after "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues" -------------

CANDIDATES: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda c: torch.where(c >= 0, c + 0.5, sigmoid(c)),
    "linear": lambda c: c,
    "tanh": lambda c: (torch.exp(2 * c) - 1) / (torch.exp(2 * c) + 1),
}


def mingru(w: Weights, x: Tensor, *, candidate: str = "positive", signed: bool = False, **_: Any) -> Tensor:
    h, states = torch.zeros(D_HIDDEN, dtype=x.dtype), []
    for step in x:
        z, c = affine(w, "rnn.*_ih_l0", step, 2)
        h = (1 - (2 if signed else 1) * sigmoid(z)) * h + sigmoid(z) * CANDIDATES[candidate](c)
        states.append(h)
    return torch.stack(states)


def minema(w: Weights, x: Tensor, **_: Any) -> Tensor:
    h, states = torch.zeros(D_HIDDEN, dtype=x.dtype), []
    for step in x:
        alpha, delta, c = affine(w, "rnn.*_ih_l0", step, 3)
        h = (1 - sigmoid(alpha) * sigmoid(delta)) * h + sigmoid(alpha) * CANDIDATES["positive"](c)
        states.append(h)
    return torch.stack(states)


def minlstm(
    w: Weights,
    x: Tensor,
    *,
    candidate: str = "positive",
    normalize: bool = True,
    signed: bool = False,
    **_: Any,
) -> Tensor:
    h, states = torch.zeros(D_HIDDEN, dtype=x.dtype), []
    for step in x:
        f, i, c = affine(w, "rnn.*_ih_l0", step, 3)
        f, i = sigmoid(f), sigmoid(i)
        total = f + i if normalize else 1
        decay = (f - i if signed else f) / total
        h = decay * h + i / total * CANDIDATES[candidate](c)
        states.append(h)
    return torch.stack(states)


# --- Elman 1990; Cho et al. 2014 and Hochreiter and Schmidhuber 1997, in the forms of torch.nn --------------


def rnn(w: Weights, x: Tensor, **_: Any) -> Tensor:
    h, states = torch.zeros(D_HIDDEN, dtype=x.dtype), []
    for step in x:
        h = torch.tanh(affine(w, "rnn.*_ih_l0", step)[0] + affine(w, "rnn.*_hh_l0", h)[0])
        states.append(h)
    return torch.stack(states)


def gru(w: Weights, x: Tensor, **_: Any) -> Tensor:
    h, states = torch.zeros(D_HIDDEN, dtype=x.dtype), []
    for step in x:
        r, z, n = affine(w, "rnn.*_ih_l0", step, 3)
        r_h, z_h, n_h = affine(w, "rnn.*_hh_l0", h, 3)
        z = sigmoid(z + z_h)
        h = (1 - z) * torch.tanh(n + sigmoid(r + r_h) * n_h) + z * h
        states.append(h)
    return torch.stack(states)


def lstm(w: Weights, x: Tensor, **_: Any) -> Tensor:
    h = c = torch.zeros(D_HIDDEN, dtype=x.dtype)
    states = []
    for step in x:
        pre = affine(w, "rnn.*_ih_l0", step)[0] + affine(w, "rnn.*_hh_l0", h)[0]
        i, f, g, o = pre.chunk(4)
        c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
        h = sigmoid(o) * torch.tanh(c)
        states.append(h)
    return torch.stack(states)


# --- "Attention Is All You Need", section 3.2, with the rotations of "RoFormer", section 3.4.2 --------------


def attention(w: Weights, x: Tensor, *, num_heads: int = 4, window: int = 0, **_: Any) -> Tensor:
    d_head = D_HIDDEN // num_heads
    rates = [10_000 ** (-2 * j / d_head) for j in range(d_head // 2)]

    def rotate(part: Tensor, position: int) -> Tensor:
        """Turn each pair (j, j + d_head / 2) of every head by position * rate."""
        turned = torch.empty_like(part)
        for j, rate in enumerate(rates):
            cos, sin = math.cos(position * rate), math.sin(position * rate)
            left, right = part[:, j], part[:, j + d_head // 2]
            turned[:, j], turned[:, j + d_head // 2] = left * cos - right * sin, left * sin + right * cos
        return turned

    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs = []
    for t, step in enumerate(x):
        q, k, v = (part.reshape(num_heads, d_head) for part in affine(w, "qkv.*", step, 3))
        keys.append(rotate(k, t))
        values.append(v)
        first = max(0, t - window + 1) if window else 0
        k, v = torch.stack(keys[first:]), torch.stack(values[first:])  # (seen, heads, d_head)
        weight = torch.exp((k * rotate(q, t)).sum(-1) / math.sqrt(d_head))  # (seen, heads)
        outputs.append(((weight / weight.sum(0)).unsqueeze(-1) * v).sum(0).flatten())
    return torch.stack(outputs)


# --- "Attention as an RNN", section 3.1: the rolling sums a and c, and the maximum m ------------------------


def aaren(w: Weights, x: Tensor, *, num_heads: int = 4, **_: Any) -> Tensor:
    q = w["query"]  # (heads, d_head)
    a, c = torch.zeros_like(q), torch.zeros(num_heads, dtype=x.dtype)
    m, outputs = torch.full_like(c, -math.inf), []
    for step in x:
        (k,), (v,) = affine(w, "key.*", step), affine(w, "value.*", step)
        s = (q * k.reshape(q.shape)).sum(-1) / math.sqrt(q.shape[1])
        m_before, m = m, torch.maximum(m, s)
        old, new = torch.exp(m_before - m), torch.exp(s - m)
        a = a * old.unsqueeze(-1) + v.reshape(q.shape) * new.unsqueeze(-1)
        c = c * old + new
        outputs.append((a / c.unsqueeze(-1)).flatten())
    return torch.stack(outputs)


# --- "On the Parameterization and Initialization of Diagonal State Space Models", section 3 -----------------


def s4d(w: Weights, x: Tensor, **_: Any) -> Tensor:
    """Both halves of each conjugate pair, by the zero-order hold, B = 1; then the source's own layer."""
    A = torch.complex(-torch.exp(w["log_decay"]), w["frequency"])
    C = torch.complex(w["C"][..., 0], w["C"][..., 1])
    A, C = torch.cat([A, A.conj()], dim=1), torch.cat([C, C.conj()], dim=1)  # (d_model, N)
    A_bar = torch.exp(torch.exp(w["log_dt"]).unsqueeze(1) * A)
    B_bar = (A_bar - 1) / A
    h, outputs = torch.zeros_like(A), []
    for step in x:
        h = A_bar * h + B_bar * step.unsqueeze(1)
        u = (C * h).sum(1).real + w["D"] * step
        gelu = u * (1 + torch.erf(u / math.sqrt(2))) / 2
        value, gate = affine(w, "output.*", gelu, 2)
        outputs.append(value * sigmoid(gate))
    return torch.stack(outputs)


# --- "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3 --------------------------


def mamba(w: Weights, x: Tensor, *, d_state: int = 16, dt_rank: int = 1, **_: Any) -> Tensor:
    """The selective state space in its block: A by the zero-order hold, B by its first-order form."""
    A = -torch.exp(w["A_log"])
    width = len(w["conv.weight"])
    inside = [torch.zeros(D_HIDDEN, dtype=x.dtype)] * (width - 1)  # what the convolution remembers
    h, outputs = torch.zeros_like(A), []
    for step in x:
        v, z = affine(w, "in_proj.*", step, 2)
        inside.append(v)
        u = w["conv.bias"] + sum(w["conv.weight"][j] * inside[-1 - j] for j in range(width))
        u = u * sigmoid(u)
        dt, B, C = affine(w, "x_proj.*", u)[0].split((dt_rank, d_state, d_state))
        delta = torch.log(1 + torch.exp(affine(w, "dt_proj.*", dt)[0] + w["dt_bias"])).unsqueeze(1)
        h = torch.exp(delta * A) * h + delta * B * u.unsqueeze(1)
        outputs.append(((C * h).sum(1) + w["D"] * u) * z * sigmoid(z))
    return torch.stack(outputs)


ORACLES: dict[str, Callable[..., Tensor]] = {
    "mingru": mingru,
    "minlstm": minlstm,
    "minema": minema,
    "rnn": rnn,
    "gru": gru,
    "lstm": lstm,
    "attention": attention,
    "aaren": aaren,
    "s4d": s4d,
    "mamba": mamba,
}
"""oracle(weights, x, **options): x `(T, d_model)` -> y `(T, d_hidden)`, one sequence from the empty state."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MIXERS},
    **RECURRENCES,
    "mingru-linear": ("mingru", {"candidate": "linear"}),
    "mingru-tanh-no-bias": ("mingru", {"candidate": "tanh", "bias": False}),
    "minlstm-unnormalized-forget-bias": ("minlstm", {"normalize": False, "forget_bias": 3.0}),
    "minlstm-signed-linear": ("minlstm", {"signed": True, "candidate": "linear"}),
    "attention-window": ("attention", {"window": 5, "num_heads": 2}),
    "aaren-one-head-no-bias": ("aaren", {"num_heads": 1, "bias": False}),
    "s4d-inv": ("s4d", {"initialization": "inv", "d_state": 6}),
    "mamba-small": ("mamba", {"d_state": 3, "d_conv": 2, "dt_rank": 2}),
}

TOLERANCES = {torch.float32: (2e-6, 5e-6), torch.float64: (1e-10, 1e-10)}
"""Of values and of gradients, relative to the largest of each tensor."""


def test_every_mixer_has_an_oracle() -> None:
    assert ORACLES.keys() == MIXERS.keys()


def ask(
    oracle: Callable[..., Tensor], weights: Weights, x: Tensor, reset: Tensor, options: dict[str, Any]
) -> Tensor:
    """Give the oracle each row's sequences, one at a time: at a reset the next one starts from nothing."""
    rows = []
    for row, starts in zip(x, reset, strict=True):
        edges = sorted({0, *starts.nonzero().flatten().tolist(), len(row)})
        rows.append(torch.cat([oracle(weights, row[a:b], **options) for a, b in pairwise(edges)]))
    return torch.stack(rows)


def assert_near(ours: Tensor, truth: Tensor, tolerance: float, what: str) -> None:
    error = (ours.double() - truth).abs().max() / truth.abs().max()
    assert error <= tolerance, f"{what}: off by {error:.1e} of the largest, more than {tolerance:.0e}"


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixer_is_its_oracle(variant: str, with_reset: bool) -> None:
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    single: Mixer = MIXERS[name](D_MODEL, D_HIDDEN, **options)
    x, weights_of_y = torch.randn(B, T, D_MODEL), torch.randn(B, T, D_HIDDEN)
    reset = torch.rand(B, T) < (0.15 if with_reset else 0)

    weights = {key: value.detach().double().requires_grad_() for key, value in single.named_parameters()}
    x_true = x.double().requires_grad_()
    y_true = ask(ORACLES[name], weights, x_true, reset, options)
    true = torch.autograd.grad((y_true * weights_of_y).sum(), [x_true, *weights.values()])

    for dtype, (of_values, of_gradients) in TOLERANCES.items():
        mixer, x_ours = copy.deepcopy(single).to(dtype), x.to(dtype).requires_grad_()
        y, _ = mixer(x_ours, reset=reset if with_reset else None)
        ours = torch.autograd.grad((y * weights_of_y).sum(), [x_ours, *mixer.parameters()])
        assert_near(y, y_true, of_values, "y")
        for what, gradient, truth in zip(["x", *weights], ours, true, strict=True):
            assert_near(gradient, truth, of_gradients, f"gradient of {what}")
