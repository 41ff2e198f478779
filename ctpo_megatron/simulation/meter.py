"""The processor time of the simulation itself, apart from that of the code it runs."""

from __future__ import annotations

import time


class Meter:
    """Adds up the CPU seconds that are spent inside `with meter:`; what the thread spends outside is the controller's.

    Only code that does not wait belongs inside.
    """

    def __init__(self) -> None:
        self.simulated_s = 0.0
        self._began = time.thread_time()
        self._entered = 0.0
        self._depth = 0

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._entered = time.thread_time()

    def __exit__(self, *_error: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.simulated_s += time.thread_time() - self._entered

    @property
    def controller_s(self) -> float:
        """Returns the CPU seconds of this thread since it was made that were not spent inside."""
        return time.thread_time() - self._began - self.simulated_s
