"""`minrnn sample`: generate text with a trained model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal

import torch
import tyro

from minrnn.cli.arguments import check_range, parse
from minrnn.files import NoEffect, warn_without_effect
from minrnn.models import SequenceModel, generate
from minrnn.tasks import Vocabulary
from minrnn.training import MOST_SEEDS, MOST_STEPS, choose_device, load_trained

PROMPTS = ("\n", " ")
"""Default prompts, of which the first in the vocabulary is used."""

WITHOUT_EFFECT = (
    NoEffect("seed", "temperature", lambda s: s["temperature"] == 0),
    NoEffect("seed", "top_k", lambda s: s["top_k"] == 1),
)
"""Options that have no effect where the most likely token is chosen, in addition to those of `generate`."""


@dataclass(frozen=True)
class SampleCommand:
    """Generate text with a trained model, token by token, in constant memory, up to the end of a document."""

    run: tyro.conf.Positional[Path]
    """Run directory."""
    prompt: str = ""
    """Beginning of a document (empty: none, or a new line where the model does not know documents)."""
    tokens: int = 500
    """Most tokens to generate after the prompt."""
    temperature: float = 1.0
    """Divisor of the logits; 0 for greedy decoding."""
    top_k: int = 0
    """Sample from this number of the most probable tokens (0: all)."""
    top_p: float = 1.0
    """Sample from the most probable tokens with this total probability (1: all)."""
    seed: int = 0
    """Seed of the sampling."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn sample`."""
    command = parse(SampleCommand, "sample", args)
    check_range("sample", "tokens", command.tokens, 0, MOST_STEPS)
    check_range("sample", "seed", command.seed, 0, MOST_SEEDS - 1)
    device = choose_device(command.device)
    model, vocabulary, *_ = load_trained(command.run, command.checkpoint, device)
    if vocabulary is None or not isinstance(model, SequenceModel):
        raise ValueError(f"sample: {command.run} must be a run of the text task, got one of another task")
    prompt = torch.tensor([prompt_ids(vocabulary, command.prompt)], device=device)  # (1, T)
    warn_without_effect(SampleCommand, vars(command), WITHOUT_EFFECT)
    is_random = command.temperature != 0 and command.top_k != 1
    tokens = generate(
        model,
        prompt,
        command.tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        generator=torch.Generator(device).manual_seed(command.seed) if is_random else None,
        end=vocabulary.end_of_text,
    )
    _write(command.prompt)
    ids = takewhile(lambda token: token != vocabulary.end_of_text, map(int, tokens))
    for text in vocabulary.decode_stream(ids):
        _write(text)
    _write("\n")
    return 0


def prompt_ids(vocabulary: Vocabulary, prompt: str) -> list[int]:
    """Return the ids of a prompt as the beginning of a document, which starts with the end of the one before.

    Where documents are joined, there is no such token, and a first symbol takes the place of an empty prompt.
    """
    if vocabulary.end_of_text is None and not prompt:
        prompt = default_prompt(vocabulary, PROMPTS)
    return vocabulary.encode_beginning(prompt)


def default_prompt(vocabulary: Vocabulary, prompts: Sequence[str]) -> str:
    """Return the first prompt that the vocabulary can encode, or else its first symbol."""
    for prompt in prompts:
        try:
            vocabulary.encode(prompt)
        except ValueError:
            continue
        return prompt
    return vocabulary.decode([0])


def _write(text: str) -> None:
    """Write text immediately, with characters replaced that the terminal cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
