"""The wish that a run ends, on its way from a signal to the job that runs."""

from __future__ import annotations

from collections.abc import Callable


class StopSignal:
    """Tells a listener the name of the signal that asked for the end. Who listens answers for the end."""

    def __init__(self) -> None:
        self._listener: Callable[[str], None] | None = None

    def listen(self, listener: Callable[[str], None] | None) -> None:
        """Call `listener` with the signal's name when it comes; None: nobody listens any more, and the job is cancelled."""
        self._listener = listener

    def tell(self, name: str) -> bool:
        """The signal called `name` has come; returns whether somebody listens."""
        if self._listener is not None:
            self._listener(name)
        return self._listener is not None
