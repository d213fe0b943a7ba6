"""What a layer and a cell share: projections of the input to a gate's pre-activations, and how they start."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minrnn.mixers.arguments import read_choice, read_dtype, read_flag, read_number, read_size
from minrnn.ops import CANDIDATES, GATES, projected_scan
from minrnn.ops.recurrence import FLOATS, STARTS
from minrnn.ops.transforms import in_autocast

FORGET_BIAS = 1.0
"""How far towards keeping the gate starts, in logits; at 1 a cell keeps about 73 % of its state a step.

A signed cell's decay, -1 to 1 instead of 0 to 1, starts as far towards +1: at 46 %, and at 0 without it.
"""


class GatedModule(nn.Module):
    """The parameters of gated recurrences, one projection `weight_ih*`, `bias_ih*` for each.

    The rows of a weight are the gate's pre-activations in the order that `gated_scan` takes them, so that a
    recurrence is one matrix product and one scan. There is no `weight_hh`: nothing depends on the previous
    state but the scan. A subclass calls `_add_projection` for each recurrence, then `reset_parameters`.
    """

    shown: ClassVar[dict[str, object]] = {"bias": True}
    """Attributes that the representation shows where they differ from their default, given here."""

    recompute = False
    """Whether backward recomputes what it can; see `MinGRU`."""

    def __init__(
        self,
        gate: str,
        *,
        input_size: int,
        hidden_size: int,
        bias: bool,
        candidate: str,
        forget_bias: float | None,
        signed: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.gate = gate
        self.signed = read_flag(name, "signed", signed)
        """Whether decays lie in (-1, 1) instead of (0, 1)."""
        self.input_size = read_size(name, "input_size", input_size)
        self.hidden_size = read_size(name, "hidden_size", hidden_size)
        self.bias = read_flag(name, "bias", bias)
        self.candidate = read_choice(name, "candidate", candidate, CANDIDATES)
        self.forget_bias = FORGET_BIAS if self.bias else 0.0
        if forget_bias is not None:
            self.forget_bias = read_number(name, "forget_bias", forget_bias)
        if self.forget_bias and not self.bias:
            raise ValueError(
                f"{name}: forget_bias={forget_bias} needs a bias to live in; drop it or set bias=True"
            )
        self._suffixes: list[str] = []

    def _add_projection(
        self, suffix: str, columns: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        dtype = read_dtype(type(self).__name__, "dtype", dtype)
        rows = GATES[self.gate].num_pre * self.hidden_size
        weight = torch.empty((rows, columns), device=device, dtype=dtype)
        self.register_parameter(f"weight_ih{suffix}", nn.Parameter(weight))
        if self.bias:
            bias = torch.empty(rows, device=device, dtype=dtype)
            self.register_parameter(f"bias_ih{suffix}", nn.Parameter(bias))
        self._suffixes.append(suffix)

    def _projection(self, suffix: str) -> list[nn.Parameter]:
        kinds = ("weight_ih", "bias_ih") if self.bias else ("weight_ih",)
        return [getattr(self, kind + suffix) for kind in kinds]

    def _project_and_scan(self, x: Tensor, suffix: str, **options: Any) -> Tensor:
        """Run one recurrence; `options` are the other arguments of `projected_scan`."""
        # Read once a call: a parametrized weight is computed anew each time that it is read.
        weight: Tensor = getattr(self, "weight_ih" + suffix)
        bias: Tensor | None = getattr(self, "bias_ih" + suffix) if self.bias else None
        if x.dtype != weight.dtype and not in_autocast(x):
            raise ValueError(
                f"{type(self).__name__}: input must have the weights' dtype, {weight.dtype}, got {x.dtype}; "
                f"convert the input with .to({weight.dtype}) or the module with .to({x.dtype})"
            )
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

        With the forget bias the cell starts by forgetting slowly, so that gradients reach far back from the
        first step.
        """
        bound, gate = 1.0 / math.sqrt(self.hidden_size), GATES[self.gate]
        assert gate.keeps is not None
        name, sign = gate.keeps
        first = gate.pre.index(name) * self.hidden_size
        with torch.no_grad():
            for suffix in self._suffixes:
                weight, *biases = self._projection(suffix)
                weight.uniform_(-bound, bound)
                for bias in biases:
                    bias.uniform_(-bound, bound)
                    bias[first : first + self.hidden_size] += sign * self.forget_bias

    def extra_repr(self) -> str:
        defaults = {
            **self.shown,
            "candidate": "positive",
            "signed": False,
            "forget_bias": FORGET_BIAS if self.bias else 0.0,
        }
        parts = [f"{self.input_size}, {self.hidden_size}"]
        parts += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(parts)

    def _check_hx(self, hx: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise unless the state has this shape, and nothing of it is lost beside an input of this dtype."""
        name = type(self).__name__
        if hx is None:
            return
        if not isinstance(hx, Tensor):
            raise TypeError(
                f"{name}: hx must be one tensor (there is no cell state), got {type(hx).__name__}; "
                "convert_rnns makes modules that take torch.nn.LSTM's pair"
            )
        if hx.shape != shape:
            raise ValueError(f"{name}: hx must be {shape}, got {tuple(hx.shape)}")
        if hx.dtype not in STARTS.get(dtype, FLOATS):
            raise TypeError(
                f"{name}: hx must be {STARTS[dtype][0]} or narrower to go with input, got {hx.dtype}"
            )
