"""Provenance of results: machine, versions and commit, saved with every result."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CODE = ("src", "csrc", "CMakeLists.txt", "pyproject.toml", "constraints.txt")
"""What a result depends on, at the top of a checkout; results and pages are not part of it."""


def provenance(device: torch.device | str) -> dict[str, object]:
    """Return a description of the machine, the package versions and the commit.

    Args:
        device: the device of the model.

    Returns:
        JSON values: `device`, `machine` (processor, CPU threads, system), `versions` (Python's and those of
        minrnn, torch, numpy and triton), `commit`, which is None if the package is installed or git fails,
        and `changes`: None if the code is that of the commit, else the SHA-256 digest of its difference.
        The code is read once in a process: what was edited after a run began did not run.
    """
    commit, changes = _code()
    device = torch.device(device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions("minrnn", "torch", "numpy", "triton")},
        "commit": commit,
        "changes": changes,
    }


def is_changed(record: Mapping[str, Any]) -> bool:
    """Return whether a result was made by code that differs from its commit, or does not say.

    Args:
        record: holds what `provenance` returned; in earlier versions, the commit ended in `-dirty`.
    """
    if "commit" not in record or str(record["commit"]).endswith("-dirty"):
        return True
    return record.get("changes") is not None


def _versions(*packages: str) -> dict[str, str]:
    """Return the versions of the installed ones of these packages; minrnn may be a checkout."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _processor() -> str:
    """Return the name of the processor; platform.processor() is empty on most Linux systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _code() -> tuple[str | None, str | None]:
    """Return the commit of the checkout of this package, and the digest of what differs from it in CODE.

    The difference is that of tracked files, and all of the untracked ones that git does not ignore.
    """
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None  # an installed package, perhaps within another repository
    commit = _git(folder, "rev-parse", "HEAD")
    places = [f":/{name}" for name in CODE]
    tracked = _git(folder, "diff", "HEAD", "--binary", "--no-ext-diff", "--no-color", "--", *places)
    names = _git(folder, "ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", *places)
    top = _git(folder, "rev-parse", "--show-toplevel")
    if commit is None or tracked is None or names is None or top is None:
        return None, None
    found = commit.decode(errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{40,64}", found):
        return None, None
    untracked = [name for name in names.split(b"\0") if name]
    if not tracked and not untracked:
        return found, None
    digest = hashlib.sha256(tracked)
    for name in untracked:
        digest.update(name + b"\0" + _content(Path(os.fsdecode(top.rstrip(b"\n")), os.fsdecode(name))))
    return found, digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a broken link, or a file that was removed
        return b""


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Return the output of git, or None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
