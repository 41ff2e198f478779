"""How a sender's buckets get under way: the next one is gathered while the present one travels.

    gather 0 | wait for the turn | start 0 | gather 1 | finish 0 | start 1 | gather 2 | finish 1 | ...

So a sender holds two buckets at most. The very first one is gathered before the servers are paused (`prefetched`). Digests of a
bucket are found in a second thread while the next bucket is gathered. Those of a delta are found before the bucket is sent, as
they tell what has changed. The stream is read to its end also after a failure: the other ranks give their pieces to it in
collectives, and would wait for ever otherwise.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ctpo_megatron.engine.checksums import EngineDigests, PartDigests
from ctpo_megatron.record import PhaseTimer
from ctpo_megatron.weights.protocol import Bucket, Sent
from ctpo_megatron.weights.transports.delta import Changes
from ctpo_megatron.weights.transports.order import SenderOrder

T = TypeVar("T")


class DigestAccount(Protocol):
    """Adds up what the engines should hold when all buckets have arrived."""

    def add(self, bucket: Bucket) -> Mapping[str, PartDigests]:
        """The digests by name of the tensors in `bucket`, and perhaps of others. The tensors may change afterwards."""
        ...

    def remember(self, parts: Mapping[str, PartDigests]) -> None:
        """Take in digests by name that were found before, of tensors that have not changed since."""
        ...

    def digests(self) -> EngineDigests:
        """The digests of the engines' tensors, from all buckets so far."""
        ...


Finish = Callable[[], None]
"""Waits until a bucket has arrived at all servers. Raises WeightSyncError."""


def prefetched(stream: Iterator[T]) -> Iterator[T]:
    """The stream, of which the first item is read now, if there is one. It keeps no item that it has given out."""
    first = list(itertools.islice(stream, 1))

    def rest() -> Iterator[T]:
        if first:
            yield first.pop()
        yield from stream

    return rest()


@dataclass(slots=True)
class SendAccount:
    """The account of one publication of one sender: it reads the stream, finds digests, and counts tensors and bytes sent."""

    stream: Iterator[Bucket]
    changes: Changes
    expected: DigestAccount | None  # None: no digests are wanted
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
        """The tensors of `bucket` to send. Its digests are found, at once or beside."""
        self._settle()
        if self.expected is None:
            return self.changes.pick(bucket)
        if self.changes.enabled and not self.changes.full:
            return self._changed(self.expected, bucket)
        self.digesting = self.beside.submit(self._changed, self.expected, bucket)  # all of it is sent
        return bucket

    def _changed(self, expected: DigestAccount, bucket: Bucket) -> Bucket:
        return self.changes.pick(bucket, expected.add(bucket))

    def _settle(self) -> None:
        """Wait for the digests that are under way, and let their bucket go."""
        digesting, self.digesting = self.digesting, None
        if digesting is not None:
            digesting.result()

    def finish(self) -> Sent:
        """What was sent in all, once everything has arrived."""
        with self.timed("digest"):
            self._settle()
        self.changes.commit()
        if self.expected is not None:
            self.sent.digests = self.expected.digests()
        return self.sent

    @property
    def timed(self) -> PhaseTimer:
        """A timer whose seconds by phase are those of what is sent."""
        return PhaseTimer(self.sent.seconds)


@contextmanager
def send_account(
    buckets: Iterable[Bucket], version: int, changes: Changes, new_account: Callable[[], DigestAccount] | None
) -> Iterator[SendAccount]:
    """An account of one publication. However the body ends, the stream is read to its end; after a failure the next publication
    is a full one."""
    stream = iter(buckets)
    beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
    try:
        expected = new_account() if new_account else None
        if expected is not None:
            expected.remember(changes.held)
        yield SendAccount(stream, changes, expected, Sent(version), beside)
    except BaseException:
        changes.forget()
        raise
    finally:
        beside.shutdown(wait=False)
        for _ in stream:
            pass


def deliver(account: SendAccount, order: SenderOrder, deadline: float, start: Callable[[Bucket, int], Finish]) -> Sent:
    """What was sent, after all buckets have arrived. `start` sets the bucket of a number under way, in this sender's turn."""
    begin = time.monotonic()
    with order.take_with(account.next, deadline) as bucket:
        account.sent.seconds["wait"] = time.monotonic() - begin - account.sent.seconds.get("gather", 0.0)
        number = 0
        while bucket is not None:
            with account.timed("send"):
                finish = start(bucket, number)
            bucket, number = account.next(), number + 1
            with account.timed("send"):
                finish()
    return account.finish()
