"""The processes of a run, called ranks, and what each of them computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run as one of them sees them. This class is a run of one process.

    Every method is called by all ranks, in the same order, and is an exchange between them in `RankGroup`.
    Here each returns what was given.
    """

    rank: int = 0
    """Number of this process, 0 .. size - 1."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process among those of its machine."""
    local_size: int = 1
    """Number of processes of this machine."""
    sequence_ranks: int = field(default=1, kw_only=True)
    """Number of consecutive ranks that have the same rows, each a part of their steps."""
    shards_weights: bool = field(default=False, kw_only=True)
    """Whether weights are divided over the ranks, which then call the model together."""

    def sharing(self, sequence_ranks: int, *, weights: bool = False) -> Self:
        """Return these ranks, with sequences that are divided among so many of them.

        Args:
            sequence_ranks: the number.
            weights: whether weights are divided over all ranks.

        Raises:
            ValueError: the number does not divide that of all ranks.
        """
        if self.size % sequence_ranks:
            raise ValueError(
                f"train.sequence_ranks must divide the number of ranks, {self.size} (torchrun starts them), "
                f"got {sequence_ranks}"
            )
        return replace(self, sequence_ranks=sequence_ranks, shards_weights=weights and self.size > 1)

    @property
    def row_groups(self) -> int:
        """Number of groups of ranks that have the same rows."""
        return self.size // self.sequence_ranks

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files and the log."""
        return self.rank == 0

    def describe(self) -> str:
        """Return the number of ranks for a log; an empty text for one process."""
        if self.size == 1:
            return ""
        divided = f", {self.sequence_ranks} for each sequence" if self.sequence_ranks > 1 else ""
        weights = ", sharded weights" if self.shards_weights else ""
        return f"{self.size} ranks, {self.local_size} on this machine{divided}{weights}; each: "

    def rows(self, count: int, *, mirrored: bool = False, rank: int | None = None) -> slice:
        """Return the rows of a batch that a rank computes; their numbers differ by at most one.

        Args:
            count: number of rows of the batch.
            mirrored: whether surplus rows go to the lowest ranks instead of the highest, so that two batches
                of a step together are divided evenly.
            rank: the rank; None for this one.

        Example:
            >>> [Ranks(rank, 3).rows(7) for rank in range(3)]
            [slice(0, 2, None), slice(2, 4, None), slice(4, 7, None)]
            >>> [Ranks(rank, 3).rows(7, mirrored=True) for rank in range(3)]
            [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        rank = self.rank if rank is None else rank
        if mirrored:
            end = self.rows(count, rank=self.size - 1 - rank)
            return slice(count - end.stop, count - end.start)
        return share(count, rank // self.sequence_ranks, self.row_groups)

    def steps(self, count: int) -> slice:
        """Return the steps of its sequences that this rank computes; their numbers differ by at most one.

        Args:
            count: number of steps of a whole sequence.
        """
        return share(count, self.rank % self.sequence_ranks, self.sequence_ranks)

    def mine(self, index: int) -> bool:
        """Whether this rank computes the item of this index, of those that are dealt out in turn."""
        return index % self.size == self.rank

    def lags(self, count: int) -> bool:
        """Whether this rank has to call the model once more after `count` items, of which others had more.

        The result of that call does not count: weights that are sharded are gathered by all ranks together.
        """
        return self.shards_weights and 0 < count % self.size <= self.rank

    @property
    def saves(self) -> bool:
        """Whether this rank takes part in writing a checkpoint."""
        return self.is_first or self.shards_weights

    def threads(self, wanted: int) -> int:
        """Return the number of CPU threads of this rank.

        Args:
            wanted: the number of its machine; 0 for torch's default.
        """
        return wanted or torch.get_num_threads()

    def device(self, name: str) -> str:
        """Return the name of this rank's device.

        Raises:
            ValueError: the name is one GPU's, and several ranks share the machine.
        """
        return name

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the ranks, in float64; the same on all of them."""
        return list(values)

    def highest(self, values: Sequence[int]) -> list[int]:
        """Return the maxima over the ranks."""
        return list(values)

    def first_says(self, make: Callable[[], T]) -> T:
        """Return what `make`, called by the first rank alone, returns there: a JSON value."""
        return make()

    def in_order(self, name: str, make: Callable[[], T]) -> T:
        """Call `make` on the first rank, then on the first of every machine, then on the others.

        For what leaves files for the others to find, such as downloads. The wait for them has no limit, but
        ends where a rank raises an error.

        Args:
            name: a name of the call; another one for each.
            make: the function.
        """
        return make()

    def check_equal(self, what: str, value: Any) -> None:
        """Check that a JSON value is the same on all ranks.

        Args:
            what: its name, for the error message.
            value: the value.

        Raises:
            ValueError: it differs; the message names a rank. All ranks raise it.
        """

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Return all rows of a batch on the first rank, and this rank's rows on the others.

        Args:
            rows: this rank's rows, those that `rows(count)` names.
            count: number of rows of the batch.
        """
        return rows

    def distribute(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return a module that computes as `model` does, and whose gradients are the mean over the ranks.

        It shares the parameters of `model`, which is moved to the device and changed in place: replicated
        weights are set to those of the first rank; of sharded ones each rank keeps its part. Where sequences
        are divided, it computes the losses of this rank's steps: see `LossOf`.
        """
        return model.to(device)

    def accumulating(self, called: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which gradients of a module made by `distribute` are summed on each rank."""
        return nullcontext()

    def evaluating(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context for evaluations: a model given to `distribute` reads whole sequences in it."""
        return nullcontext()

    def reseed(self, seed: int, step: int) -> None:
        """Seed torch's generators for a step, differently on every rank."""


def share(count: int, index: int, parts: int) -> slice:
    """Return one of the parts into which a range is divided; their sizes differ by at most one."""
    return slice(count * index // parts, count * (index + 1) // parts)


ALONE = Ranks()
"""A run of one process."""
