"""A SequenceModel as a causal language model of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NoReturn, Self

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from minrnn.integrations.transformers.available import STATE_NAME
from minrnn.integrations.transformers.configuration import MinRNNConfig
from minrnn.integrations.transformers.resets import NAME, find_resets, has_padding_at_end
from minrnn.integrations.transformers.state import MinRNNState
from minrnn.models import SequenceModel
from minrnn.models.pretrained import MODEL_TYPE
from minrnn.models.sequence import EMBEDDING_STD, ModelState, run_blocks

NOT_RETURNED = ("output_hidden_states", "output_attentions")
"""Arguments of transformers' models that ask for what this one does not return."""

Kept = slice | Tensor
"""Which steps' logits to return."""


class _Model(SequenceModel):
    """A SequenceModel whose blocks are computed again in the backward pass if transformers asks for that."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def predict(
        self, tokens: Tensor, state: ModelState | None, reset: Tensor | None, kept: Kept
    ) -> tuple[Tensor, ModelState]:
        """Return the logits of the steps that are kept, and the state after the last step."""
        self._check(tokens, state, reset)
        y, state = self._outputs(tokens, state, reset)
        return self._predict(y[:, kept]), state

    def _run_blocks(
        self, x: Tensor, state: ModelState | None, reset: Tensor | None
    ) -> tuple[Tensor, ModelState]:
        if not (self.gradient_checkpointing and self.training):
            return super()._run_blocks(x, state, reset)
        again = self._gradient_checkpointing_func
        blocks = [
            lambda x, state, *, reset, block=block: again(partial(block, reset=reset), x, state)
            for block in self.blocks
        ]
        return run_blocks(blocks, x, state, reset=reset)


class MinRNNForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of minrnn, for transformers' generate, pipeline and Trainer.

    Its `model` is a SequenceModel. What transformers keeps as a cache of keys and values is a MinRNNState of
    constant size, except with attention without a window. Padding on the left is exact: the state is cleared
    before the first real token of a row. Where position_ids are 0 a document starts, and the state is
    cleared too.

    Args:
        config: the configuration.
    """

    config_class = MinRNNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # refuses assisted decoding, which takes steps back
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, config: MinRNNConfig) -> None:
        super().__init__(config)
        self.model = _Model(config.settings)
        if not self.model.embedding.weight.is_meta:  # minrnn's own initial values stay
            for part in (*self.modules(), *self.parameters()):
                part._is_hf_initialized = True
        self.post_init()

    @classmethod
    def from_model(cls, model: SequenceModel, **settings: Any) -> Self:
        """Return a model with the weights and the dtype of a SequenceModel, copied.

        Args:
            model: the model.
            settings: further settings of the MinRNNConfig.
        """
        made = cls(MinRNNConfig(**model.config.to_dict(), **settings))
        made.to(next(model.parameters()).dtype)
        made.model.load_state_dict(model.state_dict())
        return made

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MinRNNState | None = None,
        cache: MinRNNState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict each next token.

        Args:
            input_ids: `(B, T)`, int64.
            attention_mask: `(B, P + T)` after P steps: 0 at padding, which is at one end of a row.
            position_ids: `(B, T)`: 0 where a document starts, before which the state is cleared.
            past_key_values: the state to continue from, which is changed in place; transformers' name for it
                before 5.24.
            cache: the same, since 5.24.
            labels: `(B, T)`, int64, the tokens themselves, or -100 where there is no target.
            use_cache: whether to return the state; by default as the configuration says, but not in training
                and not after padding.
            logits_to_keep: number of last steps, or indices of steps, whose logits are returned; 0 is all.
            return_dict: whether to return a CausalLMOutputWithPast instead of a tuple.
            kwargs: num_items_in_batch, and what else transformers' loss function takes.

        Returns:
            The loss, if there are labels: the mean cross-entropy of labels that follow their step; the
            logits; and the state.

        Raises:
            TypeError: the state is not one that this model returned.
            ValueError: a shape is another; there is padding between the tokens of a row, or a state is asked
                for after padding; embeddings are given instead of tokens, or hidden states asked for.
        """
        self._refuse(input_ids, kwargs)
        assert input_ids is not None
        given = _read_state(past_key_values if cache is None else cache)
        ends_in_padding = has_padding_at_end(attention_mask)
        if ends_in_padding and (given is not None or use_cache):
            raise ValueError(f"{NAME}: a state needs padding on the left, got rows that end in padding")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not ends_in_padding
        read, before = (0, None) if given is None else (given.steps, given.state)
        reset = find_resets(attention_mask, position_ids, input_ids.shape, read)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, after = self.model.predict(input_ids, before, reset, kept)
        state = MinRNNState() if given is None and use_cache else given
        if state is not None:
            state.update(after, input_ids.shape[1])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{STATE_NAME: state})
        is_named = self.config.return_dict if return_dict is None else return_dict
        return output if is_named else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, perhaps by one of another number of tokens."""
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the head; None if it is the embedding."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings  # type: ignore[assignment]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError: `generate_batch` shares pages of keys and values, of which there are none."""
        raise ValueError(
            f"{NAME}: continuous batching is for keys and values in pages, and this model has a state; call "
            "generate with a batch padded on the left"
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: registered, transformers would copy this package's files into each directory."""

    def _refuse(self, input_ids: Tensor | None, others: dict[str, Any]) -> None:
        """Raise ValueError for arguments that ask for what this model does not do."""
        if input_ids is None or others.pop("inputs_embeds", None) is not None:
            raise ValueError(f"{NAME}: give tokens as input_ids; embeddings (inputs_embeds) are not taken")
        for name in NOT_RETURNED:
            if others.pop(name, None):
                raise ValueError(f"{NAME}: {name} must be False: the model returns logits and its state")

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the initial values of what a directory lacks, of one module without its parts."""
        names = {part: name for name, part in self.model.named_modules()}
        if module in names:
            one = SequenceModel(replace(self.config.settings, num_layers=1))  # all blocks are drawn alike
            drawn = one.get_submodule(re.sub(r"^blocks\.\d+", "blocks.0", names[module]))
            for name, parameter in module.named_parameters(recurse=False):
                initialization.copy_(parameter, drawn.get_parameter(name))
        elif isinstance(module, nn.Embedding | nn.Linear):  # of another number of tokens
            initialization.normal_(module.weight, std=EMBEDDING_STD)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"{NAME}: cache_implementation must be None, got {generation_config.cache_implementation!r}: "
                "the state has one form"
            )
        if generation_config.use_cache and model_kwargs.get(STATE_NAME) is None:
            model_kwargs[STATE_NAME] = MinRNNState()


def _read_state(state: Any) -> MinRNNState | None:
    if not isinstance(state, MinRNNState | None):
        raise TypeError(f"{NAME}: {STATE_NAME} must be a MinRNNState, got {type(state).__name__}")
    return state


AutoConfig.register(MODEL_TYPE, MinRNNConfig, exist_ok=True)
AutoModelForCausalLM.register(MinRNNConfig, MinRNNForCausalLM, exist_ok=True)
