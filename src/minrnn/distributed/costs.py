"""A model of what training on many GPUs costs: seconds and bytes, computed and not measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import torch
from torch import Tensor

from minrnn.mixers import GATED_RNNS
from minrnn.models import ModelConfig, SequenceModel
from minrnn.ops.torch_private import FakeTensorMode

BYTES_OF_WEIGHTS = 16
"""A parameter in float32, its gradient and AdamW's two moments."""

BYTES_MOVED = {"replicated": 8, "sharded": 12}
"""Bytes that a rank receives of a parameter in a step, all float32: its gradient, in the two halves of a sum
(4 + 4); or its weight for the forward and for the backward pass, and its gradient (4 + 4 + 4)."""

OPERATIONS = 6
"""Floating-point operations a parameter and token: two in the forward pass, four in the backward."""

CARRIED = 16
"""Bytes that a rank receives of each rank, row and channel in a layer whose scan is split, float32: the
product of decays and the end state in the forward pass, two gradients in the backward pass."""

COLLECTIVES = 4
"""Exchanges one after the other of a layer whose scan is split."""

PROBED = (256, 512)
"""Lengths at which the bytes that a model keeps are counted: they are linear in the length."""


@dataclass(frozen=True)
class Cluster:
    """The hardware. Rates are what is reached, not what is advertised."""

    tflops: float = 400.0
    """10^12 floating-point operations a second of a GPU."""
    link: float = 300.0
    """10^9 bytes a second that a GPU receives from others of its machine."""
    network: float = 45.0
    """10^9 bytes a second that a GPU receives from other machines."""
    gpus: int = 8
    """GPUs of a machine."""
    memory: float = 80.0
    """10^9 bytes of memory of a GPU."""
    latency: float = 15.0
    """Microseconds of an exchange of few bytes within a machine."""
    latency_between: float = 8.0
    """Microseconds more for each doubling of the number of machines."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Cluster: {name} must be more than 0, got {value}")

    def machines(self, ranks: int) -> int:
        """Return the number of machines with so many GPUs."""
        return ceil(ranks / self.gpus)

    def receiving(self, bytes_: float, ranks: int) -> float:
        """Return the seconds in which a rank receives these bytes of the others in one ring."""
        rate = self.link if self.machines(ranks) == 1 else self.network
        return bytes_ * (ranks - 1) / ranks / (1e9 * rate)

    def summing(self, bytes_: float, ranks: int) -> float:
        """Return the seconds of a sum in two levels: in a machine, and of each GPU's part between them."""
        within, machines = min(ranks, self.gpus), self.machines(ranks)
        inside = bytes_ * (within - 1) / within / (1e9 * self.link)
        return inside + bytes_ / within * (machines - 1) / machines / (1e9 * self.network)

    def waiting(self, ranks: int) -> float:
        """Return the seconds of an exchange of few bytes."""
        return 1e-6 * (self.latency + self.latency_between * log2(self.machines(ranks)))


@dataclass(frozen=True)
class Work:
    """A training step of a language model."""

    mixer: str
    parameters: int
    layers: int
    channels: int
    """Channels of a layer's state."""
    conv_width: int
    kept: float
    """Bytes that the backward pass keeps of a token, float32."""
    rows: int
    """Sequences, of all ranks."""
    T: int
    """Tokens of a sequence."""


@dataclass(frozen=True)
class Costs:
    """What a rank does in a step: seconds, and bytes of its memory."""

    ranks: int
    sequence_ranks: int
    """Ranks that divide each sequence."""
    compute: float
    traffic: float
    """Seconds of receiving gradients, and weights if they are sharded, which computing may hide."""
    carries: float
    """Seconds of what a split scan exchanges, which nothing hides."""
    step: float
    tokens_per_second: float
    weights: float
    """Bytes of weights, gradients and moments."""
    activations: float
    """Bytes that the backward pass keeps."""


def work_of(config: ModelConfig, rows: int, T: int) -> Work:
    """Return the work of a model, whose parameters and kept bytes are counted without memory for either.

    Args:
        config: the model.
        rows: sequences of a step, of all ranks.
        T: tokens of a sequence.
    """
    with FakeTensorMode():
        model = SequenceModel(config)
        few, more = (_kept(model, length) for length in PROBED)
    return Work(
        mixer=config.mixer,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=config.num_layers,
        channels=config.d_hidden,
        conv_width=config.conv_width,
        kept=(more - few) / (PROBED[1] - PROBED[0]),
        rows=rows,
        T=T,
    )


def _kept(model: SequenceModel, length: int) -> int:
    """Return the bytes that a step keeps of a sequence, and those of the weights, whatever its length."""
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        found[storage._cdata] = storage.nbytes()
        return x

    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _alive = model.loss(tokens, tokens)  # a freed storage's address may be given to another
    return sum(found.values())


def costs(
    work: Work, cluster: Cluster, ranks: int, weights: Literal["replicated", "sharded"] = "replicated"
) -> Costs:
    """Return what a step costs each of several ranks.

    Rows are divided among the ranks; where they are fewer, so is each sequence, among `ranks / rows`:

        compute = 6 P B T / (N F)
        traffic = 8 P / bandwidth, summed in two levels; sharded: 12 P, in one ring
        carries = L (16 b D K (1 + (w - 1) 12 / 16) / bandwidth + 4 latencies)

    for P parameters, B sequences of T tokens, N ranks of F operations a second, L layers of D channels, K
    ranks that divide a sequence and b rows of a rank.

    Args:
        work: what all ranks do together.
        cluster: the hardware.
        ranks: number of ranks, one a GPU.
        weights: as of TrainConfig.

    Raises:
        ValueError: there are more ranks than rows, and they are no multiple of these, or the mixer's state is
            not a number for each channel; or there are more than tokens.
    """
    if ranks > work.rows and ranks % work.rows:
        raise ValueError(f"costs: ranks must be a multiple of the {work.rows} rows if more, got {ranks}")
    sequence_ranks, tokens, P = max(1, ranks // work.rows), work.rows * work.T, work.parameters
    if sequence_ranks > 1 and work.mixer not in GATED_RNNS:
        raise ValueError(
            f"costs: sequences that are divided must be of {', '.join(GATED_RNNS)}, got {work.mixer}; "
            f"with at most {work.rows} ranks, the rows, none is divided"
        )
    if sequence_ranks > work.T:
        raise ValueError(f"costs: ranks must be at most {tokens}, the tokens of a step, got {ranks}")
    most = ceil(work.rows * sequence_ranks / ranks) * ceil(work.T / sequence_ranks)  # of a rank
    compute = OPERATIONS * P * most / (1e12 * cluster.tflops)
    moved = BYTES_MOVED[weights] * P
    traffic = cluster.summing(moved, ranks) if weights == "replicated" else cluster.receiving(moved, ranks)
    carries = _carries(work, cluster, ranks, sequence_ranks)
    hiding = compute * 2 / 3 if weights == "replicated" else compute  # the backward pass; with gathers, both
    step = compute + max(0.0, traffic - hiding) + carries
    return Costs(
        ranks=ranks,
        sequence_ranks=sequence_ranks,
        compute=compute,
        traffic=traffic,
        carries=carries,
        step=step,
        tokens_per_second=tokens / step,
        weights=BYTES_OF_WEIGHTS * P / (ranks if weights == "sharded" else 1),
        activations=work.kept * most,
    )


def _carries(work: Work, cluster: Cluster, ranks: int, sequence_ranks: int) -> float:
    if sequence_ranks == 1:
        return 0.0
    rows = ceil(work.rows * sequence_ranks / ranks)
    windows = 12 * max(0, work.conv_width - 1)
    received = (CARRIED + windows) * rows * work.channels * sequence_ranks
    return work.layers * (
        cluster.receiving(received, sequence_ranks) + COLLECTIVES * cluster.waiting(sequence_ranks)
    )
