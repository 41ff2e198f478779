"""torch's stores, where ranks meet, so that they listen at one address of their host.

A TCPStore that makes its own socket listens on every interface, whatever host it is given (torch 2.14). One that is handed a
socket (`master_listen_fd`) listens where that is bound. A store asks nobody who he is, and tells its keys to all who connect
(`list_keys`): a prefix keeps ranks of two runs apart that meet at one port by mistake, and is no lock.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from ctpo_megatron.ports import await_listener, listen

SHORTEST = timedelta(seconds=1)  # to hear from torch what was wrong, when nobody came


def serve_store(
    address: str,
    port: int = 0,
    *,
    timeout: timedelta,
    world_size: int | None = None,
    wait_for_workers: bool = False,
    multi_tenant: bool = False,
) -> dist.TCPStore:
    """A store of this process that listens at `address` alone. Port 0: one that is free, told by `.port`.

    `multi_tenant`: it serves those too that ask for a store of their own at this port in this process.
    Raises OSError where the port is taken.
    """
    with listen(address, port) as listener:
        taken = listener.getsockname()[1]
        handed = listener.detach()  # torch closes it, with the store
    return dist.TCPStore(
        address,
        taken,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=wait_for_workers,
        multi_tenant=multi_tenant,
        master_listen_fd=handed,
    )


def join_store(
    address: str, port: int, *, timeout: timedelta, world_size: int | None = None, wait_for_workers: bool = False
) -> dist.TCPStore:
    """The store that another process serves at `address`. Raises RuntimeError where none answers within `timeout`.

    One that comes too early would be made to wait half a second or more between its tries by torch (2.14).
    """
    begun = time.monotonic()
    await_listener(address, port, timeout.total_seconds())
    timeout = max(timeout - timedelta(seconds=time.monotonic() - begun), SHORTEST)
    return dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=wait_for_workers)
