"""Where text comes from: this interpreter's own source, Tiny Shakespeare, or any file or folder.

`SOURCES` names the corpora that need no path. A corpus of one file is divided by its tokens, the first nine
tenths for training; a corpus of many files is divided by file, and each serves one part only.
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from minrnn.files import nearest
from minrnn.tasks.downloads import cache_folder, check_digest, download, supplied_file

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_NAME = "tinyshakespeare.txt"

FILES_PER_VALIDATION_FILE = 10  # of the files of a folder, one in ten validates

# Not the library's own code: other people's packages, tests with their fixtures, and generated tables, which
# alone (encodings, pydoc_data) would be a sixth of the corpus and more than half of a validation part.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")  # differ by machine

# What a folder of text holds beside it, and nobody means to learn: folders of these names or with one of
# these files, whatever else is in them; see also `_is_excluded`.
_NOT_TEXT = {"__pycache__", "node_modules"}
_MARKS = ("pyvenv.cfg", "CACHEDIR.TAG")  # a virtual environment's; a cache's, by bford.info/cachedir
_FIRST_BLOCK = 8192  # bytes, in which a file with a NUL is taken for binary, as by git and grep


@dataclass(frozen=True)
class Corpus:
    """The files of a text in reading order, and which of them validate."""

    name: str
    """What the user asked for: a name in SOURCES, or a path."""

    origin: Path
    """The file, or the folder that holds all files."""

    train: tuple[Path, ...]
    """Files to train on, in reading order."""

    val: tuple[Path, ...] = ()
    """Files to validate on, in reading order; empty when the last tenth of the only file validates."""

    left_out: int = 0
    """Binary files that were met, and are no part of it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: training, then validation."""
        return self.train + self.val


def find_corpus(source: str) -> Corpus:
    """Return the corpus that `source` names.

    Of a folder all files below it are read, but for what is hidden (its name begins with a dot), binary (a
    NUL byte at its beginning), and folders that hold no text of the user's: run directories and checkpoints,
    MINRNN_CACHE, virtual environments, node_modules, and caches. A link is followed where it leads out of the
    folder, once, however many lead there; what lies in the folder is read at its own place.

    Args:
        source: a name in SOURCES, or the path of a file or a folder (./python for one called python).

    Raises:
        ValueError: there is no such source, file or folder, or the folder holds no text.
        OSError: the source must be downloaded and cannot be.
    """
    if source in SOURCES:
        return SOURCES[source]()
    path = Path(source).expanduser()
    if path.is_file():
        return Corpus(source, path.resolve(), (path.resolve(),))
    if path.is_dir():
        return _text_corpus(source, path.resolve())
    hint = nearest(source, SOURCES) or "; check the path"
    raise ValueError(
        f"find_corpus: source must be {', '.join(map(repr, SOURCES))}, or an existing file or folder, got "
        f"{source!r}{hint}"
    )


def python_corpus() -> Corpus:
    """Return the Python files of this interpreter's standard library, about 10 MB that need no download.

    Third-party packages, tests, generated tables and files that differ by machine are left out, so the corpus
    depends on the Python version (and on which parts a distribution ships), not on what is installed. One
    file in ten validates, chosen by a hash of its relative path.
    """
    library = Path(sysconfig.get_path("stdlib"))
    return _split_by_file("python", library, _walk_library(library), "Python files")


def shakespeare_corpus() -> Corpus:
    """Return Tiny Shakespeare (Karpathy, char-rnn): 1,003,854 characters to train on, 111,540 to validate."""
    file = fetch_shakespeare()
    return Corpus("shakespeare", file, (file,))


def fetch_shakespeare(url: str | None = None) -> Path:
    """Return the path of Tiny Shakespeare, downloaded once.

    Looked for as tinyshakespeare.txt in the folder that MINRNN_DATA names, then in the cache folder;
    downloaded into the latter otherwise.

    Args:
        url: where to download from; by default MINRNN_SHAKESPEARE_URL where that is set, else the original.

    Raises:
        ValueError: the file found or downloaded is another (its SHA-256 differs); a download is not kept.
        OSError: the download failed; the message says where to put the file by hand.
    """
    if supplied := supplied_file(SHAKESPEARE_NAME):
        check_digest("fetch_shakespeare", supplied, SHAKESPEARE_SHA256, "Tiny Shakespeare")
        return supplied
    url = url or os.environ.get("MINRNN_SHAKESPEARE_URL") or SHAKESPEARE_URL
    return download("fetch_shakespeare", url, SHAKESPEARE_NAME, sha256=SHAKESPEARE_SHA256)


SOURCES: dict[str, Callable[[], Corpus]] = {"python": python_corpus, "shakespeare": shakespeare_corpus}


def _text_corpus(source: str, folder: Path) -> Corpus:
    files = list(_walk_text(folder))
    texts = [file for file in files if not _is_binary(file)]
    corpus = _split_by_file(source, folder, texts, "visible files of text")
    return replace(corpus, left_out=len(files) - len(texts))


def _split_by_file(name: str, folder: Path, found: Iterable[Path], what: str) -> Corpus:
    """Return the folder's files as a corpus; the tenth with the smallest hashes of their paths validates.

    The hash spreads folders over both parts, is the same on every machine, and moves few files when some are
    added. An empty file is left out: it must not be drawn for validation, where it could be the only one.
    """
    whole = [file for file in found if file.is_file() and file.stat().st_size]  # no socket, no dead link
    files = sorted(whole, key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        raise ValueError(f"find_corpus: source {name!r} must hold text, got no {what} that do in {folder}")
    if len(files) == 1:
        return Corpus(name, folder, tuple(files))
    ranked = sorted(files, key=lambda file: _path_hash(file.relative_to(folder)))
    held_out = set(ranked[: max(1, len(files) // FILES_PER_VALIDATION_FILE)])
    train = tuple(file for file in files if file not in held_out)
    return Corpus(name, folder, train, tuple(file for file in files if file in held_out))


def _walk_library(library: Path) -> Iterator[Path]:
    """Yield the library's own Python files, those with each name on the way kept."""

    def keep(name: str) -> bool:
        return name not in _NOT_LIBRARY and not name.startswith(_NOT_LIBRARY_PREFIXES)

    for parent, folders, names in os.walk(library, onerror=_raise):  # which else skips what it may not read
        folders[:] = filter(keep, folders)  # os.walk descends into what is left
        yield from (Path(parent, name) for name in filter(keep, names) if name.endswith(".py"))


def _walk_text(top: Path) -> Iterator[Path]:
    """Yield the files below a folder that a user may mean by it, each once; see `find_corpus`."""
    met: set[tuple[int, int]] = set()
    pending = [top]
    while pending:  # links last, so that what is met without one keeps its own place
        path = pending.pop(0)
        if path is top or _is_followed(path, top):
            yield from _walk_unlinked(path, pending, met)


def _is_followed(link: Path, top: Path) -> bool:
    """Whether a link is to be followed: it leads somewhere, and not to what holds the folder itself."""
    return link.exists() and not top.is_relative_to(link.resolve()) and not _is_excluded(link)


def _walk_unlinked(path: Path, links: list[Path], met: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield a file, or those below a folder, that were not met before; links below it are appended."""
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
    """Whether this is hidden, tensors, or a folder that is a cache, an environment, a run or a checkpoint."""
    if path.name.startswith(".") or path.name in _NOT_TEXT or path.suffix == ".safetensors":
        return True
    if not path.is_dir():
        return False
    names = {each.name for each in path.iterdir()}
    is_ours = "config.json" in names and names & {"checkpoints", "metrics.jsonl", "model.safetensors"}
    return bool(is_ours or names & set(_MARKS)) or path.resolve() == cache_folder().resolve()


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" in opened.read(_FIRST_BLOCK)


def _raise(error: OSError) -> None:
    raise error


def _path_hash(relative: Path) -> bytes:
    return hashlib.sha256(os.fsencode(relative.as_posix())).digest()
