"""What layers and cells share: the parameters of gated recurrences and their initialization."""

import math
from dataclasses import MISSING, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_choice, read_dtype, read_flag, read_number, read_size
from minrnn.ops import CANDIDATES, GATES, projected_scan
from minrnn.ops.recurrence import FLOATS, STARTS
from minrnn.ops.transforms import in_autocast

FORGET_BIAS = 1.0
"""The default of forget_bias, in logits.

Where the rest of a pre-activation is 0, minGRU's decay is then sigmoid(1) = 0.73 instead of 0.5; signed, 0.46
instead of 0.
"""


class GatedModule(nn.Module):
    """The parameters of gated recurrences: a projection `weight_ih*`, `bias_ih*` of the input for each.

    The rows of a weight are the gate's pre-activations in the order that `gated_scan` takes them, so that a
    recurrence is one matrix product and one scan. There is no `weight_hh`: only the scan depends on the
    previous state.

    A subclass is a dataclass: its fields are the arguments of its constructor, so that a signature is written
    once and a subclass adds an option by adding a field. `__post_init__` calls this class's constructor.
    """

    gate: str
    """The name of the gate in GATES. A class names its normalized form."""

    input_size: int
    hidden_size: int
    bias: bool
    candidate: str
    forget_bias: float | None
    signed: bool

    normalize = True
    """Whether the gates sum to one; an option where the gate has an unnormalized form."""

    recompute = False
    """Whether backward recomputes what it can; see `MinGRU`."""

    def __init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        name = type(self).__name__
        self.input_size = read_size(name, "input_size", self.input_size)
        self.hidden_size = read_size(name, "hidden_size", self.hidden_size)
        self.bias = read_flag(name, "bias", self.bias)
        self.candidate = read_choice(name, "candidate", self.candidate, CANDIDATES)
        self.forget_bias = self._read_forget_bias()
        self.normalize = read_flag(name, "normalize", self.normalize)
        self.signed = read_flag(name, "signed", self.signed)
        self.gate = self.gate if self.normalize else GATES[self.gate].unnormalized or self.gate
        if self.signed and not GATES[self.gate].can_be_signed:
            where = "" if self.normalize else " with normalize=False"
            raise ValueError(f"{name}: signed must be False{where}, got True: this gate has no signed form")
        dtype = read_dtype(name, "dtype", dtype)
        columns_of = self._columns()
        self._suffixes = list(columns_of)
        rows = GATES[self.gate].num_pre * self.hidden_size
        for suffix, columns in columns_of.items():
            weight = torch.empty((rows, columns), device=device, dtype=dtype)
            self.register_parameter(f"weight_ih{suffix}", nn.Parameter(weight))
            if self.bias:
                bias = torch.empty(rows, device=device, dtype=dtype)
                self.register_parameter(f"bias_ih{suffix}", nn.Parameter(bias))
        self.reset_parameters()

    def _columns(self) -> dict[str, int]:
        """Return the suffix of each projection's parameters and the channels that it reads."""
        raise NotImplementedError(f"{type(self).__name__} must define _columns")

    def _read_forget_bias(self) -> float:
        if self.forget_bias is None:
            return self._default_forget_bias
        forget_bias = read_number(type(self).__name__, "forget_bias", self.forget_bias)
        if forget_bias and not self.bias:
            raise ValueError(
                f"{type(self).__name__}: forget_bias={forget_bias} needs a bias; drop it or set bias=True"
            )
        return forget_bias

    @property
    def _default_forget_bias(self) -> float:
        return FORGET_BIAS if self.bias else 0.0

    def _projection(self, suffix: str) -> list[nn.Parameter]:
        kinds = ("weight_ih", "bias_ih") if self.bias else ("weight_ih",)
        return [getattr(self, kind + suffix) for kind in kinds]

    def _weights(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor | None]:
        """Return a projection's weight and bias, to be applied to x."""
        # Read once a call: a parametrized weight is computed anew each time that it is read.
        weight: Tensor = getattr(self, "weight_ih" + suffix)
        bias: Tensor | None = getattr(self, "bias_ih" + suffix) if self.bias else None
        if x.dtype != weight.dtype and not in_autocast(x):
            convertible = f" or the module with .to({x.dtype})" if x.dtype in FLOATS else ""
            raise ValueError(
                f"{type(self).__name__}: input must have the weights' dtype, {weight.dtype}, got {x.dtype}; "
                f"convert the input with .to({weight.dtype}){convertible}"
            )
        return weight, bias

    def _project_and_scan(self, x: Tensor, suffix: str, **options: Any) -> Tensor:
        """Run one recurrence; `options` are the other arguments of `projected_scan`."""
        weight, bias = self._weights(x, suffix)
        return projected_scan(
            self.gate,
            x,
            weight,
            bias,
            candidate=self.candidate,
            signed=self.signed,
            recompute=self.recompute,
            **options,
        )

    def reset_parameters(self) -> None:
        """Draw parameters from U(-k, k), k = 1 / sqrt(hidden_size), as torch.nn.GRU; add the forget bias.

        With the forget bias the recurrence starts by forgetting slowly, so that from the beginning of
        training gradients reach far back in time.
        """
        bound, gate = 1.0 / math.sqrt(self.hidden_size), GATES[self.gate]
        assert gate.keeps is not None
        name, sign = gate.keeps
        first, shift = gate.pre.index(name) * self.hidden_size, sign * (self.forget_bias or 0.0)
        with torch.no_grad():
            for suffix in self._suffixes:
                weight, *biases = self._projection(suffix)
                weight.uniform_(-bound, bound)
                for bias in biases:
                    bias.uniform_(-bound, bound)
                    bias[first : first + self.hidden_size] += shift

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        for field in fields(cast("Any", self)):
            default = self._default_forget_bias if field.name == "forget_bias" else field.default
            value = getattr(self, field.name)
            if default is not MISSING and value != default:
                parts.append(f"{field.name}={value}")
        return ", ".join(parts)

    def _check_hx(self, hx: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise unless the state has this shape and a dtype that goes with an input of this dtype."""
        name = type(self).__name__
        if hx is None:
            return
        if not isinstance(hx, Tensor):
            raise TypeError(
                f"{name}: hx must be one tensor (there is no cell state), got {type(hx).__name__}; "
                "PairedMinLSTM takes torch.nn.LSTM's pair"
            )
        if hx.shape != shape:
            raise ValueError(f"{name}: hx must be {shape}, got {tuple(hx.shape)}")
        if hx.dtype not in STARTS.get(dtype, FLOATS):
            raise TypeError(
                f"{name}: hx must be {STARTS[dtype][0]} or narrower to go with input, got {hx.dtype}"
            )
