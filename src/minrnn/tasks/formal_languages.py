"""Formal languages: rules that a finite automaton or a counter computes at any length.

Training on short strings and evaluation on longer ones shows whether a model has learned the rule. A string
is followed by one marker per token of its answer, as in Delétang et al., "Neural Networks and the Chomsky
Hierarchy" (arXiv 2207.02098); the languages are those of Beck et al., "xLSTM" (arXiv 2405.04517), with the
alphabets of the code that the authors of "Were RNNs All We Needed?" released.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minrnn.files import check_bounds, check_kind, require
from minrnn.tasks.draws import Draws, Part
from minrnn.tasks.labeled import LabeledTask, blocks, pack
from minrnn.tasks.task import Batch, TaskConfig, check_batch

String = NDArray[np.int64]

CYCLE = 5
"""Number of positions on the circle of cycle-navigation."""


def parity(string: String) -> String:
    """Return 1 if the number of ones is odd, else 0."""
    return string.sum(keepdims=True) % 2


def even_pairs(string: String) -> String:
    """Return 1 if the number of adjacent pairs of different symbols is even, else 0."""
    changes = np.count_nonzero(string[1:] != string[:-1])
    return np.array([1 - changes % 2])


def cycle_navigation(string: String) -> String:
    """Return the final position of a walk on a circle from 0; the symbols are steps of -1, 0 and 1."""
    return (string - 1).sum(keepdims=True) % CYCLE


def majority(string: String) -> String:
    """Return the most frequent symbol; of several the lowest."""
    return np.bincount(string).argmax(axis=0, keepdims=True)


def majority_count(string: String) -> String:
    """Return the count of the most frequent symbol, at most MAX_COUNT."""
    return np.minimum(np.bincount(string).max(keepdims=True), MAX_COUNT)


def bucket_sort(string: String) -> String:
    """Return the symbols sorted."""
    return np.sort(string)


MAX_COUNT = 63


class Language(NamedTuple):
    """A language: its alphabet, and the rule that maps a string to its answer."""

    symbols: int
    """Size of the alphabet."""
    answers: int
    """Number of distinct answer tokens."""
    rule: Callable[[String], String]
    """The answer to a string; for missing-duplicate, the string itself."""
    repeats: bool = False
    """Whether the string is repeated up to a gap, and the answer is the symbol at the gap."""


LANGUAGES: dict[str, Language] = {
    "bucket-sort": Language(10, 10, bucket_sort),
    "missing-duplicate": Language(9, 9, lambda string: string, repeats=True),
    "cycle-navigation": Language(3, CYCLE, cycle_navigation),
    "even-pairs": Language(2, 2, even_pairs),
    "majority": Language(63, 63, majority),
    "majority-count": Language(63, MAX_COUNT + 1, majority_count),
    "parity": Language(2, 2, parity),
}
"""The formal languages, by name."""


@dataclass(frozen=True)
class FormalLanguageConfig(TaskConfig):
    """The language and the lengths of its strings. The defaults are the paper's."""

    language: Literal[
        "bucket-sort",
        "missing-duplicate",
        "cycle-navigation",
        "even-pairs",
        "majority",
        "majority-count",
        "parity",
    ] = "parity"
    """The language."""
    min_length: int = 1
    """Minimum length of training strings."""
    max_length: int = 40
    """Maximum length of training strings; lengths are uniformly distributed."""
    eval_min_length: int = 40
    """Minimum length of evaluation strings."""
    eval_max_length: int = 256
    """Maximum length of evaluation strings; lengths are uniformly distributed."""
    eval_sequences: int = 2048
    """Number of strings in an evaluation."""
    part: Part = "validation"
    """Part for evaluation: validation, which selects the best weights, or test."""

    task = "formal-languages"

    def __post_init__(self) -> None:
        require(self, "language", self.language in LANGUAGES, f"one of {', '.join(LANGUAGES)}")
        longest = (1, 1 << 20)
        check_bounds(
            self, {"eval_sequences": (1, 1 << 30), "max_length": longest, "eval_max_length": longest}
        )
        for low, high in (("min_length", "max_length"), ("eval_min_length", "eval_max_length")):
            if not 1 <= getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"FormalLanguageConfig: {low} must lie in 1 .. {high} = {getattr(self, high)}, got "
                    f"{getattr(self, low)}"
                )


class FormalLanguageTask(LabeledTask):
    """Predict the answer to a string.

    Tokens are the symbols and answers 0 .. n - 1, and the marker n at the positions of the targets.

    Args:
        config: the language and the lengths.
    """

    config_type = FormalLanguageConfig

    def __init__(self, config: FormalLanguageConfig) -> None:
        check_kind("FormalLanguageTask", "config", config, FormalLanguageConfig)
        self.config = config
        self.language = LANGUAGES[config.language]

    @property
    def vocab_size(self) -> int:
        """The larger of the numbers of symbols and answers, plus the marker."""
        return max(self.language.symbols, self.language.answers) + 1

    @property
    def sha256(self) -> str:
        """Digest of the settings that determine the training strings."""
        config = self.config
        return hashlib.sha256(
            f"1 {config.language} {config.min_length} {config.max_length}".encode()
        ).hexdigest()

    def describe(self) -> str:
        """Return the language and the lengths in one line."""
        config = self.config
        return (
            f"{config.language}: strings of {config.min_length} to {config.max_length} symbols to train on, "
            f"{config.eval_sequences:,} of {config.eval_min_length} to {config.eval_max_length} to measure"
        )

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return new strings with their answers, (B, T), T of the longest; a pure function."""
        check_batch("batch", step, batch_size, seed)
        draws = Draws(seed, "train", step)
        return self._strings(draws, batch_size, self.config.min_length, self.config.max_length)

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the strings of the part; they are drawn independently of those for training."""
        config = self.config
        for index, size in blocks(config.eval_sequences):
            draws = Draws(0, config.part, index)
            yield self._strings(draws, size, config.eval_min_length, config.eval_max_length)

    def _strings(self, draws: Draws, count: int, shortest: int, longest: int) -> Batch:
        lengths = shortest + draws.integers(longest - shortest + 1, count)
        symbols = draws.integers(self.language.symbols, count, longest)
        strings = [row[:length] for row, length in zip(symbols, lengths, strict=True)]
        answers = [self.language.rule(string) for string in strings]
        if self.language.repeats:
            gaps = draws.integers(1 << 32, count) % lengths
            answers = [answer[gap : gap + 1] for answer, gap in zip(answers, gaps, strict=True)]
            strings = [np.concatenate([s, s[:gap]]) for s, gap in zip(strings, gaps, strict=True)]
        return pack(strings, answers, marker=self.vocab_size - 1)
