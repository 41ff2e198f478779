"""How fast servers answer, and when one is so far behind the others that a request should leave it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

KEPT = 32  # answers of each server
ENOUGH = 8  # of them to judge by


class Pace:
    """Seconds per token of each server's last answers, by the server's name; its queue is part of them.

    The measure is a median of medians: neither a single answer that took long nor a single server changes it. See
    `config.traffic.MovingConfig` for `factor` and `least_s`.
    """

    def __init__(self, factor: float, least_s: float) -> None:
        self._factor, self._least_s = factor, least_s
        self._answers: dict[str, deque[float]] = {}

    def answered(self, server: str, tokens: int, seconds: float) -> None:
        """Note that `server` gave `tokens` in `seconds`, from the request to the answer."""
        if tokens > 0:
            self._answers.setdefault(server, deque(maxlen=KEPT)).append(seconds / tokens)

    def leave_after_s(self, server: str, tokens: int, others: Iterable[str]) -> float | None:
        """Returns how long a request for at most `tokens` may stay at `server`; None: as long as it takes.

        `others` are those that it could go to. None where no other server is known well enough.
        """
        known = [self._answers.get(name, ()) for name in others if name != server]
        medians = [statistics.median(answers) for answers in known if len(answers) >= ENOUGH]
        if not medians:
            return None
        return max(self._least_s, self._factor * statistics.median(medians) * tokens)
