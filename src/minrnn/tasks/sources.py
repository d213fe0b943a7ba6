"""Sources of text: this interpreter's standard library, Tiny Shakespeare, or any file or folder.

`SOURCES` names the corpora that need no path. Files of text are split by file, and the documents in files of
rows (JSON Lines, Parquet) by document. One file of text alone is split by tokens, the first nine tenths for
training.
"""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from minrnn.files import nearest
from minrnn.tasks.documents import Documents, Piece, first_block, has_rows, read_pieces, read_text
from minrnn.tasks.downloads import cache_folder, check_digest, download, supplied_file
from minrnn.tasks.hub import PREFIX, find_data_set

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_NAME = "tinyshakespeare.txt"

FILES_PER_VALIDATION_FILE = 10  # one in ten files of a folder is used for validation

# Excluded from the standard library: third-party packages, tests with their fixtures, and generated tables,
# which (encodings, pydoc_data) would be a sixth of the corpus and more than half of a validation part.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")  # differ by machine

# Excluded from a folder of text: folders of these names or with one of these files; see `_is_excluded`.
_NOT_TEXT = {"__pycache__", "node_modules"}
_MARKS = ("pyvenv.cfg", "CACHEDIR.TAG")  # of a virtual environment; of a cache (bford.info/cachedir)
_FIRST_BLOCK = 8192  # a file with a NUL in its first bytes is binary, as for git and grep


@dataclass(frozen=True)
class Corpus:
    """The files of a text in reading order, split into training and validation."""

    name: str
    """The source as given: a name in SOURCES, or a path."""

    origin: Path
    """The file, or the folder of all files."""

    train: tuple[Path, ...]
    """Training files, in reading order."""

    val: tuple[Path, ...] = ()
    """Validation files, in reading order; empty if a single file is split by tokens."""

    rows: tuple[Path, ...] = ()
    """Files of rows, each a document for training or validation, in reading order."""

    left_out: int = 0
    """Number of binary files that were left out."""

    is_joined: bool = False
    """Whether the files are read as they are, end to end, without a mark between documents."""

    column: str = "text"
    """The key or column of the text in files of rows."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files in reading order: training, rows, validation."""
        return self.train + self.rows + self.val

    @property
    def is_split_by_tokens(self) -> bool:
        """Whether there is one file of text only, whose last tenth of tokens is for validation."""
        return not (self.val or self.rows)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each file, compressed if it is."""
        return tuple(file.stat().st_size for file in self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    @property
    def state(self) -> list[object]:
        """Path, size and times of each file, and how they are split."""
        return [len(self.train), len(self.rows), [_file_state(file) for file in self.files]]

    @property
    def is_public(self) -> bool:
        """Whether all files are world-readable."""
        folders = {folder for file in self.files for folder in file.parents}
        may_enter = all(folder.stat().st_mode & stat.S_IXOTH for folder in folders)
        return may_enter and all(file.stat().st_mode & stat.S_IROTH for file in self.files)

    def read(self, index: int) -> Iterator[Piece]:
        """Yield the documents of the file of this index in pieces."""
        path, is_validation = self.files[index], index >= len(self.train) + len(self.rows)
        pieces = read_text(path) if self.is_joined else read_pieces(path, self.column)
        yield from (piece._replace(is_held_out=True) for piece in pieces) if is_validation else pieces


def find_corpus(source: str, *, is_joined: bool = False, column: str = "text") -> Documents:
    """Return the corpus that `source` names.

    A folder is read recursively, without hidden files (their name begins with a dot), binary files (a NUL
    byte at the beginning), run directories and checkpoints, MINRNN_CACHE, virtual environments, node_modules
    and caches. Links out of the folder are followed; each file is read once, however many links lead to it.

    Args:
        source: a name in SOURCES, hf://datasets/NAME for a data set of the Hugging Face hub, or the path of a
            file or folder (./python for a folder named python).
        is_joined: read every file as it is; otherwise JSON Lines and Parquet are read by row, and .gz and
            .zst are decompressed.
        column: the key or column of the text in files of rows.

    Raises:
        ValueError: there is no such source, file or folder, or the folder holds no text.
        OSError: the source cannot be downloaded.
    """
    if source.startswith(PREFIX):
        return find_data_set(source, is_joined=is_joined, column=column)
    path = Path(source).expanduser()
    if source in SOURCES:
        return replace(SOURCES[source](), is_joined=is_joined)
    if path.is_file():
        found = _of_files(source, path.resolve(), [path.resolve()], is_joined)
        return replace(found, is_joined=is_joined, column=column)
    if path.is_dir():
        return replace(_text_corpus(source, path.resolve(), is_joined), is_joined=is_joined, column=column)
    hint = nearest(source, SOURCES) or "; check the path"
    raise ValueError(
        f"find_corpus: source must be {', '.join(map(repr, SOURCES))}, {PREFIX}NAME, or an existing file or "
        f"folder, got {source!r}{hint}"
    )


def python_corpus() -> Corpus:
    """Return the Python files of this interpreter's standard library, about 10 MB without a download.

    Third-party packages, tests, generated tables and machine-specific files are left out, so the corpus
    depends on the Python version (and on the parts that a distribution ships), not on installed packages. One
    file in ten is used for validation, selected by a hash of its relative path.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = _with_content("python", library, _walk_library(library), "Python files")
    return _of_files("python", library, files)


def shakespeare_corpus() -> Corpus:
    """Return Tiny Shakespeare (Karpathy, char-rnn): 1,003,854 training and 111,540 validation characters."""
    file = fetch_shakespeare()
    return Corpus("shakespeare", file, (file,))


def fetch_shakespeare(url: str | None = None) -> Path:
    """Return the path of Tiny Shakespeare, downloaded once.

    The file is tinyshakespeare.txt in the folder MINRNN_DATA or in the cache folder; otherwise it is
    downloaded to the cache folder.

    Args:
        url: address to download from; by default MINRNN_SHAKESPEARE_URL if set, else the original.

    Raises:
        ValueError: the SHA-256 of the file differs; a download is not kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    if supplied := supplied_file(SHAKESPEARE_NAME):
        check_digest("fetch_shakespeare", supplied, SHAKESPEARE_SHA256, "Tiny Shakespeare")
        return supplied
    url = url or os.environ.get("MINRNN_SHAKESPEARE_URL") or SHAKESPEARE_URL
    return download("fetch_shakespeare", url, SHAKESPEARE_NAME, sha256=SHAKESPEARE_SHA256)


SOURCES: dict[str, Callable[[], Corpus]] = {"python": python_corpus, "shakespeare": shakespeare_corpus}


def _text_corpus(source: str, folder: Path, is_joined: bool) -> Corpus:
    found = list(_walk_text(folder))
    texts = [file for file in found if not _is_binary(file, is_joined)]
    files = _with_content(source, folder, texts, "visible files of text")
    return replace(_of_files(source, folder, files, is_joined), left_out=len(found) - len(texts))


def _with_content(name: str, folder: Path, found: Iterable[Path], what: str) -> list[Path]:
    """Return the files that are not empty, sorted; an empty one could be the only validation file."""
    whole = [file for file in found if file.is_file() and file.stat().st_size]  # not sockets, dead links
    if not whole:
        raise ValueError(
            f"find_corpus: source {name!r} must hold text, got no {what} with content in {folder}"
        )
    return sorted(whole, key=lambda file: file.relative_to(folder).as_posix())


def _of_files(name: str, origin: Path, files: list[Path], is_joined: bool = True) -> Corpus:
    """Return the files as a corpus; of text, the tenth with the smallest hashes of their paths validates.

    The hash spreads each folder over both parts, is the same on every machine, and moves few files between
    the parts when files are added.
    """
    rows = tuple(file for file in files if not is_joined and has_rows(file))
    texts = [file for file in files if is_joined or not has_rows(file)]
    if len(texts) == 1 and not rows:
        return Corpus(name, origin, tuple(texts))
    ranked = sorted(texts, key=lambda file: _path_hash(file.relative_to(origin)))
    held_out = set(ranked[: max(not rows, len(texts) // FILES_PER_VALIDATION_FILE)])
    train = tuple(file for file in texts if file not in held_out)
    return Corpus(name, origin, train, tuple(file for file in texts if file in held_out), rows)


def _walk_library(library: Path) -> Iterator[Path]:
    """Yield the library's Python files, without excluded folders and files."""

    def keep(name: str) -> bool:
        return name not in _NOT_LIBRARY and not name.startswith(_NOT_LIBRARY_PREFIXES)

    for parent, folders, names in os.walk(library, onerror=_raise):  # errors are ignored by default
        folders[:] = filter(keep, folders)  # os.walk descends into these only
        yield from (Path(parent, name) for name in filter(keep, names) if name.endswith(".py"))


def _walk_text(top: Path) -> Iterator[Path]:
    """Yield the files below a folder that are not excluded, each once; see `find_corpus`."""
    met: set[tuple[int, int]] = set()
    pending = [top]
    while pending:  # links last, so that a file is found at its own path before a link to it
        path = pending.pop(0)
        if path is top or _is_followed(path, top):
            yield from _walk_unlinked(path, pending, met)


def _is_followed(link: Path, top: Path) -> bool:
    """Whether to follow a link: its target exists, is not excluded and is not a parent of the folder."""
    return link.exists() and not top.is_relative_to(link.resolve()) and not _is_excluded(link)


def _walk_unlinked(path: Path, links: list[Path], met: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield a file, or the files below a folder, that are not in `met`; append links below it to `links`."""
    if _identity(path) in met:
        return
    met.add(_identity(path))
    if path.is_file():
        yield path
    elif path.is_dir():
        for inside in sorted(path.iterdir()):
            if inside.is_symlink():
                links.append(inside)
            elif not _is_excluded(inside):
                yield from _walk_unlinked(inside, links, met)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_excluded(path: Path) -> bool:
    """Whether a path is hidden, a file of tensors, or a folder of a cache, environment, run or checkpoint."""
    if path.name.startswith(".") or path.name in _NOT_TEXT or path.suffix == ".safetensors":
        return True
    if not path.is_dir():
        return False
    names = {each.name for each in path.iterdir()}
    is_ours = "config.json" in names and names & {"checkpoints", "metrics.jsonl", "model.safetensors"}
    return bool(is_ours or names & set(_MARKS)) or path.resolve() == cache_folder().resolve()


def _is_binary(file: Path, is_joined: bool) -> bool:
    if not is_joined:
        return not has_rows(file) and b"\0" in first_block(file, _FIRST_BLOCK)
    with file.open("rb") as opened:
        return b"\0" in opened.read(_FIRST_BLOCK)


def _file_state(file: Path) -> tuple[str, int, int, int]:
    """Return path, size and times of a file; ctime changes even if mtime was restored."""
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _raise(error: OSError) -> None:
    raise error


def _path_hash(relative: Path) -> bytes:
    return hashlib.sha256(os.fsencode(relative.as_posix())).digest()
