"""How many requests of one key are worked on at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.refusals import Refusal


@dataclass(slots=True)
class _Gate:
    open: asyncio.Semaphore
    inside: int = field(default=0)  # those that wait too


class Gates:
    """A gate for each key that has requests now."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._gates: dict[str, _Gate] = {}

    @asynccontextmanager
    async def through(self, name: str) -> AsyncIterator[None]:
        """Inside it, a request of the attempt `name` is worked on. Raises Refusal when too many wait for that already."""
        gate = self._gates.get(name)
        if gate is None:
            gate = self._gates[name] = _Gate(asyncio.Semaphore(self._limits.in_flight))
        if gate.inside >= self._limits.in_flight + self._limits.waiting:
            raise Refusal(f"{gate.inside} requests with this key are open; wait for their answers before sending more")
        gate.inside += 1
        try:
            async with gate.open:
                yield
        finally:
            gate.inside -= 1
            if not gate.inside:
                self._gates.pop(name, None)
