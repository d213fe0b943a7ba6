"""Tasks with targets at some positions only: masked loss, token accuracy, exact match."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minrnn.tasks.task import (
    IGNORED,
    WHOLE,
    Batch,
    Split,
    Tell,
    TokenTask,
    check_max_tokens,
    device_of,
    evaluation_mode,
    nats,
)

BLOCK = 64
"""Sequences per batch of an evaluation; fixed, so that the sequences are the same on every machine."""


class LabeledTask(TokenTask):
    """Base class of the tasks in which only some positions have a target; others do not count."""

    ignores_targets = True

    @abstractmethod
    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the evaluated sequences, up to BLOCK at a time; always the same ones."""

    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None, split: Split = WHOLE
    ) -> dict[str, float]:
        """Evaluate `model` on the part that the configuration names.

        Args:
            model: maps tokens and state to logits and state.
            max_tokens: stop after the batch that reaches this number of targets; 0 for all.
            tell: unused, as these evaluations are short.
            split: division of the batches among processes.

        Returns:
            val_loss: nats per target.
            accuracy: fraction of the targets that have the highest logit.
            exact_match: fraction of the sequences with every target predicted.
            val_tokens: number of targets.
            val_sequences: number of sequences.

        Raises:
            ValueError: `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        own, answers, sequences, count = (0.0, 0, 0), 0, 0, 0
        with evaluation_mode(model), torch.no_grad():
            for batch in self.evaluation_batches():
                answers += batch.num_asked
                sequences += len(batch.targets)
                if split.mine(count):
                    total, right, exact = _scores(model, batch)
                    own = own[0] + total, own[1] + right, own[2] + exact
                count += 1
                if max_tokens and answers >= max_tokens:
                    break
            if split.lags(count):
                _scores(model, batch)
        found = split.sums(own)
        return {
            "val_loss": found[0] / answers,
            "accuracy": found[1] / answers,
            "exact_match": found[2] / sequences,
            "val_tokens": answers,
            "val_sequences": sequences,
        }

    def commonest_answer(self) -> float:
        """Return the accuracy of the best constant prediction on the evaluated part, a baseline."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for batch in self.evaluation_batches():
            targets = batch.targets[batch.targets != IGNORED].numpy()
            counts += np.bincount(targets, minlength=self.vocab_size)
        return float(counts.max() / counts.sum())


def _scores(model: nn.Module, batch: Batch) -> tuple[float, int, int]:
    """Return the nats of a batch's targets, and how many of them and of its sequences are predicted."""
    batch = batch.to(device_of(model))
    logits, _ = model(batch.inputs, None)
    asked = batch.targets != IGNORED  # (B, T)
    hit = (logits.argmax(dim=-1) == batch.targets) & asked
    exact = (hit == asked).all(dim=1)
    return nats(logits, batch.targets, "sum").item(), int(hit.sum()), int(exact.sum())


def pack(
    questions: Sequence[NDArray[np.integer]], answers: Sequence[NDArray[np.integer]], marker: int
) -> Batch:
    """Return a batch with one row per question: its tokens, then a marker for each token of its answer.

        question    q0 q1 q2  =  =
        target       -  -  - a0 a1

    Args:
        questions: tokens of each sequence, (L,).
        answers: targets of each sequence, (K,), K >= 1.
        marker: the token at the positions of targets; it also pads shorter rows.

    Returns:
        The batch, (B, T), with T of the longest row. As models are causal, padding has no effect.
    """
    rows = list(zip(questions, answers, strict=True))
    T = max(len(question) + len(answer) for question, answer in rows)
    inputs = np.full((len(rows), T), marker, dtype=np.int64)
    targets = np.full((len(rows), T), IGNORED, dtype=np.int64)
    for row, (question, answer) in enumerate(rows):
        inputs[row, : len(question)] = question
        targets[row, len(question) : len(question) + len(answer)] = answer
    return Batch(_tensor(inputs), _tensor(targets))


def blocks(num_sequences: int) -> Iterator[tuple[int, int]]:
    """Yield the index and the size of each batch of an evaluation.

    >>> list(blocks(150))
    [(0, 64), (1, 64), (2, 22)]
    """
    for index, start in enumerate(range(0, num_sequences, BLOCK)):
        yield index, min(BLOCK, num_sequences - start)


def _tensor(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)
