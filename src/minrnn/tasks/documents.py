"""Documents in files: a file of text, a line of JSON Lines or a row of Parquet is one, also compressed.

A document is read in pieces of bounded size, so that its length does not matter. Pieces depend on the
document's content only, not on how a file is read, and end where a word does.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from minrnn.files import parse_json

PIECE_BYTES = 1 << 20
"""Most bytes of a piece; at least four, so that a character fits."""

READ_BYTES = 1 << 20
"""Bytes that are read at once."""

ROWS = 64
"""Rows of Parquet that are read at once."""

SHOWN_KEYS = 8
"""Most names of columns that an error lists."""

INSTALL = "install it with pip install 'minrnn[text]'"

_WORD_END = re.compile(rb"[A-Za-z](?=[ \n])")
_SEARCHED = 4096  # bytes at the end of a piece in which the end of a word is searched for
_HELD_OUT = 10  # one document in so many is used for validation


class Piece(NamedTuple):
    """A part of a document."""

    text: bytes
    """UTF-8, or what the file has instead; never empty."""
    is_first: bool
    """Whether the document starts here."""
    is_held_out: bool
    """Whether the document is for validation: one in ten, by a hash of its text. Rows only."""
    origin: str
    """The file, and the line or row in it, for error messages."""
    offset: int
    """Bytes of the document before this piece."""
    place: int
    """Bytes of the file that have been read, compressed if it is."""


class Documents(Protocol):
    """A corpus: a sequence of documents in several parts, such as files."""

    @property
    def name(self) -> str:
        """The source as given."""

    @property
    def origin(self) -> object:
        """Where they are."""

    @property
    def column(self) -> str:
        """The key or column of the text in rows."""

    @property
    def is_joined(self) -> bool:
        """Whether there is no mark between documents."""

    @property
    def is_split_by_tokens(self) -> bool:
        """Whether it is one document, whose last tenth of tokens is for validation."""

    @property
    def is_public(self) -> bool:
        """Whether all users of this machine may read it."""

    @property
    def left_out(self) -> int:
        """Number of binary files that were left out."""

    @property
    def state(self) -> list[object]:
        """What changes when the documents do, as JSON."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each part."""

    @property
    def size(self) -> int:
        """Bytes of all parts."""

    def read(self, index: int) -> Iterator[Piece]:
        """Yield the documents of the part of this index in pieces."""


def has_rows(path: Path) -> bool:
    """Whether a file holds several documents, as lines or rows."""
    return _form(path)[0] in ROW_READERS


def read_pieces(path: Path, column: str) -> Iterator[Piece]:
    """Yield the documents of a file in pieces; documents without text are left out.

    Args:
        path: a file; its suffixes tell the format: .jsonl or .ndjson, .parquet, and else text, with .gz or
            .zst after them if it is compressed.
        column: the key of the text in JSON Lines, or its column in Parquet.

    Raises:
        ValueError: the file is damaged, or a row has no text of that name.
        ImportError: a package that reads this format is not installed; the message names the extra.
        OSError: the file cannot be read.
    """
    suffix, opener = _form(path)
    if suffix in ROW_READERS:
        with path.open("rb") as raw, opener(path, raw) as file:
            for origin, text, place in ROW_READERS[suffix](path, raw, file, column):
                yield from pieces_of_row(text, origin, place)
    else:
        yield from read_text(path, opener)


def read_text(path: Path, opener: Opener | None = None) -> Iterator[Piece]:
    """Yield a file, whatever its name, as one document in pieces."""
    with path.open("rb") as raw, (opener or _open_plain)(path, raw) as file:
        yield from _pieces_of(blocks(file), str(path), False, raw.tell)


def first_block(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, decompressed."""
    with path.open("rb") as raw, _form(path)[1](path, raw) as file:
        return file.read(size)


def shortened(piece: Piece, size: int) -> Piece:
    """Return the beginning of a piece, of about `size` bytes."""
    return piece if len(piece.text) <= size else piece._replace(text=piece.text[: _cut(piece.text[:size])])


def _form(path: Path) -> tuple[str, Opener]:
    """Return the suffix that tells the format, and the function that opens the file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    opener = OPENERS.get(suffixes[-1] if suffixes else "", _open_plain)
    if opener is not _open_plain:
        suffixes.pop()
    return (suffixes[-1] if suffixes else ""), opener


def _is_held_out(text: bytes) -> bool:
    """Whether a document is for validation; equal documents are never in both parts."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") % _HELD_OUT == 0


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield what a stream holds, READ_BYTES at a time."""
    while block := file.read(READ_BYTES):
        yield block


def pieces_of_row(text: bytes, origin: str, place: int) -> Iterator[Piece]:
    """Yield the document of a row in pieces; none if it is empty."""
    yield from _pieces_of(blocks(BytesIO(text)), origin, _is_held_out(text), partial(int, place))


def _pieces_of(
    blocks: Iterable[bytes], origin: str, is_held_out: bool, tell: Callable[[], int]
) -> Iterator[Piece]:
    """Yield one document in pieces."""
    offset, pending = 0, b""
    for block in blocks:
        pending += block
        while len(pending) > PIECE_BYTES:
            size = _cut(pending[:PIECE_BYTES])
            yield Piece(pending[:size], offset == 0, is_held_out, origin, offset, tell())
            offset, pending = offset + size, pending[size:]
    if pending:
        yield Piece(pending, offset == 0, is_held_out, origin, offset, tell())


def _cut(chunk: bytes) -> int:
    """Return where to end a piece: after a word, else between two characters.

    Byte-level tokenizers never join the letters of a word with the white space after it, so tokens of the
    two pieces are those of the whole.
    """
    ends = [match.end() for match in _WORD_END.finditer(chunk, max(0, len(chunk) - _SEARCHED))]
    if ends:
        return ends[-1]
    for start in range(len(chunk) - 1, max(0, len(chunk) - 4), -1):
        if chunk[start] & 0xC0 != 0x80:  # not a byte inside a character of UTF-8
            return start
    return len(chunk)


# compression


Opener = Callable[[Path, IO[bytes]], Any]
"""Opens a stream of the decompressed bytes, as a context manager."""


@contextmanager
def _open_plain(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    yield raw


@contextmanager
def _open_gzip(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        with gzip.GzipFile(fileobj=raw) as file:
            yield file  # type: ignore[misc]  # it is a file of bytes
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .gz file ({error})") from error


@contextmanager
def _open_zstandard(path: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    try:
        import zstandard
    except ImportError as missing:
        raise ImportError(f"{path} needs zstandard, which is not installed; {INSTALL}") from missing
    try:
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as file:
            yield file
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not a whole .zst file ({error})") from error


OPENERS: dict[str, Opener] = {".gz": _open_gzip, ".zst": _open_zstandard}
"""Compressions by suffix."""


# rows


Rows = Iterator[tuple[str, bytes, int]]
"""Origin and text of each document, and the bytes of the file that have been read."""


def _json_lines(path: Path, raw: IO[bytes], file: IO[bytes], column: str) -> Rows:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            origin = f"{path}, line {number}"
            row = parse_json(line, dict[str, Any], origin)
            if text := text_of(row, column, origin):
                yield origin, text, raw.tell()


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream; decompressors cannot iterate over lines themselves."""
    pending = b""
    for block in blocks(file):
        *whole, pending = (pending + block).split(b"\n")
        yield from whole
    yield pending


def _parquet_rows(path: Path, raw: IO[bytes], file: IO[bytes], column: str) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as missing:
        raise ImportError(f"{path} needs pyarrow, which is not installed; {INSTALL}") from missing
    size, number = path.stat().st_size, 0
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        if column not in table.schema_arrow.names:
            raise ValueError(lacks(str(path), column, table.schema_arrow.names))
        for batch in table.iter_batches(batch_size=ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                origin = f"{path}, row {number}"
                if text := text_of({column: value}, column, origin):
                    yield origin, text, size * number // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a whole Parquet file ({reason})") from error


ROW_READERS: dict[str, Callable[[Path, IO[bytes], IO[bytes], str], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet_rows,
}
"""Readers of files that hold several documents, by suffix."""


def text_of(row: dict[str, Any], column: str, origin: str) -> bytes:
    """Return the text of a row in UTF-8, empty if it is null; raise ValueError if there is none."""
    if column not in row:
        raise ValueError(lacks(origin, column, list(row)))
    text = row[column]
    if not isinstance(text, str | None):
        raise ValueError(f"{origin} must have text in {column!r}, got {type(text).__name__}")
    return (text or "").encode("utf-8", "surrogatepass")


def lacks(origin: str, column: str, names: list[str]) -> str:
    """Return the message for rows without the text's column."""
    more = ", ..." if len(names) > SHOWN_KEYS else ""
    return (
        f"{origin} must have text in {column!r}, got {', '.join(names[:SHOWN_KEYS]) or 'nothing'}{more}; "
        "task.text_column names another"
    )
