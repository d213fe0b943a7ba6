"""The law of test_accuracy.py for a million steps."""

from __future__ import annotations

import pytest
from laws import GATES
from test_accuracy import check_accuracy


@pytest.mark.parametrize("gate", GATES)
def test_error_does_not_grow_to_a_million_steps(gate: str) -> None:
    check_accuracy(gate, 2**20)
