"""The shell of `torch.nn.GRU` around a gated scan: everything MinGRU and MinLSTM share but their gate."""

import warnings
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from minrnn.mixers.arguments import read_flag, read_probability, read_size
from minrnn.mixers.gated import GatedModule
from minrnn.mixers.mixer import Mixer, State, check_reset
from minrnn.mixers.ragged import Ragged, read_documents, read_jagged, read_packed
from minrnn.ops.joined import Joined

Input = TypeVar("Input", Tensor, PackedSequence)


class MinRNN(GatedModule):
    """Layers of one gated scan each; MinGRU and MinLSTM name the gate."""

    shown: ClassVar[dict[str, object]] = {
        "num_layers": 1,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "recompute": False,
    }

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
        signed: bool,
        recompute: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            gate,
            input_size=input_size,
            hidden_size=hidden_size,
            bias=bias,
            candidate=candidate,
            forget_bias=forget_bias,
            signed=signed,
        )
        name = type(self).__name__
        self.num_layers = read_size(name, "num_layers", num_layers)
        self.batch_first = read_flag(name, "batch_first", batch_first)
        self.dropout = read_probability(name, "dropout", dropout)
        self.bidirectional = read_flag(name, "bidirectional", bidirectional)
        self.recompute = read_flag(name, "recompute", recompute)
        if self.dropout > 0 and self.num_layers == 1:
            warnings.warn(
                f"{name}: dropout={dropout} has no effect: it acts between layers, and num_layers is 1",
                stacklevel=3,  # the line that builds the layer: past two constructors
            )
        for layer in range(self.num_layers):
            columns = self.input_size if layer == 0 else self.num_directions * self.hidden_size
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: self.num_directions]:
                self._add_projection(suffix, columns, device, dtype)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        """2 when bidirectional, else 1."""
        return 2 if self.bidirectional else 1

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """The parameters of each layer and direction, in the order of `h_n`, as in `torch.nn.GRU`."""
        return [self._projection(suffix) for suffix in self._suffixes]

    def flatten_parameters(self) -> None:
        """Do nothing; for code written for torch.nn.GRU, whose cuDNN weights must share one block."""

    def forward(
        self,
        input: Input,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Input, Tensor]:
        """Run the layers over a batch of sequences.

        Args:
            input: `(T, B, input_size)`, `(B, T, input_size)` with batch_first, or `(T, input_size)`
                unbatched. Sequences of different lengths come as a PackedSequence, as a jagged nested tensor
                `(B, *, input_size)` whatever batch_first is, or joined end to end with `cu_seqlens`; they
                are not padded.
            hx: h_0, `(num_layers * num_directions, B, hidden_size)`, without B when unbatched; None is zeros.
            reset: bool, the shape of `input` without its last axis; True where a new sequence starts. What
                comes before that step is forgotten; in the backward direction, which meets the sequence's
                last step first, what comes after that last step is forgotten. So no direction sees across a
                start.
            cu_seqlens: `(B + 1,)`, int32 or int64, rising from 0 to total: input holds B sequences end to
                end, the i-th in steps cu_seqlens[i] to cu_seqlens[i + 1], and is `(total, input_size)` or
                has a batch of 1 beside. Unlike with `reset`, each has a state of its own in hx and h_n.

        Returns:
            output: the last layer's states, `(T, B, num_directions * hidden_size)`, its axes ordered as those
                of `input`, or in the form in which sequences of different lengths came.
            h_n: as `hx`: every layer's state after each sequence's own last step (the backward direction's
                last step is t = 0).

        Raises:
            TypeError: input or hx is not a tensor, reset is not bool, cu_seqlens is not of ints, or a nested
                tensor is not jagged.
            ValueError: a shape, the offsets or the dtype do not fit.
        """
        ragged = self._read_ragged(input, cu_seqlens)
        if ragged is not None:
            return self._run_ragged(ragged, hx, reset)
        assert isinstance(input, Tensor)  # a PackedSequence is ragged
        self._check_input(input)
        batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        self._check_hx(hx, self._state_shape(batch), input.dtype)
        check_reset(type(self).__name__, reset, tuple(input.shape[:-1]))
        if input.dim() == 2:
            reset = _add_batch(reset, 0)
            output, h_n = self._run_layers(input.unsqueeze(0), _add_batch(hx, 1), reset=reset)
            return output.squeeze(0), h_n.squeeze(1)
        if reset is not None and not self.batch_first:
            reset = reset.transpose(0, 1)
        return self._run_layers(input, hx, reset=reset, time_major=not self.batch_first)

    def _read_ragged(self, input: Tensor | PackedSequence, cu_seqlens: Tensor | None) -> Ragged | None:
        name, ragged = type(self).__name__, None
        if isinstance(input, PackedSequence):
            ragged = read_packed(input)
        elif not isinstance(input, Tensor):
            raise TypeError(f"{name}: input must be a tensor or a PackedSequence, got {type(input).__name__}")
        elif input.is_nested:
            ragged = read_jagged(name, input, self.input_size)
        elif cu_seqlens is not None:
            return read_documents(name, input, cu_seqlens, batch_axis=0 if self.batch_first else 1)
        if ragged is not None and cu_seqlens is not None:
            raise ValueError(f"{name}: cu_seqlens goes with a plain tensor, got {type(input).__name__}")
        return ragged

    def _run_ragged(self, ragged: Ragged, hx: Tensor | None, reset: Tensor | None) -> tuple[Any, Tensor]:
        name, rows = type(self).__name__, ragged.rows
        if rows.dim() != 2 or rows.shape[1] != self.input_size:
            raise ValueError(
                f"{name}: the sequences must have {self.input_size} channels, got {tuple(rows.shape)}"
            )
        if reset is not None:
            raise ValueError(f"{name}: reset goes with sequences of one length; mark starts by their lengths")
        self._check_hx(hx, self._state_shape((ragged.offsets.shape[0] - 1,)), rows.dtype)
        joined = Joined(ragged.offsets, rows.shape[0])
        output, h_n = self._run_layers(rows.unsqueeze(0), hx, joined=joined)
        return ragged.dress(output.squeeze(0)), h_n

    def _run_layers(
        self,
        x: Tensor,
        hx: Tensor | None,
        *,
        reset: Tensor | None = None,
        time_major: bool = False,
        joined: Joined | None = None,
    ) -> tuple[Tensor, Tensor]:
        finals: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.num_directions):
                h0, reverse = None if hx is None else hx[len(finals)], bool(direction)
                h = self._project_and_scan(
                    x,
                    self._suffixes[len(finals)],
                    h0=h0,
                    reset=_first_met(reset) if reverse else reset,
                    reverse=reverse,
                    time_major=time_major,
                    joined=joined,
                )  # (B, T, D)
                if joined is None:
                    finals.append(h.select(1, 0 if reverse else -1))
                else:
                    finals.append(joined.final(h, h0, reverse=reverse))
                outputs.append(h.transpose(0, 1) if time_major else h)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # A copy: a view would keep the whole of h alive for as long as the state.
        return x, torch.stack(finals)

    def _state_shape(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        return (self.num_layers * self.num_directions, *batch, self.hidden_size)

    def _check_input(self, input: Tensor) -> None:
        time_axis = 1 if self.batch_first and input.dim() == 3 else 0
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size or input.shape[time_axis] == 0:
            axes = f"(B, T, {self.input_size})" if self.batch_first else f"(T, B, {self.input_size})"
            raise ValueError(
                f"{type(self).__name__}: input must be {axes} or (T, {self.input_size}) "
                f"with T of at least 1, got {tuple(input.shape)}"
            )


def _first_met(reset: Tensor | None) -> Tensor | None:
    """Move resets `(B, T)` from each sequence's first step to the step that a reversed scan meets first."""
    return None if reset is None else functional.pad(reset[:, 1:], (0, 1))


class MinRNNMixer(Mixer):
    """One batch-first MinGRU or MinLSTM layer under the mixers' contract; the state is h `(B, d_hidden)`."""

    state_names = ("h",)
    rnn: MinRNN

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        rnn, h0 = self.rnn, None if state is None else state[0]
        y, h_n = rnn(x, None if h0 is None else h0.unsqueeze(0), reset=reset)
        return y, (h_n.squeeze(0),)


def _add_batch(tensor: Tensor | None, axis: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(axis)
