"""The shell of `torch.nn.GRU` around a gated scan: everything MinGRU and MinLSTM share but their gate."""

import math
import numbers
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from minrnn.mixers.mixer import Mixer, State, check_reset
from minrnn.ops import CANDIDATES, GATES, gated_scan

FORGET_BIAS = 1.0
"""How far towards keeping the gate starts, in logits; at 1 a cell keeps about 73 % of its state a step."""


class MinRNN(nn.Module):
    """Layers of one gated scan each; MinGRU and MinLSTM name the gate.

    The rows of `weight_ih_l0` are the gate's pre-activations in the order that `gated_scan` takes them, so
    a layer is one matrix product and one scan. There is no `weight_hh`: nothing depends on the previous
    state but the scan.
    """

    forget_sign: ClassVar[int]
    """+1 where raising the gate's first pre-activation keeps more of the state, -1 where it keeps less."""

    def __init__(
        self,
        gate: str,
        *,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        candidate: str,
        forget_bias: float | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _check_sizes(name, input_size, hidden_size, num_layers)
        _check_flags(name, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        _check_dropout(name, dropout, num_layers)
        if candidate not in CANDIDATES:
            raise ValueError(f"{name}: candidate must be one of {', '.join(CANDIDATES)}, got {candidate!r}")
        if forget_bias and not bias:
            raise ValueError(
                f"{name}: forget_bias={forget_bias} needs a bias to live in; drop it or set bias=True"
            )
        self.gate = gate
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.candidate = candidate
        self.forget_bias = (FORGET_BIAS if bias else 0.0) if forget_bias is None else float(forget_bias)
        self._add_parameters(device, dtype)
        self.reset_parameters()

    def _add_parameters(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        rows = GATES[self.gate].num_pre * self.hidden_size
        for layer in range(self.num_layers):
            columns = self.input_size if layer == 0 else self.num_directions * self.hidden_size
            for direction in range(self.num_directions):
                suffix = _suffix(layer, direction)
                weight = torch.empty((rows, columns), device=device, dtype=dtype)
                self.register_parameter(f"weight_ih_{suffix}", nn.Parameter(weight))
                if self.bias:
                    bias = torch.empty(rows, device=device, dtype=dtype)
                    self.register_parameter(f"bias_ih_{suffix}", nn.Parameter(bias))

    @property
    def num_directions(self) -> int:
        """2 when bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, in the order of `h_n`, as in `torch.nn.GRU`."""
        return [
            [getattr(self, f"{kind}_ih_{_suffix(layer, direction)}") for kind in self._kinds]
            for layer in range(self.num_layers)
            for direction in range(self.num_directions)
        ]

    @property
    def _kinds(self) -> tuple[str, ...]:
        return ("weight", "bias") if self.bias else ("weight",)

    def reset_parameters(self) -> None:
        """Draw parameters from U(-k, k), k = 1 / sqrt(hidden_size), as torch.nn.GRU; add the forget bias.

        With the forget bias the cell starts by forgetting slowly, so that gradients reach far back from the
        first step.
        """
        bound = 1.0 / math.sqrt(self.hidden_size)
        with torch.no_grad():
            for parameters in self.all_weights:
                for parameter in parameters:
                    parameter.uniform_(-bound, bound)
                if self.bias:
                    parameters[1][: self.hidden_size] += self.forget_sign * self.forget_bias

    def flatten_parameters(self) -> None:
        """Do nothing; for code written for torch.nn.GRU, whose cuDNN weights must share one block."""

    def forward(
        self, input: Tensor, h_0: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers over a batch of sequences.

        Args:
            input: `(T, B, input_size)`, `(B, T, input_size)` with batch_first, or `(T, input_size)`
                unbatched.
            h_0: `(num_layers * num_directions, B, hidden_size)`, without B when unbatched; None is zeros.
            reset: bool, the shape of `input` without its last axis; True where a new sequence starts. What
                comes before that step is forgotten; in the backward direction, which meets the sequence's
                last step first, what comes after that last step is forgotten. So no direction sees across a
                start.

        Returns:
            output: `(T, B, num_directions * hidden_size)`, its axes ordered as those of `input`: the last
                layer's states.
            h_n: as `h_0`: every layer's state after its last step (the backward direction's last step is t
                = 0).

        Raises:
            TypeError: `input` is a PackedSequence, h_0 is not a tensor, or reset is not bool.
            ValueError: a shape or the dtype does not fit.
        """
        self._check_input(input)
        self._check_h_0(input, h_0)
        check_reset(type(self).__name__, reset, tuple(input.shape[:-1]))
        if input.dim() == 2:
            output, h_n = self._run_layers(input.unsqueeze(0), _add_batch(h_0, 1), _add_batch(reset, 0))
            return output.squeeze(0), h_n.squeeze(1)
        if self.batch_first:
            return self._run_layers(input, h_0, reset)
        by_batch = None if reset is None else reset.transpose(0, 1)
        output, h_n = self._run_layers(input.transpose(0, 1), h_0, by_batch)
        return output.transpose(0, 1), h_n

    def _run_layers(self, x: Tensor, h_0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        resets = (reset, _starts_to_ends(reset)) if self.bidirectional else (reset,)
        finals: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.num_directions):
                h0 = None if h_0 is None else h_0[len(finals)]
                h = self._scan(layer, direction, x, h0, resets[direction])
                outputs.append(h)
                finals.append(h[:, 0 if direction else -1])
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return x, torch.stack(
            finals
        )  # a copy: a view would keep the whole of h alive for as long as the state

    def _scan(self, layer: int, direction: int, x: Tensor, h0: Tensor | None, reset: Tensor | None) -> Tensor:
        suffix = _suffix(layer, direction)
        bias = getattr(self, f"bias_ih_{suffix}") if self.bias else None
        pre = _project(x, getattr(self, f"weight_ih_{suffix}"), bias)  # (B, T, num_pre * D)
        return gated_scan(
            self.gate, pre, h0=h0, reset=reset, reverse=bool(direction), candidate=self.candidate
        )

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "candidate": "positive",
            "forget_bias": FORGET_BIAS if self.bias else 0.0,
        }
        parts += [f"{k}={getattr(self, k)}" for k, default in defaults.items() if getattr(self, k) != default]
        return ", ".join(parts)

    def _check_input(self, input: Tensor) -> None:
        name = type(self).__name__
        if isinstance(input, PackedSequence):
            raise TypeError(
                f"{name}: input must be a tensor, got a PackedSequence; pass it padded, or joined end to end "
                "with reset marking where each sequence starts"
            )
        time_axis = 1 if self.batch_first and input.dim() == 3 else 0
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size or input.shape[time_axis] == 0:
            axes = f"(B, T, {self.input_size})" if self.batch_first else f"(T, B, {self.input_size})"
            raise ValueError(
                f"{name}: input must be {axes} or (T, {self.input_size}) with T of at least 1, "
                f"got {tuple(input.shape)}"
            )
        dtype = self.weight_ih_l0.dtype
        if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"{name}: input must have the weights' dtype, {dtype}, got {input.dtype}; convert the input "
                f"with .to({dtype}) or the layer with .to({input.dtype})"
            )

    def _check_h_0(self, input: Tensor, h_0: Tensor | None) -> None:
        if h_0 is None:
            return
        name = type(self).__name__
        if not isinstance(h_0, Tensor):
            raise TypeError(f"{name}: h_0 must be one tensor (there is no cell state), got {type(h_0)}")
        batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        shape = (self.num_layers * self.num_directions, *batch, self.hidden_size)
        if h_0.shape != shape:
            raise ValueError(f"{name}: h_0 must be {shape}, got {tuple(h_0.shape)}")


class MinRNNMixer(Mixer):
    """One batch-first MinGRU or MinLSTM layer under the mixers' contract; the state is h `(B, d_hidden)`."""

    state_names = ("h",)
    rnn: MinRNN

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        y, h_n = self.rnn(x, None if state is None else state[0].unsqueeze(0), reset=reset)
        return y, (h_n[0],)


def _suffix(layer: int, direction: int) -> str:
    """End a parameter's name as torch.nn.GRU does."""
    return f"l{layer}_reverse" if direction else f"l{layer}"


def _add_batch(tensor: Tensor | None, axis: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(axis)


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer to x `(B, T, D)` in its order in memory: linear would copy a transposed view."""
    if x.transpose(0, 1).is_contiguous():
        return functional.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
    return functional.linear(x, weight, bias)


def _starts_to_ends(reset: Tensor | None) -> Tensor | None:
    """Turn marks of the first step of each sequence into marks of the last, where a backward pass enters."""
    return None if reset is None else functional.pad(reset[:, 1:], (0, 1))


def _check_sizes(name: str, input_size: int, hidden_size: int, num_layers: int) -> None:
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers}
    for key, size in sizes.items():
        if not isinstance(size, int):
            raise TypeError(f"{name}: {key} must be an int, got {type(size).__name__}")
        if size <= 0:
            raise ValueError(f"{name}: {key} must be greater than zero, got {size}")


def _check_flags(name: str, **flags: bool) -> None:
    for key, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: {key} must be a bool, got {type(flag).__name__}")


def _check_dropout(name: str, dropout: float, num_layers: int) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real) or not 0 <= dropout <= 1:
        raise ValueError(f"{name}: dropout must be a probability in [0, 1], got {dropout!r}")
    if dropout > 0 and num_layers == 1:
        warnings.warn(
            f"{name}: dropout={dropout} has no effect: it acts between layers, and num_layers is 1",
            stacklevel=4,  # the line that builds the layer: past this function and two constructors
        )
