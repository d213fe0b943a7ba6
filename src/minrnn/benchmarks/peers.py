"""Adapters to other implementations (peers), which are measured if they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.ops import CANDIDATES, GATES, torch_private
from minrnn.ops.reference import split

__all__ = [
    "LAYER_PEERS",
    "SCAN_PEERS",
    "SELECTIVE",
    "SELECTIVE_PEERS",
    "LayerPeer",
    "Peer",
    "Scan",
    "ScanPeer",
]

Scan = Callable[[str, list[Tensor]], Tensor]
"""(gate, pre) -> h: from pre-activations, separate or packed, to states (B, T, D); no initial state."""

LOG_SPACE = "log space loses accuracy in proportion to T"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The properties that all peers have."""

    package: str = "torch"
    """The package to install."""
    module: str = "torch"
    """The module of that package."""
    gates: tuple[str, ...]
    """The gates that it is compared with."""
    inexact: str = ""
    """Why its results may differ from the reference's; if empty, they have to be equal."""
    compiled: bool = False
    """Whether torch.compile is applied to it."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    """The device types that it supports."""
    widens: bool = False
    """Whether it computes 16-bit inputs in a wider dtype."""

    def reason(self, dtype: torch.dtype) -> str:
        """Return why its results may differ from the reference's in this dtype; empty if they may not."""
        narrow = "" if self.widens else "gates and state are kept in 16 bits"
        return self.inexact or (narrow if dtype.itemsize == 2 else "")


@dataclass(frozen=True, kw_only=True)
class ScanPeer(Peer):
    """Another implementation of a scan."""

    make: Callable[[], Scan]
    """Imports its package and returns the function."""
    gates: tuple[str, ...] = tuple(GATES)

    def scan(self) -> Scan:
        """Return the function; its first call imports and compiles it, and raises if that fails."""

        @cache
        def made() -> Scan:
            return torch.compile(self.make(), dynamic=False) if self.compiled else self.make()

        return lambda gate, pre: made()(gate, pre)


def _decay_and_input(gate: str, pre: list[Tensor]) -> tuple[Tensor, Tensor]:
    return GATES[gate].equations(CANDIDATES["positive"], *split(gate, pre))


def _make_loop() -> Scan:
    def loop(gate: str, pre: list[Tensor]) -> Tensor:
        a, b = _decay_and_input(gate, pre)
        h = b[:, 0]
        states = [h]
        # The backward of unbind is one stack; that of indexing fills a (B, T, D) tensor of zeros for each
        # step.
        for a_t, b_t in zip(a.unbind(1)[1:], b.unbind(1)[1:], strict=True):
            h = torch.addcmul(b_t, a_t, h)
            states.append(h)
        return torch.stack(states, 1)

    return loop


def _make_engine(module: str) -> Scan:
    engine = import_module(module)

    class Engine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: str, *pre: Tensor) -> Tensor:
            ctx.mode = gate, "positive", False, False
            h = engine.forward([*pre], None, None, *ctx.mode)
            ctx.save_for_backward(h, *pre)
            return h

        @staticmethod
        def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
            h, *pre = ctx.saved_tensors
            return None, *engine.backward(dh, pre, h, None, None, *ctx.mode)[:-1]

    return lambda gate, pre: Engine.apply(gate, *pre)


def _make_log_space() -> Scan:
    package = import_module("minGRU_pytorch.minGRU")

    def log_space(gate: str, pre: list[Tensor]) -> Tensor:
        *gates, candidate = split(gate, pre)
        log_a, log_update = _LOG_GATES[gate](*gates)
        return package.heinsen_associative_scan_log(log_a, log_update + package.log_g(candidate))

    return log_space


def _log_mingru(z: Tensor) -> tuple[Tensor, Tensor]:
    return -functional.softplus(z), -functional.softplus(-z)


def _log_minlstm(f: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    difference = functional.softplus(-f) - functional.softplus(-i)
    return -functional.softplus(difference), -functional.softplus(-difference)


def _log_minlstm_unnormalized(f: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
    return -functional.softplus(-f), -functional.softplus(-i)


# Logarithms of the decay and of the candidate's weight, as that package's layers compute them.
_LOG_GATES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "mingru": _log_mingru,
    "minlstm": _log_minlstm,
    "minlstm_unnormalized": _log_minlstm_unnormalized,
}


def _make_mambapy() -> Scan:
    pscan = import_module("mambapy.pscan").pscan

    def mambapy(gate: str, pre: list[Tensor]) -> Tensor:
        a, b = _decay_and_input(gate, pre)
        return pscan(a.unsqueeze(-1), b.unsqueeze(-1)).squeeze(-1)  # (B, T, D, N = 1)

    return mambapy


def _make_accelerated_scan(module: str) -> Scan:
    scan = import_module(module).scan

    def accelerated_scan(gate: str, pre: list[Tensor]) -> Tensor:
        a, b = _decay_and_input(gate, pre)
        h = scan(a.transpose(1, 2).contiguous(), b.transpose(1, 2).contiguous())  # (B, D, T)
        return h.transpose(1, 2).contiguous()  # the layout that the next layer of a model reads

    return accelerated_scan


def _make_warp_scan() -> Scan:
    accelerated_scan = _make_accelerated_scan("accelerated_scan.warp")

    def warp_scan(gate: str, pre: list[Tensor]) -> Tensor:
        T = pre[0].shape[1]
        if T.bit_count() != 1 or not 32 <= T <= 65536:  # undefined for others, without an error
            raise ValueError(f"T must be a power of two from 32 to 65536, got {T}")
        return accelerated_scan(gate, pre)

    return warp_scan


def _make_hgrn(name: str) -> Scan:
    scan = getattr(import_module("fla.ops.hgrn"), name)

    def hgrn(gate: str, pre: list[Tensor]) -> Tensor:
        log_a, _ = _LOG_GATES[gate](*split(gate, pre)[:-1])
        _, b = _decay_and_input(gate, pre)
        return scan(b.contiguous(), log_a.contiguous())[0]  # (states, final state or None)

    return hgrn


def _make_associative_scan() -> Scan:
    operator = torch_private.associative_scan()

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def associative_scan(gate: str, pre: list[Tensor]) -> Tensor:
        pair = _decay_and_input(gate, pre)
        return operator(combine, pair, dim=1, combine_mode="generic")[1]

    return associative_scan


def _engine(module: str) -> ScanPeer:
    return ScanPeer(make=partial(_make_engine, module), package="minrnn", module=module, widens=True)


_LOG_SPACE = ScanPeer(
    make=_make_log_space,
    package="minGRU-pytorch",
    module="minGRU_pytorch",
    gates=tuple(_LOG_GATES),
    inexact=LOG_SPACE,
)
_ACCELERATED_SCAN = ScanPeer(
    make=partial(_make_accelerated_scan, "accelerated_scan.ref"),
    package="accelerated-scan",
    module="accelerated_scan",
)
_HGRN = ScanPeer(
    make=partial(_make_hgrn, "fused_recurrent_hgrn"),
    package="flash-linear-attention",
    module="fla",
    gates=tuple(_LOG_GATES),
    devices=("cuda",),
)
_ASSOCIATIVE_SCAN = ScanPeer(make=_make_associative_scan)

SCAN_PEERS: dict[str, ScanPeer] = {
    # The same equations, one step after another, in eager torch.
    "loop": ScanPeer(make=_make_loop),
    # Our engines in torch's own operations: one in parallel over time, and the loop that specifies the rest.
    "portable": _engine("minrnn.ops.portable"),
    "reference": _engine("minrnn.ops.reference"),
    # The paper's appendix B: cumsum and logcumsumexp.
    "log-space": _LOG_SPACE,
    "log-space-compiled": replace(_LOG_SPACE, compiled=True),
    # Blelloch's sweeps with in-place operations and a backward of its own.
    "mambapy": ScanPeer(make=_make_mambapy, package="mambapy", module="mambapy"),
    # Over (B, D, T), so with transposes before and after: a recursive tree; Triton's associative scan by
    # tiles; CUDA warps, compiled on first use.
    "accelerated-scan": _ACCELERATED_SCAN,
    "accelerated-scan-triton": replace(
        _ACCELERATED_SCAN,
        make=partial(_make_accelerated_scan, "accelerated_scan.scalar"),
        devices=("cuda",),
    ),
    "accelerated-scan-warp": replace(_ACCELERATED_SCAN, make=_make_warp_scan, devices=("cuda",)),
    # flash-linear-attention's HGRN, which takes the decay's logarithm; gates in eager torch. One in chunks of
    # 128 steps, between which states are passed in sequence; one step by step.
    "fla-hgrn-chunk": replace(
        _HGRN, make=partial(_make_hgrn, "chunk_hgrn"), inexact="decays come from sums of logarithms"
    ),
    "fla-hgrn-recurrent": _HGRN,
    # torch's higher-order operator, a prototype.
    "associative-scan": _ASSOCIATIVE_SCAN,
    "associative-scan-compiled": replace(_ASSOCIATIVE_SCAN, compiled=True),
}


SELECTIVE = "selective"
"""The name of Mamba's recurrence among gates: `pre` are then u, delta_pre, A, B, C and D, the result is y."""


def _make_selective_mambapy() -> Scan:
    block = import_module("mambapy.mamba").MambaBlock

    def mambapy(gate: str, inputs: list[Tensor]) -> Tensor:
        u, delta_pre, A, B, C, D = inputs
        return block.selective_scan(None, u, functional.softplus(delta_pre), A, B, C, D)

    return mambapy


SELECTIVE_PEERS: dict[str, ScanPeer] = {
    # A parallel scan over expanded states, as its MambaBlock calls it.
    "mambapy": ScanPeer(
        make=_make_selective_mambapy,
        package="mambapy",
        module="mambapy",
        gates=(SELECTIVE,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class LayerPeer(Peer):
    """Another recurrent layer, batch first, from (B, T, input_size) to (B, T, hidden_size)."""

    build: Callable[[str, int, int], nn.Module]
    """(cell, input_size, hidden_size) -> layer."""
    call: Callable[[Any, Tensor, Any], tuple[Tensor, Any]]
    """(layer, x, state) -> (y, state); state None is the empty state."""
    load: Callable[[nn.Module, tuple[Tensor, ...]], None] | None = None
    """Loads our weights, (hidden_size, input_size) for each pre-activation, with zero biases. None if the
    layer computes another function."""


def _build_torch(cell: str, input_size: int, hidden_size: int) -> nn.Module:
    kind = {"mingru": nn.GRU, "minlstm": nn.LSTM}[cell]
    return kind(input_size, hidden_size, batch_first=True)


def _call_torch(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state)


def _build_mingru_pytorch(cell: str, input_size: int, hidden_size: int) -> nn.Module:
    module, name = {"mingru": ("minGRU", "minGRU"), "minlstm": ("minLSTM", "minLSTM")}[cell]
    kind = getattr(import_module(f"minGRU_pytorch.{module}"), name)
    expansion = hidden_size / input_size
    if int(input_size * expansion) != hidden_size:
        raise ValueError(f"no expansion_factor of a float turns {input_size} channels into {hidden_size}")
    return kind(input_size, expansion_factor=expansion, proj_out=False)


def _call_mingru_pytorch(layer: nn.Module, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    return layer(x, state, return_next_prev_hidden=True)


def _load_mingru_pytorch(layer: nn.Module, weights: tuple[Tensor, ...]) -> None:
    *gates, candidate = weights
    (theirs,) = layer.parameters()  # one projection without bias, the candidate first
    with torch.no_grad():
        theirs.copy_(torch.cat([candidate, *gates]))


_MINGRU_PYTORCH = LayerPeer(
    build=_build_mingru_pytorch,
    call=_call_mingru_pytorch,
    load=_load_mingru_pytorch,
    package="minGRU-pytorch",
    module="minGRU_pytorch",
    gates=("mingru", "minlstm"),
    inexact=LOG_SPACE,
)

LAYER_PEERS: dict[str, LayerPeer] = {
    # The classic cells, trained by backpropagation through time.
    "gru": LayerPeer(build=_build_torch, call=_call_torch, gates=("mingru",)),
    "lstm": LayerPeer(build=_build_torch, call=_call_torch, gates=("minlstm",)),
    # The same cells in log space.
    "mingru-pytorch": _MINGRU_PYTORCH,
    "mingru-pytorch-compiled": replace(_MINGRU_PYTORCH, compiled=True),
}
