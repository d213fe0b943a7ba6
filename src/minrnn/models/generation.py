"""Sampling: one token at a time from a carried state, in constant memory."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from minrnn.files import NoEffect, warn_without_effect
from minrnn.mixers.arguments import read_number, read_size
from minrnn.models.decoder import Decoder
from minrnn.models.sequence import ModelConfig, SequenceModel
from minrnn.ops.devices import widest_float
from minrnn.ops.recurrence import check_tensor

WITHOUT_EFFECT = (
    *(
        NoEffect(name, "temperature", lambda s: s["temperature"] == 0)
        for name in ("top_k", "top_p", "generator")
    ),
    *(
        NoEffect(name, "top_k", lambda s: s["top_k"] == 1 and s["temperature"] != 0)
        for name in ("temperature", "top_p", "generator")
    ),
)
"""Arguments of `generate` that have no effect where the most likely token is chosen."""


def generate(
    model: SequenceModel,
    prompt_ids: Tensor,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    end: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts, and yield each step's tokens as soon as they are drawn.

        p = softmax(logits / temperature), restricted to the top_k most likely tokens, then to the fewest
        whose probabilities sum to top_p

    The model runs through a `Decoder`, in evaluation mode; if it is already in evaluation mode, modules that
    were put in training mode, such as dropouts, stay in it. With a recurrent mixer, memory and time per token
    do not depend on the number of earlier tokens.

    Args:
        model: the language model.
        prompt_ids: `(B, T)`, int64, T >= 1, on the model's device.
        num_tokens: number of tokens to generate.
        temperature: 0 chooses the most likely token; above 1 is more random than the model.
        top_k: number of most likely tokens to sample from; 0 is all.
        top_p: least total probability of the tokens to sample from; 1 is all.
        generator: random number generator on the model's device; None is torch's global one.
        end: the token that ends a row, such as a vocabulary's end of text; None for `num_tokens` always.

    Yields:
        `(B,)`, int64: the next token of each row; `end` where the row has ended. The last tokens are those
        with which the last row ends.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the prompt is empty or holds ids outside the vocabulary.
        RuntimeError: the model's logits are not finite.
    """
    config = getattr(model, "config", None)  # works for wrapped models too, as by torch.compile
    if not isinstance(config, ModelConfig):
        raise TypeError(f"generate: model must be a SequenceModel, got {type(model).__name__}")
    _check_prompt(prompt_ids, config.vocab_size)
    num_tokens = read_size("generate", "num_tokens", num_tokens, least=0)
    temperature = read_number("generate", "temperature", temperature)
    if temperature < 0:
        raise ValueError(f"generate: temperature must be 0 (greedy) or positive, got {temperature}")
    top_k = read_size("generate", "top_k", top_k, least=0)
    top_p = read_number("generate", "top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(
            f"generate: generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if end is not None:
        end = read_size("generate", "end", end, least=0)
        if end >= config.vocab_size:
            raise ValueError(f"generate: end must lie in 0 .. {config.vocab_size - 1}, got {end}")
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    warn_without_effect(generate, settings, WITHOUT_EFFECT)
    # Arguments are checked here, because the generator below does not run before its first token is
    # requested.
    pick = partial(choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _stream(Decoder(model), prompt_ids, num_tokens, pick, end)


def choose(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """Draw one token `(B,)` for each row of logits `(B, V)`; the arguments are those of `generate`."""
    if not logits.isfinite().all():
        raise RuntimeError("generate: the model's logits are not finite; its training has diverged")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # In the widest dtype, so that a temperature near 0 gives a sharp softmax instead of an overflow.
    wide = widest_float(logits.device)
    temperature = max(temperature, torch.finfo(wide).tiny)
    scaled = (logits.to(wide) - logits.amax(dim=-1, keepdim=True)) / temperature
    ranked, order = scaled.sort(dim=-1, descending=True)  # (B, V)
    p = ranked.softmax(dim=-1)
    if top_k:
        p[:, top_k:] = 0
        p /= p.sum(dim=-1, keepdim=True)
    p[p.cumsum(dim=-1) - p >= top_p] = 0  # the sum excludes the token itself, so the first is always kept
    rank = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, rank).squeeze(1)


@torch.no_grad()
def _stream(
    decoder: Decoder, prompt_ids: Tensor, num_tokens: int, pick: Callable[[Tensor], Tensor], end: int | None
) -> Iterator[Tensor]:
    logits, state = decoder.prefill(prompt_ids)
    has_ended = torch.zeros_like(prompt_ids[:, 0], dtype=torch.bool)  # (B,)
    for step in range(num_tokens):
        token = pick(logits.float())
        if end is not None:
            token = token.masked_fill(has_ended, end)
            has_ended = token == end
        yield token
        if step + 1 == num_tokens or (end is not None and has_ended.all()):
            return
        logits, state = decoder.step(token, state)


def _check_prompt(prompt_ids: Tensor, vocab_size: int) -> None:
    check_tensor("generate", "prompt_ids", prompt_ids)
    if prompt_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"generate: prompt_ids must be int64, got {prompt_ids.dtype}")
    if prompt_ids.dim() != 2 or prompt_ids.numel() == 0:
        raise ValueError(f"generate: prompt_ids must be (B, T) with T >= 1, got {tuple(prompt_ids.shape)}")
    low, high = int(prompt_ids.min()), int(prompt_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"generate: prompt_ids must lie in 0 .. {vocab_size - 1}, got {low} .. {high}")
