"""The compiled extension of a copy, built anew for each fault in its sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from mutants.workshop import use_extension


class NotBuiltError(Exception):
    """The compiler's message."""


def first_build(copy: Path) -> None:
    """Build the extension of a copy without a fault, with the tools of the running environment."""
    options = [
        "-G",
        "Ninja",
        "-DMINRNN_ONE_ISA=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    ]
    _run([tool("cmake"), "-S", str(copy), "-B", str(_folder(copy)), *options])
    _run([tool("ninja"), "-C", str(_folder(copy))])
    shutil.copytree(_folder(copy), _clean(copy))


def build(copy: Path, ninja: str) -> None:
    """Build the extension of a copy with the fault that it has, and put it in its place there."""
    shutil.rmtree(_folder(copy))  # what the fault before this one left
    shutil.copytree(_clean(copy), _folder(copy))  # with its times, which tell ninja what it has to build
    _run([ninja, "-C", str(_folder(copy))])
    use_extension(_folder(copy), copy)


def tool(name: str) -> str:
    """Return the path of a build tool, that of the running environment if it has one."""
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if found is None:
        raise RuntimeError(f"faults of csrc need {name!r}, which is not installed here: pip install {name}")
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise NotBuiltError(done.stdout[-2000:])


def _folder(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}-build")


def _clean(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}-build-clean")
