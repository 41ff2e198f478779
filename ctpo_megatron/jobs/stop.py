"""The wish that a run ends, on its way from a signal to the job that runs."""

from __future__ import annotations

from collections.abc import Callable


class StopSignal:
    """Tells its listeners the name of the signal that asked for the end, before the job is cancelled."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the signal's name when it comes."""
        self._listeners.append(listener)

    def tell(self, name: str) -> None:
        """The signal called `name` has come."""
        for listener in self._listeners:
            listener(name)
