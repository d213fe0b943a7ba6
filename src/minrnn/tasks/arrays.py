"""Arrays in .npz files: written whole or not at all, and read so that a damaged file is a line and no more.

numpy's own reader takes the size of an array from the file's word for it, and its errors are those of five
libraries. Here a member's bytes are read first, no more than the file can hold, and an array is what lies in
them; nothing is unpickled.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from struct import error as StructError  # noqa: N812 - the library's name says nothing
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from minrnn.files import write_file

EXPANSION = 1100
"""Bytes of a member for each that it takes in the file, at most; deflate reaches 1032."""

LONGEST = 200
"""Characters that a message takes over from a library."""


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], *, compress: bool = False) -> None:
    """Write arrays into an .npz file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    save = np.savez_compressed if compress else np.savez
    with write_file(path) as partial, partial.open("wb") as file:
        save(file, **arrays)  # type: ignore[arg-type]  # its stubs take allow_pickle for one of them


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `write_arrays` wrote, or numpy's savez.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged or something else, or holds objects.
    """
    content = path.read_bytes()  # zipfile's own errors of a damaged file are the system's, too
    try:
        with ZipFile(BytesIO(content)) as archive:
            return {
                member.filename.removesuffix(".npy"): _array(_content(archive, member.filename))
                for member in archive.infolist()
            }
    except (
        BadZipFile, EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError,
        StructError, SyntaxError, TypeError, ValueError, zlib.error,
    ) as error:  # fmt: skip  # what zipfile, zlib, struct and numpy say of a damaged file
        said = " ".join(str(error).split())[:LONGEST]
        raise ValueError(f"{path} must be an .npz file, got a damaged one ({said}); remove it") from error


def _content(archive: ZipFile, name: str) -> bytes:
    """Return a member's bytes, which zipfile checks against their CRC."""
    member = archive.getinfo(name)
    if member.file_size > EXPANSION * (member.compress_size + 1):
        raise ValueError(f"{name} declares {member.file_size:,} bytes, more than compression can explain")
    return archive.read(member)


def _array(content: bytes) -> NDArray[Any]:
    """Return the array that lies in a member's bytes."""
    stream = BytesIO(content)
    version = npy.read_magic(stream)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, is_fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, which are not unpickled")
    numbers = content[stream.tell() :]
    array = np.frombuffer(numbers, dtype) if numbers else np.empty(0, dtype)
    return array.reshape(shape, order="F" if is_fortran else "C").copy()
