"""How far the clocks of the trainer's ranks are ahead of the driver's."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ctpo_megatron.cluster.calls import Process, call_all
from ctpo_megatron.cluster.trainer.tracing import read_clock
from ctpo_megatron.record.traces import Clock

ROUNDS = 5
GROUP = "pulse"  # the actors' concurrency group: it answers while the rank works


async def measure_clocks(ranks: Sequence[Process], timeout_s: float) -> list[Clock]:
    """Returns the clocks of `ranks`, each asked ROUNDS times; what took the shortest time to ask is the closest.

    An answer was read between question and receipt, so half of that is the error. Where the rank's host was started when the
    driver's was, both read one clock, if what was measured agrees.
    """
    found: list[Clock | None] = [None] * len(ranks)
    for _ in range(ROUNDS):
        begun = time.monotonic_ns()  # Ray's calls go out one after another: the later ones seem to take longer than they do
        calls = [(rank, rank.actor.clock.options(concurrency_group=GROUP).remote()) for rank in ranks]
        answers = await call_all(calls, timeout_s)
        ended = time.monotonic_ns()
        own = read_clock()[1]
        for index, (read, boot) in enumerate(answers):
            clock = compare(begun, ended, read, same_host=bool(boot) and boot == own)
            if (known := found[index]) is None or clock.error < known.error:
                found[index] = clock
    return [each or Clock() for each in found]


def compare(begun: int, ended: int, read: int, *, same_host: bool) -> Clock:
    """Returns the clock that showed `read` at a moment between `begun` and `ended` of the driver's; all in nanoseconds."""
    offset, error = read - (begun + ended) // 2, (ended - begun) // 2 + 1
    if same_host and abs(offset) <= error:
        return Clock(0, 0, same=True)
    return Clock(offset, error, same=False)


def between(before: Clock, after: Clock) -> Clock:
    """Returns the clock in the time between two measurements: how far they differ is part of the error."""
    if before.same and after.same:
        return before
    drift = abs(after.offset - before.offset)
    return Clock((before.offset + after.offset) // 2, max(before.error, after.error) + drift // 2, same=False)
