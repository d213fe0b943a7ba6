"""Links into other projects' documentation without the network, from a committed list of names.

`names.txt` lists the few names that docstrings and signatures use: one line each with the project, the kind,
the name and the page with its anchor. Sphinx reads inventory files, which are made of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.config import Config

NAMES = Path(__file__).with_name("names.txt")
ADDRESSES = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "python": "https://docs.python.org/3/",
}


def entries(project: str) -> Iterator[str]:
    """Yield an inventory's lines for a project: name, kind, priority, page, and `-` for the same title."""
    for line in NAMES.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            owner, kind, name, page = line.split()
            if owner == project:
                yield f"{name} py:{kind} 1 {page} -"


def inventory(project: str) -> bytes:
    """Return an inventory of Sphinx's second format."""
    header = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n"
    header += "# The remainder of this file is compressed using zlib.\n"
    return header.encode() + zlib.compress("".join(f"{line}\n" for line in entries(project)).encode())


def _write_inventories(app: Sphinx, config: Config) -> None:
    folder = Path(app.doctreedir)
    folder.mkdir(parents=True, exist_ok=True)
    config.intersphinx_mapping = {}
    for project, address in ADDRESSES.items():
        file = folder / f"{project}.inv"
        file.write_bytes(inventory(project))
        config.intersphinx_mapping[project] = (address, str(file))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx, before intersphinx reads its configuration."""
    app.connect("config-inited", _write_inventories, priority=400)
    return {"parallel_read_safe": True}
