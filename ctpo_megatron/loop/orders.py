"""What a run is asked to do while it runs: to save, and to stop in order. The loop looks here between phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The wish that a run saves all it has and ends. `within_s`: seconds until it has to be gone; None: it may take its time.

    `again`: the command is to begin anew by itself.
    """

    reason: str
    within_s: float | None = None
    again: bool = False


class Orders:
    """The orders that have come so far; belongs to one event loop. The first wish to stop counts.

    `on_stop` hears of it.
    """

    def __init__(self, on_stop: Callable[[StopRequest], None] = lambda _request: None) -> None:
        self._on_stop = on_stop
        self._save = False
        self.stop_request: StopRequest | None = None

    def stop(self, request: StopRequest) -> None:
        """Let the run stop when the phase that it is in allows it."""
        if self.stop_request is None:
            self.stop_request = request
            self._on_stop(request)

    def save(self) -> None:
        """Let the run save a checkpoint after the step that it is in."""
        self._save = True

    def take_save(self) -> bool:
        """Returns whether a checkpoint was asked for, once for each time."""
        asked, self._save = self._save, False
        return asked
