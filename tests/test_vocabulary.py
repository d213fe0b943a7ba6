"""A vocabulary maps text to ids and back, whole or as a stream, and says what it cannot map."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minrnn.tasks import VOCABULARIES, Vocabulary, documents
from minrnn.tasks.documents import Piece, read_pieces
from minrnn.tasks.vocabulary import END_OF_TEXT, ByteVocabulary, CharacterVocabulary, SubwordVocabulary

TEXT = "né → 漢字 😀\r\n\tend"  # one to four bytes a character

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
every_kind = pytest.mark.parametrize("kind", VOCABULARIES)


def learn(kind: str, text: str, folder: Path) -> Vocabulary:
    path = folder / "text.txt"
    path.write_bytes(text.encode())
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed: the extra text")
    return VOCABULARIES[kind].learn(read_pieces(path, "text"), 300)


def built(kind: str, text: str, is_marked: bool = True) -> Vocabulary:
    if kind == "bytes":
        return ByteVocabulary(is_marked)
    if kind == "bpe":
        pytest.importorskip("tokenizers", reason="tokenizers is not installed: the extra text")
        return SubwordVocabulary.learn(
            [Piece(text.encode(), True, False, "a text", 0, 0)], 300, is_marked=is_marked
        )
    return CharacterVocabulary("".join(sorted(set(text))), is_marked)


@every_kind
@given(text=texts)
def test_decoding_inverts_encoding(kind: str, text: str) -> None:
    vocabulary = built(kind, text)
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < vocabulary.size
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(torch.from_numpy(ids)) == text
    assert "".join(vocabulary.decode_stream(ids.tolist())) == text


@every_kind
@given(text=texts)
def test_byte_lengths_add_up_to_the_text_in_utf8(kind: str, text: str) -> None:
    vocabulary = built(kind, text)
    assert vocabulary.byte_lengths.shape == (vocabulary.size,)
    assert vocabulary.byte_lengths[vocabulary.encode(text)].sum() == len(text.encode())


@given(ids=st.lists(st.integers(0, 255)))
def test_any_bytes_decode_the_same_whole_and_as_a_stream(ids: list[int]) -> None:
    assert "".join(ByteVocabulary().decode_stream(ids)) == ByteVocabulary().decode(ids)


def test_a_character_is_streamed_with_its_last_byte_and_not_before() -> None:
    received: list[int] = []

    def sender() -> list[int]:
        for byte in "a😀b".encode():
            received.append(byte)
            yield byte

    pieces = [(text, len(received)) for text in ByteVocabulary().decode_stream(sender())]
    assert pieces == [("a", 1), ("😀", 5), ("b", 6)]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    assert list(ByteVocabulary().decode_stream("é".encode()[:1])) == ["\ufffd"]


@every_kind
def test_saving_and_loading_keeps_the_vocabulary(kind: str, tmp_path: Path) -> None:
    vocabulary = learn(kind, TEXT, tmp_path)
    for each in (vocabulary, built(kind, TEXT, False)):
        for name, text in each.files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert Vocabulary.from_dict(each.to_dict(), tmp_path) == each


@pytest.mark.parametrize(
    "saved", [{"kind": "bytes"}, {"kind": "characters", "characters": "abc"}], ids=["bytes", "characters"]
)
def test_vocabularies_of_earlier_versions_have_no_end_of_text(saved: dict[str, str]) -> None:
    vocabulary = Vocabulary.from_dict(saved)
    assert vocabulary.end_of_text is None
    assert vocabulary.size == {"bytes": 256, "characters": 3}[saved["kind"]]
    assert vocabulary.to_dict() == saved


@every_kind
def test_the_end_of_text_is_a_token_that_no_text_has(kind: str) -> None:
    text = f"n{END_OF_TEXT}é"
    vocabulary = built(kind, text)
    end = vocabulary.end_of_text
    assert end is not None
    assert built(kind, text, False).end_of_text is None
    assert end not in vocabulary.encode(text)
    assert vocabulary.byte_lengths[end] == 0
    ids = [*vocabulary.encode("né").tolist(), end, *vocabulary.encode("n").tolist()]
    assert vocabulary.decode(ids) == "".join(vocabulary.decode_stream(ids)) == f"né{END_OF_TEXT}n"


def test_a_character_that_a_document_ends_in_is_a_replacement_before_its_mark() -> None:
    ids = [0xC3, 256, 0xA9]
    assert "".join(ByteVocabulary().decode_stream(ids)) == f"\ufffd{END_OF_TEXT}\ufffd"


@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"kind": "words"},
        {"kind": "characters"},
        {"kind": "bytes", "size": "256"},
        {"kind": "characters", "characters": 3},
        {"kind": "bytes", "end_of_text": "</s>"},
        {"kind": "bytes", "end_of_text": None},
    ],
)
def test_a_malformed_saved_vocabulary_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"from_dict: saved must be .* got"):
        Vocabulary.from_dict(saved)


@pytest.mark.parametrize("characters", ["", "ba", "aab"])
def test_characters_must_be_sorted_and_distinct(characters: str) -> None:
    with pytest.raises(ValueError, match="sorted, distinct and at least one"):
        CharacterVocabulary(characters)


@pytest.mark.parametrize("kind", ["bytes", "characters"])
@pytest.mark.parametrize("read_bytes", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("piece_bytes", [4, 5, 7, 1 << 20])
def test_files_are_encoded_alike_however_they_are_cut(
    kind: str, piece_bytes: int, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "READ_BYTES", read_bytes)
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    vocabulary = learn(kind, TEXT, tmp_path)
    pieces = list(read_pieces(tmp_path / "text.txt", "text"))
    assert len(pieces) > 2 or piece_bytes > 100
    assert np.array_equal(np.concatenate(vocabulary.encode_pieces(pieces)), vocabulary.encode(TEXT))
    assert vocabulary == built(kind, TEXT)


@pytest.mark.parametrize(
    ("size", "dtype"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_ids_are_stored_in_the_smallest_type(size: int, dtype: str) -> None:
    characters = "".join(map(chr, range(0x10000, 0x10000 + size)))
    assert CharacterVocabulary(characters).dtype == np.min_scalar_type(size)  # one more: the end of text
    vocabulary = CharacterVocabulary(characters, is_marked=False)
    assert vocabulary.dtype == np.dtype(dtype)
    assert vocabulary.decode([size - 1]) == characters[-1]


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="vocabulary's 2 characters only, got 'é', '漢'; leave it out"):
        CharacterVocabulary("ab").encode("aé漢éb")
    with pytest.raises(ValueError, match="and 18 more"):
        CharacterVocabulary("A").encode("abcdefghijklmnopqrstuvwxyz")


@every_kind
@pytest.mark.parametrize("bad", [-1, 1000])
def test_decoding_refuses_an_id_that_is_no_token(kind: str, bad: int) -> None:
    vocabulary = built(kind, "abc")
    assert vocabulary.decode([vocabulary.end_of_text]) == END_OF_TEXT
    for each in (bad, vocabulary.size):
        with pytest.raises(ValueError, match=r"ids must lie in 0 \.\. \d+, got"):
            vocabulary.decode([0, each])


def test_bytes_of_a_command_line_that_are_not_utf8_survive() -> None:
    assert ByteVocabulary().encode(b"a\xff".decode("utf-8", "surrogateescape")).tolist() == [0x61, 0xFF]


@pytest.mark.parametrize("piece_bytes", [4, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"ab\xff", 2), ("né".encode() + b"\xc3x", 3), (b"abc\xc3", 3), (b"abcdefgh\xc3ijkl", 8)],
)
def test_a_file_that_is_not_utf8_is_named_with_the_place(
    content: bytes, offset: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "latin.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"needs UTF-8, got byte 0x.. at offset {offset} of .*latin\.txt"):
        CharacterVocabulary.learn(read_pieces(path, "text"))
    assert ByteVocabulary.learn(read_pieces(path, "text")).size == 257


# --- as a tokenizer.json ------------------------------------------------------------------------------------


def tokenizer_of(vocabulary: Vocabulary) -> Any:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed: the extra text")
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary.to_tokenizer())
    tokenizer.encode_special_tokens = True  # as minrnn, which has no token for marks in a text
    return tokenizer


@every_kind
@given(text=texts)
def test_a_tokenizer_gives_the_same_ids(kind: str, text: str) -> None:
    vocabulary = built(kind, f"{text}\n{END_OF_TEXT}")
    tokenizer = tokenizer_of(vocabulary)
    for each in (text, f"{text}{END_OF_TEXT}\n\n{text}", ""):
        ids = vocabulary.encode(each).tolist()
        assert tokenizer.encode(each, add_special_tokens=False).ids == ids
        assert tokenizer.encode(each).ids == [vocabulary.end_of_text, *ids]
        assert tokenizer.decode(ids) == each
    assert tokenizer.get_vocab_size() == vocabulary.size


@given(ids=st.lists(st.integers(0, 255)))
def test_a_tokenizer_decodes_any_bytes_alike(ids: list[int]) -> None:
    vocabulary = ByteVocabulary()
    assert tokenizer_of(vocabulary).decode(ids) == vocabulary.decode(ids)


@every_kind
def test_a_tokenizer_has_an_end_of_text_where_the_vocabulary_has(kind: str) -> None:
    vocabulary = built(kind, TEXT, False)
    tokenizer = tokenizer_of(vocabulary)
    assert tokenizer.encode(TEXT).ids == vocabulary.encode(TEXT).tolist()
    assert tokenizer.token_to_id(END_OF_TEXT) is None
    marked = tokenizer_of(built(kind, TEXT))
    pair = marked.encode("n", "d").ids
    assert pair[::2] == [built(kind, TEXT).end_of_text] * 2
    assert marked.decode(pair) == "nd"  # without special tokens
    assert marked.decode(pair, skip_special_tokens=False) == f"{END_OF_TEXT}n{END_OF_TEXT}d"


def test_a_tokenizer_of_characters_refuses_others() -> None:
    """It does not leave them out."""
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer_of(CharacterVocabulary("abc")).encode("abcd")


@every_kind
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_tokenizer_written_by_others_is_the_vocabularys(kind: str, is_marked: bool, tmp_path: Path) -> None:
    """With a post-processor, padding and truncation, and in another form, the file is the same vocabulary."""
    vocabulary = built(kind, TEXT * 3, is_marked)
    tokenizer = tokenizer_of(vocabulary)
    tokenizer.enable_padding()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=True)
    found = Vocabulary.from_dict(vocabulary.to_shared(), tmp_path)
    assert found == vocabulary
    assert found.to_dict() == vocabulary.to_dict()
