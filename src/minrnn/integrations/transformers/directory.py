"""Runs as directories that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from minrnn.files import write_directory
from minrnn.integrations.transformers.modeling import MinRNNForCausalLM
from minrnn.integrations.transformers.tokenizer import make_tokenizer
from minrnn.models import SequenceModel, load_checkpoint
from minrnn.models.checkpoint import TENSORS_FILE, make_readable
from minrnn.models.pretrained import TABLE_VERSION
from minrnn.tasks import Vocabulary
from minrnn.tasks.task import evaluation_mode
from minrnn.training import RunConfig, Trained

CHECKED = 16
"""Tokens on which a written directory is compared with the model."""

REPLACEMENT = "\ufffd"
"""What decoding puts in the place of bytes that are no character."""


def export_pretrained(trained: Trained, config: RunConfig, directory: Path) -> None:
    """Write a run as a directory for transformers, which minrnn reads as a run's checkpoint too.

    It holds the weights in model.safetensors, config.json, generation_config.json, a module that transformers
    runs where minrnn has not been imported, and for text tokenizer.json and tokenizer_config.json. It is
    loaded and compared with the model before it gets its name.

    Args:
        trained: the model, its vocabulary and its origin.
        config: the configuration of the run.
        directory: the directory to write.

    Raises:
        ValueError: the model is not a language model.
        FileExistsError: the directory exists, and is not empty.
        OSError: the directory cannot be written.
        RuntimeError: what was written is not the model.
    """
    if not isinstance(trained.model, SequenceModel):
        raise ValueError("export: transformers takes language models, got a policy")
    check_free(directory)
    model = MinRNNForCausalLM.from_model(trained.model, **_settings(trained, config))
    with _quiet(), write_directory(directory) as folder:
        model.save_pretrained(folder)
        make_readable(folder / TENSORS_FILE)
        if trained.vocabulary is not None:
            make_tokenizer(trained.vocabulary).save_pretrained(folder)
        _check(folder, trained.model, trained.vocabulary)


def check_free(directory: Path) -> None:
    """Check that a directory does not exist, or is empty.

    Raises:
        FileExistsError: there is something.
    """
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"export: {directory} exists; remove it, or choose another name")


def _settings(trained: Trained, config: RunConfig) -> dict[str, Any]:
    """Return the settings of a MinRNNConfig that are not those of the model."""
    vocabulary = trained.vocabulary
    run = {name: value for name, value in config.to_dict().items() if name != "model"}
    extra = {
        "vocabulary": None if vocabulary is None else vocabulary.to_shared(),
        "step": trained.step,
        "corpus": trained.corpus,
    }
    end = None if vocabulary is None else vocabulary.end_of_text
    return {
        "minrnn": {"format_version": TABLE_VERSION, "extra": extra, "run": run},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars."""
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@torch.no_grad()
def _check(folder: Path, model: SequenceModel, vocabulary: Vocabulary | None) -> None:
    """Compare a written directory with the model, as both libraries read it.

    Raises:
        RuntimeError: it differs.
    """
    tokens = torch.arange(CHECKED)[None] % model.config.vocab_size
    with evaluation_mode(model):
        expected, _ = model(tokens)
    theirs = AutoModelForCausalLM.from_pretrained(os.fspath(folder)).eval()
    ours, _ = load_checkpoint(folder)
    read = (theirs(tokens).logits, ours.eval()(tokens)[0])
    if not all(torch.equal(found, expected) for found in read):
        raise RuntimeError("export: transformers: the written model computes something else")
    if vocabulary is not None:
        _check_tokenizer(folder, vocabulary)


def _check_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    """Compare the tokenizer with the vocabulary on a text of all tokens that are characters.

    Raises:
        RuntimeError: it differs.
    """
    ids = [index for index in range(vocabulary.size) if index != vocabulary.end_of_text]
    text = vocabulary.decode(ids).replace(REPLACEMENT, "")
    found = AutoTokenizer.from_pretrained(os.fspath(folder))(text, add_special_tokens=False).input_ids
    if found != vocabulary.encode(text).tolist():
        raise RuntimeError("export: transformers: the written tokenizer gives other tokens")
