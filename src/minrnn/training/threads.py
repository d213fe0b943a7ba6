"""How many CPU threads torch uses, for the length of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_THREADS = 1024
"""More than these torch does not survive (a million is a segmentation fault), and no machine has use for."""


@contextmanager
def cpu_threads(count: int) -> Iterator[int]:
    """Let torch, and so the engine, use this many CPU threads (0: as many as before); yield how many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)
