"""Token ids of a text on disk: tokenized once and memory-mapped, so that a corpus may exceed memory.

A cache entry is a folder, `tokens/<corpus>/<state>`, with `tokens.bin` (ids, training then validation),
`tokens.json` and `checked.json`. It is created by a rename and never changes: if the corpus's files change,
<state> does, and the earlier entry is removed. Until the rename the folder is `.building-<state>`, with a
lock: other processes wait for it, and after a kill the next one continues it.

An entry is valid if its digest is. Hashing takes a second or more per GB, so it is done once: `checked.json`
keeps the size, inode and times of the two verified files, and the digest is computed again only if these
differ (as they do after a change in place or a copy). An invalid entry, whatever the reason, is rebuilt.

Folders and files of the cache inherit the permissions of their parent folder. If several users may write to
MINRNN_CACHE, they share its entries, except those of texts that are not world-readable.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from minrnn.files import InUseError, lock, read_json
from minrnn.tasks.documents import Documents
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.hub import UnreachableError
from minrnn.tasks.tokenizing import IDS, PROGRESS, blocks_of, stored_type, write_tokens
from minrnn.tasks.vocabulary import Vocabulary

FORMAT_VERSION = 2  # part of an entry's name, so that entries of other versions are ignored
KEPT_DAYS = 7
"""Days after which what a killed call left is removed, if no other call has continued it."""
_UNFINISHED = ".building-"  # prefix of folders that are being written
_LOCK = ".lock"  # suffix of the lock file of such a folder
_HEADER, _CHECKED = "tokens.json", "checked.json"
_SILENT_WAIT, _LONGEST_WAIT = 1.0, 7 * 86400.0  # seconds that another process is waited for


@dataclass(frozen=True)
class TokenizedCorpus:
    """The token ids of a corpus, memory-mapped."""

    vocabulary: Vocabulary

    train: NDArray[np.unsignedinteger]
    """Ids to train on, (N,), read-only."""

    val: NDArray[np.unsignedinteger]
    """Ids to validate on, (M,), read-only."""

    sha256: str
    """Digest of the ids, the vocabulary and the split."""


def tokenize(corpus: Documents, vocabulary: str | Vocabulary, vocab_size: int = 0) -> TokenizedCorpus:
    """Return the token ids of a corpus, cached unless one of its files changed (path, size or times).

    Where the vocabulary has an end of text, it stands before each document and at the end of each part.

    Args:
        corpus: the documents.
        vocabulary: a name in VOCABULARIES, which is learned from the documents; or a vocabulary, with an end
            of text unless the corpus is joined.
        vocab_size: most tokens of subwords that are learned.

    Raises:
        ValueError: the corpus is empty, is not UTF-8 (which bytes need not be), or has characters
            without a token.
        OSError: a file cannot be read, the hub cannot be reached, or the cache cannot be written.
    """
    if isinstance(vocabulary, Vocabulary) and vocabulary.is_marked == corpus.is_joined:
        raise ValueError(
            "tokenize: vocabulary must have an end of text, and none for a joined corpus, got one "
            f"{'with' if vocabulary.is_marked else 'without'}"
        )
    wanted = vocabulary if isinstance(vocabulary, str) else vocabulary.to_dict()
    read_as = corpus.is_joined, corpus.column
    named = [FORMAT_VERSION, str(corpus.origin), corpus.name, read_as, wanted, vocab_size]
    entry = cache_folder() / "tokens" / _digest(named) / _digest(corpus.state)
    if (found := _find(entry)) is not None:
        return found
    if not corpus.size:
        raise ValueError(
            f"tokenize: source {corpus.name!r} must hold text, got an empty file: {corpus.origin}"
        )
    return _make(entry, corpus, vocabulary, vocab_size)


def _digest(described: object) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


class _Header(TypedDict):
    """Content of tokens.json."""

    vocabulary: dict[str, str]
    num_train: int
    num_val: int
    sha256: str


def _find(entry: Path) -> TokenizedCorpus | None:
    """Return the entry, or its replacement with another suffix if another user's entry is damaged."""
    for place in (entry, *sorted(entry.parent.glob(f"{entry.name}-*"))):
        if (found := _load(place)) is not None:
            return found
    return None


def _load(entry: Path) -> TokenizedCorpus | None:
    """Memory-map an entry; return None if it is missing, unreadable or damaged."""
    try:
        header = read_json(entry / _HEADER, _Header)
        vocabulary = Vocabulary.from_dict(header["vocabulary"], entry)
        dtype, sizes = stored_type(vocabulary), (header["num_train"], header["num_val"])
        if min(sizes) < 0 or sum(sizes) * dtype.itemsize != (entry / IDS).stat().st_size:
            return None
        files = _state_of(entry)
        if not _was_checked(entry, files):
            if header["sha256"] != _hash_entry(entry, header):
                return None
            with suppress(OSError):  # not writable: the digest is computed again next time
                (entry / _CHECKED).write_text(json.dumps(files), encoding="utf-8")
        ids = np.asarray(np.memmap(entry / IDS, dtype, mode="r"))
    except (OSError, ValueError):
        return None
    parts = ids[: sizes[0]], ids[sizes[0] :]
    return TokenizedCorpus(vocabulary, *parts, header["sha256"])


def _hash_entry(entry: Path, header: _Header) -> str:
    """Compute the digest of an entry as `_write_files` does."""
    sha256 = hashlib.sha256()
    for block in blocks_of(entry / IDS):  # not the map: truncating a mapped file kills the process
        sha256.update(block)
    sha256.update(_described(header["vocabulary"], header["num_train"], header["num_val"]).encode())
    return sha256.hexdigest()


def _described(vocabulary: dict[str, str], num_train: int, num_val: int) -> str:
    return json.dumps({"vocabulary": vocabulary, "num_train": num_train, "num_val": num_val})


def _was_checked(entry: Path, files: list[list[int]]) -> bool:
    """Whether the files are unchanged since they were verified."""
    try:
        return read_json(entry / _CHECKED, list[list[int]]) == files
    except (OSError, ValueError):
        return False


def _state_of(entry: Path) -> list[list[int]]:
    """Return inode, size and times of an entry's files."""
    found = [(entry / name).stat() for name in (IDS, _HEADER)]
    return [[each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns] for each in found]


def _make(entry: Path, corpus: Documents, vocabulary: str | Vocabulary, vocab_size: int) -> TokenizedCorpus:
    """Write an entry, rename it into place, and remove the entries of earlier states of the corpus."""
    shelf = entry.parent
    try:
        _make_folders(shelf)
        _clear_unfinished(entry)
        with _building(entry) as building:
            if (found := _find(entry)) is not None:  # another process has written it meanwhile
                return found
            if not corpus.is_public:
                building.chmod(stat.S_IRWXU)
            _write_files(building, corpus, vocabulary, vocab_size)
            shutil.rmtree(entry, ignore_errors=True)  # exists only if it is invalid
            place = entry
            if entry.exists():  # owned by another user
                place = entry.with_name(f"{entry.name}-{secrets.token_hex(4)}")
            with suppress(FileExistsError):
                building.rename(place)
            shutil.rmtree(building, ignore_errors=True)  # exists only if another place appeared meanwhile
    except UnreachableError:
        raise
    except OSError as error:
        if (found := _find(entry)) is None:  # otherwise another process has written it
            reason = error.strerror if error.filename is None and error.strerror else error
            raise OSError(
                f"tokenize: cannot write the tokens of {corpus.name!r} to {shelf}: {reason} (MINRNN_CACHE "
                "can name another folder)"
            ) from error
        return found
    if (found := _find(entry)) is None:
        raise OSError(f"tokenize: {entry} was damaged right after it was written; try again")
    for earlier in shelf.iterdir():
        if not earlier.name.startswith((_UNFINISHED, entry.name)):
            shutil.rmtree(earlier, ignore_errors=True)  # may fail while another run has it open
    return found


def _make_folders(folder: Path) -> None:
    """Create a folder below the cache folder; each new folder inherits its parent's permissions."""
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
    """Set the permissions of the parent folder, for a file without writing; the umask is ignored."""
    mode = stat.S_IMODE(path.parent.stat().st_mode)
    if not path.is_dir():
        mode &= 0o644
    with suppress(OSError):  # a file system without permissions
        path.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)


@contextmanager
def _building(entry: Path) -> Iterator[Path]:
    """Lock a folder for the block: that of an interrupted call with this entry, or a new one.

    It is kept where the block is interrupted, and removed where the corpus cannot be encoded. Where it cannot
    be locked, or is another user's, the folder has a name of its own, and is always removed.
    """
    shared = entry.with_name(f"{_UNFINISHED}{entry.name}")
    unlocked: list[str] = []
    with _waiting(_lock_of(shared), unlocked.append):
        if unlocked or not _is_own(shared):
            with _building_alone(entry.parent) as folder:
                yield folder
            return
        if not shared.exists():
            shared.mkdir()
            _open_like_parent(shared)
        try:
            yield shared
        except ValueError:
            shutil.rmtree(shared, ignore_errors=True)
            raise


@contextmanager
def _building_alone(shelf: Path) -> Iterator[Path]:
    """Create a locked temporary folder for the block, and remove it at the end."""
    folder = shelf / f"{_UNFINISHED}{secrets.token_hex(8)}"
    with lock(_lock_of(folder)):  # before the folder exists, so that it never looks abandoned
        folder.mkdir()
        _open_like_parent(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _waiting(path: Path, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a lock file while the block runs; wait for another process, and tell so on stderr."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(path, wait=_SILENT_WAIT, say=say))
        except InUseError as error:
            print(
                f"waiting: the same text is being tokenized ({error.strerror})", file=sys.stderr, flush=True
            )
            stack.enter_context(lock(path, wait=_LONGEST_WAIT, say=say))
        yield


def _is_own(folder: Path) -> bool:
    """Whether a folder does not exist or is this user's."""
    return not folder.exists() or not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()


def _clear_unfinished(entry: Path) -> None:
    """Remove what killed processes left, except this entry's and recent ones of other corpora.

    A folder whose lock is not free is in use.
    """
    for path in entry.parent.parent.glob(f"*/{_UNFINISHED}*"):
        folder = path.with_name(path.name.removesuffix(_LOCK))
        is_this = folder == entry.with_name(f"{_UNFINISHED}{entry.name}")
        if is_this or (folder.parent != entry.parent and _is_recent(folder)):
            continue
        unlocked: list[str] = []
        with suppress(OSError), lock(_lock_of(folder), say=unlocked.append):  # InUseError: still in use
            if not unlocked:  # without locks it may still be in use
                shutil.rmtree(folder, ignore_errors=True)


def _is_recent(folder: Path) -> bool:
    """Whether a killed call committed something here in the last KEPT_DAYS."""
    try:
        return time.time() - (folder / PROGRESS).stat().st_mtime < KEPT_DAYS * 86400
    except OSError:
        return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}{_LOCK}")


def _write_files(folder: Path, corpus: Documents, vocabulary: str | Vocabulary, vocab_size: int) -> None:
    tokens = write_tokens(folder, corpus, vocabulary, vocab_size)
    described = _described(tokens.vocabulary.to_dict(), tokens.num_train, tokens.num_val)
    tokens.sha256.update(described.encode())
    header = json.loads(described) | {"sha256": tokens.sha256.hexdigest()}
    (folder / _HEADER).write_text(json.dumps(header), encoding="utf-8")
    for name in (IDS, _HEADER, *tokens.vocabulary.files):
        _open_like_parent(folder / name)
    (folder / _CHECKED).write_text(json.dumps(_state_of(folder)), encoding="utf-8")
    _open_like_parent(folder / _CHECKED)
