"""One step of a model in one call of the compiled engine.

    x = norm(sum_k W_k u_k + b_k)                             a start, or x as it is given
    x = [x +] W_out f(W_in conv(norm(x)) + b_in) + b_out      branches
    y = W norm(x) + b                                         an end, or x as it is then

f is a gate, whose state it advances, or an activation. A step is some sixty small operations of torch, which
take longer to call than to compute; here they are one call. It serves where numbers alone are wanted, of a
few rows in float32 on the CPU: the caller has the same function in torch's operations, for everything else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from minrnn.ops.gates import GATES
from minrnn.ops.registry import forced, load
from minrnn.ops.transforms import is_observed

__all__ = [
    "Affine",
    "Branch",
    "BranchState",
    "Chain",
    "End",
    "Links",
    "NoChainError",
    "Norm",
    "Start",
    "serves",
]

MOST_NUMBERS = 1 << 14
"""Numbers in x, rows times channels, up to which this takes less time than torch's operations: x then stays
in the nearest caches while the weights pass by once. With more, torch's matrix products win, which cut both.

On one thread of a Xeon, of torch's time: one row takes 0.17 (width 128, 3 layers) to 0.78 (width 1024, 8
layers, whose weights come from memory at 15 GB/s); at this bound 0.86 to 0.95."""

_NORMS = {"none": 0, "layer": 1, "rms": 2}  # as in chain.h
_ACTIVATIONS = {"gelu": 0, "relu": 1, "silu": 2, "swiglu": 3}
_PLAIN = (Tensor, Parameter)
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_dtype: Callable[[Tensor], torch.dtype] = operator.attrgetter("dtype")


def _engine() -> Any:
    """Find the compiled engine; None where it is missing or set aside."""
    engine = load("cpp")
    return None if isinstance(engine, ImportError) or forced() not in (None, "cpp") else engine


_cpu = _engine()


def serves(x: Tensor) -> bool:
    """Whether a step from x `(..., D)` may be one call.

    That is where the compiled engine is there, x is float32 on the CPU, and nobody watches torch's operations
    or differentiates them.
    """
    return _cpu is not None and x.dtype is torch.float32 and x.is_cpu and x.numel() > 0 and not is_observed()


class NoChainError(ValueError):
    """What was given is no chain that can be computed at once."""


class Affine(NamedTuple):
    """A weight and a bias, each of which may be absent."""

    weight: Tensor | None = None
    bias: Tensor | None = None


class Norm(NamedTuple):
    """A norm over the channels."""

    kind: str
    """none, layer or rms."""
    eps: float
    """What it adds to the variance, or to the mean square."""
    scale: Affine
    """Of each channel, `(d_model,)`."""
    channels: int | None = None
    """How many it says that it takes, which then have to be d_model."""


class Start(NamedTuple):
    """norm(sum_k W_k u_k + b_k)."""

    parts: Sequence[Affine]
    """W_k `(d_model, width of u_k)` and b_k; at least one."""
    norm: Norm


class Branch(NamedTuple):
    """[x +] W_out f(W_in conv(norm(x)) + b_in) + b_out."""

    norm: Norm
    conv: Affine | None
    """Its weight `(width, d_model)`, the present step's first, and its bias; None: no convolution."""
    up: Affine
    """W_in `(n * D, d_model)`, n the inputs of f for each of its outputs, and b_in."""
    function: str
    """f: a name in GATES, or gelu, relu, silu or swiglu (silu of one half times the other)."""
    candidate: str
    """A gate's candidate."""
    down: Affine
    """W_out `(d_model, D)`, and b_out."""
    residual: bool
    """Whether x is added."""
    signed: bool = False
    """Whether a gate's decays lie in (-1, 1)."""

    @property
    def inputs(self) -> int:
        """Inputs of f for each of its outputs."""
        gate = GATES.get(self.function)
        return 1 + (self.function == "swiglu") if gate is None else gate.num_pre


class End(NamedTuple):
    """W norm(x) + b."""

    norm: Norm
    projection: Affine
    """W `(width of y, d_model)`, and b."""


class BranchState(NamedTuple):
    """What a branch carries from step to step; None at a sequence's start, and where it carries nothing."""

    window: Tensor | None = None
    """The convolution's last inputs, `(rows, width - 1, d_model)`."""
    h: Tensor | None = None
    """The gate's state, `(rows, D)`."""


class _Carried(NamedTuple):
    """The shapes of what a branch carries."""

    past: int | None
    """Steps before the present one that the convolution sees; None: there is none."""
    D: int
    """Channels of the gate's state; 0: there is none."""


class Links(NamedTuple):
    """What a chain is made of."""

    branches: Sequence[Branch]
    """At least one, all of one d_model."""
    start: Start | None = None
    """None: x is given."""
    end: End | None = None
    """None: y is x."""


class Chain:
    """A start, branches and an end, read where their tensors lie.

    Raises:
        NoChainError: the engine is missing, or a tensor is not on the CPU, contiguous and in float32, or does
            not fit to the others.
    """

    def __init__(self, links: Links) -> None:
        branches, start, end = links
        if _cpu is None or not branches:
            raise NoChainError("Chain: needs the compiled engine and a branch")
        self._tensors: list[Tensor] = []
        self._width = _matrix(branches[0].up).shape[1]
        self._chain = _cpu.compiled.decode.Chain(self._width)
        self._inputs = [self._width]
        if start is not None:
            self._inputs = [_matrix(part).shape[1] for part in start.parts]
            parts = [
                (width, self._projection(part, width, self._width))
                for part, width in zip(start.parts, self._inputs, strict=True)
            ]
            self._chain.start(parts, self._norm(start.norm))
        self._carried = [self._add(branch) for branch in branches]
        self._outputs = self._width
        if end is not None:
            self._outputs = len(_matrix(end.projection))
            projection = self._projection(end.projection, self._width, self._outputs)
            self._chain.end(self._norm(end.norm), self._outputs, projection)
        self._places = self._where()

    def holds(self) -> bool:
        """Whether its tensors are laid out as they were, where they were; their numbers may have changed."""
        return self._where() == self._places

    def takes(self, inputs: Sequence[Tensor], states: Sequence[BranchState]) -> bool:
        """Whether `step` can be called with these, if it `serves` the first input, and should."""
        axes = inputs[0].shape[:-1]
        rows = axes.numel()
        if len(inputs) != len(self._inputs) or len(states) != len(self._carried):
            return False
        if rows * self._width > MOST_NUMBERS:
            return False
        for x, width in zip(inputs, self._inputs, strict=True):
            if not _is_readable(x, (*axes, width)):
                return False
        for (window, h), (past, D) in zip(states, self._carried, strict=True):
            if window is not None and not _is_readable(window, (rows, past, self._width)):
                return False
            if h is not None and not _is_readable(h, (rows, D)):
                return False
        return True

    def step(
        self, inputs: Sequence[Tensor], states: Sequence[BranchState]
    ) -> tuple[Tensor, list[BranchState]] | None:
        """Compute one step of every row.

        Args:
            inputs: u_k `(..., width of u_k)`; without a start x alone, `(..., d_model)`.
            states: of every branch, as before the step.

        Returns:
            y `(..., width of y)`, and the states after the step; None where a number on the way was near
            overflow, infinite or NaN: torch knows what comes of it.
        """
        first = inputs[0]
        rows = first.numel() // first.shape[-1]
        y = first.new_empty(*first.shape[:-1], self._outputs)
        after, places = [], []
        for (window, h), (past, D) in zip(states, self._carried, strict=True):
            next_window = None if past is None else first.new_empty(rows, past, self._width)
            next_h = first.new_empty(rows, D) if D else None
            after.append(BranchState(next_window, next_h))
            places.append((window, next_window, h, next_h))
        moderate = self._chain.step(rows, torch.get_num_threads(), inputs, places, y)
        return (y, after) if moderate else None

    def _add(self, branch: Branch) -> _Carried:
        wide, D = len(_matrix(branch.up)), _matrix(branch.down).shape[1]
        gated = branch.function in GATES
        if not gated and branch.function not in _ACTIVATIONS:
            raise NoChainError(f"Chain: function must be a gate or a known activation, got {branch.function}")
        if wide != branch.inputs * D:
            raise NoChainError(
                f"Chain: {branch.function} must have {branch.inputs} inputs each, got {wide}, {D}"
            )
        conv, past = Affine(), None
        if branch.conv is not None:
            past = len(_matrix(branch.conv)) - 1
            conv = self._read(branch.conv, (1 + past, self._width), (self._width,))
        self._chain.branch(
            self._norm(branch.norm),
            0 if past is None else 1 + past,
            conv,
            wide,
            D,
            self._projection(branch.up, self._width, wide),
            self._projection(branch.down, D, self._width),
            _cpu.GATE_CODES[branch.function] if gated else -1,
            _cpu.CANDIDATE_CODES[branch.candidate],
            branch.signed,
            branch.inputs,
            0 if gated else _ACTIVATIONS[branch.function],
            branch.residual,
        )
        return _Carried(past, D if gated else 0)

    def _norm(self, norm: Norm) -> tuple[int, float, Affine]:
        if norm.channels not in (None, self._width):
            raise NoChainError(f"Chain: a norm must be of {self._width} channels, got {norm.channels}")
        return _NORMS[norm.kind], norm.eps, self._read(norm.scale, (self._width,), (self._width,))

    def _projection(self, part: Affine, inputs: int, outputs: int) -> Affine:
        return self._read(part, (outputs, inputs), (outputs,))

    def _read(self, part: Affine, weight: tuple[int, ...], bias: tuple[int, ...]) -> Affine:
        """Check and keep a weight and a bias, which are read where they lie."""
        for x, shape in zip(part, (weight, bias), strict=True):
            if x is not None:
                if not _is_readable(x, shape):
                    raise NoChainError(f"Chain: {shape} float32 numbers are needed on the CPU, got {x.shape}")
                self._tensors.append(x)
        return part

    def _where(self) -> list[Any]:
        """Find all that `_is_readable` asks for."""
        tensors = self._tensors
        found = None if _exchange is None else _cpu.compiled.decode.layouts(_exchange, tensors)
        if found is None:  # strides and a number of elements say what a shape is, and faster
            looks = (Tensor.data_ptr, Tensor.stride, Tensor.numel, _dtype)
            found = [list(map(look, tensors)) for look in looks]
        return [found, *map(Tensor.is_neg, tensors)]


def _matrix(part: Affine) -> Tensor:
    if part.weight is None or part.weight.dim() != 2:
        raise NoChainError("Chain: a projection must have a matrix")
    return part.weight


def _is_readable(x: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Whether a place and a shape say all about x."""
    return (
        type(x) in _PLAIN
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and x.shape == shape
        and not x.is_neg()
    )
