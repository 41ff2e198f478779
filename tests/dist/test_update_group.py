"""The first broadcast of an update group, between a trainer rank and SGLang's own code with the hook of the plugin."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.engine.update_group import connect, join_update_group, leave_update_group
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

HOST, NAME, BOUND = "127.0.0.1", "weights", timedelta(seconds=120)
CPU = torch.device("cpu")


def test_joining_is_connecting() -> None:
    """When the server says that it has joined it has received the first byte, so the next broadcast is a bucket's."""
    trainer, server = run_ranks(2, take_part, timeout_s=300)
    assert trainer == "connected"
    assert server == {"joined": (True, "Succeeded to initialize custom process group."), "bucket": [1.0, 2.0, 3.0]}


def take_part(rank: RankInfo) -> Any:
    return as_trainer(rank.master_port) if rank.rank == 0 else as_server(rank.master_port)


def as_trainer(port: int) -> str:
    store = dist.TCPStore(HOST, port, 2, is_master=True, timeout=BOUND, wait_for_workers=False)
    group = join_update_group(store, NAME, world_size=2, backend="gloo", timeout=BOUND)
    connect(group, CPU).result(BOUND.total_seconds())
    dist.broadcast(torch.tensor([1.0, 2.0, 3.0]), src=0, group=group)
    store.wait(["received"], BOUND)
    leave_update_group(group)
    return "connected"


def as_server(port: int) -> dict[str, Any]:
    """What a scheduler of SGLang does, in the same objects."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.plugins import load_plugins

    load_plugins()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    unused = {"gpu_id": 0, "model_config": None, "custom_weight_loaders": {}, "get_model": None, "update_model_fields": None}
    updater = WeightUpdater(tp_rank=0, device="cpu", recapture_cuda_graph=None, get_model_runner=None, **unused)
    joined = updater.init_weights_update_group(HOST, port, 1, 2, NAME, "gloo")
    bucket = torch.zeros(3)
    dist.broadcast(bucket, src=0, group=updater._model_update_group[NAME])
    store = dist.TCPStore(HOST, port, is_master=False, timeout=BOUND, wait_for_workers=False)
    store.set("received", "1")
    return {"joined": joined, "bucket": bucket.tolist()}
