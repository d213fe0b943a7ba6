"""Subwords: any text comes back, tokens do not depend on how a file is read, a run keeps its tokenizer."""

from __future__ import annotations

import hashlib
import json
from itertools import islice, pairwise, product
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minrnn.cli.main import main
from minrnn.files import read_json
from minrnn.tasks import TextConfig, TextTask, Vocabulary, documents, subwords, tokenizing
from minrnn.tasks.documents import Piece, read_pieces
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.sources import find_corpus
from minrnn.tasks.tokens import tokenize
from minrnn.tasks.vocabulary import END_OF_TEXT, SubwordVocabulary
from minrnn.training import load_trained

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: the extra text")

WORDS = "the quick brown fox's 1234 jumps\n\tover -- the  lazy dog; née, 漢字漢字.\n"

texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def vocabulary() -> SubwordVocabulary:
    return learn(WORDS * 20)


def piece_of(text: str) -> Piece:
    return Piece(text.encode(), True, False, "a text", 0, 0)


def learn(text: str, size: int = 300, *, is_marked: bool = True) -> SubwordVocabulary:
    return SubwordVocabulary.learn([piece_of(text)], size, is_marked=is_marked)


@given(text=texts)
def test_any_text_comes_back(vocabulary: SubwordVocabulary, text: str) -> None:
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == "".join(vocabulary.decode_stream(ids.tolist())) == text
    assert vocabulary.byte_lengths[ids].sum() == len(text.encode())
    assert np.array_equal(vocabulary.encode_pieces([piece_of(text)])[0], ids)


def test_subwords_are_shorter_than_bytes_and_as_many_as_asked_for(vocabulary: SubwordVocabulary) -> None:
    assert vocabulary.size == 300
    assert vocabulary.dtype == np.uint16
    assert 2 * vocabulary.encode(WORDS).size < len(WORDS.encode())
    assert learn("ab").size == 258  # the text has no more


def test_a_mark_in_the_text_learned_from_is_no_subword() -> None:
    quoting = learn(f"{END_OF_TEXT} " * 50)
    ids = quoting.encode(END_OF_TEXT)
    assert quoting.end_of_text not in ids
    assert quoting.decode(ids) == END_OF_TEXT


@given(
    text=st.lists(st.sampled_from(["word", "X", "é", "漢字", " ", "\n", "  \n", "12", "'s", "--", "\t"])).map(
        "".join
    )
)
def test_a_document_in_pieces_has_the_same_tokens(vocabulary: SubwordVocabulary, text: str) -> None:
    """Where a piece ends after a word: without one, a piece of this size ends anywhere."""
    content = ("some words and " + text + " more words\nof it ") * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 64 + len(text.encode()))
        pieces = list(documents._pieces_of([content.encode()], "a text", False, int))
    assert b"".join(piece.text for piece in pieces) == content.encode()
    assert all(one.text[-1:].isalpha() and two.text[:1] in (b" ", b"\n") for one, two in pairwise(pieces))
    assert np.array_equal(np.concatenate(vocabulary.encode_pieces(pieces)), vocabulary.encode(content))


def test_large_vocabularies_have_wider_ids() -> None:
    described = json.loads(learn(WORDS).tokenizer)
    words = {
        "".join(word): 1000 + n for n, word in enumerate(islice(product(ascii_letters, repeat=3), 69_000))
    }
    described["model"]["vocab"] |= words
    wide = SubwordVocabulary(json.dumps(described))
    assert wide.size == 70_000
    assert wide.dtype == np.uint32
    assert wide.byte_lengths[[999, 69_999]].tolist() == [0, 3]  # ids may have gaps
    assert wide.decode([1000, 69_999]) == f"aaa{list(words)[-1]}"


def given_tokenizer(**changed: Any) -> str:
    """A tokenizer.json that another program wrote, with limits and other special tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(learn(WORDS, is_marked=False).tokenizer)
    tokenizer.add_special_tokens(["<bos>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    return json.dumps(json.loads(tokenizer.to_str()) | changed)


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_given_tokenizer_encodes_text_only(is_marked: bool, tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text(given_tokenizer(), encoding="utf-8")
    given = SubwordVocabulary.read(tmp_path / "my.json", is_marked)
    assert given.decode(given.encode(WORDS + "<bos>")) == WORDS + "<bos>"
    assert given.end_of_text == (given.size - 1 if is_marked else None)
    alone = learn(WORDS, is_marked=False)
    assert given.size == alone.size + 1 + is_marked
    assert given.encode(WORDS).tolist() == alone.encode(WORDS).tolist()
    assert not given.byte_lengths[alone.size :].any()  # of "<bos>" and the mark
    assert given.files == {"tokenizer.json": (tmp_path / "my.json").read_text(encoding="utf-8")}


REFUSED: dict[str, tuple[str, str]] = {
    "text": ("no JSON", "is not valid JSON"),
    "table": ("{}", "model is missing"),
    "model": ('{"model": {}}', "is no tokenizer.json"),
    "words": (
        tokenizers.Tokenizer(tokenizers.models.WordLevel({"a\u2581": 0}, "a\u2581")).to_str(),
        "must be a byte-level tokenizer, .* got the token 'a\u2581'",
    ),
    "few": (
        tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str(),
        "must be a byte-level tokenizer, .* got no token for 255 of the 256 bytes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_tokenizers_are_refused_in_one_line(what: str, tmp_path: Path) -> None:
    content, message = REFUSED[what]
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"t\.json.* {message}") as caught:
        SubwordVocabulary.read(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_changes_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(given_tokenizer(normalizer={"type": "Lowercase"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.json must return any text as it was, got .the naïve"):
        SubwordVocabulary.read(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError):
        SubwordVocabulary.read(tmp_path / "nowhere.json")
    (tmp_path / "t.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer\.json"):
        SubwordVocabulary.read(tmp_path / "t.json")


def test_errors_that_are_not_the_packages_pass() -> None:
    for kind in (KeyError, RuntimeError):
        with pytest.raises(kind), subwords._OneLineErrors("a"):
            raise kind


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"subwords need tokenizers, which is not installed; .*\[text\]"):
        learn(WORDS)


# learned from the training part


def test_subwords_are_learned_from_the_training_part(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(f"unique{ascii_letters[number] * 3} " * 40)
    corpus = find_corpus(str(tmp_path / "texts"))
    found = tokenize(corpus, "bpe", 2000).vocabulary
    validated = {file.stem for file in corpus.val}
    assert len(validated) == 2
    for number in range(20):
        size = found.encode(f"unique{ascii_letters[number] * 3}").size
        assert (size > 1) == (str(number) in validated)
    (tmp_path / "one.txt").write_text("early words " * 900 + "lateness! " * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_BYTES", 500)
        found = tokenize(find_corpus(str(tmp_path / "one.txt")), "bpe", 2000).vocabulary
    assert found.encode(" words").size == 1
    assert found.encode(" lateness").size > 2


def test_of_a_large_corpus_evenly_spaced_pieces_are_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text number {number} "} for number in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = find_corpus(str(tmp_path / "a.jsonl"))
    with tokenizing.Bar("", 1) as bar:
        learned = [piece.text for piece in tokenizing._to_learn(corpus, corpus.size // 5 + 1, bar)]
    training = [piece.text for piece in read_pieces(tmp_path / "a.jsonl", "text") if not piece.is_held_out]
    assert 80 < len(training) < 100
    assert learned == training[::5]


def test_sizes_and_tokenizers_are_other_tokens(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 30, encoding="utf-8")
    (tmp_path / "my.json").write_text(given_tokenizer(), encoding="utf-8")
    configs = [
        TextConfig(str(tmp_path / "text.txt"), "bpe", window=8, vocab_size=300),
        TextConfig(str(tmp_path / "text.txt"), "bpe", window=8, vocab_size=290),
        TextConfig(str(tmp_path / "text.txt"), str(tmp_path / "my.json"), window=8),
    ]
    tasks = [TextTask(config) for config in configs]
    assert [task.vocabulary.size for task in tasks][:2] == [300, 290]
    assert len({task.sha256 for task in tasks}) == 3
    assert all("subwords to train on" in task.describe() for task in tasks)
    again = [TextTask(config) for config in configs]
    assert [task.sha256 for task in again] == [task.sha256 for task in tasks]
    assert len(list(cache_folder().glob("tokens/*/*/tokenizer.json"))) == 3
    for task in tasks:
        whole = np.concatenate([task.train_tokens, task.val_tokens])
        assert task.vocabulary.decode(whole) == f"{END_OF_TEXT}{WORDS * 30}{END_OF_TEXT}"
        assert task.num_bytes(whole) == len((WORDS * 30).encode())


def test_a_damaged_tokenizer_of_the_cache_is_learned_again(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 30, encoding="utf-8")
    corpus = find_corpus(str(tmp_path / "text.txt"))
    first = tokenize(corpus, "bpe", 300)
    (damaged,) = cache_folder().rglob("tokenizer.json")
    damaged.write_text(damaged.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    again = tokenize(corpus, "bpe", 300)
    assert again.sha256 == first.sha256
    assert again.vocabulary == first.vocabulary


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocabulary": "pbe"}, "did you mean 'bpe'"),
        ({"vocabulary": "bpe", "vocab_size": 256}, "vocab_size must be at least 257 tokens, got 256"),
        ({"vocabulary": "bpe", "vocab_size": 1 << 25}, "vocab_size must be at most 16777216 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"TextConfig: .*{message}"):
        TextConfig(**values)


def test_a_size_without_subwords_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="vocab_size=300 has no effect with vocabulary='bytes'"):
        TextConfig(vocab_size=300)


# a run


def test_a_run_keeps_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(WORDS * 60, encoding="utf-8")
    (tmp_path / "my.json").write_text(given_tokenizer(), encoding="utf-8")
    sizes = "--model.d-model 8 --model.num-layers 1 --train.steps 2 --task.window 8 --train.eval-every 0"
    train = f"train demo --run run --task.source text.txt --task.vocabulary my.json {sizes}"
    assert main(train.split()) == 0
    assert main(["train", "--run", "run", "--resume", "--train.steps", "3"]) == 0
    for which in ("best", "last"):
        folder = tmp_path / "run" / "checkpoints" / which
        assert (folder / "tokenizer.json").read_text(encoding="utf-8") == (tmp_path / "my.json").read_text()
        listed = read_json(folder / "config.json", dict[str, Any])["files"]["tokenizer.json"]["sha256"]
        assert listed == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (tmp_path / "my.json").unlink()  # the run has its own
    assert main(["evaluate", "run"]) == 0
    capsys.readouterr()
    assert main(["sample", "run", "--prompt", "the quick", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    _, vocabulary, *_ = load_trained(tmp_path / "run", "best", "cpu")  # type: ignore[arg-type]
    assert isinstance(vocabulary, Vocabulary)
    kept = tmp_path / "run" / "checkpoints" / "best" / "tokenizer.json"
    kept.write_text(kept.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json was cut short or altered"):
        load_trained(tmp_path / "run", "best", "cpu")  # type: ignore[arg-type]
