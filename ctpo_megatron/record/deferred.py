"""Work that is done once for many who want it, a moment after the first of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from ctpo_megatron.errors import StorageError


class Deferred:
    """`work`, done `within_s` after it was wanted, or at once where somebody cannot wait or no event loop runs.

    It is done by the event loop, so it is later by as long as the loop is held up. Belongs to one event loop.
    """

    def __init__(self, work: Callable[[], None], within_s: float) -> None:
        self._work, self._within_s = work, within_s
        self._timer: asyncio.TimerHandle | None = None
        self._failed = False  # when nobody was there to hear of it

    def want(self) -> None:
        """Have the work done soon. Does it now, and raises what it raises, where it failed when its time had come."""
        if self._timer is not None:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.now()
            return
        if self._failed:
            self.now()
        else:
            self._timer = loop.call_later(self._within_s, self._due)

    def now(self) -> None:
        """Do the work, wanted or not, and raise what it raises."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._work()
        self._failed = False

    def _due(self) -> None:
        self._timer, self._failed = None, True
        with contextlib.suppress(StorageError):  # whoever comes next does it again, and hears of what holds on
            self.now()
