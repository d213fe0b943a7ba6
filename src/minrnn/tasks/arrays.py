"""Arrays in .npz files: atomic writing, and reading that is safe for damaged and untrusted files.

numpy's own reader allocates whatever size a file declares, and a damaged file raises the exceptions of five
libraries. This reader first reads a member's bytes, bounded by the size of the file, and takes the array from
them; nothing is unpickled.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from struct import error as StructError  # noqa: N812 - the library's name is just "error"
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from minrnn.files import write_file

EXPANSION = 1100
"""Maximum compression ratio of a member; deflate reaches 1032."""

LONGEST = 200
"""Characters of a library's message that are quoted."""


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], *, compress: bool = False) -> None:
    """Write arrays to an .npz file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    save = np.savez_compressed if compress else np.savez
    with write_file(path) as partial, partial.open("wb") as file:
        save(file, **arrays)  # type: ignore[arg-type]  # the stubs have allow_pickle among the keywords


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a file written by `write_arrays` or `numpy.savez`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, is not an .npz file, or holds Python objects.
    """
    content = path.read_bytes()  # apart from zipfile, which raises OSError for damaged files too
    try:
        with ZipFile(BytesIO(content)) as archive:
            return {
                member.filename.removesuffix(".npy"): _array(_content(archive, member.filename))
                for member in archive.infolist()
            }
    except (
        BadZipFile, EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError,
        StructError, SyntaxError, TypeError, ValueError, zlib.error,
    ) as error:  # fmt: skip  # raised by zipfile, zlib, struct and numpy for damaged files
        said = " ".join(str(error).split())[:LONGEST]
        raise ValueError(f"{path} must be an .npz file, got a damaged one ({said}); remove it") from error


def _content(archive: ZipFile, name: str) -> bytes:
    """Return a member's bytes; zipfile checks their CRC."""
    member = archive.getinfo(name)
    if member.file_size > EXPANSION * (member.compress_size + 1):
        raise ValueError(f"{name} declares {member.file_size:,} bytes, more than compression can explain")
    return archive.read(member)


def _array(content: bytes) -> NDArray[Any]:
    """Return the array stored in a member's bytes."""
    stream = BytesIO(content)
    version = npy.read_magic(stream)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not unpickled")
    numbers = content[stream.tell() :]
    array = np.frombuffer(numbers, dtype) if numbers else np.empty(0, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C").copy()
