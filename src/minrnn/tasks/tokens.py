"""Text as token ids on disk: tokenised once, in chunks, and memory-mapped; so a corpus may exceed memory.

One entry of the cache is a folder, `tokens/<corpus>/<state>`, with `tokens.bin` (ids, training then
validation) and `tokens.json`. It appears whole, by renaming, and never changes: a corpus whose files changed
has another <state>, and its earlier entry is removed.
"""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.sources import Corpus
from minrnn.tasks.vocabulary import VOCABULARIES, Vocabulary

FORMAT_VERSION = 1  # part of every entry's name: an entry of another version is not found
_UNFINISHED = ".building-"  # starts the names of folders that are being written


@dataclass(frozen=True)
class TokenisedCorpus:
    """A corpus as token ids, mapped from disk."""

    vocabulary: Vocabulary

    train: NDArray[np.unsignedinteger]
    """Ids to train on, (N,), read-only."""

    val: NDArray[np.unsignedinteger]
    """Ids to validate on, (M,), read-only."""

    sha256: str
    """Digest of the ids, the vocabulary and the parts: tells one state of a corpus from another."""


def tokenise(corpus: Corpus, vocabulary: str | Vocabulary) -> TokenisedCorpus:
    """Return the ids of `corpus`, from the cache unless a file changed (path, size, or time of a change).

    Args:
        corpus: the files to read.
        vocabulary: a name in VOCABULARIES, to learn it from all files; or a vocabulary to use.

    Raises:
        ValueError: the corpus is empty, is not UTF-8 (characters only), or holds characters without a token.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    state = [_file_state(file) for file in corpus.files]
    if not any(size for _, size, *_ in state):
        raise ValueError(
            f"tokenise: source {corpus.name!r} must hold text, got an empty file: {corpus.origin}"
        )
    wanted = vocabulary if isinstance(vocabulary, str) else vocabulary.to_dict()
    shelf = cache_folder() / "tokens" / _digest([FORMAT_VERSION, str(corpus.origin), corpus.name, wanted])
    entry = shelf / _digest([len(corpus.train), state])
    if (found := _load(entry)) is None:
        learnt = VOCABULARIES[vocabulary].learn(corpus.files) if isinstance(vocabulary, str) else vocabulary
        _write_entry(entry, corpus, learnt)
        found = _load(entry)
        assert found is not None, f"{entry} was just written"
    return found


def _file_state(file: Path) -> tuple[str, int, int, int]:
    """Return what changes when the file does; the time of the last status change betrays a restored mtime."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def _load(entry: Path) -> TokenisedCorpus | None:
    """Map the entry's files; None when it is not there, or was cut by a crash of the machine."""
    try:
        header = json.loads((entry / "tokens.json").read_text(encoding="utf-8"))
        vocabulary = Vocabulary.from_dict(header["vocabulary"])
        ids = np.asarray(np.memmap(entry / "tokens.bin", _stored(vocabulary), mode="r"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: cut JSON, or empty tokens.bin
        return None
    num_train, num_val = header["num_train"], header["num_val"]
    if ids.size != num_train + num_val:
        return None
    return TokenisedCorpus(vocabulary, ids[:num_train], ids[num_train:], header["sha256"])


def _write_entry(entry: Path, corpus: Corpus, vocabulary: Vocabulary) -> None:
    """Write the entry beside its final place, rename it, and remove those of the corpus's earlier states."""
    shelf = entry.parent
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=shelf, prefix=_UNFINISHED) as building:
            _write_files(Path(building), corpus, vocabulary)
            shutil.rmtree(entry, ignore_errors=True)  # there only when _load refused it
            Path(building).rename(entry)
    except OSError as error:
        if _load(entry) is None:  # otherwise another process was faster, and its entry is as good
            raise OSError(
                f"tokenise: cannot write the tokens of {corpus.name!r} to {shelf}: {error} (MINRNN_CACHE "
                "can name another folder)"
            ) from error
    for earlier in shelf.iterdir():
        if earlier != entry and not earlier.name.startswith(_UNFINISHED):
            shutil.rmtree(earlier, ignore_errors=True)  # some systems refuse while another run has it open


def _write_files(folder: Path, corpus: Corpus, vocabulary: Vocabulary) -> None:
    sha256 = hashlib.sha256()
    with (folder / "tokens.bin").open("wb") as output:
        num_train, num_val = (
            sum(_append(output, sha256, file, vocabulary) for file in files)
            for files in (corpus.train, corpus.val)
        )
    if not corpus.val:
        num_tokens = num_train
        num_train = num_tokens * 9 // 10
        num_val = num_tokens - num_train
    header = {"vocabulary": vocabulary.to_dict(), "num_train": num_train, "num_val": num_val}
    sha256.update(json.dumps(header).encode())
    digest = {"sha256": sha256.hexdigest()}
    (folder / "tokens.json").write_text(json.dumps(header | digest), encoding="utf-8")


def _append(output: BinaryIO, sha256: "hashlib._Hash", file: Path, vocabulary: Vocabulary) -> int:
    """Append the ids of `file` to `output`, and return how many they are."""
    num_tokens = 0
    for ids in vocabulary.encode_file(file):
        stored = ids.astype(_stored(vocabulary)).tobytes()
        output.write(stored)
        sha256.update(stored)
        num_tokens += ids.size
    return num_tokens


def _stored(vocabulary: Vocabulary) -> np.dtype:
    """Return how ids lie on disk: little-endian everywhere, so that the digest is the same everywhere."""
    return vocabulary.dtype.newbyteorder("<")
