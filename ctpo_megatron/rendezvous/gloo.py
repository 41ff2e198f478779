"""One gloo device for all process groups of a process.

A gloo device is a thread that wakes a hundred times a second to look at its connections, busy or not. torch 2.14 gives every
group a device of its own (`torch.distributed.distributed_c10d._create_gloo_process_group`), and two more threads for its
collectives. Megatron-Core makes up to 35 groups in a rank, SGLang ten: 140 idle ones take a tenth of a core.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo

THREADS = 1  # that run a group's collectives, one after another


def share_gloo_device() -> None:
    """Let the gloo groups that this process, or a fork of it, makes from now on share one device. Safe to call again.

    GLOO_SOCKET_IFNAME names the network interfaces, as without this; each gets a device. torch 2.11 makes gloo groups in a place
    that cannot be reached from here: there they keep a device each.
    """
    if "_backend_type" not in inspect.signature(dist.Backend.register_backend).parameters:
        return
    dist.Backend.register_backend(
        dist.Backend.GLOO,
        _new_group,
        extended_api=True,
        devices=["cpu", "cuda"],
        _backend_type=dist.ProcessGroup.BackendType.GLOO,
    )


def _new_group(group: Any, _options: object) -> ProcessGroupGloo:
    """A group as torch makes it, but for its device and threads. `group`: torch's `_DistributedBackendOptions`."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs have another name for it
    options._devices = list(_devices(os.getpid()))
    options._threads = THREADS
    options._timeout = group.timeout
    options.enable_reconfigure = group.enable_reconfigure
    options.global_ranks_in_group = group.global_ranks_in_group
    options.group_name = group.group_id
    return ProcessGroupGloo(group.store, group.group_rank, group.group_size, options)


@functools.cache
def _devices(_pid: int) -> tuple[ProcessGroupGloo.Device, ...]:
    """The devices of process `_pid`, this one; a fork does not inherit their threads."""
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return (ProcessGroupGloo.create_default_device(),)
    return tuple(ProcessGroupGloo.create_device(interface=name) for name in names.split(","))
