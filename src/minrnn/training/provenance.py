"""Provenance of results: machine, versions and commit, saved with every result."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def provenance(device: torch.device) -> dict[str, object]:
    """Return a description of the machine, the package versions and the commit.

    Args:
        device: the device of the model.

    Returns:
        JSON values: `device`, `machine` (processor, CPU threads, system), `versions` (Python's and those of
        minrnn, torch, numpy and triton), and `commit`, which is None if the package is
        installed or git fails.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions("minrnn", "torch", "numpy", "triton")},
        "commit": _commit(),
    }


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


def _commit() -> str | None:
    """Return the commit of the checkout of this package, with `-dirty` if files were changed, or None."""
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # an installed package, perhaps within another repository
    said = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return said if said is not None and re.fullmatch(r"[0-9a-f]{40,64}(-dirty)?", said) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or None if git is missing or fails."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
