"""`minrnn engines`: list the engines, their devices, and why one is unavailable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from minrnn.cli.arguments import parse
from minrnn.ops import engines
from minrnn.training import Output


@dataclass(frozen=True)
class EnginesCommand:
    """List the engines, their devices, and why one is unavailable; MINRNN_ENGINE selects one."""


def run(args: Sequence[str]) -> int:
    """Run `minrnn engines`."""
    parse(EnginesCommand, "engines", args)
    table = Table("engine", "device", "in use", "detail")
    for engine in engines():
        table.add_row(engine.name, engine.device, "yes" if engine.serves else "no", engine.detail)
    Output().print(table)
    return 0
