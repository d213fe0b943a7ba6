"""Published figures, each with its source and how sure it is."""

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
"""What a reader is told: read in the source; not checked against it; computed from what was read."""


@dataclass(frozen=True)
class Published:
    """A figure that somebody else has published."""

    text: str
    """The figure, as it is printed."""
    certainty: Certainty
    """How sure it is, a key of LABELS."""
    source: str = PAPER
    """Where it stands."""

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
    """Return a figure with its label, or nothing where there is none."""
    return "" if figure is None else str(figure)
