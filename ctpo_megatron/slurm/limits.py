"""Limits of a node's processes: InfiniBand wants locked memory, Ray open files."""

from __future__ import annotations

import resource

OPEN_FILES = 65_536


def raise_limits() -> None:
    """Raise the soft limits of this process and its children as far as it may."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (locked, locked))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
