"""The trainer's membership in SGLang's weight-update group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _abort_process_group,
    _new_process_group_helper,
    _world,
)


def join_update_group(store: dist.TCPStore, name: str, *, world_size: int, backend: str, timeout: timedelta) -> dist.ProcessGroup:
    """A process group of rank 0 (this process) and the servers' ranks, beside torch's default group.

    torch's public API only makes groups within the default one; SGLang's `init_custom_process_group`
    (sglang.srt.utils.common, 0.5.23) goes below it in the same way, and both ends must agree on the store's prefix.
    Raises RuntimeError when not all have come within `timeout`.
    """
    with _apart_from_the_default_group():
        group, _ = _new_process_group_helper(
            world_size,
            0,
            [],
            Backend(backend),
            PrefixStore(name, store),
            group_name=GroupName(name),
            timeout=timeout,
        )
    group = cast(dist.ProcessGroup, group)  # no member it would only be for ranks that are left out, and there are none
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


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
    """Forget the group: its connections close, and what is still under way in it ends with an error."""
    _abort_process_group(group)
