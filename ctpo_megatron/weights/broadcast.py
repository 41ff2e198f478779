"""Weights broadcast from one trainer rank to all ranks of all servers, through SGLang's update group: NCCL, or gloo on CPUs.

    trainer rank 0                         each server
    POST /begin_weight_update       --->   open a session
    POST /update_weights_... (names) -->   expect these tensors      } per bucket; the answer comes
    broadcast tensor by tensor      ===>   receive and load them     } when all are loaded
    POST /end_weight_update         --->   close the session
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import requests
import torch
import torch.distributed as dist

from ctpo_megatron.config.cluster import BroadcastTransport
from ctpo_megatron.config.cluster import BroadcastTransport
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.weights.group import GROUP_NAME, dtype_name, join_update_group, leave_update_group
from ctpo_megatron.weights.transport import Bucket

POLL_S = 0.002


class BroadcastSender:
    """See `transport.WeightSender`. `address` is where the servers can reach this process."""

    def __init__(self, config: BroadcastTransport, *, device: torch.device, address: str) -> None:
        self._timeout_s = config.timeout_s
        self._device = device
        self._address = address
        self._group: dist.ProcessGroup | None = None

    def connect(self, urls: list[str], api_key: str, engine_tp: int) -> None:
        """See `WeightSender.connect`. Raises WeightSyncError naming the server that did not join."""
        self._urls = list(urls)
        self._http = requests.Session()
        self._http.headers["Authorization"] = f"Bearer {api_key}"
        self._pool = ThreadPoolExecutor(max_workers=len(urls), thread_name_prefix="weights")
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        world_size, timeout = 1 + len(urls) * engine_tp, timedelta(seconds=self._timeout_s)
        port = _free_port(self._address)
        joins = [
            self._post(url, "/init_weights_update_group", self._invitation(port, 1 + i * engine_tp, world_size, backend))
            for i, url in enumerate(urls)
        ]
        store = dist.TCPStore(self._address, port, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        try:
            self._group = join_update_group(store, world_size=world_size, backend=backend, timeout=timeout)
        except RuntimeError as error:
            self._finish(joins, "joining the update group")
            raise WeightSyncError(f"the update group of {world_size} ranks did not come together: {error}") from error
        self._finish(joins, "joining the update group")

    def send(self, buckets: Iterable[Bucket], version: int) -> None:
        """See `WeightSender.send`."""
        self._everywhere("/begin_weight_update", {})
        for number, (bucket, last) in enumerate(mark_last(buckets)):
            self._send_bucket(bucket, number, version if last else None)
        self._everywhere("/end_weight_update", {})

    def close(self) -> None:
        """See `WeightSender.close`."""
        if self._group is not None:
            leave_update_group(self._group)
            self._group = None
            self._pool.shutdown(wait=False)

    def _send_bucket(self, bucket: Bucket, number: int, version: int | None) -> None:
        """One bucket. The version, and the flush of the prefix cache that held older states, come with the last one."""
        body = {
            "names": [name for name, _ in bucket],
            "dtypes": [dtype_name(tensor.dtype) for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "group_name": GROUP_NAME,
            "flush_cache": version is not None,
        } | ({} if version is None else {"weight_version": str(version)})
        posts = [self._post(url, "/update_weights_from_distributed", body) for url in self._urls]
        works = [dist.broadcast(tensor.contiguous(), src=0, group=self._group, async_op=True) for _, tensor in bucket]
        what = f"bucket {number} ({body['names'][0]} ... {body['names'][-1]})"
        deadline = time.monotonic() + self._timeout_s
        while not all(work.is_completed() for work in works):
            self._raise_failures([post for post in posts if post.done()], what)
            if time.monotonic() > deadline:
                raise WeightSyncError(f"{what} was not received within weights.timeout_s={self._timeout_s:.0f} s")
            time.sleep(POLL_S)
        for work in works:
            work.wait()
        self._finish(posts, what)

    def _invitation(self, port: int, rank_offset: int, world_size: int, backend: str) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": GROUP_NAME,
            "backend": backend,
        }

    def _everywhere(self, path: str, body: dict[str, Any]) -> None:
        self._finish([self._post(url, path, body) for url in self._urls], path)

    def _post(self, url: str, path: str, body: dict[str, Any]) -> Future[None]:
        return self._pool.submit(self._post_now, url, path, body)

    def _post_now(self, url: str, path: str, body: dict[str, Any]) -> None:
        try:
            answer = self._http.post(url + path, json=body, timeout=self._timeout_s)
        except requests.RequestException as error:
            raise WeightSyncError(f"{url}{path}: {type(error).__name__}: {error}") from error
        told = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        if answer.status_code != 200 or told.get("success") is False:
            raise WeightSyncError(f"{url}{path} answered {answer.status_code}: {answer.text[:500]}")

    def _finish(self, posts: list[Future[None]], what: str) -> None:
        """Wait for all answers; the posts themselves are bounded by the timeout."""
        for post in posts:
            post.exception()
        self._raise_failures(posts, what)

    @staticmethod
    def _raise_failures(posts: list[Future[None]], what: str) -> None:
        for post in posts:
            if (error := post.exception()) is not None:
                raise WeightSyncError(f"publishing weights, {what}: {error}") from error


def mark_last(buckets: Iterable[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    """Each non-empty bucket and whether it is the last one."""
    held: Bucket | None = None
    for bucket in buckets:
        if not bucket:
            continue
        if held is not None:
            yield held, False
        held = bucket
    if held is None:
        raise WeightSyncError("the trainer exported no weights")
    yield held, True


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
