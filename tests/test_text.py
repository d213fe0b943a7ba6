"""The text task: batches are pure functions, the state is carried exactly, every token is predicted once."""

import dataclasses
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minrnn.models import ModelConfig, SequenceModel
from minrnn.tasks import TASKS, Batch, TextConfig, TextTask, Vocabulary
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.vocabulary import CharacterVocabulary

WINDOW = 5

joined = partial(TextConfig, documents="joined")
"""A text as one stream; what marks and resets change is in test_documents.py."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    """1,000 random bytes: 900 to train on, 100 to validate on."""
    folder = tmp_path_factory.mktemp("random")
    content = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8).tobytes()
    (folder / "text.bin").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINRNN_CACHE", str(folder / "cache"))
        return TextTask(joined(source=str(folder / "text.bin"), window=WINDOW))


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def small_model(task: TextTask, mixer: str = "mingru", dropout: float = 0.0) -> SequenceModel:
    torch.manual_seed(0)
    config = ModelConfig(d_model=8, num_layers=2, mixer=mixer, dropout=dropout)
    return SequenceModel(task.model_config(config)).double()


# batches


def test_the_table_holds_the_task() -> None:
    assert TASKS["text"] is TextTask


@given(step=st.integers(0, 10**12), seed=st.integers(0, 2**64), batch_size=st.integers(1, 20))
def test_a_batch_is_a_pure_function_of_step_and_seed(
    task: TextTask, step: int, seed: int, batch_size: int
) -> None:
    batch = task.batch(step, batch_size, seed)
    task.batch(step + 1, 3, seed)
    again = task.batch(step, batch_size, seed)
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.targets, again.targets)
    assert batch.inputs.shape == batch.targets.shape == (batch_size, WINDOW)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.fresh


def test_batches_are_the_same_on_every_machine(task: TextTask) -> None:
    starts = [find(task.train_tokens, row) for row in task.batch(3, 4, seed=7).inputs]
    assert starts == [386, 374, 577, 777]


def test_a_batch_draws_no_global_random_numbers(task: TextTask) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    task.batch(0, 4, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_targets_are_the_inputs_one_step_later(task: TextTask) -> None:
    for batch in (task.batch(0, 50, seed=1), task.stream_batch(3, 6)):
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for row, target in zip(batch.inputs, batch.targets[:, -1], strict=True):
            assert task.train_tokens[find(task.train_tokens, row) + WINDOW] == target


def test_random_windows_reach_both_ends(task: TextTask) -> None:
    starts = {find(task.train_tokens, row) for step in range(100) for row in task.batch(step, 100, 0).inputs}
    assert starts == set(range(900 - WINDOW))


def test_steps_and_seeds_draw_different_windows(task: TextTask) -> None:
    batches = [task.batch(step, 8, seed).inputs for step in range(3) for seed in range(3)]
    for i, one in enumerate(batches):
        assert not any(torch.equal(one, other) for other in batches[:i])


@given(batch_size=st.integers(1, 40))
def test_streams_continue_until_they_start_over(task: TextTask, batch_size: int) -> None:
    stream_length = (task.train_tokens.size - 1) // batch_size
    steps = stream_length // WINDOW
    batches = [task.stream_batch(step, batch_size) for step in range(2 * steps + 1)]
    assert [batch.fresh for batch in batches] == [step % steps == 0 for step in range(2 * steps + 1)]
    streams = torch.cat([batch.inputs for batch in batches[:steps]], dim=1)
    for row in range(batch_size):
        expected = task.train_tokens[row * stream_length :][: steps * WINDOW]
        assert streams[row].tolist() == expected.tolist()
    assert torch.equal(batches[0].inputs, batches[steps].inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 4, 0), "step must be at least 0, got -1"),
        ((0, 0, 0), "batch_size must be at least 1, got 0"),
        ((0, 4, -1), "seed must lie in"),
        ((0, 4, 2**128), "seed must lie in"),
    ],
)
def test_batch_arguments_out_of_range_are_refused(
    task: TextTask, arguments: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=f"batch: {message}"):
        task.batch(*arguments)


def test_streams_shorter_than_a_window_are_refused(task: TextTask) -> None:
    assert task.stream_batch(0, 179).inputs.shape == (179, WINDOW)
    with pytest.raises(ValueError, match="got 180 streams of 4; use at most 179"):
        task.stream_batch(0, 180)


def find(tokens: np.ndarray, row: Tensor) -> int:
    """Return where `row` starts in `tokens`, which holds it once."""
    windows = np.lib.stride_tricks.sliding_window_view(tokens, row.numel())
    (start,) = np.flatnonzero((windows == row.numpy()).all(axis=1))
    return int(start)


# loss


def test_the_loss_is_the_mean_in_nats_and_carries_the_state(task: TextTask) -> None:
    model = small_model(task)
    first, second = task.stream_batch(0, 4), task.stream_batch(1, 4)
    one, state = task.loss(model, first)
    two, _ = task.loss(model, second, state)
    logits, _ = model(torch.cat([first.inputs, second.inputs], dim=1))
    targets = torch.cat([first.targets, second.targets], dim=1)
    whole = cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert torch.allclose((one + two) / 2, whole, rtol=0, atol=1e-12)
    assert one.shape == ()


def test_a_fresh_batch_forgets_the_state(task: TextTask) -> None:
    model = small_model(task)
    _, state = task.loss(model, task.stream_batch(0, 4))
    batch = task.batch(0, 4, 0)
    assert torch.equal(task.loss(model, batch, state)[0], task.loss(model, batch)[0])
    continued = Batch(batch.inputs, batch.targets, fresh=False)
    assert not torch.equal(task.loss(model, continued, state)[0], task.loss(model, batch)[0])


def test_logits_of_half_precision_give_a_loss_in_float32(task: TextTask) -> None:
    model = small_model(task).bfloat16()
    loss, _ = task.loss(model, task.batch(0, 4, 0))
    assert loss.dtype == torch.float32


def test_training_lowers_the_loss(task: TextTask) -> None:
    model = small_model(task)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss, _ = task.loss(model, task.batch(0, 8, seed=0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


# evaluation


@torch.no_grad()
def nats(model: nn.Module, tokens: np.ndarray) -> float:
    """Return the total loss of predicting all tokens but the first, in one pass from the empty state."""
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    logits, _ = model(ids[:, :-1])
    return cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()


@settings(max_examples=20)
@given(eval_chunk=st.integers(1, 120), max_tokens=st.integers(0, 120))
def test_evaluation_is_one_exact_pass_over_the_text(task: TextTask, eval_chunk: int, max_tokens: int) -> None:
    chunked = TextTask(dataclasses.replace(task.config, eval_chunk=eval_chunk))
    model = small_model(task)
    tokens = task.val_tokens[: max_tokens + 1] if max_tokens else task.val_tokens
    num = tokens.size - 1
    metrics = chunked.evaluate(model, max_tokens=max_tokens)
    windows = [tokens[start : min(start + WINDOW, num) + 1] for start in range(0, num, WINDOW)]
    assert metrics["val_tokens"] == num
    assert metrics["val_loss"] == pytest.approx(nats(model, tokens) / num, abs=1e-10)
    assert metrics["val_loss_windowed"] == pytest.approx(
        sum(nats(model, w) for w in windows) / num, abs=1e-10
    )
    assert metrics["bits_per_byte"] == pytest.approx(metrics["val_loss"] / math.log(2), abs=1e-10)


@pytest.mark.parametrize("mixer", ["minlstm", "lstm", "attention"])
def test_every_kind_of_state_is_carried(task: TextTask, mixer: str) -> None:
    model = small_model(task, mixer)
    whole = nats(model, task.val_tokens) / (task.val_tokens.size - 1)
    assert task.evaluate(model)["val_loss"] == pytest.approx(whole, abs=1e-10)


def test_evaluation_leaves_no_trace(task: TextTask) -> None:
    model = small_model(task, dropout=0.5)
    frozen = next(module for module in model.modules() if isinstance(module, nn.Dropout))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    assert task.evaluate(model) == task.evaluate(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_a_model_that_fails_is_put_back_in_its_mode(task: TextTask) -> None:
    class Failing(nn.Module):
        def forward(self, tokens: Tensor, state: None = None) -> tuple[Tensor, None]:
            raise RuntimeError("out of order")

    model = Failing()
    with pytest.raises(RuntimeError, match="out of order"):
        task.evaluate(model)
    assert model.training


def test_a_negative_number_of_tokens_is_refused(task: TextTask) -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 0"):
        task.evaluate(small_model(task), max_tokens=-1)


def test_bits_per_byte_counts_bytes_not_characters(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "aé漢" * 100)
    task = TextTask(joined(source, vocabulary="characters", window=WINDOW))
    metrics = task.evaluate(small_model(task))
    num_bytes = len(task.vocabulary.decode(task.val_tokens[1:]).encode())
    assert num_bytes == task.num_bytes(task.val_tokens[1:]) > task.val_tokens.size
    bits = metrics["val_loss"] * metrics["val_tokens"] / math.log(2)
    assert metrics["bits_per_byte"] == pytest.approx(bits / num_bytes)


# the text and its parts


def test_binary_files_that_are_left_out_are_said(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / "texts" / name, name * 50)
    write(tmp_path / "texts" / "c", b"\0\1")
    task = TextTask(joined(str(tmp_path / "texts"), window=WINDOW))
    assert task.describe().endswith("256 symbols; binary files, 1 of them, are left out")


def test_the_model_gets_as_many_symbols_as_the_text_has(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "abc" * 100)
    config = ModelConfig(d_model=8, num_layers=1)
    sizes = {
        kind: TextTask(joined(source, kind, window=WINDOW)).model_config(config)
        for kind in ("bytes", "characters")
    }
    assert sizes["bytes"].vocab_size == 256
    assert sizes["characters"].vocab_size == 3


@pytest.mark.parametrize("kind", ["bytes", "characters"])
def test_a_file_is_divided_nine_to_one(kind: str, tmp_path: Path) -> None:
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 300, 1234)))
    task = TextTask(joined(write(tmp_path / "text.txt", text), kind, window=WINDOW))
    whole = np.concatenate([task.train_tokens, task.val_tokens])
    assert task.vocabulary.decode(whole) == text
    assert task.train_tokens.size == whole.size * 9 // 10


def test_a_folder_is_divided_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    for i in range(12):
        write(folder / f"part{i:02}.txt", f"<{i}>" * 10)
    task = TextTask(joined(str(folder), window=WINDOW))
    train, val = (task.vocabulary.decode(part) for part in (task.train_tokens, task.val_tokens))
    numbers = {i for i in range(12) if f"<{i}>" in train}, {i for i in range(12) if f"<{i}>" in val}
    assert len(numbers[1]) == 1
    assert numbers[0] | numbers[1] == set(range(12))
    assert not numbers[0] & numbers[1]
    assert train == "".join(f"<{i}>" * 10 for i in sorted(numbers[0]))


def test_characters_of_the_validation_part_have_tokens(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "ab" * 90 + "cd" * 10)
    task = TextTask(joined(source, "characters", window=WINDOW))
    assert task.vocabulary == CharacterVocabulary("abcd", is_marked=False)
    assert task.val_tokens.max() == 3


@pytest.mark.skipif(
    "MINRNN_DATA" not in os.environ, reason="MINRNN_DATA names no folder with Tiny Shakespeare"
)
@pytest.mark.parametrize(("kind", "symbols"), [("bytes", 256), ("characters", 65)])
def test_shakespeare_has_the_published_parts(kind: str, symbols: int) -> None:
    task = TextTask(joined("shakespeare", kind))
    assert (task.train_tokens.size, task.val_tokens.size, task.vocabulary.size) == (1003854, 111540, symbols)
    assert task.vocabulary.decode(task.train_tokens[:14]) == "First Citizen:"
    assert "65 symbols" in task.describe() or kind == "bytes"


# the cache


def test_tokens_are_kept_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = joined(write(tmp_path / "text.txt", "some text " * 20), "characters", window=WINDOW)
    first = TextTask(config)
    monkeypatch.setattr(CharacterVocabulary, "learn", None)  # would fail if it read the text again
    monkeypatch.setattr(CharacterVocabulary, "encode_pieces", None)
    second = TextTask(config)
    assert second.sha256 == first.sha256
    assert np.array_equal(second.train_tokens, first.train_tokens)
    assert isinstance(second.train_tokens.base.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        second.train_tokens[0] = 0


def test_a_changed_text_is_tokenised_again_and_the_old_tokens_go(tmp_path: Path) -> None:
    config = joined(write(tmp_path / "text.txt", "some text " * 20), window=WINDOW)
    first = TextTask(config)
    status = (tmp_path / "text.txt").stat()
    write(tmp_path / "text.txt", "same size " * 20)
    os.utime(tmp_path / "text.txt", ns=(status.st_atime_ns, status.st_mtime_ns))  # as some copying tools do
    second = TextTask(config)
    assert second.vocabulary.decode(second.train_tokens[:9]) == "same size"
    assert second.sha256 != first.sha256
    assert len(list(cache_folder().glob("tokens/*/*"))) == 1


def test_a_folder_that_grew_is_tokenised_again(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / "texts" / name, name * 50)
    config = joined(str(tmp_path / "texts"), window=WINDOW)
    first = TextTask(config)
    write(tmp_path / "texts" / "d", "d" * 50)
    second = TextTask(config)
    sizes = [task.train_tokens.size + task.val_tokens.size for task in (first, second)]
    assert sizes == [150, 200]


def test_vocabularies_do_not_share_tokens(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", "bcd" * 50)
    given = CharacterVocabulary("abcdef", is_marked=False)
    tasks = [
        TextTask(joined(source, "characters", window=WINDOW)),
        TextTask(joined(source, "characters", window=WINDOW), given),
        TextTask(joined(source, "bytes", window=WINDOW)),
    ]
    assert [task.train_tokens[0] for task in tasks] == [0, 1, ord("b")]
    assert tasks[1].vocabulary == given
    assert len({task.sha256 for task in tasks}) == 3


@pytest.mark.parametrize("damage", ["tokens.bin", "tokens.json"])
@pytest.mark.parametrize("left", [0, 10])
def test_damaged_tokens_are_made_again(damage: str, left: int, tmp_path: Path) -> None:
    config = joined(write(tmp_path / "text.txt", "some text " * 20), window=WINDOW)
    sha256 = TextTask(config).sha256
    (damaged,) = cache_folder().rglob(damage)
    damaged.write_bytes(damaged.read_bytes()[:left])
    assert TextTask(config).sha256 == sha256
    assert json.loads(next(cache_folder().rglob("tokens.json")).read_text())["sha256"] == sha256


def test_a_failed_tokenisation_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write(tmp_path / "text.txt", b"ab\xff" * 50)
    with pytest.raises(ValueError, match="needs UTF-8"):
        TextTask(joined(source, "characters", window=WINDOW))
    with pytest.raises(ValueError, match="needs UTF-8"):
        TextTask(joined(source, "characters", window=WINDOW), CharacterVocabulary("ab", is_marked=False))
    assert [path for path in cache_folder().rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "text.txt", "some text " * 20)
    monkeypatch.setenv("MINRNN_CACHE", write(tmp_path / "a file", ""))
    with pytest.raises(OSError, match=r"cannot write the tokens .* \(MINRNN_CACHE can name another folder\)"):
        TextTask(joined(source, window=WINDOW))


# errors


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold text, got an empty file: .*empty\.txt"):
        TextTask(joined(write(tmp_path / "empty.txt", "")))


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="source must be"):
        TextTask(joined(str(tmp_path / "missing.txt")))


@pytest.mark.parametrize(
    ("length", "window", "part"), [(100, 95, "training, got 90"), (100, 10, "validation, got 10")]
)
def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path, length: int, window: int, part: str) -> None:
    source = write(tmp_path / "short.txt", "x" * length)
    with pytest.raises(ValueError, match=rf"at least window \+ 1 = {window + 1} tokens for {part}"):
        TextTask(joined(source, window=window))


def test_a_text_of_one_window_is_enough(tmp_path: Path) -> None:
    task = TextTask(joined(write(tmp_path / "short.txt", "abcdefghij" * 2), window=1))
    assert task.val_tokens.size == 2
    assert task.batch(0, 3, 0).inputs.shape == (3, 1)
    assert task.evaluate(small_model(task))["val_tokens"] == 1


def test_a_text_that_is_not_utf8_can_be_read_as_bytes_only(tmp_path: Path) -> None:
    source = write(tmp_path / "latin.txt", "é".encode("latin-1") * 100)
    assert TextTask(joined(source, window=WINDOW)).vocabulary.size == 256
    with pytest.raises(ValueError, match=r"needs UTF-8, got byte 0xe9 at offset 0 of .*latin\.txt; use"):
        TextTask(joined(source, "characters", window=WINDOW))


def test_a_text_with_characters_that_a_given_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    vocabulary = Vocabulary.from_dict({"kind": "characters", "characters": "ab"})
    source = write(tmp_path / "text.txt", "abc" * 50)
    with pytest.raises(ValueError, match=r"text\.txt must use the vocabulary's 2 characters only, got 'c'"):
        TextTask(joined(source, "characters", window=WINDOW), vocabulary)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulary": "words"}, "vocabulary must be one of bytes, characters, bpe, got 'words'"),
        ({"documents": "apart"}, "documents must be separate or joined, got 'apart'"),
        ({"window": 0}, "window must be at least 1 token, got 0"),
        ({"eval_chunk": -1}, "eval_chunk must be at least 1 token, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"TextConfig: {message}"):
        TextConfig(**values)


@pytest.mark.parametrize(("window", "expected"), [(None, WINDOW), (0, 0), (5, 5)])
def test_attention_sees_the_tasks_window_unless_told(
    task: TextTask, window: int | None, expected: int
) -> None:
    assert task.model_config(ModelConfig(mixer="attention", window=window)).window == expected
    assert task.model_config(ModelConfig(mixer="mingru")).window is None


def test_a_held_out_end_is_validated_on_and_the_validation_part_stays_untouched(tmp_path: Path) -> None:
    text = "to train on " * 150 + "x" * 200  # the first 1,800 are the training part
    config = joined(write(tmp_path / "text.txt", text), window=WINDOW)
    whole, cut = TextTask(config), TextTask(dataclasses.replace(config, held_out=0.25))
    assert whole.train_tokens.size == 1800
    assert cut.train_tokens.tolist() == whole.train_tokens[:1350].tolist()
    assert cut.val_tokens.tolist() == whole.train_tokens[1350:].tolist()
    assert (cut.vocab_size, cut.sha256) == (whole.vocab_size, whole.sha256)
    assert cut._windows.shape == (1350 - WINDOW, WINDOW + 1)  # no batch reaches beyond the cut
    assert cut.test_tokens.tolist() == whole.val_tokens.tolist()
    assert whole.test_tokens.size == 0
    swapped = TextTask(dataclasses.replace(config, held_out=0.25, held_out_for="test"))
    assert swapped.train_tokens.tolist() == cut.train_tokens.tolist()
    assert swapped.val_tokens.tolist() == whole.val_tokens.tolist()
    assert swapped.test_tokens.tolist() == cut.val_tokens.tolist()
    for setting in ("part", "held_out_for"):
        with pytest.raises(ValueError, match=f"{setting} must be validation where nothing is held out"):
            dataclasses.replace(config, **{setting: "test"})
    for held_out in (-0.1, 1.0):
        with pytest.raises(ValueError, match="held_out must be a fraction"):
            dataclasses.replace(config, held_out=held_out)
    with pytest.raises(ValueError, match="tokens for training, got 0"):
        TextTask(dataclasses.replace(config, held_out=0.9999))
