"""Weights broadcast from the trainer's senders to all ranks of all servers through SGLang's update groups: NCCL, gloo on CPUs.

`connect`, while the servers sample:

    driver                       sender 0, 1, ... in turn                             each server
                                 POST /init_weights_update_group ---------------->    join the sender's group
                                 broadcast a byte ==============================>     receive it, answer

One publication, after the driver has paused generation:

    driver                       sender 0, 1, ... in turn                             each server
    POST /begin_weight_update ----------------------------------------------------->  open a session
                                 POST /update_weights_from_distributed (names) --->   expect these tensors  } per bucket; the
                                 broadcast the bucket's bytes =================>      receive, load, answer } next is gathered
    POST /end_weight_update ------------------------------------------------------->  close the session      meanwhile
    POST /update_weight_version, /flush_cache ------------------------------------->  answer as the new version, cache empty

Each sender has its own group with all ranks of all servers; SGLang keeps groups by name. NCCL builds the communicator in the
first broadcast, which is therefore of a byte, before generation is paused, in a thread that the sender watches.

A server that dies or hangs makes a broadcast fail or time out: the sender aborts its group, names the server, and goes on
gathering without sending, so that no trainer rank is left waiting. The driver then ends that server and connects the survivors
anew. gloo passes a broadcast on along a tree: a survivor may wait for the one that hangs, and is free when that one's connections
close.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from ctpo_megatron.config.weights import BroadcastTransport
from ctpo_megatron.engine.calls import Answers
from ctpo_megatron.engine.update_group import connect, join_update_group, leave_update_group
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.rendezvous.store import serve_store
from ctpo_megatron.weights.protocol import Bucket, Sent
from ctpo_megatron.weights.transports.flat import Flat, flatten
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import DigestAccount, Finish, deliver, send_account
from ctpo_megatron.weights.transports.sender import ConnectingSender

LEAVE_TIMEOUT_S = 10.0


class BroadcastSender(ConnectingSender):
    """A `protocol.WeightSender`. Servers reach this process at `address`; `config.timeout_s` bounds each call."""

    def __init__(
        self,
        config: BroadcastTransport,
        order: SenderOrder | None = None,
        new_account: Callable[[], DigestAccount] | None = None,
        *,
        device: torch.device,
        address: str,
    ) -> None:
        super().__init__(config, order, new_account)
        self._device = device
        self._address = address
        self._name = ""  # of the group
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroup | None = None

    def send(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Implement `WeightSender.send`."""
        deadline = time.monotonic() + self._timeout_s
        try:
            with send_account(buckets, version, self._changes, self._new_account) as account:
                return deliver(account, self._order, deadline, lambda bucket, number: self._start(bucket, number, deadline))
        except BaseException:
            self._abandon()
            raise

    def close(self) -> None:
        """Implement `WeightSender.close`."""
        self._abandon()
        if self._connected is not None and self._name:
            # asked of all: one may have joined where another did not. A dead one cannot leave in order, and need not
            leave, path = {"group_name": self._name}, "/destroy_weights_update_group"
            self._connected.post(path, lambda _: leave, LEAVE_TIMEOUT_S, "leaving").wait(LEAVE_TIMEOUT_S)
        super().close()

    def join(self, deadline: float) -> None:
        """Make the group, and let a first byte reach all of it: this process is rank 0, each server's ranks follow."""
        calls, left = self._calls, deadline - time.monotonic()
        if left <= 0:
            raise WeightSyncError(f"sender {self._order.place} had no time left for its group when its turn came")
        # a name that nobody had: a group that hangs while it is given up keeps its own, and so does that of a sender that died
        self._name = f"ctpo_weights_{self._order.place}_{secrets.token_hex(8)}"
        offsets = [1 + sum(server.tp for server in calls.servers[:number]) for number in range(len(calls.servers))]
        world_size, timeout = 1 + sum(server.tp for server in calls.servers), timedelta(seconds=left)
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        self._store = serve_store(self._address, world_size=world_size, timeout=timeout)
        address = {"master_address": self._address, "master_port": self._store.port}
        common = {**address, "world_size": world_size, "backend": backend, "group_name": self._name}
        path, what = "/init_weights_update_group", f"joining the update group of {world_size} ranks"
        joins = calls.post(path, lambda server: {**common, "rank_offset": offsets[server]}, left, what)
        problem = ""
        try:
            self._group = join_update_group(self._store, self._name, world_size=world_size, backend=backend, timeout=timeout)
        except RuntimeError as error:
            problem = f"did not come: {error}"
        if problem:  # outside the handler, whose exception would keep the store, and with it the servers that wait, alive
            raise joins.blame(problem, self._abandon)
        connected = connect(self._joined, self._device)
        self._wait_for(connected.done, connected.result, joins, deadline, "did not come into the group")
        joins.finish(deadline, self._abandon)

    @property
    def _joined(self) -> dist.ProcessGroup:
        """The group. Raises WeightSyncError where there is none."""
        if self._group is None:
            raise WeightSyncError("the group with the inference servers was given up: call connect() again after a failure")
        return self._group

    def _start(self, bucket: Bucket, number: int, deadline: float) -> Finish:
        """Set the bucket under way to all servers."""
        calls, group = self._calls, self._joined
        flat = flatten(bucket, self._device)
        body = {**flat.metadata, "group_name": self._name, "load_format": "flattened_bucket", "flush_cache": False}
        what = f"bucket {number} ({bucket[0][0]} ... {bucket[-1][0]}) of sender {self._order.place}"
        answers = calls.post("/update_weights_from_distributed", lambda _: body, deadline - time.monotonic(), what)
        try:
            work = dist.broadcast(flat.data, src=0, group=group, async_op=True)
        except RuntimeError as error:
            raise answers.blame(f"does not receive: {error}", self._abandon) from error
        if work is None:  # so torch tells a process that is not in the group
            raise WeightSyncError("this process is not in the group with the inference servers: call connect() again")

        def finish(_kept: Flat = flat) -> None:  # until it has been read
            self._wait_for(work.is_completed, work.wait, answers, deadline, "did not receive it")
            answers.finish(deadline, self._abandon)

        return finish

    def _wait_for(
        self, done: Callable[[], bool], result: Callable[[], object], answers: Answers, deadline: float, failing: str
    ) -> None:
        """Until a broadcast is `done`, a server says that it does not take part, or time is over. `result` raises its error.

        `failing`: what the error says of the servers at fault.
        """
        pause_s = 1e-4
        while not done():
            if answers.failed():
                raise answers.blame("failed", self._abandon)
            if time.monotonic() > deadline:
                raise answers.blame(f"{failing} within weights.timeout_s={self._timeout_s:.0f} s", self._abandon)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.002)
        try:
            result()
        except RuntimeError as error:
            raise answers.blame(f"{failing}: {error}", self._abandon) from error

    def _abandon(self) -> None:
        """Give up the group: its connections close, which frees the servers that wait in it."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            leave_update_group(group)
