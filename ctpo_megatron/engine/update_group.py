"""The trainer's membership in SGLang's weight-update groups.

NCCL builds a group's communicator in its first collective, and blocks there until all ranks have come. So both sides take part in
a broadcast of one byte as soon as they have joined: the servers by a hook (`engine.sglang.update_group`), the trainer in a thread
that can be watched and given up. On gloo, which connects when a group is made, it is a byte more.

A group with servers must never end a trainer's process. torch's watchdog ends it when a peer is lost, so these groups have none:
see NCCL_SETTINGS.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)

# What torch reads when it makes a group, and has no argument for. With blocking waits a group has no watchdog thread: who waits
# for a collective is told of an error, or asks for it. Without asynchronous handling nothing else reacts to one.
NCCL_SETTINGS = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
ABORT_TIMEOUT_S = 10.0  # for a group to be given up; NCCL may hang in it, and goes on beside then


def join_update_group(store: dist.TCPStore, name: str, *, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """A process group of rank 0 (this process) and the servers' ranks, beside torch's default group.

    torch's public API only makes groups within the default one; SGLang's `init_custom_process_group`
    (sglang.srt.utils.common, 0.5.23) goes below it in the same way, and both ends must agree on the store's prefix.
    On gloo it raises RuntimeError when not all have come within `timeout`; on NCCL they come in `connect`.
    """
    nccl = backend == "nccl"
    with _apart_from_the_default_group(), _environment(NCCL_SETTINGS if nccl else {}):
        group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            Backend(backend),
            PrefixStore(name, store),
            group_name=GroupName(name),
            backend_options=_abortable(timeout) if nccl else None,
            timeout=timeout,
        )
    group = cast(dist.ProcessGroup, group)  # no member it would only be for ranks that are left out, and there are none
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def connect(group: dist.ProcessGroup, device: torch.device) -> Future[None]:
    """The group's first broadcast, under way in a thread of its own; it fails with RuntimeError when the group is given up."""
    return _beside("connect", lambda: first_broadcast(group, device))


def first_broadcast(group: dist.ProcessGroup, device: torch.device) -> None:
    """Take part in the first broadcast of the group, from its rank 0; on NCCL this builds the communicator."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # threads begin on the first GPU
        work = dist.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), src=0, group=group, async_op=True)
        if work is None:  # so torch tells a process that is not in the group
            raise RuntimeError("this process is not in the group")
        work.wait()


@contextlib.contextmanager
def _apart_from_the_default_group() -> Iterator[None]:
    """While this context is open, torch makes a group of its own instead of splitting the default group.

    A default group that is bound to a device is split: with NCCL a call that all of its ranks must make (torch 2.14,
    `_new_process_group_helper`). Only the sender makes this group, so it would wait for the other trainer ranks for ever, and
    the servers for it.
    """
    default = dist.group.WORLD
    device = None if default is None else default.bound_device_id
    if default is None or device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def leave_update_group(group: dist.ProcessGroup) -> None:
    """Forget the group: its connections close, and what is still under way in it ends with an error.

    Returns after ABORT_TIMEOUT_S at the latest.
    """
    leaving = _beside("leave", lambda: _abort_process_group(group))
    if wait_for([leaving], timeout=ABORT_TIMEOUT_S).done:
        leaving.result()


def _abortable(timeout: timedelta) -> object:
    """Options of an NCCL group whose communicator can be aborted while it is built: calls into NCCL do not block."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.config.blocking = 0
    return options


def _beside(name: str, action: Callable[[], None]) -> Future[None]:
    """The outcome of `action`, run in a thread that does not keep the process from ending."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - whoever waits for the outcome is told
            outcome.set_exception(error.with_traceback(None))  # its frames hold the group, and with it the store
        else:
            outcome.set_result(None)

    threading.Thread(target=run, name=f"update group: {name}", daemon=True).start()
    return outcome


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the body only: the trainer's own groups keep torch's defaults."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
