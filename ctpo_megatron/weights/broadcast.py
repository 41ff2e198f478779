"""Weights broadcast from one trainer rank to all ranks of all servers, through SGLang's update group: NCCL, or gloo on CPUs.

trainer rank 0                         each server
POST /begin_weight_update       --->   open a session
POST /update_weights_... (names) -->   expect these tensors      } per bucket; the answer comes
broadcast the bucket's bytes    ===>   receive and load them     } when all are loaded
POST /end_weight_update         --->   close the session
POST /update_weight_version     --->   only now answer with the new version
POST /flush_cache               --->   forget the prefixes that older weights computed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import requests
import torch
import torch.distributed as dist

from ctpo_megatron.config.cluster import BroadcastTransport
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.group import GROUP_NAME, join_update_group, leave_update_group
from ctpo_megatron.weights.transport import Bucket

LEAVE_TIMEOUT_S = 10.0


class BroadcastSender:
    """See `transport.WeightSender`. Servers reach this process at `address`; `config.timeout_s` bounds each wait."""

    def __init__(self, config: BroadcastTransport, *, device: torch.device, address: str) -> None:
        self._timeout_s = config.timeout_s
        self._device = device
        self._address = address
        self._urls: list[str] = []
        self._headers: dict[str, str] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None

    def connect(self, urls: list[str], api_key: str, engine_tp: int) -> None:
        """See `WeightSender.connect`. Called again, it leaves the old servers first."""
        self.close()
        self._urls = list(urls)
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._pool = ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="weights")
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        world_size, timeout = 1 + len(urls) * engine_tp, timedelta(seconds=self._timeout_s)
        store = dist.TCPStore(self._address, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        common = {"master_address": self._address, "master_port": store.port, "world_size": world_size, "backend": backend}
        joins = self._post_all(
            "/init_weights_update_group",
            lambda server: {**common, "group_name": GROUP_NAME, "rank_offset": 1 + server * engine_tp},
        )
        try:
            self._group = join_update_group(store, world_size=world_size, backend=backend, timeout=timeout)
        except RuntimeError as error:
            self._finish(joins, "joining the update group")  # a server's own words say more, if it has any
            raise WeightSyncError(f"the update group of {world_size} ranks did not come together: {error}") from error
        self._finish(joins, "joining the update group")

    def send(self, buckets: Iterable[Bucket], version: int) -> None:
        """See `WeightSender.send`."""
        if self._group is None:
            raise WeightSyncError("no inference server is connected: call connect() before send()")
        self._call("/begin_weight_update", {}, "opening the update")
        sent = 0
        for number, bucket in enumerate(buckets):
            if bucket:
                self._send_bucket(bucket, number)
                sent += len(bucket)
        if not sent:
            raise WeightSyncError("the trainer exported no weights")
        self._call("/end_weight_update", {}, "closing the update")
        self._call("/update_weight_version", {"new_version": str(version), "abort_all_requests": False}, "setting the version")
        self._call("/flush_cache", {}, "flushing the prefix cache")

    def close(self) -> None:
        """See `WeightSender.close`."""
        if self._group is not None:
            # a server that has died cannot leave in order, and need not
            for leaving in self._post_all("/destroy_weights_update_group", lambda _: {"group_name": GROUP_NAME}, LEAVE_TIMEOUT_S):
                leaving.exception()
            leave_update_group(self._group)
            self._group = None
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def _send_bucket(self, bucket: Bucket, number: int) -> None:
        """One flat tensor of bytes, whatever the model is made of: few large messages."""
        # SGLang cuts it up in this order, and needs each tensor aligned to its own item size: the widest type first
        ordered = sorted(bucket, key=lambda named: -named[1].element_size())
        flat = torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in ordered]).to(self._device)
        body = {
            "names": [name for name, _ in ordered],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            "shapes": [list(tensor.shape) for _, tensor in ordered],
            "group_name": GROUP_NAME,
            "load_format": "flattened_bucket",
            "flush_cache": False,  # once, at the end
        }
        what = f"bucket {number} ({body['names'][0]} ... {body['names'][-1]})"
        posts = self._post_all("/update_weights_from_distributed", lambda _: body)
        self._wait_for(dist.broadcast(flat, src=0, group=self._group, async_op=True), posts, what)
        self._finish(posts, what)

    def _wait_for(self, work: dist.Work, posts: list[Future[None]], what: str) -> None:
        """Until the broadcast is done, a server says that it does not take part, or time is over."""
        deadline = time.monotonic() + self._timeout_s
        pause_s = 1e-4
        while not work.is_completed():
            if any(post.done() and post.exception() for post in posts):
                self._finish(posts, what)
            if time.monotonic() > deadline:
                raise WeightSyncError(f"{what} was not received within weights.timeout_s={self._timeout_s:.0f} s by {self._urls}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)
        try:
            work.wait()
        except RuntimeError as error:
            raise WeightSyncError(f"broadcasting {what} to {self._urls} failed: {error}") from error

    def _call(self, path: str, body: dict[str, Any], what: str) -> None:
        self._finish(self._post_all(path, lambda _: body), what)

    def _post_all(
        self, path: str, body_of: Callable[[int], dict[str, Any]], timeout_s: float | None = None
    ) -> list[Future[None]]:
        """Post to all servers at once. Each future ends with None or that server's WeightSyncError."""
        limit = timeout_s or self._timeout_s
        return [self._pool.submit(self._post, url + path, body_of(server), limit) for server, url in enumerate(self._urls)]

    def _post(self, url: str, body: dict[str, Any], timeout_s: float) -> None:
        try:
            answer = requests.post(url, json=body, headers=self._headers, timeout=timeout_s)
        except requests.RequestException as error:
            raise WeightSyncError(f"{url}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise WeightSyncError(f"{url} answered {answer.status_code}: {answer.text[:500]}")

    def _finish(self, posts: list[Future[None]], what: str) -> None:
        """Wait for the answers that may still come, and raise what went wrong.

        Where one server has refused, the others wait for a broadcast that never comes: they are not waited for.
        """
        failed = [error for post in posts if post.done() and (error := post.exception())]
        if not failed:
            failed = [error for post in posts if (error := post.exception())]
        if failed:
            raise WeightSyncError(f"publishing weights, {what}: " + "; ".join(map(str, failed))) from failed[0]
