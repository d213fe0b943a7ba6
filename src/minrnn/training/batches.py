"""The batches of a training step, and what part of the step's loss each has."""

from __future__ import annotations

from collections.abc import Sequence

from minrnn.distributed import Ranks
from minrnn.tasks import Batch, Task, TokenTask
from minrnn.training.config import TrainConfig


class Batches:
    """The batches of a run's backward passes: this rank's rows of what one process would draw.

    Args:
        task: the task.
        settings: the sizes of batches, and how the text is read.
        ranks: the ranks of the run.
        least_steps: fewest steps of a part of a sequence.

    Raises:
        ValueError: a rank would have no row, or no target.
    """

    def __init__(self, task: Task, settings: TrainConfig, ranks: Ranks, least_steps: int = 1) -> None:
        self._task, self._settings, self._ranks = task, settings, ranks
        self._fresh = settings.fresh_windows if settings.carry_state else 0
        self._rows = settings.batch_size - self._fresh  # of the batch whose state is carried, if one is
        self._least_steps = least_steps
        self._is_spare = False  # whether the second batch of a backward pass does not count
        self._length = 0  # steps of a whole sequence, where they are divided
        if self._rows < ranks.row_groups:
            streams = " without the windows of train.fresh_share" if self._fresh else ""
            each = " for each sequence's" if ranks.sequence_ranks > 1 else ""
            raise ValueError(
                f"train.batch_size{streams} must be at least {ranks.row_groups}, the number of ranks{each}, "
                f"got {self._rows}"
            )
        if ranks.sequence_ranks > 1 and (task.ignores_targets or not isinstance(task, TokenTask)):
            raise ValueError(
                "train.sequence_ranks must be 1 for a task in which only some steps have a target, got "
                f"{ranks.sequence_ranks}: a rank's steps might have none"
            )

    @property
    def carried_rows(self) -> int:
        """Number of rows of the batch whose state is carried, on all ranks together."""
        return self._rows

    def __call__(self, index: int) -> list[Batch]:
        """Return this rank's rows, or its steps of them: streams first if the run has any, then windows."""
        if self._ranks.size == 1:
            return self.whole(index)
        task, settings = self._task, self._settings
        rows = self._ranks.rows(self._rows)
        if not settings.carry_state:
            return self._divided([task.batch_rows(index, self._rows, settings.seed, rows)])
        batches = [task.stream_rows(index, self._rows, rows)]
        fresh = self._ranks.rows(self._fresh, mirrored=True)
        self._is_spare = bool(self._fresh and self._ranks.shards_weights and fresh.start == fresh.stop)
        if self._is_spare:  # another rank has a window, and all call the model together
            fresh = slice(0, 1)
        if fresh.start < fresh.stop:
            batches.append(task.batch_rows(index, self._fresh, settings.seed, fresh))
        return self._divided(batches)

    def _divided(self, batches: list[Batch]) -> list[Batch]:
        """Return this rank's steps of its rows."""
        if self._ranks.sequence_ranks == 1:
            return batches
        self._length = batches[0].targets.shape[1]
        if self._length // self._ranks.sequence_ranks < self._least_steps:
            raise ValueError(
                f"train.sequence_ranks must leave each rank at least {self._least_steps} of the "
                f"{self._length} steps, which the model's convolutions read, got {self._ranks.sequence_ranks}"
            )
        steps = self._ranks.steps(self._length)
        return [batch.steps(steps) for batch in batches]

    def whole(self, index: int) -> list[Batch]:
        """Return all rows for a backward pass."""
        task, settings = self._task, self._settings
        if not settings.carry_state:
            return [task.batch(index, self._rows, settings.seed)]
        batches = [task.stream_batch(index, self._rows)]
        return [*batches, task.batch(index, self._fresh, settings.seed)] if self._fresh else batches

    def targets(self, batches: Sequence[Batch]) -> int:
        """Return the number of targets of a backward pass on all ranks, ignored ones included."""
        length = self._length or batches[0].targets.shape[1]
        return (self._rows + self._fresh) * length

    def weights(self, batches: Sequence[Batch]) -> list[float]:
        """Return the factors by which the mean losses of this rank's batches enter its loss.

            factor = ranks * targets of this rank's batch / targets of all,   without ignored ones

        The mean over the ranks of their losses is then the mean loss of the whole batches, each weighted by
        its targets, as in one process.
        """
        size, targets = self._ranks.size, self.targets(batches)
        if size > 1 and self._task.ignores_targets:
            (own,) = (batch.num_asked for batch in batches)  # such a task has no streams
            (asked,) = self._ranks.sums([float(own)])
            return [own * size / asked]
        weights = [batch.num_targets * size / targets for batch in batches]
        return [weights[0], 0.0] if self._is_spare else weights
