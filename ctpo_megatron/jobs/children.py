"""What a command leaves behind where it could not end it in order."""

from __future__ import annotations

import psutil

BY_THEMSELVES_S = 5.0  # servers end, and tidy up, when the actor that holds them has ended
END_WITHIN_S = 5.0


def end_children() -> None:
    """Wait a bounded time for the end of all processes below this one, then kill those that are left."""
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=BY_THEMSELVES_S)
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=END_WITHIN_S)
