"""What the driver's host is like."""

from __future__ import annotations

import psutil


def memory_used() -> float:
    """Returns the share of the host's memory that is in use and cannot be had: 0 to 1. It reads one small file."""
    memory = psutil.virtual_memory()
    return 1.0 - memory.available / memory.total
