"""Decoding: single steps of a model from a carried state, for one batch or for rows of a large pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor

from minrnn.mixers.arguments import read_size
from minrnn.mixers.mixer import check_reset
from minrnn.models.block import Block
from minrnn.models.decision import DecisionConfig, DecisionModel, Steps
from minrnn.models.evaluation import call_in_evaluation
from minrnn.models.fused_step import NotFusableError, fuse
from minrnn.models.sequence import ModelConfig, ModelState, SequenceModel, check_state, map_state
from minrnn.ops.recurrence import check_tensor
from minrnn.ops.transforms import is_observed

PROMPT_CHUNK = 4096
"""Tokens of a prompt per call: only the last outputs are kept, which saves memory for long prompts."""


class Decoder:
    """Takes single steps of a model from a carried state, in one call of the compiled engine if possible.

        outputs, state = decoder.prefill(prompt)           (B, T) -> (B, V), as model(prompt)
        outputs, state = decoder.step(tokens, state)       (B,) -> (B, V), as model(tokens[:, None], state)

    States are the model's own: nested tuples of tensors whose first axis is the batch, as `model(...)` takes
    and returns them. A server that holds many states keeps them in one *pool* of N rows, from `new_state`:
    `prefill(prompt, pool, rows)` and `step(tokens, pool, rows)` advance B rows of it in place and do not
    access the others; `reset(pool, rows)` clears rows.

    A step is one call if the mixers are those of a gate (mingru, minlstm, minema), in float32 on the CPU:
    then `backend` is "cpp". Otherwise it is "torch", `reason` tells why, and a step calls the model. Either
    way, steps run in evaluation mode, without gradients. The results of the two backends differ in rounding
    only. With "cpp", three kinds of steps still call the model: those of more than `most_rows` rows, where
    torch is faster; those from states that are not contiguous float32 tensors on the CPU; and those in which
    a number comes near overflow or is not finite, so that they overflow as the model does.

    The constructor reads the model, which should then stay unchanged. With "cpp":

    - values changed in place, as by an optimizer or `load_state_dict`, are used from the next step on;
    - tensors that move in memory, as by `model.to(...)`, `model.double()`, `share_memory()` or an assignment
      to `.data`, make the next step raise RuntimeError; so does the next `prefill` after parameters or
      buffers were replaced, as by `load_state_dict(..., assign=True)`;
    - all other changes are ignored by steps: replaced parameters and modules, settings, hooks,
      parametrizations, and dropouts put in training mode. Make a new decoder.

    With "torch", all changes take effect, as each step calls the model. A model in training mode is in
    evaluation mode while it is called: do not train it in another thread at that time. Several threads may
    use one decoder with states of their own. A copy of a decoder holds a copy of the model.

    Args:
        model: a SequenceModel or DecisionModel, in any mode. For a wrapped one, as by torch.compile, the
            backend is "torch", and the wrapper is called.

    Raises:
        TypeError: model is neither.
        RuntimeError: the memory of one of its tensors was freed.

    Example:
        >>> from minrnn.models import ModelConfig, SequenceModel
        >>> decoder = Decoder(SequenceModel(ModelConfig(vocab_size=10, d_model=8)))
        >>> logits, state = decoder.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> logits, state = decoder.step(logits.argmax(dim=-1), state)
        >>> logits.shape
        torch.Size([2, 10])
        >>> pool = decoder.new_state(1000)
        >>> logits, pool = decoder.step(torch.tensor([7, 8]), pool, torch.tensor([41, 7]))
        >>> logits.shape
        torch.Size([2, 10])
    """

    def __init__(self, model: SequenceModel | DecisionModel) -> None:
        config = getattr(model, "config", None)  # works for wrapped models too, as by torch.compile
        if not isinstance(config, ModelConfig | DecisionConfig):
            kind = type(model).__name__
            raise TypeError(f"Decoder: model must be a SequenceModel or DecisionModel, got {kind}")
        self.model = model
        self._reads_steps = isinstance(config, DecisionConfig)
        self._reason: str | None = None
        self._fused = None
        self._tensors: tuple[Tensor, ...] = ()
        try:
            self._fused = fuse(model)
            self._tensors = tuple(_model_tensors(model))
        except NotFusableError as error:
            self._reason = str(error)

    @property
    def backend(self) -> str:
        """The backend of steps: "cpp", the compiled engine, or "torch", the model itself."""
        return "cpp" if self.reason is None else "torch"

    @property
    def reason(self) -> str | None:
        """Why the backend is "torch", in one sentence; None if it is "cpp".

        The backend is also "torch" while autocast, a transform, a tracer or a mode of torch is active.
        """
        if self._reason is None and is_observed():
            return "autocast, a transform, a tracer or a mode of torch is active, which sees each operation"
        return self._reason

    @property
    def most_rows(self) -> int:
        """Most rows for which the compiled engine is faster than torch; 0 if it takes no steps."""
        return 0 if self._fused is None else self._fused.most_rows

    def step(
        self, inputs: Tensor | Steps, state: ModelState | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Take one step of B rows.

        Args:
            inputs: tokens `(B,)`, int64, below vocab_size; for a DecisionModel, Steps of T = 1.
            state: state returned by the model or the decoder; None is the empty state. It is changed only if
                `rows` are given.
            rows: `(B,)`, int64, all different: the rows of the state, a pool of N >= B rows, to advance in
                place. Other rows are neither read nor written.

        Returns:
            Logits `(B, V)`, or a DecisionModel's outputs `(B, A)`, and the state after the step; with `rows`,
            the pool.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape is not as above, a row is not in the pool or is given twice, or the state
                grows with each step (attention without a window), so that it cannot be in a pool.
            IndexError: a token is not in the vocabulary.
            RuntimeError: the model's tensors have moved in memory.
        """
        batch = self._read_batch(inputs)
        indices = None if rows is None else _read_rows("Decoder.step", rows, batch, state)
        if self._fused is not None and batch and not is_observed():
            stepped = self._fused.run(inputs, batch, state, indices)
            if stepped is not None:
                return stepped
        return self._step_model(inputs, state, rows)

    def prefill(
        self,
        inputs: Tensor | Steps,
        state: ModelState | None = None,
        rows: Tensor | None = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]:
        """Read T tokens of B rows in parallel, by the model's forward; a single token is a step.

        Args:
            inputs: tokens `(B, T)`, int64; for a DecisionModel, Steps.
            state: as in `step`.
            rows: as in `step`.
            reset: `(B, T)`, bool; where True, the state is cleared before step t.

        Returns:
            The outputs after the last token, `(B, V)` or `(B, A)`, and the state after it; with `rows`, the
            pool.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape is not as above, or rows and pool are not as in `step`.
            IndexError: a token is not in the vocabulary.
            RuntimeError: the backend is "cpp", and the model's tensors have been replaced; or T = 1, and they
                have moved in memory.
        """
        B, T = self._read_shape("Decoder.prefill", inputs)
        if T == 0:
            raise ValueError("Decoder.prefill: the prompt must hold a token or a step, got none")
        if self._fused is not None and not _are_same(self._tensors, _model_tensors(self.model)):
            raise RuntimeError("Decoder.prefill: the model's tensors were replaced; make a new decoder")
        if isinstance(inputs, Tensor):
            self._check_tokens(inputs)
        check_reset("Decoder.prefill", reset, (B, T))
        after = state
        if rows is not None:
            _read_rows("Decoder.prefill", rows, B, state)
            after = self._take("Decoder.prefill", state, rows)
        for start in range(0, T, PROMPT_CHUNK):
            now = slice(start, start + PROMPT_CHUNK)
            piece = inputs[:, now] if isinstance(inputs, Tensor) else Steps(*(x[:, now] for x in inputs))
            outputs, after = self._read(piece, after, None if reset is None else reset[:, now])
        if rows is not None:
            after = _write("Decoder.prefill", state, rows, after)
        assert after is not None
        return outputs, after

    def new_state(self, num_rows: int) -> ModelState:
        """Return an empty state of `num_rows` rows: a pool, or the explicit form of None for a batch.

        Raises:
            TypeError: num_rows is not an integer.
            ValueError: num_rows is below 1.
            AttributeError: a block, convolution or mixer was replaced by a module without `empty_state`.
        """
        num_rows = read_size("Decoder.new_state", "num_rows", num_rows)
        blocks = cast("Iterable[Block]", self.model.blocks)
        with torch.inference_mode(False):  # a pool is written in any mode
            like = next(self.model.parameters()).detach()
            return tuple(block.empty_state(num_rows, like) for block in blocks)

    @torch.no_grad()
    def reset(self, state: ModelState, rows: Tensor) -> None:
        """Clear rows of a pool, in place.

        Args:
            state: the pool, from `new_state`.
            rows: `(R,)`, int64, all different.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: a row is not in the pool or is given twice, or the state is not a pool of this model.
        """
        check_tensor("Decoder.reset", "rows", rows)
        _read_rows("Decoder.reset", rows, rows.numel(), state)
        self._check_pool("Decoder.reset", state)
        empty = map_state(lambda part: part.expand(len(rows), *part.shape[1:]), self.new_state(1))
        _write("Decoder.reset", state, rows, empty)

    def __reduce__(self) -> tuple[type[Decoder], tuple[Any]]:
        return Decoder, (self.model,)

    @torch.no_grad()
    def _step_model(
        self, inputs: Tensor | Steps, state: ModelState | None, rows: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Take a step by calling the model."""
        before = state if rows is None else self._take("Decoder.step", state, rows)
        inputs = inputs.unsqueeze(1) if isinstance(inputs, Tensor) else inputs
        outputs, after = call_in_evaluation(self.model, inputs, before)
        return outputs[:, -1], after if rows is None else _write("Decoder.step", state, rows, after)

    @torch.no_grad()
    def _read(
        self, inputs: Tensor | Steps, state: ModelState | None, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Read a part of a prompt by calling the model."""
        if reset is None and self._read_shape("Decoder.prefill", inputs)[1] == 1:
            return self.step(inputs[:, 0] if isinstance(inputs, Tensor) else inputs, state)
        outputs, state = call_in_evaluation(self.model, inputs, state, reset=reset)
        return outputs[:, -1].clone(), state  # a view would keep all outputs alive

    def _take(self, function: str, pool: Any, rows: Tensor) -> ModelState:
        """Copy rows of a pool."""
        self._check_pool(function, pool)
        return map_state(lambda part: part.index_select(0, rows), pool)

    def _check_pool(self, function: str, pool: Any) -> None:
        check_state(function, pool, len(self.model.blocks), _num_rows(function, pool))

    def _read_batch(self, inputs: Any) -> int:
        """Return the number of rows of a step's inputs."""
        if self._reads_steps:
            batch, T = self._read_shape("Decoder.step", inputs)
            if T != 1:
                raise ValueError(f"Decoder.step: steps must be (B, T, ...) with T = 1, got T = {T}")
            return batch
        check_tensor("Decoder.step", "tokens", inputs)
        if inputs.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"Decoder.step: tokens must be int64, got {inputs.dtype}")
        if inputs.dim() != 1:
            raise ValueError(f"Decoder.step: tokens must be (B,), got {tuple(inputs.shape)}")
        return len(inputs)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.is_floating_point() or not tokens.numel():  # the model refuses floats
            return
        low, high = int(tokens.min()), int(tokens.max())
        size = cast("ModelConfig", self.model.config).vocab_size
        if low < 0 or high >= size:
            raise IndexError(f"Decoder.prefill: tokens must lie in 0 .. {size - 1}, got {low} .. {high}")

    def _read_shape(self, function: str, inputs: Any) -> tuple[int, int]:
        """Return B and T; the model checks everything else."""
        name, leading = "tokens", inputs
        if self._reads_steps:
            if not isinstance(inputs, Steps):
                raise TypeError(f"{function}: steps must be Steps, got {type(inputs).__name__}")
            name, leading = "times", inputs.times
        check_tensor(function, name, leading)
        if leading.dim() != 2:
            raise ValueError(f"{function}: {name} must be (B, T), got {tuple(leading.shape)}")
        return leading.shape[0], leading.shape[1]


def _model_tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _are_same(tensors: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether the same tensor objects come in the same order."""
    return all(x is y for x, y in zip_longest(tensors, others))


def _read_rows(function: str, rows: Any, batch: int, state: Any) -> list[int]:
    """Check rows of a pool and return their indices."""
    check_tensor(function, "rows", rows)
    if rows.dtype != torch.int64:
        raise TypeError(f"{function}: rows must be int64, got {rows.dtype}")
    if rows.shape != (batch,):
        raise ValueError(f"{function}: rows must be ({batch},), got {tuple(rows.shape)}")
    indices, size = rows.tolist(), _num_rows(function, state)
    if indices and not 0 <= min(indices) <= max(indices) < size:
        raise ValueError(
            f"{function}: rows must lie in 0 .. {size - 1}, got {min(indices)} .. {max(indices)}"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"{function}: rows must be different from each other, got one twice")
    return indices


def _num_rows(function: str, state: Any) -> int:
    """Return the number of rows of a pool, read from its last tensor."""
    part = state
    while isinstance(part, tuple) and part:
        part = part[-1]
    if not isinstance(part, Tensor) or part.dim() == 0:
        raise TypeError(f"{function}: rows need a state, as from new_state, got {type(state).__name__}")
    return part.shape[0]


@torch.no_grad()
def _write(function: str, pool: Any, rows: Tensor, values: Any) -> Any:
    """Write values into rows of a pool, all or none of them, and return the pool."""
    parts, new = list(_tensors(pool)), list(_tensors(values))
    forms = [tuple(part.shape[1:]) for part in parts], [tuple(part.shape[1:]) for part in new]
    if forms[0] != forms[1]:
        raise ValueError(
            f"{function}: the state of a row must keep its shapes, as from new_state (attention needs a "
            f"window), got {forms[0]} before and {forms[1]} after"
        )
    for part, value in zip(parts, new, strict=True):
        part.index_copy_(0, rows, value.to(part.dtype))
    return pool


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    else:
        for part in state:
            yield from _tensors(part)
