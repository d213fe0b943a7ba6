"""Conversion between text and token ids: a token is a byte or a character."""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minrnn.files import shown

BLOCK_BYTES = 1 << 20  # read at once; the code points of a block (4 MiB) fit the processor's cache


class Vocabulary(ABC):
    """A one-to-one map between text and token ids 0 .. size - 1."""

    kind: ClassVar[str]

    @classmethod
    @abstractmethod
    def learn(cls, files: Iterable[Path]) -> Self:
        """Return the vocabulary of `files`; raise ValueError if a file cannot be encoded."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of tokens V."""

    @property
    @abstractmethod
    def byte_lengths(self) -> NDArray[np.int64]:
        """Length in bytes of the UTF-8 text of each token, (V,)."""

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (T,); raise ValueError naming the characters that have none."""

    @abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,); raise ValueError for an id outside 0 .. V - 1."""

    @abstractmethod
    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` as they arrive, each character once its last token has arrived."""

    @abstractmethod
    def encode_file(self, path: Path) -> Iterator[NDArray[np.integer]]:
        """Yield the ids of the file at `path` block by block; raise ValueError if it cannot be encoded."""

    @abstractmethod
    def to_dict(self) -> dict[str, str]:
        """Return the vocabulary as a dict for `from_dict`, to be saved as JSON."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type for the ids, in which tokens are stored."""
        return np.min_scalar_type(self.size - 1)

    @staticmethod
    def from_dict(saved: Mapping[str, str]) -> "Vocabulary":
        """Return the vocabulary of a dict returned by `to_dict`.

        >>> Vocabulary.from_dict({"kind": "characters", "characters": "abc"}).encode("cab").tolist()
        [2, 0, 1]
        """
        match dict(saved):
            case {"kind": ByteVocabulary.kind, **rest} if not rest:
                return ByteVocabulary()
            case {"kind": CharacterVocabulary.kind, "characters": str(characters), **rest} if not rest:
                return CharacterVocabulary(characters)
        raise ValueError(
            "Vocabulary.from_dict: saved must be {'kind': 'bytes'} or {'kind': 'characters', 'characters': "
            f"'...'}}, got {shown(saved)}"
        )

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
    """The 256 bytes; it encodes any text and any file.

    >>> vocabulary = ByteVocabulary()
    >>> vocabulary.encode("né").tolist()
    [110, 195, 169]
    >>> list(vocabulary.decode_stream([110, 195, 169]))  # the é waits for its second byte
    ['n', 'é']
    """

    kind: ClassVar[str] = "bytes"

    @classmethod
    def learn(cls, files: Iterable[Path]) -> Self:
        """Return the vocabulary; `files` are not read."""
        return cls()

    @property
    def size(self) -> int:
        """256."""
        return 256

    @property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Ones, (256,)."""
        return np.ones(256, dtype=np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of `text` in UTF-8, (T,); lone surrogates raise ValueError.

        Surrogates that stand for undecodable bytes, of a command line for example, become those bytes.
        """
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,), with U+FFFD for bytes that are not UTF-8."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield each character once its last byte has arrived; an incomplete last one is U+FFFD."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in ids:
            if text := decoder.decode(bytes((token,))):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def encode_file(self, path: Path) -> Iterator[NDArray[np.integer]]:
        """Yield the bytes of the file at `path`."""
        for block in _read_bytes(path):
            yield np.frombuffer(block, np.uint8)

    def to_dict(self) -> dict[str, str]:
        """Return {"kind": "bytes"}."""
        return {"kind": self.kind}


@dataclass(frozen=True)
class CharacterVocabulary(Vocabulary):
    """The characters of a corpus, in the order of their code points.

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

    kind: ClassVar[str] = "characters"

    def __post_init__(self) -> None:
        if not self.characters or list(self.characters) != sorted(set(self.characters)):
            raise ValueError(
                "CharacterVocabulary: characters must be sorted, distinct and at least one, got "
                f"{shown(self.characters)}"
            )

    @classmethod
    def learn(cls, files: Iterable[Path]) -> Self:
        """Return the vocabulary of the characters in `files`; raise ValueError if one is not UTF-8."""
        seen: set[str] = set()
        for path in files:
            for text in _read_text(path):
                seen.update(text)
        return cls("".join(sorted(seen)))

    @property
    def size(self) -> int:
        """Number of distinct characters."""
        return len(self.characters)

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """Length in bytes of each character in UTF-8, (V,)."""
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self.characters], dtype=np.int64)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, (T,); raise ValueError naming the characters that have none."""
        return self._encode(text, "encode: text")

    def decode(self, ids: ArrayLike) -> str:
        """Return the text of `ids`, (T,); raise ValueError for an id outside 0 .. V - 1."""
        return self._points[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the character of each id."""
        for token in ids:
            yield self.characters[token]

    def encode_file(self, path: Path) -> Iterator[NDArray[np.integer]]:
        """Yield the ids of the file at `path`; raise ValueError if it cannot be encoded."""
        for text in _read_text(path):
            yield self._encode(text, f"encode_file: {path}")

    def to_dict(self) -> dict[str, str]:
        """Return {"kind": "characters", "characters": ...}."""
        return {"kind": self.kind, "characters": self.characters}

    @cached_property
    def _points(self) -> NDArray[np.uint32]:
        return _code_points(self.characters)

    def _encode(self, text: str, what: str) -> NDArray[np.int64]:
        points = _code_points(text)
        ids = np.searchsorted(self._points, points).clip(max=self.size - 1)
        known = self._points[ids] == points
        if not known.all():
            unknown = sorted({chr(point) for point in points[~known]})
            raise ValueError(
                f"{what} must use the vocabulary's {self.size} characters only, got {_names(unknown)}; "
                "leave it out or use bytes"
            )
        return ids


VOCABULARIES: dict[str, type[Vocabulary]] = {"bytes": ByteVocabulary, "characters": CharacterVocabulary}
"""The kinds of tokens, by name."""


def _names(characters: list[str], at_most: int = 8) -> str:
    """Return the first characters, quoted, and the number of the others."""
    shown = ", ".join(repr(c) for c in characters[:at_most])
    return shown if len(characters) <= at_most else f"{shown} and {len(characters) - at_most} more"


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _read_bytes(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _read_text(path: Path) -> Iterator[str]:
    """Yield the file's text with its line ends; raise ValueError at the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    consumed = 0  # bytes decoded before this block
    for block in chain(_read_bytes(path), (b"",)):
        pending = len(decoder.getstate()[0])  # first bytes of a character split between blocks
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            offset = consumed - pending + error.start
            raise ValueError(
                f"vocabulary 'characters' needs UTF-8, got byte {error.object[error.start]:#04x} at offset "
                f"{offset} of {path}; use vocabulary 'bytes'"
            ) from error
        consumed += len(block)
