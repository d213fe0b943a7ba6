"""Arrays in .npz files: what is written is read, and nothing else than arrays of numbers comes out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minrnn.tasks import ListOpsConfig, listops
from minrnn.tasks.arrays import read_arrays, write_arrays
from minrnn.tasks.downloads import cache_folder
from minrnn.tasks.listops import ListOpsTask

ARRAYS = {
    "floats": np.arange(6.0).reshape(2, 3),
    "by column": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "state/none": np.zeros((0, 3), np.float32),
    "one": np.array(3.5),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("compress", [False, True])
def test_what_is_written_is_read(compress: bool, tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.npz", ARRAYS, compress=compress)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    for read in (read_arrays(tmp_path / "a.npz"), dict(np.load(tmp_path / "a.npz"))):
        assert read.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(read[name], array)
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape


def npy(shape: tuple[int, ...], content: bytes) -> bytes:
    """Return a member that declares a shape, with what it holds in truth."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def archive(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.npy", content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "File is not a zip file"),
        (lambda path: path.write_bytes(b"\0" * 1000), "File is not a zip file"),
        (lambda path: np.savez(path, a=np.array([{}], object)), "objects, which are not unpickled"),
        (lambda path: archive(path, b"no array"), "magic string"),
        (lambda path: archive(path, npy((10**12,), b"\0" * 80)), "cannot reshape array of size 10"),
        (lambda path: archive(path, npy((10,), b"\0" * 79)), "multiple of element size"),
        (lambda path: archive(path, npy((10,), b"\0" * 72)), "cannot reshape array of size 9"),
    ],
)
def test_what_is_no_file_of_arrays_is_refused(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a.npz")
    with pytest.raises(
        ValueError, match=rf"a.npz must be an .npz file, got a damaged one \(.*{message}.*remove it"
    ):
        read_arrays(tmp_path / "a.npz")


def test_a_damaged_cache_of_expressions_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path))
    config = ListOpsConfig(
        max_length=20, min_length=2, max_depth=3, num_train=9, num_validation=5, num_test=5
    )
    first = ListOpsTask(config).sha256
    (path,) = cache_folder().rglob("*.npz")
    whole = path.read_bytes()
    monkeypatch.setattr(listops, "generate_expressions", None)
    assert ListOpsTask(config).sha256 == first  # from the cache
    monkeypatch.undo()
    monkeypatch.setenv("MINRNN_CACHE", str(tmp_path))
    other = io.BytesIO()
    np.savez(other, tokens=np.zeros(3, np.uint8), ends=np.zeros(3, np.int64), values=np.zeros(3, np.uint8))
    for content in (b"", whole[:-30], whole[:50] + b"\0" + whole[51:], other.getvalue()):
        path.write_bytes(content)
        assert ListOpsTask(config).sha256 == first
        assert path.read_bytes() == whole or read_arrays(path)["tokens"].size


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_declares_more_than_numpys_compression_explains_is_refused(method: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as file:
        file.writestr("a.npy", npy((1 << 20,), b"\0" * (8 << 20)))
    with pytest.raises(ValueError, match="more than compression can explain"):
        read_arrays(tmp_path / "a.npz")


def test_arrays_are_compressed_where_that_is_asked_for(tmp_path: Path) -> None:
    sizes = []
    for compress in (True, False):
        write_arrays(tmp_path / "a.npz", {"a": np.zeros(10_000)}, compress=compress)
        sizes.append((tmp_path / "a.npz").stat().st_size)
    assert sizes[0] < 2000 < 80_000 < sizes[1]
