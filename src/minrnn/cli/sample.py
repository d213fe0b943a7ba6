"""`minrnn sample`: text from a trained model, character by character."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from minrnn.cli.arguments import check_range, parse
from minrnn.models import SequenceModel, generate
from minrnn.tasks import Vocabulary
from minrnn.training import MOST_SEEDS, MOST_STEPS, choose_device, load_trained

PROMPTS = ("\n", " ")
"""What a text goes on from when nothing is said: the first that the vocabulary has."""


@dataclass(frozen=True)
class SampleCommand:
    """Write text with a trained model, as it comes; memory stays the same however long it gets."""

    run: tyro.conf.Positional[Path]
    """Directory of the run whose model writes."""
    prompt: str = ""
    """Text to go on from (empty: a new line, or what else the vocabulary has)."""
    tokens: int = 500
    """Tokens to write after the prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 the likely becomes likelier, 0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens only (0: all)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability (1: all)."""
    seed: int = 0
    """Seed of the choices: the same seed writes the same text."""
    checkpoint: Literal["best", "last"] = "best"
    """Weights with the lowest validation loss, or the last ones."""
    device: str = "auto"
    """Device to compute on: auto (a GPU when there is one), cpu, cuda, ..."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn sample`."""
    command = parse(SampleCommand, "sample", args)
    check_range("sample", "tokens", command.tokens, 0, MOST_STEPS)
    check_range("sample", "seed", command.seed, 0, MOST_SEEDS - 1)
    device = choose_device(command.device)
    model, vocabulary, *_ = load_trained(command.run, command.checkpoint, device)
    if vocabulary is None or not isinstance(model, SequenceModel):
        raise ValueError(f"sample: {command.run} must be a run that learned text; what this one says is none")
    given = command.prompt or default_prompt(vocabulary, PROMPTS)
    prompt = torch.from_numpy(vocabulary.encode(given))[None].to(device)  # (1, T)
    tokens = generate(
        model,
        prompt,
        command.tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        generator=torch.Generator(device).manual_seed(command.seed),
    )
    _write(command.prompt)
    for text in vocabulary.decode_stream(int(token) for token in tokens):
        _write(text)
    _write("\n")
    return 0


def default_prompt(vocabulary: Vocabulary, prompts: Sequence[str]) -> str:
    """Return the first of some prompts that a vocabulary can encode, or else its first symbol."""
    for prompt in prompts:
        try:
            vocabulary.encode(prompt)
        except ValueError:
            continue
        return prompt
    return vocabulary.decode([0])


def _write(text: str) -> None:
    """Write text at once, in whatever the terminal can show."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
