"""An all-reduce across the nodes of a job, one process on each, with its bandwidth."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from ctpo_megatron.slurm.preflight.meeting import Meeting
from ctpo_megatron.slurm.preflight.report import Finding

MEBIBYTES = {"gloo": 16, "nccl": 256}
ROUNDS = 3
TIMEOUT_S = 30.0
TOPIC = "all-reduce"


def all_reduce(meeting: Meeting, mine: str) -> Finding:
    """Returns the bandwidth of an all-reduce over all nodes, with one GPU of each, or without GPUs through gloo.

    All nodes call it. `mine`: this node's address, by which gloo is told its interface. What fails within TIMEOUT_S is a finding.
    """
    nodes = len(meeting.hosts)
    if nodes == 1:
        return Finding(topic=TOPIC, state="ok", found="one node")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    interface = _interface_of(mine)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)  # else gloo takes what the host's name resolves to
    store = dist.PrefixStore("all-reduce", meeting.store)
    try:
        dist.init_process_group(backend, store=store, rank=meeting.rank, world_size=nodes, timeout=timedelta(seconds=TIMEOUT_S))
        seconds, total = _measure(backend)
    except RuntimeError as error:
        why = str(error).splitlines()[0][:200]
        meaning = f"{backend}: {why}; is it the right network? GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose it"
        return Finding(topic=TOPIC, state="bad", found="failed", meaning=meaning)
    if total != nodes:
        return Finding(
            topic=TOPIC, state="bad", found=f"{total:g} for {nodes}", meaning=f"{backend} adds wrongly: do not use this node"
        )
    # what crosses each node's link, in each direction: a ring carries 2 (n - 1) / n of the data
    moved = MEBIBYTES[backend] * 2**20 * 2 * (nodes - 1) / nodes
    found = f"{moved / seconds / 1e9:.2f} GB/s by {backend}, {MEBIBYTES[backend]} MiB, {nodes} nodes"
    return Finding(topic=TOPIC, state="ok", found=found)


def _measure(backend: str) -> tuple[float, float]:
    """Returns the seconds of the fastest of some rounds after a first one, and what ones on all nodes add up to."""
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    data = torch.zeros(MEBIBYTES[backend] * 2**18, device=device)
    seconds = []
    for _ in range(1 + ROUNDS):
        data.fill_(1.0)
        dist.barrier()
        begun = time.monotonic()
        dist.all_reduce(data)
        total = float(data[-1])  # waits for the device
        seconds.append(time.monotonic() - begun)
    return min(seconds[1:]), total


def _interface_of(address: str) -> str | None:
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(each.address == address for each in addresses)), None)
