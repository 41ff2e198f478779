"""For how long servers have something to do."""

from __future__ import annotations

import asyncio
from collections import Counter

from ctpo_megatron.engine.load import SHOWN


class BusyTimes:
    """How long each server has had a request, on the clock of the event loop. A server is known by its name, which ends with its
    number: one that is started again goes on where it was."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()
        self._since: dict[str, float] = {}  # of those with a request
        self._seconds: dict[str, float] = {}
        self._from: float | None = None

    def asked(self, server: str) -> None:
        """Note that a request goes to it."""
        self._open[server] += 1
        if self._open[server] == 1:
            self._since[server] = _now()
            self._seconds.setdefault(server, 0.0)

    def answered(self, server: str) -> None:
        """Note that one of its requests is over."""
        self._open[server] -= 1
        if self._open[server] == 0:
            self._seconds[server] += _now() - self._since.pop(server)

    def begin(self) -> None:
        """Count from now on: a step begins."""
        self._from = _now()
        self._since = dict.fromkeys(self._since, self._from)
        self._seconds = dict.fromkeys(self._seconds, 0.0)

    def metrics(self) -> dict[str, float]:
        """Returns the share of the time since `begin` for each of the first SHOWN servers that was ever asked for something."""
        now = _now()
        whole = 0.0 if self._from is None else now - self._from
        found = {}
        for server, seconds in self._seconds.items() if whole > 0 else ():
            number = server.rpartition(" ")[2]
            if number.isdigit() and int(number) < SHOWN:
                found[f"servers/busy/server_{number}"] = (seconds + now - self._since.get(server, now)) / whole
        return found


def _now() -> float:
    return asyncio.get_running_loop().time()
