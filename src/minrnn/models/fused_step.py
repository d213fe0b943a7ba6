"""A model's step as one call of the compiled engine (csrc/decode.h), translated from the model's modules.

    x = embedding[token]     or     x = norm(sum_k W_k u_k + b_k)      input
    x = [x +] W_out f(W_in conv(norm(x)) + b_in) + b_out               residual branches
    y = W norm(x) + b                                                  output

f is an activation, or a gate whose state the step advances. In torch a step is some sixty small operations,
whose overhead exceeds their computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from types import ModuleType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minrnn.mixers.calls import is_plain
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.layer import MinRNN
from minrnn.mixers.registry import GATED_RNNS
from minrnn.models.block import GATED, MLP, Block, BlockState
from minrnn.models.decision import DecisionModel, Steps
from minrnn.models.dropout import Dropout
from minrnn.models.sequence import ModelState, SequenceModel
from minrnn.ops import GATES
from minrnn.ops.registry import forced, load

__all__ = ["FusedStep", "NotFusableError", "fuse"]

_ACTIVATIONS = {"gelu": 0, "relu": 1, "silu": 2, "swiglu": 3}  # as in decode.h
_NORMS = {nn.Identity: 0, nn.LayerNorm: 1, nn.RMSNorm: 2}
_PLAIN = (Tensor, nn.Parameter)

Weights = tuple[Tensor | None, Tensor | None]
"""A weight and a bias, either of which may be absent."""

Norm = tuple[int, float, Weights]
"""Kind, epsilon, and the scale of each channel."""

Inputs = tuple[list[int], list[Tensor]]
"""Tokens of each row, or the inputs `(B, 1, ...)` of each projection."""


class NotFusableError(Exception):
    """A model's step cannot be fused; the message gives the reason in one sentence."""


class _StateForm(NamedTuple):
    """The sizes of a block's state."""

    past: int | None
    """Past steps in the convolution's window; None: no convolution."""
    D: int
    """Channels of the gate's state."""
    has_mlp: bool
    """Whether the block has a second branch, which has no state."""


def most_numbers(isa: str) -> int:
    """Return the largest size of x, rows times channels, for which a fused step is faster than torch's.

    For larger ones torch's matrix products are faster, which block both operands; in a fused step the rows of
    x come from a farther cache for every four outputs.

    Time on one thread of an AMD EPYC relative to torch's, with AVX-512, for six layers of width 512: 0.31
    with 8 rows, 0.71 with 64, 0.81 at this bound, 128; for four layers of width 1024: 0.83 there, 1.05 with
    with four times the rows. With AVX2: 0.77 to 0.88 at its bound, 1.16 to 1.34 at four times that.

    Args:
        isa: the engine's instruction set.
    """
    return 1 << (16 if isa.startswith("avx512") else 14)


class FusedStep:
    """The fused step of one model, which reads the model's tensors in place.

    Args:
        step: the compiled engine's object.
        width: d_model.
        num_outputs: channels of y.
        forms: the sizes of each block's state.
        tensors: all tensors that `step` reads.
        read: converts the inputs of a step to the engine's; returns None if the engine cannot read them.
        finish: converts y to the model's outputs.
    """

    def __init__(
        self,
        step: Any,
        isa: str,
        width: int,
        num_outputs: int,
        forms: Sequence[_StateForm],
        tensors: Sequence[Tensor],
        read: Callable[[Any], Inputs | None],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self.most_rows = most_numbers(isa) // width
        self._step, self._width, self._num_outputs, self._forms = step, width, num_outputs, forms
        self._read, self._finish = read, finish
        self._like = torch.empty(0)
        # Keeps the storages alive even if a tensor is given another one: the engine holds addresses.
        self._tensors, self._storages = tensors, [x.untyped_storage() for x in tensors]
        self._addresses = list(map(Tensor.data_ptr, tensors))

    def run(
        self, inputs: Tensor | Steps, batch: int, state: ModelState | None, rows: list[int] | None
    ) -> tuple[Tensor, ModelState] | None:
        """Take a step, or return None if torch has to take it.

        Args:
            inputs: tokens `(B,)`, or steps of T = 1.
            batch: B.
            state: as in `SequenceModel`; with `rows`, a pool, whose rows are advanced in place.
            rows: B distinct row indices of the pool.

        Returns:
            The outputs `(B, ...)` and the state after the step. None, without any change, for more than
            `most_rows` rows, if a number came near overflow or was not finite (the result then depends on the
            order of torch's sums), and for tensors that are not contiguous, in float32 and on the CPU.

        Raises:
            RuntimeError: a tensor of the model has moved in memory.
            IndexError: a token is not in the vocabulary.
        """
        if batch > self.most_rows:
            return None
        # Without this check stale memory could be read. It takes 60 ns per tensor, a twentieth of a step.
        if list(map(Tensor.data_ptr, self._tensors)) != self._addresses:
            raise RuntimeError(
                "Decoder: the model's tensors must stay where they were in memory when the decoder was made, "
                "and have been moved or replaced; make a new Decoder"
            )
        if state is not None and not self._is_state(state, batch if rows is None else None):
            return None
        read = self._read(inputs)
        if read is None:
            return None
        after = self._new_state(batch) if rows is None or state is None else state
        y = self._like.new_empty(batch, self._num_outputs)
        states, pool_rows = self._branch_states(state, after), after[0][1][0].shape[0]
        if not self._step.run(batch, torch.get_num_threads(), *read, states, pool_rows, rows or [], y):
            return None
        return self._finish(y), after

    def _new_state(self, batch: int) -> ModelState:
        """Allocate a state."""
        empty = self._like.new_empty
        return tuple(
            (() if past is None else (empty(batch, past, self._width),), (empty(batch, D),))
            for past, D, _ in self._forms
        )

    def _branch_states(self, before: ModelState | None, after: ModelState) -> list[Any]:
        """List each branch's window and h before and after the step, None for absent ones."""
        states: list[Any] = []
        for index, form in enumerate(self._forms):
            window, h = (None, None) if before is None else _window_and_h(before[index])
            next_window, next_h = _window_and_h(after[index])
            states.append((window, next_window, h, next_h))
            states += [(None,) * 4] * form.has_mlp
        return states

    def _is_state(self, state: Any, batch: int | None) -> bool:
        """Whether the state consists of tensors that the engine can read, all of one batch."""
        if type(state) is not tuple or len(state) != len(self._forms):
            return False
        for block, (past, D, _) in zip(state, self._forms, strict=True):
            if type(block) is not tuple or len(block) != 2:
                return False
            windows, hidden = block
            if type(windows) is not tuple or type(hidden) is not tuple:
                return False
            if len(windows) != (past is not None) or len(hidden) != 1:
                return False
            if not _is_readable(hidden[0], (batch, D)):
                return False
            batch = hidden[0].shape[0]
            if windows and not _is_readable(windows[0], (batch, past, self._width)):
                return False
        return True


def fuse(model: nn.Module) -> FusedStep:
    """Translate a model to its fused step.

    Raises:
        NotFusableError: the engine does not support or cannot read a part of the model, or is unavailable.
        RuntimeError: the memory of one of its tensors was freed or shortened.
    """
    engine = load("cpp")
    if isinstance(engine, ImportError):
        raise NotFusableError(f"the compiled engine is missing: {engine}")
    if forced() not in (None, "cpp"):
        raise NotFusableError(f"the compiled engine is disabled by MINRNN_ENGINE={forced()}")
    if type(model) is SequenceModel:
        return _fuse_sequence_model(model, _Translation(model, model.config.d_model, engine))
    if type(model) is DecisionModel:
        return _fuse_decision_model(model, _Translation(model, model.config.trunk.d_model, engine))
    kind = type(model).__name__
    raise NotFusableError(f"the model is of class {kind}, not SequenceModel or DecisionModel")


def _fuse_sequence_model(model: SequenceModel, parts: _Translation) -> FusedStep:
    if parts.module("embedding", nn.Embedding).max_norm is not None:
        raise NotFusableError("embedding has a max_norm, so that a step changes its weight")
    embedding = parts.tensor("embedding.weight", None, parts.width)
    parts.step.embed(len(embedding), embedding)
    is_tied = parts.module("head", nn.Linear, NoneType) is None
    output = (embedding, None) if is_tied else parts.linear("head", None, parts.width)

    def read(tokens: Tensor) -> Inputs | None:
        return (tokens.tolist(), []) if tokens.is_cpu else None

    return parts.finish(output, read, lambda logits: logits)


def _fuse_decision_model(model: DecisionModel, parts: _Translation) -> FusedStep:
    config = model.config
    if config.tokens == "interleaved":
        raise NotFusableError("a step of interleaved tokens is three steps of the blocks")
    parts.module("embed_time", NoneType)
    for name in ("observation_mean", "observation_std"):
        parts.tensor(name, config.observation_size)
    parts.tensor("action_bound", config.action_size)
    sizes = {
        "embed_previous": config.action_size,
        "embed_return": 1,
        "embed_observation": config.observation_size,
    }
    inputs = [sizes[name] for name in model.embeddings]
    weights = [parts.linear(name, parts.width, sizes[name]) for name in model.embeddings]
    parts.step.project(list(zip(inputs, weights, strict=True)), parts.norm("embed_norm"))

    def read(steps: Steps) -> Inputs | None:
        model.check_steps(steps)
        numbers = list(model.embedding_inputs(steps).values())
        readable = [_is_readable(x, (None, 1, size)) for x, size in zip(numbers, inputs, strict=True)]
        return ([], numbers) if all(readable) else None

    return parts.finish(parts.linear("head", None, parts.width), read, model.to_actions)


class _Translation:
    """Translates a model, module by module, to the engine's step. Modules are named by their paths."""

    def __init__(self, model: nn.Module, width: int, engine: ModuleType) -> None:
        self.width, self.step = width, engine.compiled.decode.FusedStep(width)
        self.isa = engine.ISA
        self._model, self._engine = model, engine
        self._tensors: list[Tensor] = []
        self._check_plain("the model", model)

    def finish(
        self, output: Weights, read: Callable[[Any], Inputs | None], finish: Callable[[Tensor], Tensor]
    ) -> FusedStep:
        """Read the blocks, the last norm and the head."""
        self._check_dropout("dropout")
        count = len(self.module("blocks", nn.ModuleList))
        if count == 0:
            raise NotFusableError("the model has no blocks")
        forms = [self._add_block(f"blocks.{index}") for index in range(count)]
        assert output[0] is not None
        num_outputs = len(output[0])
        self.step.output(self.norm("norm"), num_outputs, output)
        return FusedStep(self.step, self.isa, self.width, num_outputs, forms, self._tensors, read, finish)

    def module(self, path: str, *kinds: type) -> Any:
        """Return a module of one of these classes whose call is the unmodified forward of its class."""
        module = self._find(path)
        if type(module) not in kinds:
            known = " or ".join("None" if kind is NoneType else kind.__name__ for kind in kinds)
            raise NotFusableError(f"{path} is of class {type(module).__name__}, not {known}")
        if module is not None:
            self._check_plain(path, module)
        return module

    def norm(self, path: str) -> Norm:
        """Return a norm over the channels."""
        norm = self.module(path, *_NORMS)
        kind = _NORMS[type(norm)]
        if type(norm) is nn.Identity:
            return kind, 0.0, (None, None)
        if tuple(norm.normalized_shape) != (self.width,):
            raise NotFusableError(f"{path} is over {tuple(norm.normalized_shape)} channels, not {self.width}")
        weight = self._optional(f"{path}.weight", self.width)
        if type(norm) is nn.LayerNorm:
            return kind, norm.eps, (weight, self._optional(f"{path}.bias", self.width))
        eps = torch.finfo(torch.float32).eps if norm.eps is None else norm.eps  # torch's default
        return kind, eps, (weight, None)

    def linear(self, path: str, outputs: int | None, inputs: int | None) -> Weights:
        """Return a linear layer's weights; sizes other than None are checked."""
        self.module(path, nn.Linear)
        weight = self.tensor(f"{path}.weight", outputs, inputs)
        return weight, self._optional(f"{path}.bias", len(weight))

    def tensor(self, path: str, *shape: int | None) -> Tensor:
        """Return a tensor that the engine can read; sizes other than None are checked."""
        x = self._find(path)
        if not _is_readable(x, shape):
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            found = f"{tuple(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise NotFusableError(f"{path} is {found}, not contiguous, ({sizes}), float32 and on the CPU")
        self._tensors.append(x)
        return x

    def _optional(self, path: str, *shape: int | None) -> Tensor | None:
        return None if self._find(path) is None else self.tensor(path, *shape)

    def _find(self, path: str) -> Any:
        try:
            return attrgetter(path)(self._model)
        except AttributeError as error:
            raise NotFusableError(f"{path} is missing") from error

    def _check_plain(self, path: str, module: nn.Module) -> None:
        if not is_plain(module, type(module)) or "mix" in vars(module):
            raise NotFusableError(f"{path} has hooks, is compiled, or has another forward than its class")

    def _check_dropout(self, path: str) -> None:
        """Raise unless the dropout has no effect in a step, which runs in evaluation mode."""
        if self.module(path, Dropout).training and not self._model.training:
            raise NotFusableError(f"{path} is in training mode in a model that is not")

    def _add_block(self, path: str) -> _StateForm:
        block = self.module(path, Block)
        self._check_dropout(f"{path}.dropout")
        past, D = self._add_mixer(path, block.residual)
        return _StateForm(past, D, self._add_mlp(path, block.residual))

    def _add_mixer(self, path: str, residual: bool) -> tuple[int | None, int]:
        """Add a block's first branch; return the sizes of its state."""
        mixer = self.module(f"{path}.mixer", *(row.mixer for row in GATED_RNNS.values()))
        rnn = self.module(f"{path}.mixer.rnn", *(row.layer for row in GATED_RNNS.values()))
        if rnn.num_layers != 1 or rnn.bidirectional or not rnn.batch_first or rnn.input_size != self.width:
            raise NotFusableError(
                f"{path}.mixer.rnn is not one batch-first layer over {self.width} channels in one direction"
            )
        if mixer.d_model != self.width:
            raise NotFusableError(f"{path}.mixer is of {mixer.d_model} channels, not {self.width}")
        mode, num_pre = self._mode(f"{path}.mixer.rnn", rnn)
        D = mixer.d_hidden
        up = self.tensor(f"{path}.mixer.rnn.weight_ih_l0", num_pre * D, self.width)
        bias = self._optional(f"{path}.mixer.rnn.bias_ih_l0", num_pre * D) if rnn.bias else None
        down = self.linear(f"{path}.down", self.width, D)
        norm, (taps, conv) = self.norm(f"{path}.mixer_norm"), self._convolution(f"{path}.conv")
        self.step.add_branch(norm, taps, conv, num_pre * D, D, (up, bias), down, mode, num_pre, 0, residual)
        return taps - 1 if taps else None, D

    def _mode(self, path: str, rnn: MinRNN) -> tuple[tuple[int, int, bool], int]:
        """Return the engine's (gate, candidate, signed) codes, and the gate's number of pre-activations."""
        gate = self._engine.GATE_CODES.get(rnn.gate)
        candidate = self._engine.CANDIDATE_CODES.get(rnn.candidate)
        if gate is None or candidate is None or rnn.signed not in (False, GATES[rnn.gate].can_be_signed):
            raise NotFusableError(f"{path} has an unknown gate or candidate")
        return (gate, candidate, rnn.signed), GATES[rnn.gate].num_pre

    def _convolution(self, path: str) -> tuple[int, Weights]:
        """Return a convolution's width, 0 if there is none, and its weights."""
        conv = self.module(path, CausalConv, NoneType)
        if conv is None:
            return 0, (None, None)
        weight = self.tensor(f"{path}.weight", conv.width, self.width)
        return conv.width, (weight, self._optional(f"{path}.bias", self.width))

    def _add_mlp(self, path: str, residual: bool) -> bool:
        """Add a block's second branch; return whether there is one."""
        mlp = self.module(f"{path}.mlp", MLP, NoneType)
        if mlp is None:
            return False
        if mlp.activation not in _ACTIVATIONS:
            raise NotFusableError(f"{path}.mlp has an unknown activation")
        down = self.linear(f"{path}.mlp.down", self.width, None)
        assert down[0] is not None
        inner, num_inputs = down[0].shape[1], 2 if mlp.activation in GATED else 1
        up = self.linear(f"{path}.mlp.up", num_inputs * inner, self.width)
        norm, no_conv = self.norm(f"{path}.mlp_norm"), (0, (None, None))
        no_gate, activation = ((-1, 0, False), num_inputs), _ACTIVATIONS[mlp.activation]
        self.step.add_branch(
            norm, *no_conv, num_inputs * inner, inner, up, down, *no_gate, activation, residual
        )
        return True


def _window_and_h(state: BlockState) -> tuple[Tensor | None, Tensor]:
    windows, (h,) = state
    return windows[0] if windows else None, h


def _is_readable(x: Any, shape: Sequence[int | None]) -> bool:
    """Whether x is contiguous, float32 and on the CPU, of this shape; a size of None matches any."""
    return (
        type(x) in _PLAIN
        and x.dtype is torch.float32
        and x.is_cpu
        and x.is_contiguous()
        and len(x.shape) == len(shape)
        and all(size is None or size == found for size, found in zip(shape, x.shape, strict=True))
        and not x.is_neg()
    )
