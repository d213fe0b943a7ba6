"""The scripts in examples, imported and run as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import minrnn

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
PAGES = REPOSITORY / "docs" / "examples"
PACKAGE = Path(minrnn.__file__).parents[1]


@contextmanager
def imported(path: str) -> Iterator[ModuleType]:
    """Import a script, which finds the files beside it; afterwards they are forgotten."""
    script = EXAMPLES / path
    siblings = {file.stem for file in script.parent.glob("*.py")}
    sys.path.insert(0, str(script.parent))
    try:
        yield import_module(script.stem)
    finally:
        sys.path.remove(str(script.parent))
        for name in siblings:
            sys.modules.pop(name, None)


def run(path: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, which imports the minrnn that is tested."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **variables}
    command = [sys.executable, str(EXAMPLES / path), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)
