"""ListOps: compute the value of a nested expression over digits, such as [MAX 2 9 [MIN 4 7 ] 0 ] = 9.

The grammar, its probabilities and limits are those of the generator that Long Range Arena published (Tay et
al., arXiv 2011.04006; lra_benchmarks/data/listops.py), which follows Nangia and Bowman (arXiv 1804.06028):

    a node at depth max_depth is a digit; any other node is a digit with probability 3/4
    an operator is MIN, MAX, MED or SM, with 2 .. max_args arguments, both uniformly distributed
    an expression is kept if min_length < tokens < max_length and it is not a duplicate

SM is the sum modulo 10; MED is the median, rounded down. As in the original, classes are not balanced. The
additional parentheses of the original, which its own pipeline removes, are left out.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minrnn.files import NoEffect, check_bounds, check_kind, warn_without_effect
from minrnn.tasks.arrays import read_arrays, write_arrays
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.draws import Draws, Part
from minrnn.tasks.labeled import LabeledTask, blocks, pack
from minrnn.tasks.task import Batch, TaskConfig, check_batch

FORMAT_VERSION = 1  # part of a cached file's name, so that files of other versions are ignored

MIN, MAX, MED, SM = 10, 11, 12, 13
END = 14
MARKER = 15
SYMBOLS = (*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]", "=")
"""Text of each token; the last is the marker after the expression, at the position of the target."""

OPERATORS = (MIN, MAX, MED, SM)
DIGIT_PROBABILITY = 0.75
PATIENCE = 100_000
"""Maximum rejections in a row; with Long Range Arena's limits about one in twelve expressions is kept."""

WITHOUT_EFFECT = (NoEffect("max_args", "max_depth", lambda s: s["max_depth"] == 1),)
"""Fields of ListOpsConfig that have no effect with some values of another: expressions are then digits."""


@dataclass(frozen=True)
class ListOpsConfig(TaskConfig):
    """The limits of the grammar and the sizes of the parts. The defaults are Long Range Arena's."""

    max_length: int = 2000
    """Upper bound of the number of tokens of an expression, exclusive."""
    min_length: int = 500
    """Lower bound of the number of tokens of an expression, exclusive."""
    max_depth: int = 10
    """Maximum depth of an expression, digits included."""
    max_args: int = 10
    """Maximum number of arguments of an operator."""
    num_train: int = 96_000
    """Number of training expressions."""
    num_validation: int = 2000
    """Number of validation expressions, which select the best weights."""
    num_test: int = 2000
    """Number of test expressions."""
    data_seed: int = 0
    """Seed of the expressions."""
    part: Part = "validation"
    """Part for evaluation: validation or test."""

    task = "listops"

    def __post_init__(self) -> None:
        check_bounds(
            self,
            {
                "max_depth": (1, 100),  # the generator is recursive
                "max_args": (2, 1000),
                "min_length": (0, 1 << 20),
                "max_length": (0, 1 << 20),
                "data_seed": (0, (1 << 64) - 1),
                **dict.fromkeys(("num_train", "num_validation", "num_test"), (1, 1 << 30)),
            },
        )
        if self.max_length < self.min_length + 2:
            raise ValueError(
                f"ListOpsConfig: max_length must be at least min_length + 2 = {self.min_length + 2}, as "
                f"lengths lie strictly between them, got {self.max_length}"
            )
        warn_without_effect(type(self), vars(self), WITHOUT_EFFECT, stacklevel=4)

    @property
    def num_expressions(self) -> int:
        """Total number of expressions of all parts."""
        return self.num_train + self.num_validation + self.num_test


class Expressions(NamedTuple):
    """Concatenated expressions and their values."""

    tokens: NDArray[np.uint8]
    """All tokens, (N,)."""
    ends: NDArray[np.int64]
    """Index one past the last token of each expression."""
    values: NDArray[np.uint8]
    """Value of each expression, 0 .. 9."""

    def question(self, index: int) -> NDArray[np.uint8]:
        """Return the tokens of one expression."""
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]]


class ListOpsTask(LabeledTask):
    """Predict the value of an expression at the marker after it: ten classes.

    The expressions are generated when the task is created (a minute or two with the defaults), and cached.

    Args:
        config: the grammar's limits and the sizes of the parts.

    Raises:
        ValueError: the limits allow too few distinct expressions.
        OSError: the cache cannot be written.
    """

    config_type = ListOpsConfig

    def __init__(self, config: ListOpsConfig) -> None:
        check_kind("ListOpsTask", "config", config, ListOpsConfig)
        self.config = config
        self._expressions = _cached(config)

    @property
    def vocab_size(self) -> int:
        """The number of digits, operators, bracket and marker."""
        return len(SYMBOLS)

    @property
    def sha256(self) -> str:
        """Digest of the expressions."""
        return hashlib.sha256(self._expressions.tokens.tobytes()).hexdigest()

    def describe(self) -> str:
        """Return the numbers of expressions and their lengths in one line."""
        config = self.config
        return (
            f"{config.task}: {config.num_train:,} expressions to train on, {config.num_validation:,} to "
            f"validate on, of more than {config.min_length} and fewer than {config.max_length:,} tokens"
        )

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return random training expressions, (B, T), T of the longest; a pure function."""
        check_batch("batch", step, batch_size, seed)
        return self._gather(Draws(seed, "train", step).integers(self.config.num_train, batch_size))

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the expressions of the part."""
        config = self.config
        is_test = config.part == "test"
        first = config.num_train + (config.num_validation if is_test else 0)
        count = config.num_test if is_test else config.num_validation
        for _, size in blocks(count):
            yield self._gather(np.arange(first, first + size))
            first += size

    def _gather(self, indices: NDArray[np.integer]) -> Batch:
        questions = [self._expressions.question(int(index)) for index in indices]
        answers = [self._expressions.values[index : index + 1] for index in indices]
        return pack(questions, answers, marker=MARKER)


def generate_expressions(config: ListOpsConfig) -> Expressions:
    """Generate distinct expressions, first those of training, then validation, then test.

    A pure function of the configuration: Python guarantees the sequence of `random.Random.random`.

    Raises:
        ValueError: the limits allow too few distinct expressions.
    """
    source = random.Random(config.data_seed)
    found: dict[bytes, int] = {}  # tokens and value, in order of generation
    refused = 0  # rejected in a row
    while len(found) < config.num_expressions and refused < PATIENCE:
        grown = _Expression(source, config)
        tokens = bytes(grown.tokens)
        refused += 1
        if config.min_length < len(tokens) < config.max_length and tokens not in found:
            found[tokens] = grown.value
            refused = 0
    if refused:
        raise ValueError(
            f"ListOpsConfig: the limits must allow {config.num_expressions:,} different expressions, got "
            f"{len(found):,}; allow longer or deeper ones, or take fewer"
        )
    ends = np.cumsum([len(tokens) for tokens in found])
    values = np.fromiter(found.values(), np.uint8)
    return Expressions(np.frombuffer(b"".join(found), np.uint8), ends, values)


class _Expression:
    """A random expression; once it is too long to be kept, only digits are added."""

    def __init__(self, source: random.Random, config: ListOpsConfig) -> None:
        self._random, self._config = source.random, config
        self.tokens: list[int] = []
        self.value = self._grow(1)

    def _grow(self, depth: int) -> int:
        config = self._config
        is_digit = depth >= config.max_depth or self._random() < DIGIT_PROBABILITY
        if is_digit or len(self.tokens) >= config.max_length:
            digit = int(self._random() * 10)
            self.tokens.append(digit)
            return digit
        operator = OPERATORS[int(self._random() * len(OPERATORS))]
        num_args = 2 + int(self._random() * (config.max_args - 1))
        self.tokens.append(operator)
        values = [self._grow(depth + 1) for _ in range(num_args)]
        self.tokens.append(END)
        return _apply(operator, values)


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def _cached(config: ListOpsConfig) -> Expressions:
    """Return the configuration's expressions, from the cache if they are there."""
    limits = [config.max_length, config.min_length, config.max_depth, config.max_args, config.data_seed]
    described = json.dumps([FORMAT_VERSION, *limits, config.num_expressions])
    shelf = cache_folder() / "listops"
    path = shelf / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.npz"
    if (found := _read(path, config)) is not None:
        return found
    expressions = generate_expressions(config)
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        write_arrays(path, expressions._asdict(), compress=True)
    except OSError as error:
        raise OSError(
            f"listops: cannot write the expressions to {shelf}: {error} (MINRNN_CACHE can name another "
            "folder)"
        ) from error
    return expressions


def _read(path: Path, config: ListOpsConfig) -> Expressions | None:
    """Return the expressions of a cached file, or None if it is missing or damaged."""
    try:
        arrays = read_arrays(path)
    except (OSError, ValueError):
        return None
    kinds = {name: array.dtype for name, array in arrays.items()}
    if kinds != {"tokens": np.uint8, "ends": np.int64, "values": np.uint8}:
        return None
    found = Expressions(**arrays)
    ends = found.ends
    fits = (
        all(array.ndim == 1 for array in found)
        and len(ends) == len(found.values) == config.num_expressions
        and ends[-1] == len(found.tokens)
        and not np.any(np.diff(ends, prepend=0) < 1)
    )
    return found if fits else None
