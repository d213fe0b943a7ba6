"""Models of token sequences: embed -> blocks -> norm -> head."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from inspect import signature
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrnn.files import (
    NoEffect,
    check_choice,
    check_kind,
    check_types,
    convert,
    require,
    warn_without_effect,
)
from minrnn.mixers import MIXERS
from minrnn.mixers.calls import is_plain, runs
from minrnn.mixers.convolution import CausalConv
from minrnn.mixers.mixer import check_reset
from minrnn.models.block import ACTIVATIONS, MLP, Block, BlockState
from minrnn.models.dropout import Dropout
from minrnn.models.losses import chunked_loss, linear_loss
from minrnn.models.shards import is_sharded
from minrnn.ops.recurrence import check_tensor

ModelState = tuple[BlockState, ...]
"""One state per block."""

NORMS = ("layer", "rms", "none")

MIXER_OPTIONS = ("candidate", "forget_bias", "normalize", "signed", "num_heads", "window", "d_state")
"""Fields of ModelConfig that only some mixers have; they are passed on when they are set."""

EMBEDDING_STD = 0.02

LARGEST = {
    "vocab_size": 1 << 24,
    "d_model": 1 << 16,
    "num_layers": 4096,
    "expansion": 256,
    "conv_width": 1 << 16,
    "mlp_ratio": 256,
    "num_heads": 1 << 16,
    "window": 1 << 30,
    "d_state": 1 << 16,
}
"""Upper limits of a model's sizes, far above any real model. A larger value is a mistake or comes from a
damaged file, and would take much memory and time before it failed."""

WITHOUT_EFFECT = (
    NoEffect("mlp_activation", "mlp_ratio", lambda s: round(s["mlp_ratio"] * s["d_model"]) == 0),
)
"""Fields of ModelConfig that have no effect with some values of another."""


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a SequenceModel.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range or unknown, or an option is set that the mixer does not have.
    """

    vocab_size: int = 256
    """Size of the vocabulary; set by the task."""
    d_model: int = 192
    """Channels of the residual stream."""
    num_layers: int = 4
    """Blocks."""
    mixer: str = "mingru"
    """The module that mixes steps: mingru, minlstm, minema, rnn, gru, lstm, attention, aaren, s4d, mamba."""
    expansion: float = 1.0
    """Channels of the mixer's state, as a multiple of d_model."""
    conv_width: int = 4
    """Width of the convolution before each mixer in steps, the current one included; 0: no convolution."""
    mlp_ratio: float = 2.0
    """Inner channels of each block's MLP, as a multiple of d_model; 0: no MLP."""
    mlp_activation: str = "gelu"
    """The MLP's activation: gelu, relu, silu, or swiglu, which has a gate and 1.5 times as many weights."""
    norm: str = "layer"
    """The norm before each branch and the head: layer, rms or none."""
    residual: bool = True
    """Add each branch to its input; otherwise its output replaces the input."""
    dropout: float = 0.0
    """Probability of zeroing a channel of the embedding or of a branch's output during training."""
    tie_embeddings: bool = False
    """Use the embedding's matrix as the head's; fewer parameters, but worse where the vocabulary is small."""
    bias: bool = True
    """Biases in the blocks' own linear layers, convolutions and layer norms; a mixer always keeps its own."""
    candidate: str | None = None
    """mingru, minlstm, minema: the candidate's function: positive, linear or tanh; unset: positive."""
    forget_bias: float | None = None
    """mingru, minlstm, minema, gru, lstm: initial bias of the gate towards keeping the state, in logits, of
    gru and lstm beside torch's own; unset: 1, and 0 for gru and lstm."""
    normalize: bool | None = None
    """minlstm: make the forget and input gates sum to one; unset: yes."""
    signed: bool | None = None
    """mingru, minlstm: decays in (-1, 1) instead of (0, 1), for state tracking; unset: no."""
    num_heads: int | None = None
    """attention, aaren: heads; unset: 4."""
    window: int | None = None
    """attention: window in tokens, the current one included; 0: all; unset: the task's window, or all."""
    d_state: int | None = None
    """s4d, mamba: states per channel; unset: 64 and 16."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "d_model", "num_layers", "expansion"):
            require(self, name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("conv_width", "mlp_ratio"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "0 (none) or positive")
        for name, most in LARGEST.items():
            require(self, name, (getattr(self, name) or 0) <= most, f"at most {most}")
        require(self, "dropout", 0 <= self.dropout < 1, "a probability in [0, 1)")
        names: dict[str, Collection[str]] = {
            "mixer": MIXERS,
            "mlp_activation": ACTIVATIONS,
            "norm": NORMS,
        }
        for name, known in names.items():
            check_choice(self, name, known)
        self._check_mixer_options()
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)

    def _check_mixer_options(self) -> None:
        for option in self.mixer_options:
            having = [name for name, mixer in MIXERS.items() if option in signature(mixer).parameters]
            if self.mixer not in having:
                raise ValueError(
                    f"ModelConfig: mixer {self.mixer!r} has no option {option!r}; unset it "
                    f"or use a mixer that has it ({', '.join(having)})"
                )

    @property
    def d_hidden(self) -> int:
        """Channels of the mixer's state."""
        return max(1, round(self.expansion * self.d_model))

    @property
    def d_inner(self) -> int:
        """Inner channels of each MLP; 0: no MLP."""
        return round(self.mlp_ratio * self.d_model)

    @property
    def mixer_options(self) -> dict[str, Any]:
        """The mixer's options that are set."""
        return {name: getattr(self, name) for name in MIXER_OPTIONS if getattr(self, name) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return every field and its value, as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from the result of `to_dict`; missing fields take their defaults.

        Raises:
            ValueError: a key is not a field (the message names the nearest), or a value is not valid.
        """
        return convert(values, cls)


class SequenceModel(nn.Module):
    """A language model whose state can be carried from call to call: embed -> blocks -> norm -> head.

    A step is a call with T = 1. However a sequence is divided into calls, its logits equal those of one call.

    Modules keep their own initial values, except the embedding, which is drawn from N(0, 0.02) as in GPT-2,
    so that a tied head starts with logits near 0. Measured on tiny Shakespeare (4 layers of width 128, 500
    steps, two seeds), torch's initial values for the matrices that write to the residual stream end 0.02 to
    0.04 nats lower than values scaled down with depth, and an embedding from N(0, 1) ends 0.02 higher.

    Args:
        config: the configuration.

    Raises:
        ValueError: an option's value is not valid for the mixer.

    Example:
        >>> model = SequenceModel(ModelConfig(vocab_size=10, d_model=8))
        >>> logits, state = model(torch.randint(10, (2, 5)))
        >>> logits, state = model(torch.randint(10, (2, 1)), state)
        >>> logits.shape
        torch.Size([2, 1, 10])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_kind("SequenceModel", "config", config, ModelConfig)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.dropout = Dropout(config.dropout)
        self.blocks = make_blocks(config)
        self.norm = make_norm(config)
        # Without a second name for a tied matrix, a checkpoint holds it once.
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Predict each next token.

        Args:
            tokens: `(B, T)`, int64, below vocab_size.
            state: state returned by an earlier call, nested tuples of tensors whose first axis is B; None is
                the empty state.
            reset: `(B, T)`, bool; where True, the state is cleared before step t (a document starts there).

        Returns:
            logits `(B, T, vocab_size)`, at step t those of token t + 1, and the state after the last token.

        Raises:
            TypeError: the tokens are not a tensor of integers, the state was not returned by a call, or reset
                is not bool.
            ValueError: a shape is not as above, or the state is of another model.
        """
        self._check(tokens, state, reset)
        y, state = self._outputs(tokens, state, reset)
        return self._predict(y), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: ModelState | None = None,
        *,
        reset: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> tuple[Tensor, ModelState]:
        """Return the cross-entropy of the targets, without holding all logits at once.

            loss = -mean(log softmax(logits)[target])

        Memory does not grow with the number of tokens times `vocab_size`, unlike that of `forward`, as the
        logits are computed in chunks. torch's `linear_cross_entropy` does so where the head is a plain linear
        layer; any other head is called, and called again in the backward pass.

        Args:
            tokens: `(B, T)`, int64, below vocab_size.
            targets: `(B, T)`, int64, below vocab_size, or `ignore_index`.
            state: as of `forward`.
            reset: as of `forward`.
            reduction: mean, over the targets that are not ignored, or sum.
            ignore_index: target of steps without one.

        Returns:
            The loss, a scalar in at least float32, and the state after the last token.

        Raises:
            TypeError: as of `forward`.
            ValueError: as of `forward`, or the shape of the targets is another.
        """
        self._check(tokens, state, reset)
        check_tensor("SequenceModel.loss", "targets", targets)
        if targets.shape != tokens.shape:
            raise ValueError(
                f"SequenceModel.loss: targets must be {tuple(tokens.shape)}, as tokens, got "
                f"{tuple(targets.shape)}"
            )
        if reduction not in ("mean", "sum"):
            raise ValueError(f"SequenceModel.loss: reduction must be mean or sum, got {reduction!r}")
        y, state = self._outputs(tokens, state, reset)
        y, targets, how = y.flatten(0, 1), targets.flatten(), (reduction, ignore_index)
        weight = self._plain_weight()
        loss = None if weight is None else linear_loss(y, weight, targets, *how)
        if loss is None:
            loss = chunked_loss(self._predict, y, targets, self.config.vocab_size, *how)
        return loss, state

    def _outputs(
        self, tokens: Tensor, state: ModelState | None, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        """Return what the head reads, (B, T, d_model), and the state."""
        x = self.dropout(self.embedding(tokens))  # (B, T, d_model)
        x, state = self._run_blocks(x, state, reset)
        return self.norm(x), state

    def _run_blocks(
        self, x: Tensor, state: ModelState | None, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        return run_blocks(self.blocks, x, state, reset=reset)

    def _plain_weight(self) -> Tensor | None:
        """Return the matrix of the head, if it is a linear layer as it was made, without hooks."""
        head = self.embedding if self.head is None else self.head
        is_own = is_plain(head, nn.Embedding if self.head is None else nn.Linear)
        return head.weight if is_own and getattr(head, "bias", None) is None else None

    def _predict(self, y: Tensor) -> Tensor:
        head, embedding = self.head, self.embedding
        if head is not None:
            return head(y)
        if runs(embedding, nn.Embedding) and not is_sharded(embedding.weight):
            return functional.linear(y, embedding.weight)
        # A replacement of the embedding may have no weight, and one that is sharded by itself has it while
        # it is called only; the matrix is then its output for all tokens.
        return functional.linear(y, embedding(torch.arange(self.config.vocab_size, device=y.device)))

    def _check(self, tokens: Tensor, state: ModelState | None, reset: Tensor | None) -> None:
        check_tensor("SequenceModel", "tokens", tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"SequenceModel: tokens must be int64, got {tokens.dtype}")
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"SequenceModel: tokens must be (B, T) with T >= 1, got {tuple(tokens.shape)}")
        check_state("SequenceModel", state, len(self.blocks), tokens.shape[0])
        check_reset("SequenceModel", reset, tuple(tokens.shape))


class LossOf(nn.Module):
    """A model that is called for its loss, which it computes in chunks, and not for its logits.

    A wrapper, such as DistributedDataParallel, runs no other method of a model than its call.

    Args:
        model: the model, a SequenceModel.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *arguments: Any, **options: Any) -> tuple[Tensor, ModelState]:
        """Return what `SequenceModel.loss` returns."""
        return cast(SequenceModel, self.model).loss(*arguments, **options)


def make_blocks(config: ModelConfig) -> nn.ModuleList:
    """Make the `num_layers` blocks of a model."""
    return nn.ModuleList(_make_block(config) for _ in range(config.num_layers))


def make_norm(config: ModelConfig) -> nn.Module:
    """Make a norm over the channels of the residual stream."""
    if config.norm == "none":
        return nn.Identity()
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, bias=config.bias)
    return nn.RMSNorm(config.d_model)


def run_blocks(
    blocks: Iterable[Callable[..., Any]], x: Tensor, state: ModelState | None, *, reset: Tensor | None
) -> tuple[Tensor, ModelState]:
    """Run x `(B, T, d_model)` through the blocks; return the output and each block's state."""
    states: list[BlockState] = []
    for index, block in enumerate(blocks):
        x, block_state = block(x, None if state is None else state[index], reset=reset)
        states.append(block_state)
    return x, tuple(states)


def check_state(name: str, state: ModelState | None, num_blocks: int, batch: int) -> None:
    """Raise unless `state` is None or has so many blocks and rows; the message starts with `name`.

    Raises:
        TypeError: it does not have the nested form that a call returns.
        ValueError: its number of blocks or rows differs.
    """
    if state is None:
        return
    if not isinstance(state, tuple):
        raise TypeError(f"{name}: state must be the tuple that a call returned, got {type(state).__name__}")
    if len(state) != num_blocks:
        raise ValueError(f"{name}: state must have {num_blocks} blocks, got {len(state)}")
    for block in state:
        if not isinstance(block, tuple) or tuple(map(type, block)) != (tuple, tuple):
            raise TypeError(f"{name}: a block's state must be the tuple of two tuples that a call returned")
        for tensor in (*block[0], *block[1]):
            check_tensor(name, "each part of the state", tensor)
            if tensor.dim() == 0 or tensor.shape[0] != batch:
                raise ValueError(
                    f"{name}: the first axis of each state tensor must be the batch, {batch}, got shape "
                    f"{tuple(tensor.shape)}"
                )


def map_state(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Apply a function to every tensor of a nested state, as in `map_state(torch.detach, state)`."""
    if isinstance(state, Tensor):
        return function(state)
    return tuple(map_state(function, part) for part in state)


def _make_block(config: ModelConfig) -> Block:
    width = config.d_model
    conv = CausalConv(width, config.conv_width, bias=config.bias) if config.conv_width else None
    mlp = (
        MLP(width, config.d_inner, activation=config.mlp_activation, bias=config.bias)
        if config.d_inner
        else None
    )
    return Block(
        MIXERS[config.mixer](width, config.d_hidden, **config.mixer_options),
        make_norm=partial(make_norm, config),
        conv=conv,
        mlp=mlp,
        residual=config.residual,
        dropout=config.dropout,
        bias=config.bias,
    )
