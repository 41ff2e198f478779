"""A server whose processes all stand still, as if its host had: it neither answers nor breaks a connection."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.engines import RunningServer


def stop(running: RunningServer) -> None:
    os.killpg(running.server.pid, signal.SIGSTOP)


@contextmanager
def stopped(running: RunningServer) -> Iterator[None]:
    """The server stands still inside the body and goes on afterwards, unless it was ended meanwhile."""
    stop(running)
    try:
        yield
    finally:
        if running.server.alive():
            os.killpg(running.server.pid, signal.SIGCONT)
