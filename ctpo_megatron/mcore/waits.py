"""How long a rank waits for others within a pass, as Megatron's schedules tell it.

Megatron calls `config.timers(name)` and starts and stops what it is given. Counted are its exchanges with pipeline neighbours and
the sums of gradients over replicas: the transfer itself, and the waiting for whoever is behind. What ranks wait for one another
within a layer, as tensor and expert parallelism make them, lies in the passes and is not seen here.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

MOST = 10_000  # times that a GPU's events hold: where nobody asks, as in supervised training, the oldest go
COUNTED = ("-recv", "-send", "-sync", "-all-reduce")  # ends of Megatron's names; none of these holds another


class Waits:
    """Megatron's `config.timers`: adds up what is COUNTED, by the host's clock, or by the GPU's, which works later.

    It costs the host 2 us for each pair of Megatron's calls, and on a GPU two events.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._timers: dict[str, _Timer | _Nothing] = {}
        self._seconds = 0.0
        self._events: deque[tuple[Any, Any]] = deque(maxlen=MOST)  # of a GPU's stream, not read yet

    def __call__(self, name: str, log_level: int | None = None) -> _Timer | _Nothing:
        """Returns the timer of that name, as Megatron wants it."""
        if name not in self._timers:
            self._timers[name] = _Timer(self) if name.endswith(COUNTED) else _Nothing()
        return self._timers[name]

    def mark(self) -> Any:
        """Returns now: seconds, or an event of the GPU."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begun: Any, ended: Any) -> None:
        """Count the time between two marks."""
        if self._on_gpu:
            self._events.append((begun, ended))
        else:
            self._seconds += ended - begun

    def taken(self) -> float:
        """Returns the seconds since it was asked last. Waits for the GPU: ask behind a step."""
        for begun, ended in self._events:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _Timer:
    def __init__(self, waits: Waits) -> None:
        self._waits, self._begun = waits, None

    def start(self, barrier: bool = False) -> None:
        """Begin; Megatron's `barrier` would cost what is to be measured."""
        self._begun = self._waits.mark()

    def stop(self) -> None:
        """End; the time counts."""
        self._waits.add(self._begun, self._waits.mark())


class _Nothing:
    def start(self, barrier: bool = False) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""
