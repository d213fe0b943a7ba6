"""Conversion between text and token ids: a token is a byte, a character or a subword, or ends a text."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minrnn.files import shown
from minrnn.tasks.documents import Piece
from minrnn.tasks.subwords import Subwords, byte_tokenizer, character_tokenizer, learn_tokenizer

TOKENIZER_FILE = "tokenizer.json"

END_OF_TEXT = "<|endoftext|>"
"""The token before, between and after documents. No text is encoded to it, not even these characters."""


class Vocabulary(ABC):
    """A one-to-one map between text and token ids 0 .. size - 1, of which one may mark the end of a text."""

    kind: ClassVar[str]
    unit: ClassVar[str]
    """What its tokens are, in the plural."""
    most_learned: ClassVar[int | None] = None
    """Bytes of the training part that it is learned from, about; None for all of both parts."""

    is_marked: bool
    """Whether there is a token for the end of a text; in the vocabularies of joined streams there is none."""

    @classmethod
    @abstractmethod
    def learn(cls, pieces: Iterable[Piece], size: int = 0, *, is_marked: bool = True) -> Self:
        """Return the vocabulary of documents; raise ValueError if one cannot be encoded.

        Args:
            pieces: the documents.
            size: most tokens; for subwords only.
            is_marked: whether it has an end of text.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of tokens V."""

    @property
    def end_of_text(self) -> int | None:
        """Id of the token END_OF_TEXT; None if there is none."""
        return self.size - 1 if self.is_marked else None

    @property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """Length in bytes of the UTF-8 text of each token, (V,); that of END_OF_TEXT is 0."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (T,); raise ValueError naming the characters that have none."""

    def encode_beginning(self, text: str) -> list[int]:
        """Return the ids of `text` as the beginning of a document: after END_OF_TEXT, if there is one.

        >>> ByteVocabulary().encode_beginning("né")
        [256, 110, 195, 169]
        """
        ids: list[int] = self.encode(text).tolist()
        return ids if self.end_of_text is None else [self.end_of_text, *ids]

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,); raise ValueError for an id outside 0 .. V - 1."""

    @abstractmethod
    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` as they arrive, each character once its last token has arrived."""

    @abstractmethod
    def encode_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.integer]]:
        """Return the ids of each piece, without marks; raise ValueError if one cannot be encoded."""

    @abstractmethod
    def to_dict(self) -> dict[str, str]:
        """Return the vocabulary as a dict for `from_dict`, to be saved as JSON beside `files`."""

    @property
    def files(self) -> dict[str, str]:
        """Names and texts of the files that `from_dict` reads."""
        return {}

    @abstractmethod
    def to_tokenizer(self) -> str:
        """Return a tokenizer.json with the same ids, which puts END_OF_TEXT, if there is one, before a text.

        Raises:
            ImportError: tokenizers is not installed.
        """

    def to_shared(self) -> dict[str, str]:
        """Return what `to_dict` returns, for a folder in which other programs write tokenizer.json anew."""
        return self.to_dict()

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type for the ids, in which tokens are stored."""
        return np.min_scalar_type(self.size - 1)

    @staticmethod
    def from_dict(saved: Mapping[str, str], folder: Path | None = None) -> "Vocabulary":
        """Return the vocabulary of a dict returned by `to_dict`, and of its `files` in `folder`.

        Those of earlier versions, and of joined streams, have no `end_of_text`.

        >>> Vocabulary.from_dict({"kind": "characters", "characters": "abc"}).encode("cab").tolist()
        [2, 0, 1]
        """
        values = dict(saved)
        is_marked = values.pop("end_of_text", None) == END_OF_TEXT
        if is_marked == ("end_of_text" in saved):
            match values:
                case {"kind": ByteVocabulary.kind, **rest} if not rest:
                    return ByteVocabulary(is_marked)
                case {"kind": CharacterVocabulary.kind, "characters": str(characters), **rest} if not rest:
                    return CharacterVocabulary(characters, is_marked)
                case {"kind": SubwordVocabulary.kind, "sha256": str(sha256), **rest} if folder and not rest:
                    return SubwordVocabulary.read(folder / TOKENIZER_FILE, is_marked, sha256=sha256)
                case {"kind": SubwordVocabulary.kind, **rest} if folder and not rest:
                    return SubwordVocabulary.read(folder / TOKENIZER_FILE, is_marked).plain()
        raise ValueError(
            "Vocabulary.from_dict: saved must be {'kind': 'bytes'} or {'kind': 'characters', 'characters': "
            f"'...'}} or {{'kind': 'bpe', 'sha256': '...'}}, with 'end_of_text': {END_OF_TEXT!r} or without, "
            f"got {shown(saved)}"
        )

    def _saved(self, **values: str) -> dict[str, str]:
        """Return what `to_dict` returns, with the kind and the mark."""
        mark = {"end_of_text": END_OF_TEXT} if self.is_marked else {}
        return {"kind": self.kind, **values, **mark}

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Return `ids` as an array, after checking that each is a token of this vocabulary."""
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.size):
            raise ValueError(
                f"decode: ids must lie in 0 .. {self.size - 1}, got {array.min()} .. {array.max()}; "
                "the model's vocab_size must be this vocabulary's size"
            )
        return array


@dataclass(frozen=True)
class ByteVocabulary(Vocabulary):
    """The 256 bytes, and the end of a text; it encodes any text and any file.

    >>> vocabulary = ByteVocabulary()
    >>> vocabulary.encode("né").tolist()
    [110, 195, 169]
    >>> list(vocabulary.decode_stream([110, 195, 169]))  # the é waits for its second byte
    ['n', 'é']
    >>> vocabulary.decode([110, vocabulary.end_of_text])
    'n<|endoftext|>'
    """

    is_marked: bool = True
    """Whether there is a token for the end of a text, 256."""

    kind: ClassVar[str] = "bytes"
    unit: ClassVar[str] = "bytes"

    @classmethod
    def learn(cls, pieces: Iterable[Piece], size: int = 0, *, is_marked: bool = True) -> Self:
        """Return the vocabulary; the documents are not read."""
        return cls(is_marked)

    @property
    def size(self) -> int:
        """257; 256 without END_OF_TEXT."""
        return 256 + self.is_marked

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Ones, and the 0 of END_OF_TEXT, (V,)."""
        return np.array([1] * 256 + [0] * self.is_marked, dtype=np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of `text` in UTF-8, (T,); lone surrogates raise ValueError.

        Surrogates that stand for undecodable bytes, of a command line for example, become those bytes.
        """
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,), with U+FFFD for bytes that are not UTF-8."""
        return "".join(self.decode_stream(self._checked(ids).tolist()))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield each character once its last byte has arrived; an incomplete last one is U+FFFD."""
        return decode_bytes(bytes((token,)) if token < 256 else None for token in ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.integer]]:
        """Return the bytes of each piece."""
        return [np.frombuffer(piece.text, np.uint8) for piece in pieces]

    def to_tokenizer(self) -> str:
        """Return the tokenizer.json of the bytes."""
        return byte_tokenizer(END_OF_TEXT if self.is_marked else None)

    def to_dict(self) -> dict[str, str]:
        """Return {"kind": "bytes", "end_of_text": "<|endoftext|>"}, or without the mark."""
        return self._saved()


@dataclass(frozen=True)
class CharacterVocabulary(Vocabulary):
    """The characters of a corpus, in the order of their code points, and the end of a text.

    >>> vocabulary = CharacterVocabulary("abc")
    >>> vocabulary.decode([2, 0, 1])
    'cab'
    >>> vocabulary.encode("bad")
    Traceback (most recent call last):
        ...
    ValueError: encode: text must use the vocabulary's 3 characters only, got 'd'; leave it out or use bytes
    """

    characters: str
    """Each character of the vocabulary once, sorted."""

    is_marked: bool = True
    """Whether there is a token for the end of a text, the last."""

    kind: ClassVar[str] = "characters"
    unit: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise ValueError(
                "CharacterVocabulary: characters must be sorted, distinct and at least one, got "
                f"{shown(self.characters)}"
            )

    @classmethod
    def learn(cls, pieces: Iterable[Piece], size: int = 0, *, is_marked: bool = True) -> Self:
        """Return the vocabulary of the characters in documents; raise ValueError if one is not UTF-8."""
        seen: set[str] = set()
        for piece in pieces:
            seen.update(decode_piece(piece, cls.kind))
        return cls("".join(sorted(seen)), is_marked)

    @property
    def size(self) -> int:
        """Number of distinct characters, plus one for END_OF_TEXT."""
        return len(self.characters) + self.is_marked

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Length in bytes of each character in UTF-8, and the 0 of END_OF_TEXT, (V,)."""
        lengths = [len(c.encode("utf-8", "surrogatepass")) for c in self.characters]
        return np.array(lengths + [0] * self.is_marked, dtype=np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (T,); raise ValueError naming the characters that have none."""
        return self._encode(text, "encode: text")

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,); raise ValueError for an id outside 0 .. V - 1."""
        return "".join(self.decode_stream(self._checked(ids).tolist()))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the character of each id."""
        for token in ids:
            yield END_OF_TEXT if token == self.end_of_text else self.characters[token]

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.integer]]:
        """Return the ids of each piece; raise ValueError if one cannot be encoded."""
        return [self._encode(decode_piece(piece, self.kind), piece.origin) for piece in pieces]

    def to_tokenizer(self) -> str:
        """Return the tokenizer.json of the characters, which raises where a text has others."""
        return character_tokenizer(self.characters, END_OF_TEXT if self.is_marked else None)

    def to_dict(self) -> dict[str, str]:
        """Return {"kind": "characters", "characters": ..., "end_of_text": ...}, or without the mark."""
        return self._saved(characters=self.characters)

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        return _code_points(self.characters)

    def _encode(self, text: str, what: str) -> NDArray[np.int64]:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=len(self.characters) - 1)
        known = self._points[ids] == points
        if not known.all():
            unknown = sorted({chr(point) for point in points[~known]})
            raise ValueError(
                f"{what} must use the vocabulary's {len(self.characters)} characters only, got "
                f"{_names(unknown)}; leave it out or use bytes"
            )
        return ids


@dataclass(frozen=True)
class SubwordVocabulary(Vocabulary):
    """The tokens of a byte-level tokenizer.json, learned by byte-pair encoding or given."""

    tokenizer: str
    """The content of tokenizer.json."""

    is_marked: bool = True
    """Whether its token for the end of a text is used; it is added if it is missing."""

    origin: str = field(default=TOKENIZER_FILE, compare=False)
    """The file, for error messages."""

    kind: ClassVar[str] = "bpe"
    unit: ClassVar[str] = "subwords"
    most_learned: ClassVar[int | None] = 1 << 27

    @classmethod
    def learn(cls, pieces: Iterable[Piece], size: int = 4096, *, is_marked: bool = True) -> Self:
        """Return the vocabulary of the most frequent subwords; raise ValueError for what is not UTF-8."""
        texts = (decode_piece(piece, cls.kind) for piece in pieces)
        return cls(learn_tokenizer(texts, size, [END_OF_TEXT] * is_marked), is_marked)

    @classmethod
    def read(cls, path: Path, is_marked: bool = True, *, sha256: str | None = None) -> Self:
        """Return the vocabulary of a tokenizer.json.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is no tokenizer.json or not byte-level, or has another digest.
        """
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no tokenizer.json ({error})") from error
        vocabulary = cls(text, is_marked, str(path))
        if sha256 is not None and vocabulary._sha256 != sha256:
            raise ValueError(f"{path} was cut short or altered: its SHA-256 is not the recorded one")
        _ = vocabulary.subwords
        return vocabulary

    @cached_property
    def subwords(self) -> Subwords:
        """The tokenizer."""
        return Subwords(self.tokenizer, self.origin, END_OF_TEXT if self.is_marked else None)

    @property
    def size(self) -> int:
        """Number of tokens, END_OF_TEXT among them."""
        return len(self.subwords.tokens)

    @property
    def end_of_text(self) -> int | None:
        """Id of the token END_OF_TEXT; None if it is not used."""
        return self.subwords.mark

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Length in bytes of each token, (V,); 0 for special ones."""
        return np.array([len(token) for token in self.subwords.tokens], dtype=np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (T,); lone surrogates raise ValueError."""
        text.encode()  # the tokenizer would raise an error of its own
        return np.array(self.subwords.encode([text])[0], dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,), with U+FFFD for bytes that are not UTF-8."""
        return "".join(self.decode_stream(self._checked(ids).tolist()))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of each id, each character once its last byte has arrived."""
        tokens, end = self.subwords.tokens, self.end_of_text
        return decode_bytes(None if token == end else tokens[token] for token in ids)

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[NDArray[np.integer]]:
        """Return the ids of each piece; raise ValueError if one is not UTF-8."""
        encoded = self.subwords.encode([decode_piece(piece, self.kind) for piece in pieces])
        return [np.array(ids, dtype=self.dtype) for ids in encoded]

    def to_dict(self) -> dict[str, str]:
        """Return {"kind": "bpe", "sha256": the digest of `files`' tokenizer.json, "end_of_text": ...}."""
        return self._saved(sha256=self._sha256)

    def to_tokenizer(self) -> str:
        """Return the tokenizer.json, with END_OF_TEXT before each text."""
        return self.subwords.to_tokenizer()

    def to_shared(self) -> dict[str, str]:
        """Return what `to_dict` returns, without the digest."""
        return self._saved()

    def plain(self) -> Self:
        """Return the vocabulary as it is learned: equal whoever has written the file since."""
        return replace(self, tokenizer=self.subwords.to_str())

    @property
    def files(self) -> dict[str, str]:
        """tokenizer.json, as transformers and tokenizers read it."""
        return {TOKENIZER_FILE: self.tokenizer}

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(self.tokenizer.encode()).hexdigest()


VOCABULARIES: dict[str, type[Vocabulary]] = {
    "bytes": ByteVocabulary,
    "characters": CharacterVocabulary,
    "bpe": SubwordVocabulary,
}
"""The kinds of tokens, by name."""


def _names(characters: list[str], at_most: int = 8) -> str:
    """Return the first characters, quoted, and the number of the others."""
    shown = ", ".join(repr(c) for c in characters[:at_most])
    return shown if len(characters) <= at_most else f"{shown} and {len(characters) - at_most} more"


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def decode_bytes(parts: Iterable[bytes | None]) -> Iterator[str]:
    """Yield the text of the bytes of tokens, each character once it is whole; None marks the end of a text.

    Bytes that are not UTF-8 become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for part in parts:
        if text := decoder.decode(part or b"", final=part is None):
            yield text
        if part is None:
            yield END_OF_TEXT
    if text := decoder.decode(b"", final=True):
        yield text


def decode_piece(piece: Piece, kind: str) -> str:
    """Return the text of a piece for a vocabulary of this kind; raise ValueError if it is not UTF-8."""
    try:
        return piece.text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"vocabulary {kind!r} needs UTF-8, got byte {piece.text[error.start]:#04x} at offset "
            f"{piece.offset + error.start} of {piece.origin}; use vocabulary 'bytes'"
        ) from error
