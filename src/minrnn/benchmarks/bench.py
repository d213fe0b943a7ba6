"""The interface of a benchmark, and the entries of the registry BENCHES, imported on demand."""

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
"""The result of a benchmark, as JSON: see `Report`."""

Timings = dict[str, Any]
"""The measurements of one system, as JSON: see `measure`."""


class Bench(NamedTuple):
    """A benchmark: its options, the function that runs it, and its table."""

    options: type[Any]
    """A dataclass whose fields are the command-line options."""
    run: Callable[[Any, Sequence[str], Console], object]
    """(options, command-line arguments, console) -> report."""
    render: Callable[[Document], str]
    """Renders a document of this benchmark as Markdown tables."""


class Entry(NamedTuple):
    """An entry of the registry BENCHES."""

    module: str
    """Module with a `BENCH`; imported on demand, because it imports torch."""
    help: str
    """A one-line description."""

    def load(self) -> Bench:
        """Import the benchmark."""
        bench: Bench = import_module(self.module).BENCH
        return bench
