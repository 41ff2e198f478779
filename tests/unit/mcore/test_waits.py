"""What Megatron's timers add up to, by a clock that is set."""

from __future__ import annotations

import time

import pytest
import torch

from ctpo_megatron.mcore.waits import Waits


def test_exchanges_and_sums_of_gradients_count_and_passes_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    waits = Waits(torch.device("cpu"))
    counted = ("forward-recv", "backward-send", "forward-send-backward-recv", "all-grads-sync", "embedding-grads-all-reduce")
    for seconds, name in enumerate((*counted, "forward-compute", "backward-compute", "forward-backward"), start=1):
        waits(name, log_level=1).start(barrier=True)
        now[0] += seconds
        waits(name).stop()
    assert waits.taken() == 1 + 2 + 3 + 4 + 5
    assert waits.taken() == 0.0


def test_on_a_gpu_its_own_times_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is far ahead of it: the events are read when somebody asks."""
    recorded = list["Event"]()

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.done = False

        def record(self) -> None:
            recorded.append(self)

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, other: Event) -> float:
            assert other.done
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    waits = Waits(torch.device("cuda", 0))
    for _ in range(2):
        waits("all-grads-sync").start()
        waits("all-grads-sync").stop()
    assert len(recorded) == 4
    assert not any(each.done for each in recorded)
    assert waits.taken() == 0.5
    assert waits.taken() == 0.0
