"""What one client may ask of the endpoint, so that it harms no other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of requests and connections. All have a default that no harness known to us comes near."""

    body_bytes: int = 8 * 2**20
    """Largest body of a request."""
    brackets: int = 50_000
    """Opening brackets and braces in a body, also those in its text. Decoding holds the interpreter, 20 ms for so many lists."""
    commas: int = 500_000
    """Commas in a body, also those in its text; for the same reason."""
    nesting: int = 64
    """Depth of lists and objects in a body."""
    messages: int = 4096
    """Messages of one history."""
    in_flight: int = 32
    """Requests of one key that are worked on at a time; more wait."""
    waiting: int = 256
    """Requests of one key that may wait for that; more are refused."""
    connections: int = 4096
    """Connections of all clients together; more are closed at once."""
    body_s: float = 60.0
    """Seconds in which a body has to arrive."""
    idle_s: float = 75.0
    """Seconds in which a connection has to bring the whole head of a request. Longer than clients keep idle connections."""
    write_s: float = 60.0
    """Seconds in which a client has to make room for what is written to it."""
    keep_alive_s: float = 15.0
    """Seconds after which a client that waits for an answer gets a sign of life, and again."""
