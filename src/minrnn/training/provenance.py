"""What a result was computed with: machine, versions and commit, saved beside every figure."""

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
    """Describe the machine, the versions and the commit that compute on a device.

    Args:
        device: where the model is.

    Returns:
        JSON values: `device`, `machine` (processor, CPU threads, system), `versions` (Python's and those of
        minrnn, torch, numpy and triton), and `commit`, which is None for an installed package, and where git
        cannot tell.
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
    """Return the versions of those packages that are installed; minrnn in a checkout may not be."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _processor() -> str:
    """Name the processor; platform.processor() is empty on most Linux systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout that this package is in, with `-dirty` where files differ from it."""
    folder = Path(__file__).parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # installed: a repository around the environment is not ours
    said = _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return said if said is not None and re.fullmatch(r"[0-9a-f]{40,64}(-dirty)?", said) else None


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git says in one line; None where there is no git, or one that does not work."""
    try:
        done = subprocess.run(
            ["git", "-C", folder, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
