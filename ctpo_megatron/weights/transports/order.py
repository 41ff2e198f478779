"""Order of the senders: one after the other, in a fixed order, each told how the one before it fared.

A server handles requests one at a time, and a broadcast holds it until it is over: two senders at once would wait for each other
on two servers that saw them in different orders. So joining and sending go round the senders in the order of their ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.parallel.plain import broadcast_plain
from ctpo_megatron.rendezvous.store import join_store, serve_store

T = TypeVar("T")
VERDICT_TIME_S = 10.0  # that a sender may take, beyond its own bound, to find out which server failed and to say so


class SenderOrder:
    """Place `place` of `count` in the order. `store` is shared by all senders; each calls `take` equally often."""

    def __init__(self, store: dist.Store | None, place: int, count: int) -> None:
        self._store = store
        self.place = place
        self.count = count
        self._round = 0

    @classmethod
    def alone(cls) -> SenderOrder:
        """The order of a single sender."""
        return cls(None, 0, 1)

    @property
    def last(self) -> bool:
        """Whether no sender comes after this one."""
        return self.place == self.count - 1

    def take(self, deadline: float) -> AbstractContextManager[None]:
        """This sender's turn: the body runs when the senders before have had theirs in this round.

        `deadline` counts as `time.monotonic()` does. Raises WeightSyncError when a sender before failed, with the servers it
        blamed, or did not end in time. However the body ends, the next sender learns of it.
        """
        return self.take_with(lambda: None, deadline)

    @contextmanager
    def take_with(self, prepare: Callable[[], T], deadline: float) -> Iterator[T]:
        """As `take`, but `prepare` runs before the wait and its result is given to the body; its failure counts as the body's."""
        self._round += 1
        outcome: dict[str, Any] = {"problem": None}
        try:
            prepared = [prepare()]
            if self.place > 0:
                self._await(self.place - 1, deadline)
            yield prepared.pop()  # the body's alone: of a bucket it lets go as soon as it has arrived
        except WeightSyncError as error:
            outcome = {"problem": str(error), "servers": error.servers}
            raise
        except BaseException as error:
            outcome = {"problem": f"{type(error).__name__}: {error}", "servers": []}
            raise
        finally:
            if self._store is not None:
                self._store.set(self._key(self.place), json.dumps(outcome))

    def conclude(self, deadline: float) -> None:
        """Wait until the last sender has had its turn in the present round. Raises WeightSyncError as `take` does."""
        if not self.last:
            self._await(self.count - 1, deadline)

    def _await(self, place: int, deadline: float) -> None:
        if self._store is None:  # a single sender waits for none
            return
        key = self._key(place)
        left = max(0.0, deadline - time.monotonic()) + VERDICT_TIME_S
        try:
            self._store.wait([key], timedelta(seconds=left))
            before = json.loads(self._store.get(key))
        except RuntimeError as error:  # torch's DistStoreError and DistNetworkError
            raise WeightSyncError(
                f"sender {self.place} of {self.count} waited {left:.0f} s in vain for sender {place}: {error}"
            ) from error
        if before["problem"] is not None:
            raise WeightSyncError(before["problem"], servers=before["servers"])

    def _key(self, place: int) -> str:
        return f"turn/{self._round}/{place}"


def open_order(senders: list[int], address: str, timeout_s: float) -> SenderOrder | None:
    """This rank's place among the trainer's ranks that send, in their order; None for the others. Every rank calls it.

    `address`: of this node, for the others to reach.
    """
    rank, first, timeout = dist.get_rank(), senders[0], timedelta(seconds=timeout_s)
    store = serve_store(address, timeout=timeout) if rank == first else None
    host, port = broadcast_plain(None if store is None else (address, store.port), tuple[str, int], source=first)
    if rank not in senders:
        return None
    store = store or join_store(host, port, timeout=timeout)
    return SenderOrder(store, senders.index(rank), len(senders))
