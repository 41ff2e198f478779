"""Ports for the servers of a run."""

from __future__ import annotations

import contextlib
import random
import socket

FIRST, END = 20_000, 32_000  # below the range that the system takes ports of outgoing connections from


def free_port(host: str) -> int:
    """A port of `host` on which no process listens now and that no outgoing connection will take before it is used."""
    for _ in range(1000):
        port = random.randrange(FIRST, END)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no free port of {host} between {FIRST} and {END}")
