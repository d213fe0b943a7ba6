"""Lists of planted faults: one TOML file or more for each room, whose format tests/test_mutants.py checks."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

LISTS = Path(__file__).parent
REPOSITORY = LISTS.parents[1]

COMPILED = "csrc"
"""The room, and the folder, whose faults are compiled."""
TRITON = "triton"
"""The room of the GPU backends."""
NEEDED = {
    "src/minrnn/ops/triton/": "triton",
    "src/minrnn/ops/selective/triton/": "triton",
    "src/minrnn/integrations/harness.py": "lm_eval",
    "src/minrnn/tasks/hub.py": "datasets",
    "src/minrnn/integrations/transformers/": "transformers",
}
"""The modules without which the faults of a file, or of the files of a folder, are not run."""

KEYS = {"file", "old", "new", "tests", "survives"}


class Fault(NamedTuple):
    """A small change of one file, which the related tests should notice."""

    room: str
    name: str
    """Its list and its number there, from 1 on."""
    file: str
    old: str
    """What is replaced; it occurs once in the file."""
    new: str
    tests: tuple[str, ...]
    """What is run: files, or tests as `file::test`."""
    survives: str | None
    """Why no test can notice it."""

    @property
    def change(self) -> tuple[str, str, str]:
        """What it changes, which stays the same where its list is ordered anew."""
        return self.file, self.old, self.new

    @property
    def is_compiled(self) -> bool:
        """Whether it is planted in a source of the extension."""
        return self.file.startswith(f"{COMPILED}/")

    @property
    def needs(self) -> str | None:
        """The module that must be installed for its tests; None for none beyond the extra dev."""
        return next((module for start, module in NEEDED.items() if self.file.startswith(start)), None)

    @property
    def place(self) -> str:
        """The file and the line."""
        text = (REPOSITORY / self.file).read_text(encoding="utf-8")
        return f"{self.file}:{text[: text.index(self.old)].count(chr(10)) + 1}"

    def planted(self, text: str) -> str:
        """Return the file's text with the fault."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in {self.file}")
        return text.replace(self.old, self.new)


def read_lists(folder: Path = LISTS) -> list[Fault]:
    """Return the faults of all lists in a folder."""
    return [fault for path in sorted(folder.glob("*.toml")) for fault in read_list(path)]


def read_list(path: Path) -> list[Fault]:
    """Return a list's faults. Its room is the file's name, up to the first dash."""
    with path.open("rb") as file:
        content = tomllib.load(file)
    if unknown := sorted(content.keys() - {"tests", "fault"}):
        raise ValueError(f"{path.name}: a list has 'tests' and [[fault]]s, and this one {unknown[0]!r}")
    default = content.get("tests", [])
    return [
        _fault(f"{path.stem}-{number}", path.stem.partition("-")[0], entry, default)
        for number, entry in enumerate(content["fault"], start=1)
    ]


def _fault(name: str, room: str, entry: dict[str, Any], default: list[str]) -> Fault:
    missing, unknown = {"file", "old", "new"} - entry.keys(), entry.keys() - KEYS
    if missing or unknown:
        raise ValueError(f"{name}: lacks {sorted(missing)}, and has the unknown {sorted(unknown)}")
    tests = tuple(entry.get("tests", default))
    if not tests:
        raise ValueError(f"{name}: no tests are named, neither for the list nor for the fault")
    return Fault(room, name, entry["file"], entry["old"], entry["new"], tests, entry.get("survives"))


def file_of(test: str) -> str:
    """Return the file of a test."""
    return test.partition("::")[0]


def related(faults: Iterable[Fault]) -> dict[str, list[str]]:
    """Return the tests of faults by their file; a file alone stands for all that it holds."""
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    files = dict.fromkeys(map(file_of, tests))
    return {
        file: [file] if file in tests else [test for test in tests if file_of(test) == file] for file in files
    }
