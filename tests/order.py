"""Tests run in random order, so that none comes to depend on what another left behind.

Modules are shuffled, and tests within each, so that what a module shares is still made once. An order comes
from a number, which a run shows first; MINRNN_ORDER=NUMBER repeats it, of a part of the tests too.
"""

from __future__ import annotations

import hashlib
import os
import random

import pytest


def place(number: str, name: str) -> bytes:
    """Return what a name is sorted by: its digest, so that leaving out some does not move the others."""
    return hashlib.sha256(f"{number} {name}".encode()).digest()


class Order:
    """One order, the same in all processes of a run."""

    def __init__(self, number: str) -> None:
        self.number = number

    @pytest.hookimpl(trylast=True)  # as soon as there is a terminal; pytest's own header is left out by -q
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if terminal := session.config.pluginmanager.get_plugin("terminalreporter"):
            terminal.write_line(f"in the order of MINRNN_ORDER={self.number}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        node.workerinput["order"] = self.number  # type: ignore[attr-defined]

    @pytest.hookimpl(tryfirst=True)  # before pytest brings together what shares a parameter's fixture
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(
            key=lambda item: (
                place(self.number, item.nodeid.split("::")[0]),
                place(self.number, item.nodeid),
            )
        )


def register(config: pytest.Config) -> None:
    """Let a run of pytest be in the order that MINRNN_ORDER numbers, or in one of its own."""
    own = getattr(config, "workerinput", {}).get("order") or os.environ.get("MINRNN_ORDER")
    config.pluginmanager.register(Order(own or str(random.SystemRandom().randrange(10**6))), "order")
