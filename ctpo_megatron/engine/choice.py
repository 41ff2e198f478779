"""Which server a request goes to: home, where its session's earlier tokens are cached, as long as there is room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """A server as the choice sees it."""

    serves: bool
    in_flight: int = 0  # requests at it
    limit: int | None = None  # of these; None: no bound
    left: bool = False  # whether the request comes from there, because it was slow

    @property
    def has_room(self) -> bool:
        """Returns whether it may be sent one more."""
        return self.limit is None or self.in_flight < self.limit

    @property
    def fullness(self) -> float:
        """Returns how many requests are at it, over its bound where it has one."""
        return self.in_flight / (self.limit or 1)


def choose(places: Sequence[Place], session: int) -> int:
    """Returns the number of the server for a request of `session`, one that serves; at least one has to.

    Its home is the same for all requests of a session. Where home does not serve, its sessions are spread evenly over those that
    do; where the place so found is full or was left, the emptiest other one with room is taken. Where all are full, the
    emptiest is: it is waited for (`Fleet.acquire`).
    """
    serving = [number for number, place in enumerate(places) if place.serves]
    if not serving:
        raise ValueError("no server serves")
    home = session % len(places)
    first = home if places[home].serves else serving[session // len(places) % len(serving)]
    if places[first].has_room and not places[first].left:
        return first
    others = [number for number in serving if not places[number].left] or serving
    return min(others, key=lambda number: (not places[number].has_room, places[number].fullness, number != first, number))
