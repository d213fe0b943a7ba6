"""The base classes of layers, with the interface of `torch.nn.GRU` around gated scans."""

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from minrnn.files import NoEffect, warn_without_effect
from minrnn.mixers.arguments import read_flag, read_probability, read_size
from minrnn.mixers.gated import GatedModule
from minrnn.mixers.mixer import Mixer, State, check_reset
from minrnn.mixers.ragged import Ragged, read_documents, read_jagged, read_packed
from minrnn.ops.joined import Joined

Input = TypeVar("Input", Tensor, PackedSequence)

WITHOUT_EFFECT = (NoEffect("dropout", "num_layers", lambda s: s["num_layers"] == 1),)
"""Arguments of a layer that have no effect with some values of another: dropout acts between layers."""


@dataclass(eq=False, repr=False)
class MinRNNBase(GatedModule):
    """Stacked layers of gated scans, without a `forward`, which depends on the form of the state."""

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    _: KW_ONLY
    candidate: str = "positive"
    forget_bias: float | None = None
    signed: bool = False
    recompute: bool = False
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None

    def __post_init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        name = type(self).__name__
        self.num_layers = read_size(name, "num_layers", self.num_layers)
        self.batch_first = read_flag(name, "batch_first", self.batch_first)
        self.dropout = read_probability(name, "dropout", self.dropout)
        self.bidirectional = read_flag(name, "bidirectional", self.bidirectional)
        self.recompute = read_flag(name, "recompute", self.recompute)
        super().__init__(device, dtype)
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)

    def _columns(self) -> dict[str, int]:
        above = self.num_directions * self.hidden_size
        return {
            suffix: above if layer else self.input_size
            for layer in range(self.num_layers)
            for suffix in (f"_l{layer}", f"_l{layer}_reverse")[: self.num_directions]
        }

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

    def _run(
        self, input: Input, hx: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Input, Tensor]:
        """Compute `MinRNN.forward`."""
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
            raise ValueError(
                f"{name}: reset must be None with packed, jagged or joined sequences, each of which starts "
                "from its own state"
            )
        self._check_hx(hx, self._state_shape((ragged.offsets.shape[0] - 1,)), rows.dtype)
        joined = Joined(ragged.offsets, rows.shape[0])
        output, h_n = self._run_layers(rows.unsqueeze(0), hx, joined=joined)
        return ragged.repack(output.squeeze(0)), h_n

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
                h, final = self._run_direction(
                    x,
                    self._suffixes[len(finals)],
                    h0=None if hx is None else hx[len(finals)],
                    reset=reset,
                    reverse=bool(direction),
                    time_major=time_major,
                    joined=joined,
                )  # (B, T, D), (B, D)
                finals.append(final)
                outputs.append(h.transpose(0, 1) if time_major else h)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        # A copy: a view would keep the whole of h alive for as long as the state.
        return x, torch.stack(finals)

    def _run_direction(
        self,
        x: Tensor,
        suffix: str,
        *,
        h0: Tensor | None,
        reset: Tensor | None,
        reverse: bool,
        time_major: bool,
        joined: Joined | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the states of one layer and direction, and the state after the last step."""
        h = self._project_and_scan(
            x,
            suffix,
            h0=h0,
            reset=_first_met(reset) if reverse else reset,
            reverse=reverse,
            time_major=time_major,
            joined=joined,
        )
        if joined is not None:
            return h, joined.final(h, h0, reverse=reverse)
        return h, h.select(1, 0 if reverse else -1)

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


for _argument in ("device", "dtype"):  # arguments, not attributes, which their defaults would become
    delattr(MinRNNBase, _argument)


class MinRNN(MinRNNBase):
    """Stacked layers of gated scans whose state is one tensor; a subclass names the gate."""

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
            reset: bool, the shape of `input` without its last axis; True where a new sequence starts. The
                forward direction forgets everything before that step; the backward direction, which reads
                a sequence from its last step, forgets everything after that last step. So no information
                crosses a start.
            cu_seqlens: `(B + 1,)`, int32 or int64, rising from 0 to total: input holds B sequences end to
                end, the i-th in steps cu_seqlens[i] to cu_seqlens[i + 1], and is `(total, input_size)`, with
                or without a batch axis of 1. Unlike with `reset`, each has its own state in hx and h_n.

        Returns:
            output: the last layer's states, `(T, B, num_directions * hidden_size)`, in the layout of `input`,
                also for sequences of different lengths.
            h_n: as `hx`: every layer's state after the last step of each sequence (of the backward
                direction, t = 0).

        Raises:
            TypeError: input or hx is not a tensor, reset is not bool, cu_seqlens is not integer, or a nested
                tensor is not jagged.
            ValueError: a shape, the offsets or the dtype do not fit.
        """
        return self._run(input, hx, reset, cu_seqlens)


class MinRNNMixer(Mixer):
    """One batch-first layer as a mixer; the state is h `(B, d_hidden)`."""

    state_names = ("h",)
    layer: ClassVar[type[MinRNN]]
    """The layer's class; a subclass names it."""
    rnn: MinRNN

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        candidate: str = "positive",
        forget_bias: float | None = None,
        signed: bool = False,
        bias: bool = True,
    ) -> None:
        self._build(d_model, d_hidden, candidate=candidate, forget_bias=forget_bias, signed=signed, bias=bias)

    def _build(self, d_model: int, d_hidden: int, **options: Any) -> None:
        """Construct the mixer, with the options of its layer."""
        super().__init__(d_model, d_hidden)
        self.rnn = self.layer(d_model, d_hidden, batch_first=True, **options)

    def mix(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        rnn, h0 = self.rnn, None if state is None else state[0]
        y, h_n = rnn(x, None if h0 is None else h0.unsqueeze(0), reset=reset)
        return y, (h_n.squeeze(0),)


def _add_batch(tensor: Tensor | None, axis: int) -> Tensor | None:
    return None if tensor is None else tensor.unsqueeze(axis)
