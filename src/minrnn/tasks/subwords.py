"""Byte-level subwords: a tokenizer.json of the package tokenizers, learned or given.

Byte-pair encoding (Sennrich et al., arXiv 1508.07909) over bytes, as in GPT-2: each byte is a character of an
alphabet of 256, and every text can be encoded and is returned as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from minrnn.files import parse_json
from minrnn.tasks.documents import INSTALL

if TYPE_CHECKING:
    import tokenizers

PROBE = "The naïve\n\n\tcafé's 漢字, 😀 12345  <|endoftext|>"
"""A text that a tokenizer must return."""


def learn_tokenizer(texts: Iterable[str], size: int, marks: Sequence[str]) -> str:
    """Return the tokenizer.json of byte-pair encoding with at most `size` tokens, `marks` among them.

    Raises:
        ImportError: tokenizers is not installed.
    """
    package = _import_tokenizers()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(marks),
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def byte_tokenizer(mark: str | None) -> str:
    """Return the tokenizer.json whose tokens are the 256 bytes in their order, then `mark`.

    Raises:
        ImportError: tokenizers is not installed.
    """
    package = _import_tokenizers()
    tokenizer = package.Tokenizer(package.models.BPE(vocab=_BYTES, merges=[]))
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    return _starting_with(mark, tokenizer)


def character_tokenizer(characters: str, mark: str | None) -> str:
    """Return the tokenizer.json whose tokens are `characters` in their order, then `mark`.

    Raises:
        ImportError: tokenizers is not installed.
    """
    package = _import_tokenizers()
    ids = {character: index for index, character in enumerate(characters)}
    # Not byte-pair encoding, which leaves out what is not in its vocabulary: this model raises.
    tokenizer = package.Tokenizer(package.models.WordLevel(ids))
    each = package.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = package.pre_tokenizers.Split(each, "isolated")
    tokenizer.decoder = package.decoders.Fuse()
    return _starting_with(mark, tokenizer)


def read_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json's content."""
    tokenizer: tokenizers.Tokenizer = _import_tokenizers().Tokenizer.from_str(text)
    return tokenizer


def _starting_with(mark: str | None, tokenizer: tokenizers.Tokenizer) -> str:
    """Return a tokenizer as JSON, with `mark` before each text, unless asked for no special tokens."""
    if mark is None:
        return tokenizer.to_str()
    tokenizer.add_special_tokens([mark])
    tokenizer.post_processor = _import_tokenizers().processors.TemplateProcessing(
        single=f"{mark} $A",
        pair=f"{mark} $A {mark} $B",
        special_tokens=[(mark, tokenizer.token_to_id(mark))],
    )
    return tokenizer.to_str()


class Subwords:
    """A byte-level tokenizer.

    Args:
        text: the content of a tokenizer.json.
        origin: its file, for error messages.
        mark: a token that no text is encoded to; it is added if it is missing.

    Raises:
        ValueError: it is no tokenizer.json, or not one that returns any text as it was.
        ImportError: tokenizers is not installed.
    """

    def __init__(self, text: str, origin: str, mark: str | None) -> None:
        self._described = parse_json(text, _Described, origin)
        with _OneLineErrors(origin):
            self._tokenizer: tokenizers.Tokenizer = _import_tokenizers().Tokenizer.from_str(text)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode_special_tokens = True  # as the characters that they consist of
            if mark is not None:
                self._tokenizer.add_special_tokens([mark])
        self._mark = mark
        self.mark: int | None = None if mark is None else self._tokenizer.token_to_id(mark)
        """Id of the mark."""
        self._check(origin)

    @cached_property
    def tokens(self) -> list[bytes]:
        """The bytes of each token; empty for special tokens, and for ids that are no token."""
        added = {each["content"]: each["special"] for each in self._described.get("added_tokens", [])}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        found = [b""] * (1 + max(vocabulary.values()))
        for token, index in vocabulary.items():
            if index == self.mark:
                continue
            if token in added:
                found[index] = b"" if added[token] else token.encode()
            else:
                found[index] = bytes(_BYTES[character] for character in token)
        return found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, encoded in parallel."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [each.ids for each in encoded]

    def to_tokenizer(self) -> str:
        """Return the tokenizer.json with the mark before each text."""
        return _starting_with(self._mark, read_tokenizer(self._tokenizer.to_str()))

    def to_str(self) -> str:
        """Return what encodes and decodes as JSON, as `learn_tokenizer` does."""
        tokenizer = read_tokenizer(self._tokenizer.to_str())
        tokenizer.post_processor = None
        return tokenizer.to_str()

    def _check(self, origin: str) -> None:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        added = {each["content"] for each in self._described.get("added_tokens", [])}
        others = sorted(token for token in vocabulary if token not in added and set(token) - _BYTES.keys())
        lacking = _BYTES.keys() - vocabulary.keys()
        if others or lacking:
            got = f"the token {others[0]!r}" if others else f"no token for {len(lacking)} of the 256 bytes"
            raise ValueError(
                f"{origin} must be a byte-level tokenizer, as GPT-2's and those that `minrnn train` learns, "
                f"got {got}"
            )
        returned = b"".join(self.tokens[index] for index in self.encode([PROBE])[0])
        if returned != PROBE.encode():
            raise ValueError(
                f"{origin} must return any text as it was, got {returned.decode()!r} for {PROBE!r}"
            )


class _AddedToken(TypedDict):
    content: str
    special: bool


class _Described(TypedDict):
    """The keys of tokenizer.json that are read here."""

    model: dict[str, Any]
    added_tokens: NotRequired[list[_AddedToken]]


def _alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _alphabet()


def _import_tokenizers() -> ModuleType:
    try:
        import tokenizers
    except ImportError as missing:
        raise ImportError(f"subwords need tokenizers, which is not installed; {INSTALL}") from missing
    return tokenizers


class _OneLineErrors:
    """Context manager that turns errors of tokenizers, which have no class of their own, into ValueErrors."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if kind is Exception:  # itself, and no subclass
            raise ValueError(
                f"{self._origin} is no tokenizer.json ({' '.join(str(error).split())})"
            ) from error
