"""Wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ctpo_megatron.record.heartbeat import Stages


class PhaseTimer:
    """Adds up wall time by name: `with timer("rollout"): ...`, then `timer.seconds["rollout"]`.

    `seconds`: where the sums go on from, and are kept; none: they begin at nothing. `stages`: each phase is one of these too, at
    training step `step`.
    """

    def __init__(self, seconds: dict[str, float] | None = None, *, stages: Stages | None = None, step: int | None = None) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self._stages, self._step = stages or Stages(), step

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            with self._stages(phase, step=self._step):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun
