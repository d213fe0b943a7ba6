"""What tasks share whose answers stand at some positions only: masked loss, token accuracy, exact match."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minrnn.tasks.task import (
    IGNORED,
    Batch,
    Tell,
    TokenTask,
    check_max_tokens,
    device_of,
    evaluation_mode,
    nats,
)

BLOCK = 64
"""Sequences that are evaluated at once: fixed, so that the sequences do not depend on a machine's memory."""


class LabeledTask(TokenTask):
    """Sequences in which some positions have an answer, and all others are left out of loss and metrics."""

    @abstractmethod
    def evaluation_batches(self) -> Iterator[Batch]:
        """Yield the part that is measured, up to BLOCK sequences at a time; always the same."""

    def evaluate(
        self, model: nn.Module, *, max_tokens: int = 0, tell: Tell | None = None
    ) -> dict[str, float]:
        """Measure `model` on the part that the configuration names.

        Args:
            model: maps tokens and state to logits and state.
            max_tokens: stop after the block of sequences that holds this answer; 0 for all.
            tell: not asked: these sequences are few.

        Returns:
            val_loss: nats per answer.
            accuracy: share of the answers that the likeliest token gives.
            exact_match: share of the sequences whose answers are all right.
            val_tokens: how many answers there are.
            val_sequences: in how many sequences.

        Raises:
            ValueError: `max_tokens` is negative.
        """
        check_max_tokens(max_tokens)
        total_nats, answers, right, sequences, exact = 0.0, 0, 0, 0, 0
        with evaluation_mode(model), torch.inference_mode():
            for batch in self.evaluation_batches():
                batch = batch.to(device_of(model))
                logits, _ = model(batch.inputs, None)
                total_nats += nats(logits, batch.targets, "sum").item()
                asked = batch.targets != IGNORED  # (B, T)
                hit = (logits.argmax(dim=-1) == batch.targets) & asked
                answers += int(asked.sum())
                right += int(hit.sum())
                exact += int((hit == asked).all(dim=1).sum())
                sequences += len(asked)
                if max_tokens and answers >= max_tokens:
                    break
        return {
            "val_loss": total_nats / answers,
            "accuracy": right / answers,
            "exact_match": exact / sequences,
            "val_tokens": answers,
            "val_sequences": sequences,
        }

    def commonest_answer(self) -> float:
        """Return the accuracy of the best constant answer on the part that is measured: what chance gives."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for batch in self.evaluation_batches():
            targets = batch.targets[batch.targets != IGNORED].numpy()
            counts += np.bincount(targets, minlength=self.vocab_size)
        return float(counts.max() / counts.sum())


def pack(
    questions: Sequence[NDArray[np.integer]], answers: Sequence[NDArray[np.integer]], marker: int
) -> Batch:
    """Put each question, and a marker for each of its answers, into a row; targets stand at the markers.

        question    q0 q1 q2  =  =
        target       -  -  - a0 a1

    Args:
        questions: tokens of each sequence, (L,).
        answers: what is to be said after it, (K,), K >= 1.
        marker: the token that asks for an answer, and fills rows up that are shorter.

    Returns:
        The batch, (B, T), T of the longest row. Models are causal: what fills a row up changes nothing.
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
    """Yield index and size of each block of sequences.

    >>> list(blocks(150))
    [(0, 64), (1, 64), (2, 22)]
    """
    for index, start in enumerate(range(0, num_sequences, BLOCK)):
        yield index, min(BLOCK, num_sequences - start)


def _tensor(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)
