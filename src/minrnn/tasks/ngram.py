"""An n-gram language model with Witten-Bell smoothing, a baseline for trained models.

Order n predicts a token from the n before it. Each order is smoothed by the order below (Witten and Bell,
1991; in the interpolated form of Chen and Goodman, 1999, section 2.5), down to the uniform distribution:

    p_n(w | c) = (count(c, w) + types(c) * p_{n-1}(w | c')) / (count(c) + types(c))

where c are the n tokens before w, c' is c without its first token, count(c) sums count(c, w) over w, and
types(c) is the number of distinct w seen after c. For an unseen context p_n = p_{n-1}. There are no
hyperparameters but the order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minrnn.tasks.text import TextTask

BLOCK_TOKENS = 1 << 22  # tokens counted or scored at once, which limits memory to about 200 MiB

_Keys = NDArray[np.unsignedinteger]  # n-grams as integers whose digits in base V are the tokens
_Counts = NDArray[np.int64]


def ngram_baseline(task: TextTask, order: int = 3) -> dict[str, float]:
    """Fit an n-gram model to the task's training part, and evaluate it on the validation part.

    Args:
        task: the text.
        order: number of tokens in a context.

    Returns:
        val_loss, bits_per_byte, val_tokens: as `TextTask.evaluate` returns them, over the same tokens.

    Raises:
        ValueError: `order` is out of range for the task's vocabulary.
    """
    model = NGramModel(task.train_tokens, task.vocabulary.size, order)
    nats = model.nats(task.val_tokens)
    num_predicted = task.val_tokens.size - 1
    return {
        "val_loss": nats / num_predicted,
        "bits_per_byte": nats / task.num_bytes(task.val_tokens[1:]) / math.log(2),
        "val_tokens": num_predicted,
    }


class NGramModel:
    """An n-gram model of token ids with Witten-Bell smoothing.

    Args:
        tokens: training ids, (N,), N > order; read block by block, so they may be memory-mapped.
        vocab_size: size V of the vocabulary.
        order: number of tokens in a context; V^(order + 1) <= 2^64, as an n-gram is stored as one integer.

    Raises:
        ValueError: `order` is out of range, or there are not enough tokens.
    """

    def __init__(self, tokens: NDArray[np.integer], vocab_size: int, order: int = 3) -> None:
        if order < 0 or vocab_size ** (order + 1) > 1 << 64:
            raise ValueError(
                "NGramModel: order must be at least 0 with vocab_size^(order + 1) at most 2^64, got order "
                f"{order} with vocab_size {vocab_size}"
            )
        if tokens.size <= order:
            raise ValueError(f"NGramModel: tokens must be more than order = {order}, got {tokens.size}")
        self.vocab_size = vocab_size
        self.order = order
        # n-grams of four bytes fit 32 bits, which halves memory and sorting time.
        self._dtype = np.dtype(np.uint32 if vocab_size ** (order + 1) <= 1 << 32 else np.uint64)
        self._orders = self._count_orders(tokens)

    def probabilities(self, tokens: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the probability of each token, (N,), given up to `order` tokens before it."""
        p = np.full(tokens.size, 1 / self.vocab_size)
        for n, counts in enumerate(self._orders[: tokens.size]):
            p[n:] = counts.smooth(self._keys(tokens, n + 1), p[n:])
        return p

    def nats(self, tokens: NDArray[np.integer]) -> float:
        """Return the summed negative log-likelihood of every token but the first."""
        return -sum(float(np.log(p).sum()) for p in self._probabilities_by_block(tokens))

    def _probabilities_by_block(self, tokens: NDArray[np.integer]) -> Iterator[NDArray[np.float64]]:
        for start in range(1, tokens.size, BLOCK_TOKENS):
            context = min(start, self.order)
            yield self.probabilities(tokens[start - context : start + BLOCK_TOKENS])[context:]

    def _count_orders(self, tokens: NDArray[np.integer]) -> list["_OrderCounts"]:
        """Return the counts of orders 0 .. `order`; each is the sum of the one above over its first token.

        All orders thus count the same tokens, those with a full context: all but the first `order`.
        """
        keys, counts = self._count_longest(tokens)
        orders = [_OrderCounts.of(keys, counts, self.vocab_size)]
        for length in range(self.order, 0, -1):
            keys, counts = _sum_by_key(keys % self._dtype.type(self.vocab_size**length), counts)
            orders.insert(0, _OrderCounts.of(keys, counts, self.vocab_size))
        return orders

    def _count_longest(self, tokens: NDArray[np.integer]) -> tuple[_Keys, _Counts]:
        """Return the distinct (order + 1)-grams, sorted, and their counts."""
        parts = []
        for start in range(0, tokens.size - self.order, BLOCK_TOKENS):
            piece = tokens[start : start + BLOCK_TOKENS + self.order]  # pieces share tokens, but no n-gram
            parts.append(np.unique(self._keys(piece, self.order + 1), return_counts=True))
        keys, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return _sum_by_key(keys, counts)

    def _keys(self, tokens: NDArray[np.integer], length: int) -> _Keys:
        """Return the n-grams of `length` tokens, (N - length + 1,); the first token is the leading digit."""
        num_runs = tokens.size - length + 1
        keys = tokens[:num_runs].astype(self._dtype)
        for place in range(1, length):
            keys *= self._dtype.type(self.vocab_size)
            keys += tokens[place : place + num_runs].astype(self._dtype)
        return keys


@dataclass(frozen=True)
class _OrderCounts:
    """The counts of one order."""

    vocab_size: int
    grams: _Keys  # (context, token), sorted
    gram_counts: _Counts
    contexts: _Keys  # sorted
    context_counts: _Counts
    context_types: _Counts  # number of distinct tokens that followed

    @classmethod
    def of(cls, grams: _Keys, counts: _Counts, vocab_size: int) -> "_OrderCounts":
        """Return the counts of sorted n-grams and of their contexts, which are adjacent as leading digits."""
        contexts, starts, types = np.unique(
            grams // grams.dtype.type(vocab_size), return_index=True, return_counts=True
        )
        return cls(vocab_size, grams, counts, contexts, np.add.reduceat(counts, starts), types)

    def smooth(self, grams: _Keys, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return p_n of each n-gram, given p_{n-1} of each."""
        place, seen = _find(self.grams, grams)
        count = np.where(seen, self.gram_counts[place], 0)
        place, seen = _find(self.contexts, grams // grams.dtype.type(self.vocab_size))
        types = self.context_types[place]
        return np.where(seen, (count + types * lower) / (self.context_counts[place] + types), lower)


def _sum_by_key(keys: _Keys, counts: _Counts) -> tuple[_Keys, _Counts]:
    """Return the distinct keys, sorted, and the sum of the counts of each."""
    by_key = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[by_key], return_index=True)
    return distinct, np.add.reduceat(counts[by_key], starts)


def _find(keys: _Keys, wanted: _Keys) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the index of each wanted key in the sorted `keys`, and whether it occurs."""
    places = np.searchsorted(keys, wanted).clip(max=keys.size - 1)
    return places, keys[places] == wanted
