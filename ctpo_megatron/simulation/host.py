"""Processors that servers, trainer and tools share, as they do on a host without GPUs.

Each of them would keep some cores busy; where these are more than there are, all become slower alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Host:
    """`cores`: how many there are; None: everybody has devices of its own, and nobody slows another down.

    Belongs to one event loop.
    """

    def __init__(self, cores: float | None = None) -> None:
        self._cores = cores
        self._wanted = 0.0
        self._hear: list[Callable[[], None]] = []
        self._changed = asyncio.Event()
        self.slowness = 1.0  # seconds that a second of work takes

    def listen(self, before: Callable[[], None]) -> None:
        """Let `before` be called whenever `slowness` is about to change, and again when it has."""
        self._hear.append(before)

    def take(self, cores: float) -> None:
        """Note that `cores` more are kept busy; negative: fewer."""
        if self._cores is None:
            return
        self._wanted += cores
        slowness = max(1.0, self._wanted / self._cores)
        if slowness == self.slowness:
            return
        for each in self._hear:
            each()
        self.slowness = slowness
        for each in self._hear:
            each()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def work(self, seconds: float, cores: float = 1.0) -> None:
        """Return when work is done that keeps `cores` busy for `seconds`, where nobody else wants them."""
        if self._cores is None:
            await asyncio.sleep(seconds)
            return
        loop, left = asyncio.get_running_loop(), seconds
        self.take(cores)
        try:
            while left > 1e-9:
                begun, slowness, changed = loop.time(), self.slowness, self._changed
                try:
                    async with asyncio.timeout(left * slowness):
                        await changed.wait()
                except TimeoutError:
                    return
                left -= (loop.time() - begun) / slowness
        finally:
            self.take(-cores)
