"""Work that nobody waits for: done in order by a thread of its own, out of a queue that has an end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ctpo_megatron.errors import StorageError, told

RETRY_S = 2.0  # between two tries of what a disk did not take
LONGEST_REASON = 300  # characters of an error's first line


class Aside:
    """Does what it is given, with at most `most` pieces of work waiting; what comes while so many wait is dropped and counted.

    A piece that fails because of the disk, in a way that somebody may mend, is tried again every `retry_s` until it succeeds, and
    what comes behind it waits. A piece that fails otherwise is counted as lost, and the next one has its turn. `put` and `lost`
    never wait for a piece.
    """

    def __init__(self, name: str, most: int, *, retry_s: float = RETRY_S) -> None:
        self._most, self._retry_s = most, retry_s
        self._queue: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closing = self._abandoned = False
        self._lost, self._reason = 0, ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Have `work` done when its turn comes. It is dropped where too many wait, and after `close`."""
        with self._changed:
            if self._closing or len(self._queue) >= self._most:
                self._lost += 1
                self._reason = self._reason or f"{len(self._queue)} pieces of work wait already"
                return
            self._queue.append(work)
            self._changed.notify()

    def lost(self) -> tuple[int, str]:
        """Returns how many pieces were dropped or failed since it was asked last, and the newest reason; (0, ""): none."""
        with self._changed:
            lost, self._lost = self._lost, 0
            return lost, self._reason if lost else ""

    @property
    def idle(self) -> bool:
        """Whether its thread has ended: nothing is under way any more."""
        return not self._thread.is_alive()

    def close(self, within_s: float) -> None:
        """Let what waits be done, for `within_s` at most; what is left then is lost. Safe to call twice.

        A piece that is under way when the time is over may still end by itself; nothing is done behind it.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(within_s)
        with self._changed:
            self._abandoned = True
            self._lost += len(self._queue)
            self._queue.clear()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            done = self._attempt(work)
            with self._changed:
                if self._abandoned:
                    return
                if done:
                    self._queue.popleft()
                elif self._closing:
                    return  # that was the last try; `close` counts what is left
                else:
                    self._changed.wait_for(lambda: self._closing, self._retry_s)

    def _next(self) -> Callable[[], None] | None:
        """Returns the first piece, which stays in the queue until it is done; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            return self._queue[0] if self._queue and not self._abandoned else None

    def _attempt(self, work: Callable[[], None]) -> bool:
        """Returns whether the work needs no other try."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the thread
            mendable = isinstance(error, StorageError) and error.mendable
            with self._changed:
                self._lost += not mendable
                self._reason = first_line(error)
            return not mendable
        with self._changed:
            self._reason = self._reason if self._lost else ""
        return True


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says to a person, not longer than LONGEST_REASON."""
    first, *_ = [*told(error)[0].splitlines(), ""]
    return first[:LONGEST_REASON]
