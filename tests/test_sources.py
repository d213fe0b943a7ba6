"""Where text comes from: the standard library, a download that is checked, a file, a folder."""

import hashlib
import http.server
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minrnn.tasks import sources
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.sources import Corpus, fetch_shakespeare, find_corpus

CONTENT = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests out of the user's cache, and the user's settings out of the tests."""
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("MINRNN_DATA", "MINRNN_SHAKESPEARE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_shakespeare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few lines pass for the corpus."""
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(CONTENT).hexdigest())


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path but /missing, on this machine only, and counts the requests."""

    content = CONTENT
    requests = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/input.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *arguments: object) -> None:
        """Keep the tests quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(
            target=running.serve_forever, args=(0.01,)
        )  # seconds between looks for the end
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write_tree(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")


# Tiny Shakespeare: supplied, cached, downloaded


@pytest.mark.usefixtures("small_shakespeare")
def test_shakespeare_is_downloaded_once(server: Server) -> None:
    path = fetch_shakespeare(server.url)
    assert path.read_bytes() == CONTENT
    assert fetch_shakespeare(server.url) == path
    assert server.requests == 1
    assert files_in(cache_folder()) == ["tinyshakespeare.txt"]


@pytest.mark.usefixtures("small_shakespeare")
def test_the_address_can_be_set_from_outside(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_SHAKESPEARE_URL", server.url)
    corpus = find_corpus("shakespeare")
    assert corpus.train[0].read_bytes() == CONTENT
    assert corpus.val == ()


@pytest.mark.usefixtures("small_shakespeare")
def test_a_supplied_shakespeare_needs_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(CONTENT)
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    assert fetch_shakespeare("http://127.0.0.1:9/") == (tmp_path / "tinyshakespeare.txt").resolve()


@pytest.mark.usefixtures("small_shakespeare")
def test_a_data_folder_without_shakespeare_does_not_hinder_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path / "nothing"))
    assert fetch_shakespeare(server.url).read_bytes() == CONTENT


def test_a_supplied_file_with_another_checksum_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tinyshakespeare.txt").write_bytes(CONTENT)
    monkeypatch.setenv("MINRNN_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"tinyshakespeare\.txt must be Tiny Shakespeare, SHA-256 86c4e6"):
        fetch_shakespeare()


def test_a_download_with_another_checksum_is_refused_and_not_kept(server: Server) -> None:
    with pytest.raises(ValueError, match="does not match the known hash"):
        fetch_shakespeare(server.url)
    assert files_in(cache_folder()) == []


@pytest.mark.usefixtures("small_shakespeare")
def test_a_damaged_cached_file_is_downloaded_again(server: Server) -> None:
    cache_folder().mkdir()
    (cache_folder() / "tinyshakespeare.txt").write_bytes(CONTENT[:10])
    assert fetch_shakespeare(server.url).read_bytes() == CONTENT


def test_without_a_network_the_error_says_where_to_put_the_file() -> None:
    with Server(("127.0.0.1", 0), Handler) as closed:
        url = closed.url
    with pytest.raises(OSError, match=r"cannot download http://127.*; put the file, named tinyshakespeare"):
        fetch_shakespeare(url)
    assert files_in(cache_folder()) == []


def test_a_missing_page_is_an_error_that_leaves_no_file(server: Server) -> None:
    with pytest.raises(OSError, match="404"):
        fetch_shakespeare(server.url.replace("input.txt", "missing"))
    assert files_in(cache_folder()) == []


# the standard library


def test_python_is_the_library_without_tests_packages_and_tables() -> None:
    corpus = find_corpus("python")
    library = Path(sysconfig.get_path("stdlib"))
    names = {file.relative_to(library).as_posix() for file in corpus.files}
    assert {"ast.py", "json/decoder.py", "collections/__init__.py"} <= names
    folders = {part for name in names for part in Path(name).parts[:-1]}
    assert folders.isdisjoint({"site-packages", "test", "tests", "idle_test", "__pycache__", "encodings"})
    assert all(name.endswith(".py") for name in names)


def test_python_is_ordered_and_divided_by_file() -> None:
    corpus = find_corpus("python")
    for part in (corpus.train, corpus.val):
        assert list(part) == sorted(part, key=lambda file: file.relative_to(corpus.origin).as_posix())
    assert not set(corpus.train) & set(corpus.val)
    sizes = [sum(file.stat().st_size for file in part) for part in (corpus.train, corpus.val)]
    assert 0.02 < sizes[1] / sum(sizes) < 0.2


def test_generated_and_machine_files_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    kept = [f"module{i}.py" for i in range(20)] + ["package/__init__.py", "package/testing.py"]
    left_out = [
        "_sysconfigdata__linux.py", "sitecustomize.py", "config-3.11-x/python-config.py", "package/data.txt",
        "package/test/test_a.py", "site-packages/torch.py", "encodings/cp037.py", "pydoc_data/topics.py",
    ]  # fmt: skip
    write_tree(tmp_path, kept + left_out)
    found = {file.relative_to(tmp_path).as_posix() for file in find_corpus("python").files}
    assert found == set(kept)


# files and folders


def test_a_file_is_its_own_corpus(tmp_path: Path) -> None:
    write_tree(tmp_path, ["a.txt"])
    file = tmp_path / "a.txt"
    assert find_corpus(str(file)) == Corpus(str(file), file.resolve(), (file.resolve(),))


def test_a_folder_is_read_without_hidden_and_empty_files(tmp_path: Path) -> None:
    write_tree(tmp_path, ["b.txt", "a/c.md", ".git/config", "a/.hidden", "a/__pycache__/x.pyc"])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    corpus = find_corpus(str(tmp_path))
    assert {file.name for file in corpus.files} == {"b.txt", "c.md"}
    assert len(corpus.val) == 1


def names_of(folder: Path) -> list[str]:
    """Return what a folder is read as, its files' paths in it."""
    return sorted(file.relative_to(folder.resolve()).as_posix() for file in find_corpus(str(folder)).files)


def test_a_folder_of_work_is_read_without_what_is_no_text_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs, checkpoints, caches, environments and what is binary: `--task.source .` learnt from them once."""
    texts = ["a.txt", "notes/b.md", "notes/config.json", "runs/readme.txt", "env/d.txt"]
    write_tree(tmp_path, texts)
    others = {
        "runs/one": ["config.json", "metrics.jsonl", "results.json"],
        "runs/two": ["config.json", "checkpoints/last/config.json", "loss.txt"],
        "model": ["config.json", "model.safetensors", "card.md"],
        "venv": ["pyvenv.cfg", "lib/python3/site.py"],
        "build": ["CACHEDIR.TAG", "log.txt"],
        "web": ["node_modules/left-pad/index.js"],
        "a cache": ["tokens/x/y/tokens.json", "tinyshakespeare.txt"],
        ".hidden": ["x.txt"],
        "notes/__pycache__": ["x.txt"],
        "tensors": ["weights.safetensors"],
    }
    for folder, names in others.items():
        write_tree(tmp_path / folder, names)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "late.bin").write_bytes(b"x" * 8191 + b"\0")
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path / "notes" / ".." / "a cache"))
    assert names_of(tmp_path) == sorted(texts)
    assert find_corpus(str(tmp_path)).left_out == 2


def test_links_out_of_a_folder_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    write_tree(folder, ["z/real.txt", "one.txt"])
    write_tree(elsewhere, ["far.txt", "deep/farther.txt", "runs/config.json", "runs/metrics.jsonl"])
    (tmp_path / "single.txt").write_text("alone")
    for name, target in {
        "a": folder / "z",  # what is met at its own place
        "b": elsewhere,
        "c": elsewhere,
        "d": elsewhere / "deep",
        "e": folder,
        "f": tmp_path,  # which holds the folder itself
        "g": tmp_path / "nowhere",
        "one again.txt": folder / "one.txt",
        "single.txt": tmp_path / "single.txt",
        "single again.txt": tmp_path / "single.txt",
    }.items():
        (folder / name).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder / "loop")
    assert names_of(folder) == [
        "b/deep/farther.txt", "b/far.txt", "one.txt", "single again.txt", "z/real.txt"
    ]  # fmt: skip


def test_a_file_validates_by_its_relative_path_alone(tmp_path: Path) -> None:
    names = [f"chapter{i}.txt" for i in range(40)]
    write_tree(tmp_path / "one", names)
    write_tree(tmp_path / "two", names)
    for name in names:
        (tmp_path / "two" / name).write_text("other words")
    one, two = (find_corpus(str(tmp_path / which)) for which in ("one", "two"))
    assert len(one.val) == 4
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert {file.name for file in one.val} == set(ranked[:4])
    assert {file.name for file in one.train} == set(ranked[4:])
    assert [file.name for file in one.val] == [file.name for file in two.val]
    write_tree(tmp_path / "one", ["zzz.txt"])
    moved = {file.name for file in one.val} ^ {file.name for file in find_corpus(str(tmp_path / "one")).val}
    assert len(moved) <= 2  # at most the new file in another's place


def test_a_folder_with_one_file_is_divided_like_a_file(tmp_path: Path) -> None:
    write_tree(tmp_path, ["only.txt"])
    assert find_corpus(str(tmp_path)).val == ()


def test_a_path_may_start_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_tree(tmp_path, ["a.txt"])
    assert find_corpus("~/a.txt").files[0].name == "a.txt"


def test_a_missing_source_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'shakespere'; did you mean 'shakespeare'"):
        find_corpus("shakespere")
    with pytest.raises(ValueError, match=r"got '.*nothing\.txt'; check the path"):
        find_corpus(str(tmp_path / "nothing.txt"))


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "a/b@", "a/b:", "a/b:c:d", "a/b@c@d", "a b"])
def test_names_of_data_sets_have_a_form(name: str) -> None:
    with pytest.raises(ValueError, match=r"source must be hf://datasets/NAME, with @REVISION and :CONFIG"):
        find_corpus(f"hf://datasets/{name}")


def test_a_data_set_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_corpus("hf://datasets/some/text@refs/pr/1:part", is_joined=True, column="body")
    assert (found.origin, found.is_joined, found.column) == ("hf://datasets/some/text:part", True, "body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ImportError, match=r"text@refs/pr/1:part needs datasets, which is not installed; .*\[datasets\]"
    ):
        assert found.state


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    with pytest.raises(ValueError, match="must hold text, got no visible files"):
        find_corpus(str(tmp_path))
