"""How many threads a trainer rank computes with."""

from __future__ import annotations

import os


def set_threads(count: int) -> None:
    """Let torch and OpenMP compute with `count` threads in this process. To be called before its first tensor is made."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch reads it at its first tensor: large pages for buckets of weights
    import torch

    torch.set_num_threads(count)


def threads_per_rank(ranks: int) -> int:
    """An equal share of this machine's CPUs for each of `ranks` processes, at least one thread."""
    return max(1, (os.cpu_count() or 1) // ranks)
