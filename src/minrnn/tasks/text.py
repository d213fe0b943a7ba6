"""Language modeling: predict each token of a text from the tokens before it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minrnn.files import NoEffect, check_bounds, check_choice, check_kind, require, warn_without_effect
from minrnn.models import ModelConfig
from minrnn.models.sequence import LARGEST
from minrnn.tasks.draws import Draws, Part
from minrnn.tasks.sources import find_corpus
from minrnn.tasks.task import (
    WHOLE,
    Batch,
    Split,
    TaskConfig,
    Tell,
    TokenTask,
    check_batch,
    check_max_tokens,
    device_of,
    evaluation_mode,
    token_nats,
)
from minrnn.tasks.tokens import TokenizedCorpus, tokenize
from minrnn.tasks.vocabulary import VOCABULARIES, SubwordVocabulary, Vocabulary

_COUNTED_TOKENS = 1 << 22  # tokens per bincount, which converts them to 64 bits, 32 MiB


LEAST_SUBWORDS = 257
"""The bytes and the end of a text, without which a text might have no tokens."""

WITHOUT_EFFECT = (NoEffect("vocab_size", "vocabulary", lambda s: s["vocabulary"] != "bpe"),)
"""Fields of TextConfig that have no effect with some values of another."""


@dataclass(frozen=True)
class TextConfig(TaskConfig):
    """The text, its vocabulary and split, and the lengths of training and evaluation."""

    source: str = "python"
    """Text to learn: python (this interpreter's standard library), shakespeare (downloaded once),
    hf://datasets/NAME[@REVISION][:CONFIG] (a data set of the Hugging Face hub, streamed; the extra datasets),
    or the path of a file or a folder (without hidden and binary files, runs, caches and virtual
    environments). A file of text is a document, and so is a line of .jsonl and a row of .parquet; .gz and
    .zst are decompressed."""
    vocabulary: str = "bytes"
    """Tokens: bytes; characters that occur in the text; bpe, subwords that are learned from the training
    part by byte-pair encoding; or the path of a byte-level tokenizer.json."""
    window: int = 256
    """Length T of a training sequence, in tokens, and of the windows of val_loss_windowed."""
    eval_chunk: int = 4096
    """Tokens per call of the model during evaluation; affects memory and speed, not the result."""
    held_out: float = 0.0
    """Fraction of the training text, at its end, that is not trained on (0: train on all of it)."""
    held_out_for: Literal["validation", "test"] = "validation"
    """What the held-out text is used for: validation, which leaves the usual validation part for a final
    test; or that test."""
    part: Part = "validation"
    """Part for evaluation: validation, which selects the best weights, or test."""
    best_in_windows: bool = False
    """Select a run's best weights by val_loss_windowed instead of val_loss; for mixers whose state is not
    useful beyond the lengths they were trained on."""
    documents: Literal["separate", "joined"] = "separate"
    """Documents: separate, with the token `<|endoftext|>` before each, at which the state is reset; or
    joined: files are read as they are, one after the other, without a mark and without resets."""
    text_column: str = "text"
    """Key of the text in lines of .jsonl, or its column in .parquet or a data set."""
    vocab_size: int = 4096
    """Most tokens of the vocabulary bpe."""

    task = "text"
    verb = "sample"
    earlier: ClassVar[Mapping[str, Any]] = {"documents": "joined"}
    """Runs of earlier versions read documents joined."""

    def __post_init__(self) -> None:
        if Path(self.vocabulary).suffix != ".json":
            check_choice(self, "vocabulary", VOCABULARIES)
        require(self, "documents", self.documents in ("separate", "joined"), "separate or joined")
        check_bounds(self, {"window": (1, 1 << 24), "eval_chunk": (1, 1 << 30)}, " token")
        check_bounds(self, {"vocab_size": (LEAST_SUBWORDS, LARGEST["vocab_size"])}, " tokens")
        require(self, "held_out", 0 <= self.held_out < 1, "a fraction in [0, 1)")
        choices = ("validation", "test") if self.held_out else ("validation",)
        without = "" if self.held_out else " where nothing is held out"
        require(self, "held_out_for", self.held_out_for in choices, " or ".join(choices) + without)
        require(self, "part", self.part in choices, " or ".join(choices) + without)
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)


class TextTask(TokenTask):
    """Next-token prediction on a text, with the loss in nats per token.

    Args:
        config: the configuration.
        vocabulary: a vocabulary, such as a checkpoint's; by default that of `config`, built from the whole
            text, validation part included. It has an end of text unless documents are joined.

    Raises:
        ValueError: the text is missing, empty, or too short for one window in either part; it is not UTF-8
            though the vocabulary requires that; or it has characters that are not in `vocabulary`.
        OSError: the text cannot be downloaded or read, or the cache cannot be written.
    """

    config_type = TextConfig

    def __init__(self, config: TextConfig, vocabulary: Vocabulary | None = None) -> None:
        check_kind("TextTask", "config", config, TextConfig)
        self.config = config
        is_joined = config.documents == "joined"
        corpus = find_corpus(config.source, is_joined=is_joined, column=config.text_column)
        self._left_out = corpus.left_out
        is_learned = vocabulary is None and config.vocabulary in VOCABULARIES
        if vocabulary is None and not is_learned:
            vocabulary = SubwordVocabulary.read(Path(config.vocabulary).expanduser(), not is_joined)
        size = config.vocab_size if is_learned and config.vocabulary == SubwordVocabulary.kind else 0
        self._corpus: TokenizedCorpus = tokenize(corpus, vocabulary or config.vocabulary, size)
        for part, tokens in (("training", self.train_tokens), ("validation", self.val_tokens)):
            if tokens.size <= config.window:
                raise ValueError(
                    f"TextTask: source {config.source!r} must hold at least window + 1 = {config.window + 1} "
                    f"tokens for {part}, got {tokens.size}; use a longer text or a smaller window"
                )
        # A view, (N - T, T + 1): row i is the window from token i on and the target of its last token.
        self._windows = np.lib.stride_tricks.sliding_window_view(self.train_tokens, config.window + 1)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, which converts text to tokens and back."""
        return self._corpus.vocabulary

    @property
    def vocab_size(self) -> int:
        """The vocabulary's size V."""
        return self.vocabulary.size

    @property
    def saved_vocabulary(self) -> dict[str, str]:
        """The vocabulary as a dict, for `Vocabulary.from_dict`."""
        return self.vocabulary.to_dict()

    @property
    def saved_files(self) -> dict[str, str]:
        """The files of the vocabulary, such as tokenizer.json."""
        return self.vocabulary.files

    @property
    def train_tokens(self) -> NDArray[np.unsignedinteger]:
        """Training ids, (N,), read-only."""
        return self._corpus.train[: self._num_train]

    @property
    def val_tokens(self) -> NDArray[np.unsignedinteger]:
        """Validation ids, (M,), read-only."""
        part = self._held_out if self.config.held_out_for == "validation" else self._corpus.val
        return part if self.config.held_out else self._corpus.val

    @property
    def test_tokens(self) -> NDArray[np.unsignedinteger]:
        """Ids that are neither trained on nor validated on, (M,), read-only; none if nothing is held out."""
        if not self.config.held_out:
            return self._corpus.val[:0]
        return self._corpus.val if self.config.held_out_for == "validation" else self._held_out

    @property
    def _held_out(self) -> NDArray[np.unsignedinteger]:
        return self._corpus.train[self._num_train :]

    @property
    def _num_train(self) -> int:
        size = self._corpus.train.size
        return size - round(self.config.held_out * size)

    @property
    def sha256(self) -> str:
        """Digest of tokens, vocabulary and split: equal digests mean equal data."""
        return self._corpus.sha256

    def describe(self) -> str:
        """Return the source and the sizes of its parts in one line, for a log."""
        left_out = f"; binary files, {self._left_out:,} of them, are left out" if self._left_out else ""
        return (
            f"{self.config.source}: {self.train_tokens.size:,} {self.vocabulary.unit} to train on, "
            f"{self.val_tokens.size:,} to validate on, {self.vocabulary.size} symbols{left_out}"
        )

    def model_config(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with the task's `vocab_size`.

        The window of attention defaults to `TextConfig.window` tokens, the length it is trained on: without a
        bound, the state carried through the validation part would hold every key, and take hours.
        """
        config = super().model_config(config)
        if config.mixer == "attention" and config.window is None:
            return dataclasses.replace(config, window=self.config.window)
        return config

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return `batch_size` random windows of the training part, (B, T).

        Windows start anywhere; where a document starts inside one, the state is reset. The batch is a pure
        function of the arguments, the same on every machine and in a resumed run.

        Args:
            step: index of the batch, >= 0.
            batch_size: number of windows B, >= 1.
            seed: seed of the sequence of batches, 0 <= seed < 2^128.

        Raises:
            ValueError: an argument is out of range.
        """
        return self.batch_rows(step, batch_size, seed, slice(None))

    def batch_rows(self, step: int, batch_size: int, seed: int, rows: slice) -> Batch:
        check_batch("batch", step, batch_size, seed, seeds=1 << 128)
        starts = Draws(seed, "train", step).integers(len(self._windows), batch_size)
        return self._gather(starts[rows], fresh=True)

    def stream_batch(self, step: int, batch_size: int) -> Batch:
        """Return the next T tokens of `batch_size` streams, (B, T), for training with a carried state.

        The training part is split into B streams of equal length; row b of step k + 1 continues row b of step
        k. When fewer than T tokens are left, the streams start over, and the batch is `fresh`. The batch is a
        pure function of the arguments.

        Args:
            step: index of the batch, >= 0.
            batch_size: number of streams B, >= 1.

        Raises:
            ValueError: an argument is out of range, or the streams would be shorter than a window.
        """
        return self.stream_rows(step, batch_size, slice(None))

    def stream_rows(self, step: int, batch_size: int, rows: slice) -> Batch:
        check_batch("stream_batch", step, batch_size)
        T = self.config.window
        stream_length = (self.train_tokens.size - 1) // batch_size  # the last token is only a target
        if stream_length < T:
            raise ValueError(
                f"stream_batch: batch_size must leave each stream a window of {T} tokens, got {batch_size} "
                f"streams of {stream_length}; use at most {(self.train_tokens.size - 1) // T}"
            )
        position = step % (stream_length // T)
        starts = np.arange(batch_size) * stream_length + position * T
        return self._gather(starts[rows], fresh=position == 0)

    @property
    def chosen_by(self) -> str:
        return "val_loss_windowed" if self.config.best_in_windows else "val_loss"

    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None, split: Split = WHOLE
    ) -> dict[str, float]:
        """Evaluate `model` on the configured part by two protocols; both predict every token but the first.

        Runs in eval mode without gradients, draws no random numbers, and restores the modules' modes.

        Args:
            model: maps tokens and state to logits and state.
            max_tokens: predict the first `max_tokens` tokens only; 0 for all.
            tell: progress callback.
            split: division of the windows among processes; the stream is read by each.

        Returns:
            val_loss: nats per token, with the text as one stream whose state is carried from chunk to chunk,
                and reset where a document starts.
            val_loss_windowed: nats per token, with each window of T tokens starting from the empty state, as
                usual for models without a carried state.
            bits_per_byte: val_loss / ln 2 * tokens / bytes of UTF-8; comparable between vocabularies. The
                ends of documents are predicted, and have no bytes.
            val_tokens: number of predicted tokens.

        Raises:
            ValueError: `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        tokens = self.test_tokens if self.config.part == "test" else self.val_tokens
        tokens = tokens[: max_tokens + 1] if max_tokens else tokens
        num_predicted = tokens.size - 1
        with evaluation_mode(model), torch.no_grad():
            stream_nats = self._stream_nats(model, tokens, lambda done: tell and tell(done / 2))
            own_nats = self._windowed_nats(model, tokens, split, lambda done: tell and tell((1 + done) / 2))
        (windowed_nats,) = split.sums([own_nats])
        return {
            "val_loss": stream_nats / num_predicted,
            "val_loss_windowed": windowed_nats / num_predicted,
            "bits_per_byte": stream_nats / self.num_bytes(tokens[1:]) / math.log(2),
            "val_tokens": num_predicted,
        }

    def num_bytes(self, tokens: NDArray[np.integer]) -> int:
        """Return the length in bytes of the UTF-8 text of the tokens, (N,)."""
        occurrences = np.zeros(self.vocabulary.size, dtype=np.int64)
        for start in range(0, tokens.size, _COUNTED_TOKENS):
            piece = tokens[start : start + _COUNTED_TOKENS]
            occurrences += np.bincount(piece, minlength=self.vocabulary.size)
        return int(occurrences @ self.vocabulary.byte_lengths)

    def _gather(self, starts: NDArray[np.int64], *, fresh: bool) -> Batch:
        tokens = torch.from_numpy(self._windows[starts].astype(np.int64))  # (B, T + 1)
        inputs = tokens[:, :-1]
        return Batch(inputs, tokens[:, 1:], fresh, self._resets(inputs, fresh=fresh))

    def _resets(self, inputs: Tensor, *, fresh: bool) -> Tensor | None:
        """Return where documents start in inputs (B, T): at their mark."""
        mark = self.vocabulary.end_of_text
        if mark is None:
            return None
        reset = inputs == mark
        if fresh:
            reset[:, 0] = False  # the state is empty anyway, and a call without resets is faster
        return reset if reset.any() else None

    def _stream_nats(self, model: nn.Module, tokens: NDArray[np.integer], tell: Tell) -> float:
        """Return the total loss with the tokens as one stream, chunk by chunk with a carried state."""
        device, total, state = device_of(model), 0.0, None
        for start in range(0, tokens.size - 1, self.config.eval_chunk):
            chunk = _to_tensor(tokens[None, start : start + self.config.eval_chunk + 1], device)
            inputs = chunk[:, :-1]
            reset = self._resets(inputs, fresh=state is None)
            loss, state = token_nats(model, inputs, chunk[:, 1:], state, reset, "sum")
            total += loss.item()
            tell(min(1.0, (start + self.config.eval_chunk) / (tokens.size - 1)))
        return total

    def _windowed_nats(
        self, model: nn.Module, tokens: NDArray[np.integer], split: Split, tell: Tell
    ) -> float:
        """Return the loss of this process's windows, each starting from the empty state."""
        total, done, count = 0.0, 0, 0
        for inputs, targets in self._evaluation_windows(tokens, device_of(model)):
            if split.mine(count):
                total += self._nats_of(model, inputs, targets)
            count += 1
            done += targets.numel()
            tell(done / (tokens.size - 1))
        if split.lags(count):
            self._nats_of(model, inputs, targets)
        return total

    def _nats_of(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
        resets = self._resets(inputs, fresh=True)
        return token_nats(model, inputs, targets, None, resets, "sum")[0].item()

    def _evaluation_windows(
        self, tokens: NDArray[np.integer], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets, (B, T): batches of up to eval_chunk tokens, then a shorter window."""
        T = self.config.window
        span = max(1, self.config.eval_chunk // T) * T
        num_whole = (tokens.size - 1) // T * T
        for start in range(0, num_whole, span):
            piece = _to_tensor(tokens[start : min(start + span, num_whole) + 1], device)
            yield piece[:-1].view(-1, T), piece[1:].view(-1, T)
        if num_whole < tokens.size - 1:
            piece = _to_tensor(tokens[None, num_whole:], device)
            yield piece[:, :-1], piece[:, 1:]


def _to_tensor(tokens: NDArray[np.integer], device: torch.device) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64)).to(device)
