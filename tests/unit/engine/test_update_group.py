"""The update group is the servers' and one trainer rank's alone: torch never makes it out of the trainer's own group."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ctpo_megatron.engine.update_group import join_update_group

GPU = torch.device("cuda", 0)


class Asked(Exception):
    """What torch asks of the backend that makes a communicator."""

    def __init__(self, split_from: object) -> None:
        super().__init__()
        self.split_from = split_from


def record(options: Any, _backend_options: Any) -> None:
    """Stands where torch makes an NCCL communicator."""
    raise Asked(options.split_from)


@pytest.fixture
def default_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torch's default group of one rank. Its gloo stands for NCCL, which can be split."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setitem(c10d.Backend._plugins, "NCCL", SimpleNamespace(extended_api=True, creator_fn=record))
    monkeypatch.setattr(c10d, "_get_split_source", lambda group: group._get_backend(torch.device("cpu")))
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def asked_for(name: str) -> object:
    """What the communicator of an update group of five ranks would be split from."""
    with pytest.raises(Asked) as found:
        join_update_group(dist.HashStore(), name, world_size=5, backend="nccl", timeout=timedelta(seconds=1))  # type: ignore[arg-type]
    return found.value.split_from


def test_a_group_of_a_bound_default_group_would_be_split(default_group: Any) -> None:
    """The trap itself: what torch does for a group that is made without care."""
    default_group.bound_device_id = GPU
    name, backend, timeout = c10d.GroupName("careless"), c10d.Backend("nccl"), timedelta(seconds=1)
    with pytest.raises(Asked) as found:
        c10d._new_process_group_helper(5, 0, [], backend, dist.HashStore(), group_name=name, timeout=timeout)
    assert found.value.split_from is not None


@pytest.mark.parametrize("bound", [GPU, None])
def test_the_update_group_is_never_split(default_group: Any, bound: torch.device | None) -> None:
    default_group.bound_device_id = bound
    assert asked_for(f"update {bound}") is None
    assert default_group.bound_device_id == bound
