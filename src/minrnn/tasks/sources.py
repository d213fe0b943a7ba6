"""Where text comes from: this interpreter's own source, Tiny Shakespeare, or any file or folder.

`SOURCES` names the corpora that need no path. A corpus of one file is divided by its tokens, the first nine
tenths for training; a corpus of many files is divided by file, and each serves one part only.
"""

import difflib
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minrnn.tasks.downloads import download, supplied_file

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_NAME = "tinyshakespeare.txt"

FILES_PER_VALIDATION_FILE = 10  # of the files of a folder, one in ten validates

# Not the library's own code: other people's packages, tests with their fixtures, and generated tables, which
# alone (encodings, pydoc_data) would be a sixth of the corpus and more than half of a validation part.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
_NOT_LIBRARY_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")  # differ by machine


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

    @property
    def files(self) -> tuple[Path, ...]:
        """All files: training, then validation."""
        return self.train + self.val


def find_corpus(source: str) -> Corpus:
    """Return the corpus that `source` names.

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
        return _split_by_file(source, path.resolve(), lambda name: not name.startswith((".", "__pycache__")))
    near = difflib.get_close_matches(source, SOURCES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "check the path"
    raise ValueError(
        f"find_corpus: source must be {', '.join(map(repr, SOURCES))}, or an existing file or folder, got "
        f"{source!r}; {hint}"
    )


def python_corpus() -> Corpus:
    """Return the Python files of this interpreter's standard library, about 10 MB that need no download.

    Third-party packages, tests, generated tables and files that differ by machine are left out, so the corpus
    depends on the Python version (and on which parts a distribution ships), not on what is installed. One
    file in ten validates, chosen by a hash of its relative path.
    """
    library = Path(sysconfig.get_path("stdlib"))
    return _split_by_file(
        "python",
        library,
        lambda name: name not in _NOT_LIBRARY and not name.startswith(_NOT_LIBRARY_PREFIXES),
        suffix=".py",
    )


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
        _check_shakespeare(supplied)
        return supplied
    url = url or os.environ.get("MINRNN_SHAKESPEARE_URL") or SHAKESPEARE_URL
    return download("fetch_shakespeare", url, SHAKESPEARE_NAME, sha256=SHAKESPEARE_SHA256)


SOURCES: dict[str, Callable[[], Corpus]] = {"python": python_corpus, "shakespeare": shakespeare_corpus}


def _check_shakespeare(path: Path) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise ValueError(
            f"fetch_shakespeare: {path} must be Tiny Shakespeare, SHA-256 {SHAKESPEARE_SHA256}, got "
            f"{digest}; remove it to have it downloaded, or pass its path as the source"
        )


def _split_by_file(name: str, folder: Path, keep: Callable[[str], bool], suffix: str = "") -> Corpus:
    """Return the folder's files as a corpus; the tenth with the smallest hashes of their paths validates.

    The hash spreads folders over both parts, is the same on every machine, and moves few files when some are
    added.
    """
    files = sorted(_walk(folder, keep, suffix), key=lambda file: file.relative_to(folder).as_posix())
    if not files:
        wanted = f"{suffix} files" if suffix else "visible files"
        raise ValueError(f"find_corpus: source {name!r} must hold text, got no {wanted} that do in {folder}")
    if len(files) == 1:
        return Corpus(name, folder, tuple(files))
    ranked = sorted(files, key=lambda file: _path_hash(file.relative_to(folder)))
    held_out = set(ranked[: max(1, len(files) // FILES_PER_VALIDATION_FILE)])
    train = tuple(file for file in files if file not in held_out)
    return Corpus(name, folder, train, tuple(file for file in files if file in held_out))


def _walk(folder: Path, keep: Callable[[str], bool], suffix: str) -> Iterator[Path]:
    """Yield the files below `folder` that end in `suffix` and are not empty, if each name on the way is kept.

    An empty file must not be drawn for validation, where it could be the only one.
    """
    for parent, folders, names in os.walk(folder, onerror=_raise):  # which else skips what it may not read
        folders[:] = filter(keep, folders)  # os.walk descends into what is left
        for name in filter(keep, names):
            file = Path(parent, name)
            if name.endswith(suffix) and file.is_file() and file.stat().st_size:  # no socket, no dead link
                yield file


def _raise(error: OSError) -> None:
    raise error


def _path_hash(relative: Path) -> bytes:
    return hashlib.sha256(os.fsencode(relative.as_posix())).digest()
