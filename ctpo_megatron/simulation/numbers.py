"""What is kept of a simulated run, in memory: the numbers of its steps, and its ledger."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from ctpo_megatron.loop.admission import Admitted
from ctpo_megatron.loop.ledger import Ledger
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.record.events import Event, StepTrained
from ctpo_megatron.record.values import Value
from ctpo_megatron.simulation.server import SimulatedServer, Used
from ctpo_megatron.types import TrajectoryGroup


@dataclass(slots=True)
class Step:
    """One training step. Seconds are virtual; `servers`: what all servers together had done by its end, since the beginning."""

    step: int
    ended: float
    metrics: dict[str, float]
    servers: Used
    trajectories: int
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    tail: float = 0.0


class NumbersOnly(RunRecord):
    """Keeps the numbers of each step in memory."""

    def __init__(self, servers: dict[str, SimulatedServer]) -> None:
        self._servers = servers
        self.steps: list[Step] = []

    def step(self, step: int, groups: list[TrajectoryGroup], metrics: dict[str, float], expert_load: object = None) -> None:
        """Keep training step `step`, counted from 1."""
        trajectories = sum(len(group.trajectories) for group in groups)
        for server in self._servers.values():
            server.settle()
        used = sum((server.used for server in self._servers.values()), Used())
        self.steps.append(Step(step, asyncio.get_running_loop().time(), metrics, used, trajectories))

    def obey(self, orders: Orders) -> None:
        """Nothing is wanted: a simulation has no alarms."""

    def alarms_memory(self) -> None:
        """Returns None: there are none that could remember."""

    def phase(self, step: int, phase: str, seconds: float) -> None:
        """Keep nothing: the event of a step has its phases."""

    def ratios(self, step: int, stats: Mapping[str, Value]) -> None:
        """Nothing is trained, so there are no ratios."""

    def close(self) -> None:
        """Nothing is open."""

    def heard(self, event: Event) -> None:
        """Note how long a step took in all."""
        if isinstance(event, StepTrained):
            made = self.steps[event.step - 1]
            made.seconds, made.phases, made.tail = event.seconds, event.phases, event.rollout_tail


class NobodyGrades:
    """Compares nothing: a simulation evaluates nothing."""

    async def same(self, one: str, other: str) -> bool | None:
        """Returns None."""
        return None


class CountingLedger(Ledger):
    """A ledger in memory that knows how many groups were ever open at a time."""

    most_open = 0

    def admit(self, group: Admitted) -> None:
        """Enter a group that was admitted."""
        super().admit(group)
        self.most_open = max(self.most_open, len(self._open))


@contextlib.contextmanager
def silent(_label: str, _total: int) -> Iterator[Callable[[int], None]]:
    """Yields what shows nothing, in the place of a bar for people."""
    yield lambda _done: None
