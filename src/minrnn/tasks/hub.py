"""Documents of the Hugging Face hub's data sets, by name: streamed, so that only tokens are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minrnn.tasks.documents import Piece, lacks, pieces_of_row, text_of

PREFIX = "hf://datasets/"
"""What names of data sets begin with, as in the package datasets."""

INSTALL = "install it with pip install 'minrnn[datasets]'"

TRAINING, VALIDATION = "train", "validation"
"""The splits that are read. Without the second, one document in ten of the first is for validation."""

_FORM = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@]+))?(?::(?P<config>[^:]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class UnreachableError(OSError):
    """The hub did not answer, or did not deliver a file."""


@dataclass(frozen=True)
class _Shard:
    """A part of a split that is read by itself, such as a file."""

    split: str
    index: int
    count: int
    """Shards of the split."""
    size: int
    """Bytes, about."""


@dataclass(frozen=True)
class DataSet:
    """The documents of a data set on the Hugging Face hub, in the order that it has there.

    Args:
        name: the source as given.
        repository: the data set's name on the hub.
        revision: a commit, branch or tag; None for the newest.
        config: the subset's name; None for the only one, or the default.
        column: the column of the text.
        is_joined: whether there is no mark between documents.
    """

    name: str
    repository: str
    revision: str | None
    config: str | None
    column: str
    is_joined: bool

    left_out = 0
    is_split_by_tokens = False
    is_public = False
    """It may be private on the hub, so its tokens are for this user only."""

    @property
    def origin(self) -> str:
        """The data set and its subset."""
        return f"{PREFIX}{self.repository}:{self.config or ''}"

    @cached_property
    def state(self) -> list[object]:
        """The commit, on which the documents depend. Nothing is asked if the source names it."""
        if self.revision is not None and _COMMIT.fullmatch(self.revision):
            return [self.revision]
        return [self._builder.hash]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each shard, about."""
        return tuple(shard.size for shard in self._shards)

    @property
    def size(self) -> int:
        """Bytes of all shards, about."""
        return sum(self.sizes)

    def read(self, index: int) -> Iterator[Piece]:
        """Yield the documents of the shard of this index in pieces."""
        shard, done = self._shards[index], 0
        own_split = VALIDATION in self._splits
        for number, row in enumerate(self._rows(shard), 1):
            origin = f"{self.name}, {shard.split}, shard {shard.index + 1}, row {number}"
            text = text_of(row, self.column, origin)
            done += len(text)
            for piece in pieces_of_row(text, origin, min(done, shard.size)):
                yield piece._replace(is_held_out=shard.split == VALIDATION) if own_split else piece

    def _rows(self, shard: _Shard) -> Iterator[dict[str, Any]]:
        stream = self._splits[shard.split]
        with _in_one_line(self.name):
            stream = stream.select_columns([self.column])
            yield from stream.shard(num_shards=shard.count, index=shard.index)

    @cached_property
    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as missing:
            raise ImportError(f"{self.name} needs datasets, which is not installed; {INSTALL}") from missing
        with _in_one_line(self.name):
            path = PREFIX + self.repository
            return datasets.load_dataset_builder(path, self.config, revision=self.revision)

    @cached_property
    def _splits(self) -> dict[str, Any]:
        """The streams of the splits that are read."""
        builder = self._builder
        with _in_one_line(self.name):
            found = builder.as_streaming_dataset()
            if TRAINING not in found:
                raise ValueError(f"it has no split {TRAINING!r}, but {', '.join(map(repr, found))}")
        splits = {split: found[split] for split in (TRAINING, VALIDATION) if split in found}
        for split, stream in splits.items():
            columns = stream.column_names
            if columns is None:  # known from the first rows only
                with _in_one_line(self.name):
                    columns = list(next(iter(stream), {}))
            if self.column not in columns:
                raise ValueError(lacks(f"{self.name}, {split},", self.column, columns))
        return splits

    @cached_property
    def _shards(self) -> tuple[_Shard, ...]:
        return tuple(
            _Shard(split, index, stream.num_shards, -(-size // stream.num_shards))
            for split, stream in self._splits.items()
            for size in [self._split_size(split)]
            for index in range(stream.num_shards)
        )

    def _split_size(self, split: str) -> int:
        """Return the bytes that the data set's card states, else those of its files."""
        stated = (self._builder.info.splits or {}).get(split)
        if stated is not None and stated.num_bytes:
            return int(stated.num_bytes)
        from huggingface_hub import HfFileSystem

        files = HfFileSystem()
        with _in_one_line(self.name):
            return sum(files.info(path)["size"] for path in self._builder.config.data_files[split])


def find_data_set(source: str, *, is_joined: bool, column: str) -> DataSet:
    """Return the data set that `source` names: hf://datasets/NAME[@REVISION][:CONFIG].

    Raises:
        ValueError: it is not of this form. What the hub does not have is noticed when it is read.
    """
    match = _FORM.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise ValueError(
            f"find_corpus: source must be {PREFIX}NAME, with @REVISION and :CONFIG after it where wanted, "
            f"got {source!r}"
        )
    return DataSet(source, match["name"], match["revision"], match["config"], column, is_joined)


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """Turn the errors of the package datasets into a line each: what is wrong there, or out of reach."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    try:
        yield
    except (FileNotFoundError, DatasetsError, ValueError, RuntimeError) as error:
        raise ValueError(f"find_corpus: {name!r} cannot be read: {_line(error)}") from error
    except (OSError, httpx.HTTPError) as error:
        raise UnreachableError(f"{name!r} cannot be reached: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
