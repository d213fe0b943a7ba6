"""The cache of tokens: whatever happens to an entry is noticed, and several users and processes share it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from minrnn.files import claims, write_json
from minrnn.tasks import tokens
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.hub import UnreachableError
from minrnn.tasks.sources import Corpus, find_corpus
from minrnn.tasks.tokens import TokenizedCorpus, tokenize

TEXT = "some text, and some more of it. " * 20
NOBODY = 65534  # a user without rights
AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(tmp_path / "text.txt")


def read(source: str) -> TokenizedCorpus:
    return tokenize(find_corpus(source, is_joined=True), "characters")


def entries() -> list[Path]:
    return sorted(path for path in cache_folder().glob("tokens/*/*"))


def content(corpus: TokenizedCorpus) -> str:
    return corpus.vocabulary.decode(np.concatenate([corpus.train, corpus.val]))


def flip(path: Path) -> None:
    """Change a byte and put the time of the last change back, as an unlucky tool or a careful one would."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_json(path: Path) -> None:
    path.write_text("[]")


def shorten(path: Path) -> None:
    header = json.loads(path.read_text())
    path.write_text(
        json.dumps(header | {"num_train": header["num_train"] - 1, "num_val": header["num_val"] + 1})
    )


def other_letters(path: Path) -> None:
    path.write_text(path.read_text().replace("d", "q"))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("tokens.bin", flip),
        ("tokens.bin", cut),
        ("tokens.bin", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        ("tokens.bin", make_folder),
        ("tokens.bin", lambda path: path.unlink()),
        ("tokens.json", flip),
        ("tokens.json", cut),
        ("tokens.json", replace_json),
        ("tokens.json", shorten),
        ("tokens.json", other_letters),
        ("tokens.json", lambda path: path.unlink()),
        ("checked.json", flip),
        ("checked.json", replace_json),
        ("checked.json", lambda path: path.unlink()),
    ],
)
def test_whatever_is_wrong_is_noticed_and_made_anew(
    name: str, damage: Callable[[Path], object], text: str
) -> None:
    first = read(text)
    (entry,) = entries()
    damage(entry / name)
    again = read(text)
    assert content(again) == TEXT
    assert again.sha256 == first.sha256
    assert entries() == [entry]


def test_an_entry_is_hashed_again_only_where_it_may_have_changed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    whole = tokens._hash_entry
    monkeypatch.setattr(
        tokens, "_hash_entry", lambda entry, header: hashed.append(entry) or whole(entry, header)
    )
    read(text)
    read(text)
    assert not hashed
    (entry,) = entries()
    copy = shutil.copytree(entry, entry.with_name("copy"))  # has other times, as one from another machine
    shutil.rmtree(entry)
    copy.rename(entry)
    for _ in range(2):
        assert content(read(text)) == TEXT
    assert len(hashed) == 1


def test_what_a_killed_tokenisation_left_goes_but_a_living_ones_stays(text: str, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from minrnn.tasks import tokens\n"
        "entry = tokens.cache_folder() / 'tokens' / sys.argv[1] / 'state'; entry.parent.mkdir(parents=True)\n"
        "with tokens._building(entry) as folder:\n"
        "    (folder / 'tokens.bin').write_bytes(b'half'); print(folder, flush=True); time.sleep(60)\n"
    )
    makers = {
        name: subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, text=True)
        for name in ("dead", "recent", "old", "alive")
    }
    folders = {name: Path((maker.stdout or sys.stdin).readline().strip()) for name, maker in makers.items()}
    for name in ("recent", "old"):
        write_json(folders[name] / "progress.json", {})
    past = time.time() - 86400 * tokens.KEPT_DAYS
    os.utime(folders["old"] / "progress.json", (past, past))
    for name in ("dead", "recent", "old"):
        makers[name].send_signal(signal.SIGKILL)
        makers[name].communicate()
    assert all((folder / "tokens.bin").is_file() for folder in folders.values())
    read(text)
    assert {name for name, folder in folders.items() if folder.exists()} == {"recent", "alive"}
    assert (folders["alive"] / "tokens.bin").is_file()
    makers["alive"].kill()
    makers["alive"].communicate()
    (tmp_path / "text.txt").write_text("another " + TEXT)
    read(text)
    assert not folders["alive"].exists()


# --- two users -------------------------------------------------------------------------------------------


@contextmanager
def as_user(number: int) -> Iterator[None]:
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_up(folder: Path) -> None:
    """Let all users enter a folder of a test: pytest keeps its own to itself."""
    top = Path(tempfile.gettempdir()).resolve()
    for place in (folder, *folder.parents):
        if place.resolve().is_relative_to(top) and place.resolve() != top:
            place.chmod(0o755)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that all may write into, as /tmp, and a text that all may read."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setenv("MINRNN_CACHE", str(folder))
    open_up(tmp_path)
    return folder


def test_folders_are_as_open_as_the_cache_whatever_the_umask(shared: Path, text: str) -> None:
    with umask(0o077):
        read(text)
    (entry,) = entries()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (entry.parent.parent, entry.parent, entry)]
    assert modes == [0o1777] * 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in entry.iterdir()} == {0o644}
    shared.chmod(0o700)
    shutil.rmtree(shared / "tokens")
    read(text)
    assert stat.S_IMODE(entries()[0].stat().st_mode) == 0o700


def test_what_is_not_for_all_to_read_stays_so_in_a_shared_cache(
    shared: Path, text: str, tmp_path: Path
) -> None:
    for mode, folder_mode in ((0o600, 0o755), (0o644, 0o700)):
        Path(text).chmod(mode)
        tmp_path.chmod(folder_mode)
        read(text)
        assert stat.S_IMODE(entries()[0].stat().st_mode) == 0o700


def test_a_source_out_of_reach_is_no_failure_of_the_cache(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_nothing(self: Corpus, index: int) -> NoReturn:
        raise UnreachableError("the hub does not answer")

    monkeypatch.setattr(Corpus, "read", read_nothing)
    with pytest.raises(UnreachableError, match=r"^the hub does not answer$"):
        read(text)


@pytest.mark.skipif(not AS_ROOT, reason="only root can be two users")
def test_two_users_share_a_cache(shared: Path, text: str, tmp_path: Path) -> None:
    with umask(0o077):
        first = read(text)
    with as_user(NOBODY):
        again = read(text)
        assert again.sha256 == first.sha256
        assert len(entries()) == 1  # the other user's own
        (entry,) = entries()
    flip(entry / "tokens.bin")  # which nobody else can mend, nor remove
    with as_user(NOBODY):
        assert content(read(text)) == TEXT
        assert content(read(text)) == TEXT
        assert len(entries()) == 2
    (entry / "tokens.json").chmod(0o000)
    with as_user(NOBODY):
        assert content(read(text)) == TEXT
        assert len(entries()) == 2
    (tmp_path / "text.txt").write_text("another " + TEXT)
    with as_user(NOBODY):
        assert content(read(text)).startswith("another")


@pytest.mark.skipif(not AS_ROOT, reason="only root can be another user")
def test_a_cache_that_may_not_be_written_serves_what_it_has_and_says_what_it_cannot(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    open_up(tmp_path)
    monkeypatch.setenv("MINRNN_CACHE", str(closed))
    read(text)
    with as_user(NOBODY):
        assert content(read(text)) == TEXT
    (tmp_path / "text.txt").write_text("another " + TEXT)
    with (
        as_user(NOBODY),
        pytest.raises(
            OSError, match=r"cannot write the tokens of .* \(MINRNN_CACHE can name another folder\)"
        ),
    ):
        read(text)


def test_the_same_files_divided_otherwise_are_other_tokens(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text(file.name * 20)
    both = Corpus("mine", tmp_path, tuple(files), is_joined=True)
    apart = Corpus("mine", tmp_path, (files[0],), (files[1],), is_joined=True)
    sizes = [tokenize(corpus, "bytes").val.size for corpus in (both, apart, both)]
    assert sizes == [20, 100, 20]


def test_ids_are_stored_with_the_lowest_byte_first(tmp_path: Path) -> None:
    """Whatever the machine, so that a digest is the same on all."""
    (tmp_path / "text.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 300))))
    read(str(tmp_path / "text.txt"))
    (entry,) = entries()
    stored = (entry / "tokens.bin").read_bytes()
    assert stored == b"".join(number.to_bytes(2, "little") for number in range(300))


def test_where_there_are_no_locks_unfinished_folders_are_left(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(text)
    unfinished = entries()[0].with_name(".building-0123456789abcdef")

    def unsupported(handle: int) -> bool:
        raise OSError(errno.ENOLCK, "no locks")

    for is_supported in (False, True):
        unfinished.mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            if not is_supported:
                patch.setattr(claims, "_try_lock", unsupported)
            Path(text).write_text(TEXT + f"and {is_supported}")
            read(text)
        assert unfinished.exists() != is_supported  # it may be in use where that cannot be known
