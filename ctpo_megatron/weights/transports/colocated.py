"""Weights handed to servers on the same node without a copy over the network: shared memory on CPUs, CUDA IPC on GPUs.

    driver                       sender 0, 1, ... in turn                        each server
    POST /begin_weight_update ------------------------------------------------>  open a session
                                 put a bucket where servers can map it    } per bucket; the next is
                                 POST /update_weights_from_tensor ------->  map, load, answer   } gathered meanwhile
    POST /end_weight_update, ... as in `broadcast` --------------------------->

What travels is a handle, one for each rank of the server, in SGLang's own form: the pickle that torch's multiprocessing makes of
tensors, which SGLang reads with an unpickler that admits nothing else. All tensors of a bucket lie in one piece of memory. A
device is named by its UUID, since two processes may number devices differently; a server must see the sender's device.

While the trainer trains, servers on its devices give their memory back: `WeightPublisher.offload`.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ctpo_megatron.config.weights import ColocatedTransport
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.hf.shared_memory import start_helper
from ctpo_megatron.weights.protocol import Bucket, Sent, Server
from ctpo_megatron.weights.transports.flat import Flat, flatten
from ctpo_megatron.weights.transports.order import SenderOrder
from ctpo_megatron.weights.transports.prefetch import DigestAccount, Finish, deliver, send_account
from ctpo_megatron.weights.transports.sender import ConnectingSender

_DEVICE = 6  # which argument of torch's `rebuild_cuda_tensor` is the device


class ColocatedSender(ConnectingSender):
    """A `protocol.WeightSender`. `address`: of this node, as it stands in the servers' URLs."""

    def __init__(
        self,
        config: ColocatedTransport,
        order: SenderOrder | None = None,
        new_account: Callable[[], DigestAccount] | None = None,
        *,
        device: torch.device,
        address: str,
    ) -> None:
        super().__init__(config, order, new_account)
        self._device = device
        self._local = {address, "127.0.0.1", "localhost"}

    def admit(self, servers: list[Server]) -> None:
        """Refuse servers on other nodes."""
        away = [server.url for server in servers if urlsplit(server.url).hostname not in self._local]
        if away:
            raise WeightSyncError(
                f"weights.type=colocated hands memory over within a node, but {', '.join(away)} is not on "
                f"{sorted(self._local)}; use weights.type=broadcast, or disk",
                servers=away,
            )

    def send(self, buckets: Iterable[Bucket], version: int) -> Sent:
        """Implement `WeightSender.send`."""
        deadline = time.monotonic() + self._timeout_s
        with send_account(buckets, version, self._changes, self._new_account) as account:
            return deliver(account, self._order, deadline, lambda bucket, number: self._start(bucket, number, deadline))

    def _start(self, bucket: Bucket, number: int, deadline: float) -> Finish:
        """Let all servers map and load the bucket."""
        calls = self._calls
        flat = flatten(bucket, self._device)
        # a handle is for one reader: torch counts the readers of CUDA memory by handles
        handles = [[handle(flat.bucket) for _ in range(server.tp)] for server in calls.servers]

        def body(server: int) -> dict[str, Any]:
            return {"serialized_named_tensors": handles[server], "flush_cache": False}

        what = f"bucket {number} ({bucket[0][0]} ... {bucket[-1][0]}) of sender {self._order.place}"
        answers = calls.post("/update_weights_from_tensor", body, deadline - time.monotonic(), what)

        def finish(_kept: Flat = flat) -> None:  # until all servers have mapped it
            answers.finish(deadline)

        return finish


def handle(bucket: Bucket) -> str:
    """The text that lets one other process of this node map the tensors of `bucket`."""
    if any(not tensor.is_cuda for _, tensor in bucket):
        start_helper()
    before = torch.multiprocessing.get_sharing_strategy()
    # by name: passing file descriptors needs a key that only processes of one family share
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        buffer = io.BytesIO()
        _HandlePickler(buffer).dump(bucket)
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    return base64.b64encode(buffer.getvalue()).decode()


class _HandlePickler(ForkingPickler):
    """torch's pickle of shared tensors, with a device's UUID in place of its number, as SGLang expects it."""

    def reducer_override(self, value: Any) -> Any:
        """Implement `pickle.Pickler.reducer_override`: how `value` is rebuilt, or NotImplemented for the usual way."""
        if isinstance(value, Tensor) and value.is_cuda:
            rebuild, arguments = reduce_tensor(value)
            uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
            return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])
        return NotImplemented
