"""Selective copying: repeat the data tokens of a long sequence in order, without its blanks.

    . . 7 . 2 . . . 9 .  =  =  =
                         7  2  9

The positions of the data tokens are random, so a model must decide by content which tokens to keep. Source:
Gu and Dao, "Mamba" (arXiv 2312.00752), section 4.1.1, after Jing et al. (2019); sizes and tokens as in the
code that the authors of "Were RNNs All We Needed?" released for their tables 1 and 2.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from minrnn.files import check_bounds, check_kind
from minrnn.tasks.draws import Draws, Part
from minrnn.tasks.labeled import LabeledTask, blocks
from minrnn.tasks.task import IGNORED, Batch, TaskConfig, check_batch

MARKER = 0
"""The token at the positions of targets; data tokens are 1 .. kinds, and kinds + 1 is the blank."""


@dataclass(frozen=True)
class SelectiveCopyingConfig(TaskConfig):
    """The sizes of the sequences. The defaults are the paper's."""

    length: int = 4096
    """Length of the part with data tokens and blanks; one marker per data token follows."""
    num_tokens: int = 16
    """Number of data tokens in a sequence."""
    kinds: int = 14
    """Number of distinct data tokens; the vocabulary also has the marker and the blank."""
    eval_sequences: int = 12_800
    """Number of sequences in an evaluation."""
    part: Part = "validation"
    """Part for evaluation: validation, which selects the best weights, or test."""

    task = "selective-copying"

    def __post_init__(self) -> None:
        sizes = {"length": (1, 1 << 24), "num_tokens": (1, 1 << 24), "kinds": (1, 1 << 16)}
        check_bounds(self, {**sizes, "eval_sequences": (1, 1 << 30)})
        if self.num_tokens > self.length:
            raise ValueError(
                f"SelectiveCopyingConfig: num_tokens must be at most length = {self.length}, got "
                f"{self.num_tokens}"
            )


class SelectiveCopyingTask(LabeledTask):
    """Copy the data tokens among blanks.

    Args:
        config: the sizes of the sequences.
    """

    config_type = SelectiveCopyingConfig

    def __init__(self, config: SelectiveCopyingConfig) -> None:
        check_kind("SelectiveCopyingTask", "config", config, SelectiveCopyingConfig)
        self.config = config

    @property
    def vocab_size(self) -> int:
        """The number of data tokens, plus marker and blank."""
        return self.config.kinds + 2

    @property
    def sha256(self) -> str:
        """Digest of the settings that determine the training sequences."""
        config = self.config
        return hashlib.sha256(f"1 {config.length} {config.num_tokens} {config.kinds}".encode()).hexdigest()

    def describe(self) -> str:
        """Return the sizes in one line."""
        config = self.config
        return (
            f"{config.task}: {config.num_tokens} tokens of {config.kinds} kinds to copy out of "
            f"{config.length:,}, new ones at every step, {config.eval_sequences:,} sequences to validate on"
        )

    def batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """Return new sequences, (B, length + num_tokens): a pure function of the arguments."""
        check_batch("batch", step, batch_size, seed)
        return self._sequences(Draws(seed, "train", step), batch_size)

    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the sequences of the part; they are drawn independently of those for training."""
        for index, size in blocks(self.config.eval_sequences):
            yield self._sequences(Draws(0, self.config.part, index), size)

    def _sequences(self, draws: Draws, count: int) -> Batch:
        config = self.config
        data = 1 + draws.integers(config.kinds, count, config.num_tokens)
        places = draws.subsets(config.length, config.num_tokens, count)
        inputs = np.full((count, config.length + config.num_tokens), MARKER, dtype=np.int64)
        inputs[:, : config.length] = self.vocab_size - 1  # blanks
        np.put_along_axis(inputs, places, data, axis=1)
        targets = np.full_like(inputs, IGNORED)
        targets[:, config.length :] = data
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
