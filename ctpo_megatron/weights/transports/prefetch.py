"""How a sender's buckets get under way: the next one is gathered while the present one travels.

    gather 0 | wait for the turn | start 0 | gather 1 | finish 0 | start 1 | gather 2 | finish 1 | ...

So a sender holds two buckets at most. The very first one is gathered before the servers are paused (`begun`). A bucket's digests
are found in a thread beside, until the next one is gathered; only where deltas are sent they come first, as they tell what has
changed. Whatever goes wrong, the stream is read to its end: other ranks give their pieces to it and would wait for each other's
collectives otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ctpo_megatron.weights.protocol import Bucket, Sent
from ctpo_megatron.weights.transports.delta import Changes
from ctpo_megatron.weights.transports.order import SenderOrder


class Expected(Protocol):
    """Adds up what the engines should hold when all buckets have arrived."""

    def add(self, bucket: Bucket) -> Mapping[str, tuple[int, ...]]:
        """Take note of these tensors; they may change afterwards. Returns digests by name, of these and perhaps of others."""
        ...

    def digests(self) -> list[dict[str, int]]:
        """Of all tensors so far, as `Sent.digests`."""
        ...


Finish = Callable[[], None]


def begun(stream: Iterator[Bucket]) -> Iterator[Bucket]:
    """The stream, whose first bucket is read now; it keeps none that it has given."""
    first = [next(stream)]

    def rest() -> Iterator[Bucket]:
        yield first.pop()
        yield from stream

    return rest()


@dataclass(slots=True)
class SendAccount:
    """Reads a stream of buckets and keeps the account: digests of all, and of all that is sent number and bytes."""

    stream: Iterator[Bucket]
    changes: Changes
    expected: Expected | None
    sent: Sent
    beside: Executor  # of one thread
    digesting: Future[object] | None = None  # the last bucket's digests

    def next(self) -> Bucket | None:
        """The next bucket with anything to send; None at the end."""
        while True:
            with self.timed("gather"):
                bucket = next(self.stream, None)
            if bucket is None:
                return None
            if not bucket:  # pieces given away
                continue
            with self.timed("digest"):
                bucket = self._digest(bucket)
            if bucket:
                self.sent.tensors += len(bucket)
                self.sent.bytes += sum(tensor.nbytes for _, tensor in bucket)
                return bucket

    def _digest(self, bucket: Bucket) -> Bucket:
        """Have its digests found, and say what of it to send."""
        self._settle()
        if self.expected is None:
            return self.changes.pick(bucket)
        if self.changes.enabled:
            return self.changes.pick(bucket, self.expected.add(bucket))
        self.digesting = self.beside.submit(self.expected.add, bucket)
        return bucket

    def _settle(self) -> None:
        """Wait for the digests that are under way, and let their bucket go."""
        digesting, self.digesting = self.digesting, None
        if digesting is not None:
            digesting.result()

    def finish(self) -> Sent:
        """All has arrived."""
        with self.timed("digest"):
            self._settle()
        self.changes.commit()
        if self.expected is not None:
            self.sent.digests = self.expected.digests()
        return self.sent

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of the body to `phase`."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.sent.seconds[phase] = self.sent.seconds.get(phase, 0.0) + time.monotonic() - begin


@contextmanager
def intake(
    buckets: Iterable[Bucket], version: int, changes: Changes, new_expected: Callable[[], Expected] | None
) -> Iterator[SendAccount]:
    """An account of one publication. When the body fails, the stream is read to its end, and the next publication is full."""
    stream = iter(buckets)
    beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
    try:
        yield SendAccount(stream, changes, new_expected() if new_expected else None, Sent(version), beside)
    except BaseException:
        changes.forget()
        raise
    finally:
        beside.shutdown(wait=False)
        for _ in stream:
            pass


def deliver(account: SendAccount, turns: SenderOrder, deadline: float, start: Callable[[Bucket, int], Finish]) -> Sent:
    """Pass on all buckets in this sender's turn; `start` sets one under way and returns how to wait for its arrival."""
    begin = time.monotonic()
    with turns.take(deadline, account.next) as bucket:
        account.sent.seconds["wait"] = time.monotonic() - begin - account.sent.seconds.get("gather", 0.0)
        number = 0
        while bucket is not None:
            with account.timed("send"):
                finish = start(bucket, number)
            bucket, number = account.next(), number + 1
            with account.timed("send"):
                finish()
    return account.finish()
