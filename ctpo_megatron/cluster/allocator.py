"""Memory of large tensors on CPUs, which a process keeps for the next ones."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h


def keep_memory() -> bool:
    """Have malloc take no memory of its own for each large tensor, and give none back; returns whether it will.

    By default glibc asks the system for every tensor of more than 32 MiB and returns it behind its last use. A training step then
    writes zeros into a gigabyte of new pages, again and again: a seventh of its time. What a process needs most it holds from
    then on. The user's own MALLOC_ variables win; other C libraries than glibc have no `mallopt`.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
