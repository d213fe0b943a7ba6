"""`minrnn bench layer`: training steps of our layers, torch's GRU and LSTM, and other peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from minrnn.benchmarks.bench import OURS, Bench, Document
from minrnn.benchmarks.check import errors, layer_reference, some_rows
from minrnn.benchmarks.measure import System
from minrnn.benchmarks.options import TimedBench, require
from minrnn.benchmarks.peers import LAYER_PEERS, LayerPeer
from minrnn.benchmarks.report import Report
from minrnn.benchmarks.session import Case, Kind, run
from minrnn.benchmarks.tables import by_length, by_system
from minrnn.benchmarks.timing import Workload
from minrnn.benchmarks.workloads import training_step
from minrnn.mixers import GATED_RNNS
from minrnn.mixers.layer import MinRNN
from minrnn.ops import GATES

__all__ = [
    "BENCH",
    "KIND",
    "LayerBench",
    "build_linear",
    "build_ours",
    "build_peer",
    "layer_systems",
    "our_weight",
    "peer_call",
]

RECOMPUTING = f"{OURS}-recompute"
"""Our layer with recompute=True, which needs less memory and more time."""

LIMIT = "linear"
KIND = Kind("layer", "BTD", across="T", limit=LIMIT, phases=("forward", "backward", "step"), unit="ms")

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerBench(TimedBench):
    """Time the training step of MinGRU(D, D) or MinLSTM(D, D), of torch's GRU or LSTM, and of other peers.

    A step is forward, and backward to the input and all weights given the gradient of the output, without an
    optimizer. Layers with the same equations are first compared with a float64 loop. The limit is the
    training step of Linear(D, 2 D), or 3 D for minLSTM: the matrix product that our layer begins with. Our
    layer is also timed with recompute=True, which saves less for backward.
    """

    shapes: tuple[str, ...] = ("16x64..4096x256",)
    """BxTxD: batch, length, hidden channels; 64..1024 stands for 64, 128, 256, 512 and 1024."""
    cells: tuple[Literal["mingru", "minlstm"], ...] = ("mingru",)
    """Gates; mingru is compared with a GRU, minlstm with an LSTM."""
    input_size: int = 0
    """Channels of the input (0: as many as hidden channels)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("input_size", self.input_size >= 0, "0 or more", self.input_size)


def bench_layer(options: LayerBench, command: Sequence[str], console: Console) -> Report:
    """Run the benchmark; arguments, return value and errors are those of `session.run`."""

    def systems(case: Case, peers: Mapping[str, LayerPeer]) -> dict[str, System]:
        return layer_systems(case, peers, options.input_size or case.shape["D"])

    return run(KIND, options, options.cells, LAYER_PEERS, systems, command, console)


def render(document: Document) -> str:
    """Return a table with a row for each length if only the length varies, else for each case and system."""
    results = document["results"]
    others = {str({**result, "systems": None, "shape": {**result["shape"], "T": 0}}) for result in results}
    lengths_only = len(results) > 1 and len(others) == 1
    return (by_length(results) if lengths_only else by_system(results, KIND.phases)).markdown()


BENCH = Bench(LayerBench, bench_layer, render)


def build_ours(case: Case, input_size: int) -> MinRNN:
    """Return our layer with zero biases, so that layers without biases compute the same function."""
    kind = GATED_RNNS[case.gate].layer
    layer = kind(input_size, case.shape["D"], batch_first=True, device=case.device, dtype=case.torch_dtype)
    nn.init.zeros_(layer.get_parameter("bias_ih_l0"))
    return layer


def _recomputing(layer: MinRNN) -> MinRNN:
    """Return a copy with recompute=True."""
    again = deepcopy(layer)
    again.recompute = True
    return again


def our_weight(layer: MinRNN) -> Tensor:
    """Return the weight of all pre-activations, (k * hidden_size, input_size)."""
    return layer.all_weights[0][0]


def build_peer(peer: LayerPeer, case: Case, input_size: int, weight: Tensor) -> nn.Module:
    """Return a peer's layer, with our weight if it computes the same function."""
    layer = peer.build(case.gate, input_size, case.shape["D"]).to(case.device, case.torch_dtype)
    if peer.load is not None:
        peer.load(layer, weight.detach().chunk(GATES[case.gate].num_pre))
    return layer


def build_linear(case: Case, input_size: int) -> nn.Linear:
    """Return the matrix product that our layer begins with."""
    rows = GATES[case.gate].num_pre * case.shape["D"]
    return nn.Linear(input_size, rows, device=case.device, dtype=case.torch_dtype)


def peer_call(peer: LayerPeer) -> Callable[[Any, Tensor, Any], tuple[Tensor, Any]]:
    """Return the function that calls the peer's layer, compiled if the peer is."""
    return torch.compile(peer.call, dynamic=False) if peer.compiled else peer.call


def layer_systems(case: Case, peers: Mapping[str, LayerPeer], input_size: int) -> dict[str, System]:
    """Return the linear layer, our layer with and without recompute, and the peers, on the same inputs.

    Args:
        case: gate, shape (B, T, D), dtype, device and seed.
        peers: the layers to compare with.
        input_size: channels of the input.
    """
    torch.manual_seed(case.seed)
    B, T, D = case.shape.values()
    x = _draw(case, B, T, input_size).requires_grad_()
    dy = _draw(case, B, T, D)
    ours, linear = build_ours(case, input_size), build_linear(case, input_size)
    rows = some_rows(B, T, max(input_size, D))
    few = x[:rows].detach().requires_grad_()
    exact = layer_reference(case.gate, few, our_weight(ours), dy[:rows])

    def compare(call: Call, **weights: Tensor) -> dict[str, float]:
        """Compare h, dx, and the gradients of `weights`, named dNAME."""
        y = call(few)
        dx, *dweights = torch.autograd.grad(y, [few, *weights.values()], dy[:rows])
        named = zip(weights, dweights, strict=True)
        return errors({"h": y, "dx": dx} | {f"d{name}": d for name, d in named}, exact)

    def our_system(layer: MinRNN) -> System:
        def call(x: Tensor) -> Tensor:
            return layer(x)[0]

        return System(_step(call, layer, x, dy), lambda: compare(call, weight=our_weight(layer)))

    systems = {
        LIMIT: System(_step(linear, linear, x, _draw(case, B, T, linear.out_features))),
        OURS: our_system(ours),
        RECOMPUTING: our_system(_recomputing(ours)),
    }
    for name, peer in peers.items():
        systems[name] = _peer_system(peer, case, x, dy, our_weight(ours), compare)
    return systems


def _peer_system(
    peer: LayerPeer,
    case: Case,
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    compare: Callable[[Call], dict[str, float]],
) -> System:
    layer = build_peer(peer, case, x.shape[2], weight)
    call_layer = peer_call(peer)

    def call(x: Tensor) -> Tensor:
        return call_layer(layer, x, None)[0]

    same_function = peer.load is not None
    return System(
        _step(call, layer, x, dy),
        (lambda: compare(call)) if same_function else None,
        peer.reason(case.torch_dtype),
    )


def _draw(case: Case, *shape: int) -> Tensor:
    return torch.randn(*shape).to(case.device, case.torch_dtype)


def _step(call: Call, layer: nn.Module, x: Tensor, dy: Tensor) -> Workload:
    return training_step(lambda: call(x), [x, *layer.parameters()], dy)
