"""Ports for the servers of a run."""

from __future__ import annotations

import contextlib
import random
import socket
import time

FIRST, END = 20_000, 32_000  # below the range that the system takes ports of outgoing connections from
KNOCK_S = 0.02  # between two tries to reach somebody who may not listen yet
BACKLOG = 2048  # connections that wait to be accepted: all ranks come at once


def free_port(host: str) -> int:
    """A port of `host` on which no process listens now and that no outgoing connection will take before it is used."""
    for _ in range(1000):
        port = random.randrange(FIRST, END)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no free port of {host} between {FIRST} and {END}")


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at one address of this host. Port 0: one that is free. Raises OSError where the port is taken."""
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def is_free(host: str, port: int) -> bool:
    """Whether `port` of `host` can be listened at now."""
    with contextlib.suppress(OSError), listen(host, port):
        return True
    return False


def await_listener(host: str, port: int, timeout_s: float) -> None:
    """Return once somebody listens at `port` of `host`, or after `timeout_s`: whoever connects then learns what is wrong."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left):
            return
        time.sleep(min(KNOCK_S, left))
