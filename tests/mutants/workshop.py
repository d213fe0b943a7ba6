"""Scratch copies of the checkout, in which faults are planted, and an environment that imports them."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from py_compile import PycInvalidationMode

from mutants.faults import REPOSITORY

BYTECODE = {"PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"}
"""Variables that would leave each fault's tests to be compiled again."""


def extension() -> Path:
    """Return the compiled extension of the running environment."""
    code = "import minrnn.ops._cpu as extension; print(extension.__file__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"minrnn's compiled extension is not installed here: {done.stderr.splitlines()[-1]}"
        )
    return Path(done.stdout.strip())


def copy_checkout(to: Path, compiled: Path) -> None:
    """Copy all files that git knows or does not ignore, with the compiled extension."""
    listed = subprocess.run(
        ["git", "-C", REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():  # not one that was deleted
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, to / name)
    shutil.copy(compiled, to / "src/minrnn/ops")
    # Bytecode that knows its source by content: a fault often leaves a file's size and second as they were.
    compileall.compile_dir(to / "src", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)


def use_extension(folder: Path, copy: Path) -> None:
    """Put the extension that lies in a folder into its place in a copy."""
    for extension in folder.glob("_cpu*.*"):
        shutil.copy(extension, copy / "src/minrnn/ops")


def make_environment(folder: Path) -> Path:
    """Make an environment that borrows all packages of the running one, and return its interpreter.

    An editable installation of minrnn has no effect there, nor in the processes that tests start.
    """
    venv.create(folder, with_pip=False)
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    variables = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=variables))
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed), encoding="utf-8")
    return Path(sysconfig.get_path("scripts", vars=variables)) / "python"


def environment_of(copy: Path) -> dict[str, str]:
    """Return the variables of processes that import a copy and write only beside it."""
    work = work_of(copy)
    kept = {name: value for name, value in os.environ.items() if name not in BYTECODE}
    mine = {"PYTHONPATH": copy / "src", "OMP_NUM_THREADS": 1, "MINRNN_CACHE": work / "cache", "TMPDIR": work}
    return {**kept, **{name: str(value) for name, value in mine.items()}}


def work_of(copy: Path) -> Path:
    """Return the folder for what the tests of one fault write."""
    return copy.with_name(f"{copy.name}-work")


def assert_imported(python: Path, copy: Path) -> None:
    """Raise unless a process that is started imports this copy."""
    code = (
        "import minrnn, minrnn.ops._cpu as extension; print(minrnn.__file__, extension.__file__, sep='\\n')"
    )
    done = subprocess.run(
        [python, "-c", code], env=environment_of(copy), capture_output=True, text=True, check=True
    )
    for found in done.stdout.split():
        if not Path(found).is_relative_to(copy):
            raise RuntimeError(f"the copy in {copy} should be imported, and {found} is")
