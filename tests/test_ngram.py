"""The n-gram baseline is the textbook's formula, a distribution, and the same however the text is chunked."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.tasks import TextConfig, TextTask, ngram
from minrnn.tasks.ngram import NGramModel, ngram_baseline

V = 4
tokens_of_v = st.lists(st.integers(0, V - 1), min_size=4, max_size=60)
orders = st.integers(0, 3)


def textbook(train: list[int], context: tuple[int, ...], token: int, order: int) -> float:
    """Return Witten-Bell's p(token | context) by counting one token at a time."""
    p = 1 / V
    for n in range(len(context) + 1):
        ending = context[len(context) - n :]
        followers = Counter(train[i] for i in range(order, len(train)) if tuple(train[i - n : i]) == ending)
        if followers:
            p = (followers[token] + len(followers) * p) / (followers.total() + len(followers))
    return p


@given(train=tokens_of_v, text=tokens_of_v, order=orders)
def test_probabilities_are_the_textbooks(train: list[int], text: list[int], order: int) -> None:
    expected = [textbook(train, tuple(text[max(0, i - order) : i]), text[i], order) for i in range(len(text))]
    model = NGramModel(np.array(train), V, order)
    assert model.probabilities(np.array(text)) == pytest.approx(expected)
    assert model.nats(np.array(text)) == pytest.approx(-sum(map(math.log, expected[1:])))


@given(train=tokens_of_v, context=st.lists(st.integers(0, V - 1), max_size=3), order=orders)
def test_probabilities_sum_to_one_after_any_context(train: list[int], context: list[int], order: int) -> None:
    model = NGramModel(np.array(train), V, order)
    assert sum(model.probabilities(np.array([*context, w]))[-1] for w in range(V)) == pytest.approx(1)


@given(train=tokens_of_v, text=tokens_of_v, order=orders, chunk=st.integers(1, 20))
def test_chunks_change_nothing(train: list[int], text: list[int], order: int, chunk: int) -> None:
    whole = NGramModel(np.array(train), V, order).nats(np.array(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram, "BLOCK_TOKENS", chunk)
        assert NGramModel(np.array(train), V, order).nats(np.array(text)) == pytest.approx(whole)


@pytest.mark.parametrize(("vocab_size", "order"), [(256, 3), (256, 7), (65536, 3)])
def test_the_largest_ids_of_the_largest_orders_do_not_overflow(vocab_size: int, order: int) -> None:
    train = np.array([vocab_size - 1, vocab_size - 2] * 20, dtype=np.min_scalar_type(vocab_size - 1))
    counts: dict[int, int] = defaultdict(int)
    model = NGramModel(train, vocab_size, order)
    for token, p in zip(train[order:], model.probabilities(train)[order:], strict=True):
        counts[int(p > 0.9)] += 1
        assert token in (vocab_size - 1, vocab_size - 2)
    assert counts == {1: 40 - order}


@pytest.mark.parametrize(("vocab_size", "order"), [(256, 8), (256, -1), (65537, 3)])
def test_an_order_out_of_range_is_refused(vocab_size: int, order: int) -> None:
    with pytest.raises(ValueError, match=f"got order {order} with vocab_size {vocab_size}"):
        NGramModel(np.zeros(100, dtype=np.int64), vocab_size, order)


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be more than order = 3, got 3"):
        NGramModel(np.zeros(3, dtype=np.uint8), 256, 3)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_the_baseline_uses_the_tasks_parts_and_units(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    text = "né" * 1000
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    task = TextTask(TextConfig(str(tmp_path / "text.txt"), kind, window=10, documents="joined"))
    metrics = ngram_baseline(task)
    nats = NGramModel(task.train_tokens, task.vocabulary.size).nats(task.val_tokens)
    assert metrics["val_tokens"] == task.val_tokens.size - 1
    assert metrics["val_loss"] == pytest.approx(nats / metrics["val_tokens"])
    assert metrics["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(task.vocabulary.decode(task.val_tokens[1:]).encode()), rel=1e-2
    )
    assert metrics["bits_per_byte"] < 0.1  # the text repeats


@pytest.mark.parametrize(
    ("vocab_size", "order"), [(256, 3), (256, 4), (65536, 1), (65536, 2), (17, 7), (17, 8)]
)
def test_contexts_that_differ_in_their_first_token_alone_are_told_apart(vocab_size: int, order: int) -> None:
    """Around V^(order + 1) = 2^32, where n-grams no longer fit 32 bits."""
    first, other = vocab_size - 1, vocab_size - 2
    train = np.array([*[first, *[0] * (order - 1), 1] * 8, *[other, *[0] * (order - 1), 2] * 8])
    model = NGramModel(train, vocab_size, order)
    for leading, following in ((first, 1), (other, 2)):
        text = np.array([leading, *[0] * (order - 1), following])
        assert model.probabilities(text)[-1] > 0.8
