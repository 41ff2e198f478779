"""What happens in a run, on its way to the run's sinks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ctpo_megatron.record.events import Event, StepTrained
from ctpo_megatron.record.recorder import Sink
from ctpo_megatron.record.sink_events import PointsLost

OTHERWISE = (StepTrained, PointsLost)  # sinks have each step's numbers and phases; one that loses things would lose these too


class SinkFeed:
    """A reader of a run's events that hands them to its sinks, with the times at which they happened.

    What happens before `begin` is held for them: there are sinks only when the run's directory is there.
    """

    def __init__(self) -> None:
        self.sinks: tuple[Sink, ...] = ()
        self._held: list[tuple[Event, float]] | None = []  # None: `begin` was called

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        if isinstance(event, OTHERWISE):
            return
        at = time.time()
        if self._held is not None:
            self._held.append((event, at))
        for sink in self.sinks:
            sink.event(event, at)

    def begin(self, sinks: Sequence[Sink]) -> None:
        """Hand what was held to `sinks`, and what happens from now on as it happens."""
        held, self._held, self.sinks = self._held or [], None, tuple(sinks)
        for event, at in held:
            for sink in self.sinks:
                sink.event(event, at)
