"""What a command leaves behind where it could not end it in order."""

from __future__ import annotations

import psutil

END_WITHIN_S = 5.0


def end_children() -> None:
    """Kill all processes below this one, and wait a bounded time for their end."""
    below = psutil.Process().children(recursive=True)
    for process in below:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(below, timeout=END_WITHIN_S)
