"""Tokenizing a corpus into a folder: in parallel, in bounded memory, and resumable after a kill.

Documents are read in order, encoded in threads (numpy and tokenizers release Python's lock), and appended in
order; so the result does not depend on the number of threads, and an interrupted call is continued where its
last commit was. The ids for validation have a file of their own until the end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self, TypedDict

import numpy as np

from minrnn.files import read_json, replace_text, write_json
from minrnn.tasks.documents import PIECE_BYTES, Documents, Piece, blocks, shortened
from minrnn.tasks.progress import Bar
from minrnn.tasks.vocabulary import VOCABULARIES, Vocabulary

IDS = "tokens.bin"
PROGRESS = "progress.json"
_HELD_OUT, _VOCABULARY = "validation.bin", "vocabulary.json"

PORTION_BYTES = 1 << 22
"""Bytes of text that are encoded by a thread at once."""

COMMIT_BYTES = 1 << 25
"""Bytes of text between two commits, at most a few seconds of work."""

MOST_THREADS = 8
"""Threads that encode; tokenizers has its own threads below them, one for each core."""

SAMPLED_FILES, SAMPLED_BYTES = 16, 1 << 16
"""Files, and bytes of text in each, that are encoded to estimate the size of the result."""

MARGIN = 1.2
"""Bytes that must be free, as a multiple of the estimate: the validation part is there twice for a while."""


class Tokens(NamedTuple):
    """What `write_tokens` wrote."""

    vocabulary: Vocabulary
    num_train: int
    num_val: int
    sha256: hashlib._Hash
    """Digest of the ids, which the caller completes."""


def write_tokens(
    folder: Path, corpus: Documents, vocabulary: str | Vocabulary, vocab_size: int = 0
) -> Tokens:
    """Write the token ids of a corpus, training then validation, to `folder / IDS`.

    Args:
        folder: the folder, which nobody else writes to; what an interrupted call left there is continued.
        corpus: the documents, unchanged since that call.
        vocabulary: a name in VOCABULARIES, or a vocabulary; its `files` are written too.
        vocab_size: most tokens of subwords that are learned.

    Raises:
        ValueError: a document cannot be encoded.
        OSError: a file cannot be read, or the disk has not enough space, which is estimated first.
    """
    learned = _learned(folder, corpus, vocabulary, vocab_size)
    with _Writer(folder, learned) as writer, Bar(f"tokenizing {corpus.name}", corpus.size) as bar:
        _check_space(folder, corpus, learned, writer.num_bytes)
        portions = _portions(corpus, writer.position)
        for portion, ids in _encoded(portions, lambda portion: _encode(portion, learned)):
            writer.append(portion, ids)
            bar.update(portion.place)
        return writer.finish(is_split_by_tokens=corpus.is_split_by_tokens)


def stored_type(vocabulary: Vocabulary) -> np.dtype:
    """Return the dtype on disk: little-endian, so that digests are the same on every machine."""
    return vocabulary.dtype.newbyteorder("<")


def _learned(folder: Path, corpus: Documents, vocabulary: str | Vocabulary, vocab_size: int) -> Vocabulary:
    """Return the vocabulary, and keep it in the folder, so that it is the same after a kill."""
    if isinstance(vocabulary, str):
        try:
            return Vocabulary.from_dict(read_json(folder / _VOCABULARY, dict[str, str]), folder)
        except (OSError, ValueError):  # not there yet
            pass
        kind = VOCABULARIES[vocabulary]
        with Bar(f"learning the {kind.unit} of {corpus.name}", corpus.size) as bar:
            pieces = _to_learn(corpus, kind.most_learned, bar)
            vocabulary = kind.learn(pieces, vocab_size, is_marked=not corpus.is_joined)
    for name, text in vocabulary.files.items():
        replace_text(folder / name, text)
    write_json(folder / _VOCABULARY, vocabulary.to_dict())
    return vocabulary


def _to_learn(corpus: Documents, most: int | None, bar: Bar) -> Iterator[Piece]:
    """Yield the pieces to learn a vocabulary from: all, or evenly spaced ones of the training part."""
    before, every = 0, max(1, -(-corpus.size // most)) if most else 1
    numbers = count()
    for index, size in enumerate(corpus.sizes):
        for piece in corpus.read(index):
            bar.update(before + piece.place)
            is_cut_off = corpus.is_split_by_tokens and piece.place > size * 9 // 10 and piece.offset
            if most is None or not (piece.is_held_out or is_cut_off or next(numbers) % every):
                yield piece
        before += size


# reading and encoding


class _Position(NamedTuple):
    """A place between two pieces of a corpus."""

    file: int
    """Index of the file."""
    pieces: int
    """Pieces of the file before it."""


class _Portion(NamedTuple):
    """Consecutive pieces that are encoded at once."""

    pieces: list[Piece]
    end: _Position
    place: int
    """Bytes of the corpus's files up to the end."""


def _portions(corpus: Documents, start: _Position) -> Iterator[_Portion]:
    pieces: list[Piece] = []
    size, before = 0, sum(corpus.sizes[: start.file])
    for index in range(start.file, len(corpus.sizes)):
        skipped = start.pieces if index == start.file else 0
        for number, piece in enumerate(corpus.read(index), 1):
            if number <= skipped:
                continue
            pieces.append(piece)
            size += len(piece.text)
            if size >= PORTION_BYTES:
                yield _Portion(pieces, _Position(index, number), before + piece.place)
                pieces, size = [], 0
        before += corpus.sizes[index]
    if pieces:
        yield _Portion(pieces, _Position(len(corpus.sizes), 0), before)


def _encoded(
    portions: Iterator[_Portion], encode: Callable[[_Portion], _Ids]
) -> Iterator[tuple[_Portion, _Ids]]:
    """Yield portions in order with their ids, encoded in threads a few portions ahead."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[_Portion, Future[_Ids]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for portion in portions:
            waiting.append((portion, pool.submit(encode, portion)))
            if len(waiting) > threads:
                first, ids = waiting.popleft()
                yield first, ids.result()
        for last, ids in waiting:
            yield last, ids.result()


class _Ids(NamedTuple):
    """Encoded pieces, as bytes on disk."""

    train: bytes
    val: bytes


def _encode(portion: _Portion, vocabulary: Vocabulary) -> _Ids:
    stored = stored_type(vocabulary)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    mark = _mark(vocabulary)
    for piece, ids in zip(portion.pieces, vocabulary.encode_pieces(portion.pieces), strict=True):
        if piece.is_first:
            parts[piece.is_held_out].append(mark)
        parts[piece.is_held_out].append(ids.astype(stored).tobytes())
    return _Ids(*map(b"".join, parts))


def _mark(vocabulary: Vocabulary) -> bytes:
    """Return the end of a text on disk; empty for a joined stream."""
    end = vocabulary.end_of_text
    return b"" if end is None else np.array(end, stored_type(vocabulary)).tobytes()


# writing


class _Progress(TypedDict):
    """Content of progress.json: how much of the corpus and of the two files is done."""

    file: int
    pieces: int
    train: int
    val: int


_NOTHING: _Progress = {"file": 0, "pieces": 0, "train": 0, "val": 0}


class _Writer:
    """The two files of ids of a corpus that is being tokenized, and what is committed of them."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self._folder, self._vocabulary = folder, vocabulary
        self._done = self._read_progress()
        self._sha256 = hashlib.sha256()  # of the training part, so far
        self._uncommitted = 0
        self._files = ExitStack()
        self._train, self._val = (
            self._open(name, size)
            for name, size in ((IDS, self._done["train"]), (_HELD_OUT, self._done["val"]))
        )
        for block in blocks_of(folder / IDS):
            self._sha256.update(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def position(self) -> _Position:
        """Where to continue."""
        return _Position(self._done["file"], self._done["pieces"])

    @property
    def num_bytes(self) -> int:
        """Bytes that are written."""
        return self._done["train"] + self._done["val"]

    def append(self, portion: _Portion, ids: _Ids) -> None:
        """Append encoded pieces, and commit now and then."""
        self._train.write(ids.train)
        self._val.write(ids.val)
        self._sha256.update(ids.train)
        done = self._done
        self._done = {
            "file": portion.end.file,
            "pieces": portion.end.pieces,
            "train": done["train"] + len(ids.train),
            "val": done["val"] + len(ids.val),
        }
        self._uncommitted += sum(len(piece.text) for piece in portion.pieces)
        if self._uncommitted >= COMMIT_BYTES:
            self._commit()

    def finish(self, *, is_split_by_tokens: bool) -> Tokens:
        """Complete the file of ids, and return what it holds."""
        mark = _mark(self._vocabulary)
        for file, size in ((self._train, self._done["train"]), (self._val, self._done["val"])):
            file.write(mark if size else b"")
        self._sha256.update(mark if self._done["train"] else b"")
        num_train = self._train.tell() // stored_type(self._vocabulary).itemsize
        self._val.flush()
        for block in blocks_of(self._folder / _HELD_OUT):
            self._train.write(block)
            self._sha256.update(block)
        num_tokens = self._train.tell() // stored_type(self._vocabulary).itemsize
        if is_split_by_tokens:
            num_train = num_tokens * 9 // 10
        self._files.close()
        for name in (_HELD_OUT, PROGRESS, _VOCABULARY):
            (self._folder / name).unlink(missing_ok=True)
        return Tokens(self._vocabulary, num_train, num_tokens - num_train, self._sha256)

    def _commit(self) -> None:
        for file in (self._train, self._val):
            file.flush()
            os.fsync(file.fileno())
        write_json(self._folder / PROGRESS, self._done)
        self._uncommitted = 0

    def _read_progress(self) -> _Progress:
        """Return what an interrupted call committed, if the files still hold it."""
        try:
            done = read_json(self._folder / PROGRESS, _Progress)
            sizes = [(self._folder / name).stat().st_size for name in (IDS, _HELD_OUT)]
        except (OSError, ValueError):
            sizes, done = [0, 0], _NOTHING
        return done if 0 <= done["train"] <= sizes[0] and 0 <= done["val"] <= sizes[1] else _NOTHING

    def _open(self, name: str, size: int) -> BinaryIO:
        """Open a file for appending after its first `size` bytes."""
        path = self._folder / name
        path.touch()
        file = self._files.enter_context(path.open("r+b"))
        file.truncate(size)
        file.seek(size)
        return file


def blocks_of(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in blocks."""
    with path.open("rb") as file:
        yield from blocks(file)


def _check_space(folder: Path, corpus: Documents, vocabulary: Vocabulary, written: int) -> None:
    """Raise OSError if the disk has less space than the ids will take, by an estimate from a sample."""
    needed = round(MARGIN * _estimate(corpus, vocabulary)) - written
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the tokens need about {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left",
        )


def _estimate(corpus: Documents, vocabulary: Vocabulary) -> float:
    """Return about how many bytes the ids of a corpus take."""
    places = num_bytes = ids_bytes = sampled = 0
    for index in range(0, len(corpus.sizes), -(-len(corpus.sizes) // SAMPLED_FILES)):
        pieces, size, place = [], 0, 0
        for piece in corpus.read(index):
            pieces.append(piece)
            size, place = size + len(piece.text), piece.place
            if size >= PIECE_BYTES:
                break
        if not pieces:
            continue
        places, num_bytes = places + place, num_bytes + size
        some = [shortened(piece, SAMPLED_BYTES) for piece in pieces]
        some = some[: max(1, len(some) * SAMPLED_BYTES // size)]
        ids = _encode(_Portion(some, _Position(0, 0), 0), vocabulary)
        ids_bytes += len(ids.train) + len(ids.val)
        sampled += sum(len(piece.text) for piece in some)
    return corpus.size * (num_bytes / max(1, places)) * (ids_bytes / max(1, sampled))
