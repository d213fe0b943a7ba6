"""Signals to torchrun itself, which passes SIGTERM on to its ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from rank_pool import Pool
from test_torchrun import pytestmark, ranks_of, stop_and_go_on, whole

__all__ = ["pytestmark", "ranks_of", "whole"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_torchrun_saves_all_after_one_step(
    corpus: Path, tmp_path: Path, ranks_of: Pool, whole: Path, name: str
) -> None:
    number = signal.Signals[name]
    stop_and_go_on(corpus, tmp_path, ranks_of, whole, name, lambda torchrun, _: os.kill(torchrun, number))
