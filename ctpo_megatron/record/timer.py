"""Time by phase: wall time, or that of another clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ctpo_megatron.record.heartbeat import OpenStage, Stages


class PhaseTimer:
    """Adds up time by name: `with timer("rollout"): ...`, then `timer.seconds["rollout"]`.

    `seconds`: where the sums go on from, and are kept; none: they begin at nothing. `stages`: each phase is one of these too, at
    training step `step`. `prefix`: of the stages' names. `clock`: says what time it is. `ended`: hears of each phase that is over
    and of its seconds.
    """

    def __init__(
        self,
        seconds: dict[str, float] | None = None,
        *,
        stages: Stages | None = None,
        step: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        prefix: str = "",
        ended: Callable[[str, float], None] = lambda _phase, _seconds: None,
    ) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self._stages, self._step, self._clock = stages or Stages(), step, clock
        self._prefix, self._ended = prefix, ended

    @contextmanager
    def __call__(self, phase: str) -> Iterator[OpenStage]:
        begun = self._clock()
        try:
            with self._stages(self._prefix + phase, step=self._step) as stage:
                yield stage
        finally:
            took = self._clock() - begun
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took
            self._ended(phase, took)


TAIL_BEGINS = 0.8  # share of the parts that are in when the tail begins


class TailTimer:
    """How long the last fifth of `total` parts was waited for, as `seconds`: call it with how many are in, then `end` it.

    `clock`: says what time it is.
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._from = TAIL_BEGINS * total
        self._begun: float | None = None
        self.seconds = 0.0

    def __call__(self, done: int) -> int:
        """Note that `done` parts are in; returns it."""
        if self._begun is None and done >= self._from:
            self._begun = self._clock()
        return done

    def end(self) -> None:
        """All parts are in."""
        self.seconds = 0.0 if self._begun is None else self._clock() - self._begun
