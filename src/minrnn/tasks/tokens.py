"""Text as token ids on disk: tokenized once, in chunks, and memory-mapped; so a corpus may exceed memory.

One entry of the cache is a folder, `tokens/<corpus>/<state>`, with `tokens.bin` (ids, training then
validation), `tokens.json` and `checked.json`. It appears whole, by renaming, and never changes: a corpus
whose files changed has another <state>, and its earlier entry is removed.

An entry is used if its digest is right. Hashing takes a second a GB or several, so it is done once:
`checked.json` keeps size, inode and times of the two files that were found whole, and only where these differ
(whoever changes a byte in place changes them, and so does copying) the digest is computed again. Whatever is
wrong with an entry, be it cut, altered or unreadable, it is made anew.

A folder of the cache is as open as the one that holds it, and its files likewise: where MINRNN_CACHE is a
folder that several users may write into, what one has made serves all, unless the text is not for all to
read.
"""

import hashlib
import json
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
from numpy.typing import NDArray

from minrnn.files import lock, read_json
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.sources import Corpus
from minrnn.tasks.vocabulary import VOCABULARIES, Vocabulary

FORMAT_VERSION = 1  # part of every entry's name: an entry of another version is not found
_UNFINISHED = ".building-"  # starts the names of folders that are being written
_LOCK = ".lock"  # ends the name of what is locked while such a folder is written
_IDS, _HEADER, _CHECKED = "tokens.bin", "tokens.json", "checked.json"
_BLOCK_BYTES = 1 << 20  # read at once


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus as token ids, mapped from disk."""

    vocabulary: Vocabulary

    train: NDArray[np.unsignedinteger]
    """Ids to train on, (N,), read-only."""

    val: NDArray[np.unsignedinteger]
    """Ids to validate on, (M,), read-only."""

    sha256: str
    """Digest of the ids, the vocabulary and the parts: tells one state of a corpus from another."""


def tokenize(corpus: Corpus, vocabulary: str | Vocabulary) -> TokenizedCorpus:
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
            f"tokenize: source {corpus.name!r} must hold text, got an empty file: {corpus.origin}"
        )
    wanted = vocabulary if isinstance(vocabulary, str) else vocabulary.to_dict()
    shelf = cache_folder() / "tokens" / _digest([FORMAT_VERSION, str(corpus.origin), corpus.name, wanted])
    entry = shelf / _digest([len(corpus.train), state])
    if (found := _find(entry)) is None:
        learned = VOCABULARIES[vocabulary].learn(corpus.files) if isinstance(vocabulary, str) else vocabulary
        found = _make(entry, corpus, learned)
    return found


def _file_state(file: Path) -> tuple[str, int, int, int]:
    """Return what changes when the file does; the time of the last status change betrays a restored mtime."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _digest(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


class _Header(TypedDict):
    """What tokens.json holds."""

    vocabulary: dict[str, str]
    num_train: int
    num_val: int
    sha256: str


def _find(entry: Path) -> TokenizedCorpus | None:
    """Return the entry, or one that stands beside what another user has left damaged in its place."""
    for place in (entry, *sorted(entry.parent.glob(f"{entry.name}-*"))):
        if (found := _load(place)) is not None:
            return found
    return None


def _load(entry: Path) -> TokenizedCorpus | None:
    """Map the entry's files; None when it is not there, cannot be read, or is not what was written."""
    try:
        header = read_json(entry / _HEADER, _Header)
        vocabulary = Vocabulary.from_dict(header["vocabulary"])
        dtype, sizes = _stored(vocabulary), (header["num_train"], header["num_val"])
        if min(sizes) < 0 or sum(sizes) * dtype.itemsize != (entry / _IDS).stat().st_size:
            return None
        files = _state_of(entry)
        if not _was_checked(entry, files):
            if header["sha256"] != _hash_entry(entry, header):
                return None
            with suppress(OSError):  # another user's, perhaps: then it is hashed the next time too
                (entry / _CHECKED).write_text(json.dumps(files), encoding="utf-8")
        ids = np.asarray(np.memmap(entry / _IDS, dtype, mode="r"))
    except (OSError, ValueError):
        return None
    return TokenizedCorpus(vocabulary, ids[: sizes[0]], ids[sizes[0] :], header["sha256"])


def _hash_entry(entry: Path, header: _Header) -> str:
    """Return the digest that `_write_files` computed, from what is there now."""
    sha256 = hashlib.sha256()
    with (entry / _IDS).open("rb") as file:  # not the map: what is cut under a map ends the process
        while block := file.read(_BLOCK_BYTES):
            sha256.update(block)
    sha256.update(_described(header["vocabulary"], header["num_train"], header["num_val"]).encode())
    return sha256.hexdigest()


def _described(vocabulary: dict[str, str], num_train: int, num_val: int) -> str:
    return json.dumps({"vocabulary": vocabulary, "num_train": num_train, "num_val": num_val})


def _was_checked(entry: Path, files: list[list[int]]) -> bool:
    """Whether the files are those that were found whole before."""
    try:
        return read_json(entry / _CHECKED, list[list[int]]) == files
    except (OSError, ValueError):
        return False


def _state_of(entry: Path) -> list[list[int]]:
    """Return what changes when one of the entry's files does."""
    found = [(entry / name).stat() for name in (_IDS, _HEADER)]
    return [[each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns] for each in found]


def _make(entry: Path, corpus: Corpus, vocabulary: Vocabulary) -> TokenizedCorpus:
    """Write the entry beside its final place, rename it, and remove those of the corpus's earlier states."""
    shelf = entry.parent
    try:
        _make_folders(shelf)
        _clear_unfinished(shelf.parent)
        with _building(shelf) as building:
            if not _is_public(corpus):
                building.chmod(stat.S_IRWXU)
            _write_files(building, corpus, vocabulary)
            shutil.rmtree(entry, ignore_errors=True)  # there only when _load refused it
            place = entry
            if entry.exists():  # another user's, who alone can remove it
                place = entry.with_name(f"{entry.name}-{secrets.token_hex(4)}")
            with suppress(FileExistsError):
                building.rename(place)
    except OSError as error:
        if (found := _find(entry)) is None:  # otherwise another process was faster: its entry is as good
            raise OSError(
                f"tokenize: cannot write the tokens of {corpus.name!r} to {shelf}: {error} (MINRNN_CACHE "
                "can name another folder)"
            ) from error
        return found
    if (found := _find(entry)) is None:
        raise OSError(f"tokenize: {entry} was just written, and is not what was written; try once more")
    for earlier in shelf.iterdir():
        if not earlier.name.startswith((_UNFINISHED, entry.name)):
            shutil.rmtree(earlier, ignore_errors=True)  # some systems refuse while another run has it open
    return found


def _make_folders(folder: Path) -> None:
    """Make a folder below the cache folder, each as open as the one that holds it."""
    if folder.is_dir():
        return
    if folder == cache_folder() or folder.parent == folder:
        folder.mkdir(parents=True, exist_ok=True)
        return
    _make_folders(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
        _open_like_parent(folder)


def _open_like_parent(path: Path) -> None:
    """Give others what they may do in the folder that holds this path; with a file, at most reading it.

    Whatever the process's umask is: it speaks of a user's own files.
    """
    mode = stat.S_IMODE(path.parent.stat().st_mode)
    if not path.is_dir():
        mode &= 0o644
    with suppress(OSError):  # a file system without modes
        path.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)


def _is_public(corpus: Corpus) -> bool:
    """Whether every user of the machine may read all of a corpus."""
    folders = {folder for file in corpus.files for folder in file.parents}
    may_enter = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
    return may_enter and all(file.stat().st_mode & stat.S_IROTH for file in corpus.files)


@contextmanager
def _building(shelf: Path) -> Iterator[Path]:
    """Make a folder to write into, with a lock beside it while this process lives; removed in the end."""
    folder = shelf / f"{_UNFINISHED}{secrets.token_hex(8)}"
    with lock(_lock_of(folder)):  # before it is there: nobody may take it for a dead one's
        folder.mkdir()
        _open_like_parent(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _clear_unfinished(shelves: Path) -> None:
    """Remove what killed processes have left on all shelves: that nobody holds a lock of."""
    for path in shelves.glob(f"*/{_UNFINISHED}*"):
        folder = path.with_name(path.name.removesuffix(_LOCK))
        unlocked: list[str] = []
        with suppress(OSError), lock(_lock_of(folder), say=unlocked.append):  # refused by a living one
            if not unlocked:  # where there are no locks, it may well be a living one's
                shutil.rmtree(folder, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_LOCK}")


def _write_files(folder: Path, corpus: Corpus, vocabulary: Vocabulary) -> None:
    sha256 = hashlib.sha256()
    with (folder / _IDS).open("wb") as output:
        num_train, num_val = (
            sum(_append(output, sha256, file, vocabulary) for file in files)
            for files in (corpus.train, corpus.val)
        )
    if not corpus.val:
        num_tokens = num_train
        num_train = num_tokens * 9 // 10
        num_val = num_tokens - num_train
    described = _described(vocabulary.to_dict(), num_train, num_val)
    sha256.update(described.encode())
    header = json.loads(described) | {"sha256": sha256.hexdigest()}
    (folder / _HEADER).write_text(json.dumps(header), encoding="utf-8")
    for name in (_IDS, _HEADER):
        _open_like_parent(folder / name)
    (folder / _CHECKED).write_text(json.dumps(_state_of(folder)), encoding="utf-8")
    _open_like_parent(folder / _CHECKED)


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
