"""A context manager for the number of CPU threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_THREADS = 1024
"""Maximum number of threads; torch crashes with far larger numbers (a segmentation fault at a million)."""


@contextmanager
def cpu_threads(count: int) -> Iterator[int]:
    """Set torch's number of CPU threads for the block (0: unchanged), and yield it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)
