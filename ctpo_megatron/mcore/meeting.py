"""Who a process is among the trainer's ranks, and how they meet."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ctpo_megatron.mcore.host import backend_for
from ctpo_megatron.rendezvous.store import join_store, serve_store

TIMEOUT_MINUTES = 30  # after which a collective that a rank does not join is given up; `cluster.watch` finds that rank before


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Who this process is among the trainer's ranks, and where rank 0 listens."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int
    local_rank: int = 0
    prefix: str = field(default="", repr=False)
    """Of the run's keys in that store: ranks of another run that come to this port by mistake meet nobody."""


def meet(rank: RankInfo, device: torch.device) -> None:
    """Make the default group, at a store that rank 0 serves. The group is bound to no device.

    A group that is bound starts its communicator at once, and torch then makes every later group of the process by splitting it.
    A split is a collective call of all trainer ranks, which a group with the servers' ranks can never be.
    """
    timeout = datetime.timedelta(minutes=TIMEOUT_MINUTES)
    # not by `init_method`: that joins what this process already has at the port, where this refuses a port that is taken
    reach = serve_store if rank.rank == 0 else join_store
    store = reach(rank.master_addr, rank.master_port, world_size=rank.world_size, wait_for_workers=True, timeout=timeout)
    dist.init_process_group(
        backend_for(device),
        store=dist.PrefixStore(rank.prefix, store),
        rank=rank.rank,
        world_size=rank.world_size,
        timeout=timeout,
    )
