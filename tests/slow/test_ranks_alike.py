"""Runs of one process and of several agree over 40 steps, on every number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_pool import Pool
from test_distributed import LABELED, READING, compare, labeled_config, pytestmark, ranks_of, text_config

from minrnn.mixers import MIXERS

__all__ = ["pytestmark", "ranks_of"]

STEPS = 40


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer(corpus: Path, tmp_path: Path, ranks_of: Pool, mixer: str) -> None:
    compare(ranks_of, text_config(corpus, mixer), tmp_path, (2, 4), STEPS)


@pytest.mark.parametrize("settings", READING, ids=str)
def test_every_way_of_reading(corpus: Path, tmp_path: Path, ranks_of: Pool, settings: dict[str, Any]) -> None:
    compare(ranks_of, text_config(corpus, **settings), tmp_path, (2, 3), STEPS)


@pytest.mark.parametrize("name", LABELED)
def test_every_task(tmp_path: Path, ranks_of: Pool, name: str) -> None:
    compare(ranks_of, labeled_config(name), tmp_path, (2, 3), STEPS)
