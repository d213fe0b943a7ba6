"""Published figures, each with its source and certainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAPER = "Were RNNs All We Needed?, arXiv 2410.01201, version 3"

Certainty = Literal["published", "recalled", "derived"]
LABELS: dict[Certainty, str] = {
    "published": "as published",
    "recalled": "as recalled, unconfirmed",
    "derived": "derived from published figures",
}
"""Labels in tables: read in the source; not checked against it; computed from published figures."""


@dataclass(frozen=True)
class Published:
    """A figure published by others."""

    text: str
    """The figure, as printed."""
    certainty: Certainty
    """Its certainty, a key of LABELS."""
    source: str = PAPER
    """Its source."""

    def __str__(self) -> str:
        return f"{self.text} ({LABELS[self.certainty]})"


def published(text: str, source: str = PAPER) -> Published:
    """Return a figure that was read in its source, or in a public account of it."""
    return Published(text, "published", source)


def recalled(text: str, source: str = PAPER) -> Published:
    """Return a figure that was not checked against its source."""
    return Published(text, "recalled", source)


def derived(text: str, source: str = PAPER) -> Published:
    """Return a figure that was computed from published ones."""
    return Published(text, "derived", source)


def shown(figure: Published | None) -> str:
    """Return a figure with its label; empty for None."""
    return "" if figure is None else str(figure)
