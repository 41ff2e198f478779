"""Groups of a process that share one gloo device: how many threads they take, and that they work as groups do."""

from __future__ import annotations

import datetime
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ctpo_megatron.mcore.rank import RankInfo
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

GROUPS = 10
TIMEOUT = datetime.timedelta(seconds=60)
IDLE_S = 2.0


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    return run_ranks(2, probe, False, "", bare=True)


@pytest.fixture(scope="module", params=["", "lo"])
def shared(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(2, probe, True, request.param, bare=True)


def test_torch_still_gives_every_group_a_device(alone: list[dict[str, Any]]) -> None:
    """Once it does not, rendezvous/gloo.py can go."""
    for rank in alone:
        assert rank["threads"]["gloo_tcp_loop"] == GROUPS + 1


def test_shared_groups_have_one_device_and_one_thread_each(shared: list[dict[str, Any]]) -> None:
    for rank in shared:
        assert rank["threads"]["gloo_tcp_loop"] == 1
        assert rank["threads"]["pt_gloo_runloop"] == GROUPS + 1


def test_idle_groups_take_no_time(alone: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    """A hundred wake-ups a second, instead of a hundred for each group."""
    for apart, together in zip(alone, shared, strict=True):
        assert together["wakeups"] < apart["wakeups"] / 4, (together["wakeups"], apart["wakeups"])


@pytest.mark.parametrize("key", ["name", "timeout", "members", "group name", "sums", "sum of a fork", "sum after one has left"])
def test_groups_are_as_torch_makes_them(alone: list[dict[str, Any]], shared: list[dict[str, Any]], key: str) -> None:
    assert [rank[key] for rank in shared] == [rank[key] for rank in alone]


# ---- what runs in the processes


def probe(rank: RankInfo, share: bool, interface: str) -> dict[str, Any]:
    import torch.distributed as dist

    from ctpo_megatron.rendezvous.gloo import share_gloo_device

    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if share:
        share_gloo_device()
        share_gloo_device()
    found: dict[str, Any] = {"sum of a fork": in_a_fork()}
    init = f"tcp://{rank.master_addr}:{rank.master_port}"
    dist.init_process_group("gloo", init_method=init, rank=rank.rank, world_size=rank.world_size, timeout=TIMEOUT)
    groups = [dist.new_group([0, 1]) for _ in range(GROUPS)]
    before = wakeups()
    time.sleep(IDLE_S)  # also until every thread has its name
    found["wakeups"] = wakeups() - before
    found["threads"] = Counter(file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
    options = groups[-1]._get_backend(torch.device("cpu")).options
    found |= {"name": dist.get_backend(groups[-1]), "timeout": options._timeout}
    found |= {"members": options.global_ranks_in_group, "group name": options.group_name}
    found["sums"] = [summed(group, rank.rank + at) for at, group in enumerate(groups)]
    dist.destroy_process_group(groups.pop(0))
    found["sum after one has left"] = summed(groups[0], rank.rank + 1)
    dist.destroy_process_group()
    return found


def summed(group: Any, value: float) -> float:
    import torch.distributed as dist

    tensor = torch.tensor([float(value)])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def wakeups() -> int:
    """How often a thread of this process has given up the processor."""
    lines = [line for file in Path("/proc/self/task").glob("*/status") for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def in_a_fork() -> int:
    """Exit code of a fork that makes a group after its parent has made one, whose threads it does not have."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    dist.destroy_process_group()
    child = os.fork()
    if not child:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        os._exit(int(summed(None, 7)))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
