"""The registry of benchmarks: the table BENCHES of `minrnn bench`, whose modules are imported when used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["OURS", "Bench", "Document", "Entry", "Timings"]

OURS = "minrnn"
"""The name of our own system."""

Document = Mapping[str, Any]
"""What a benchmark writes, as JSON: see `Report`."""

Timings = dict[str, Any]
"""What was measured of one system, as JSON: see `measure`."""


class Bench(NamedTuple):
    """A benchmark: its options, what runs it, and its table."""

    options: type[Any]
    """A dataclass; its fields are the options of the command line."""
    run: Callable[[Any, Sequence[str], Console], object]
    """Takes the options, the arguments that they were read from, and where to print."""
    render: Callable[[Document], str]
    """Returns a document of this benchmark as tables in Markdown."""


class Entry(NamedTuple):
    """A line of the table BENCHES."""

    module: str
    """Module with a `BENCH`; importing it takes torch's time."""
    help: str
    """What is measured, in a line."""

    def load(self) -> Bench:
        """Import the benchmark."""
        bench: Bench = import_module(self.module).BENCH
        return bench
