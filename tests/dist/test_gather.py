"""Pieces of weights come to their sender through memory of its host where they can, otherwise through sockets: the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.errors import WeightSyncError
from ctpo_megatron.mcore.hf.buffers import BucketMemory
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import write_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

MODELS: dict[str, dict[str, int]] = {"qwen3": {"tp": 2, "pp": 2}, "qwen3_moe": {"tp": 2, "pp": 2, "ep": 2}}
WAYS = ("near", "far", "two hosts", "no room", "cannot be mapped", "private")
BUCKET_BYTES = 20_000


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    models = {family: write_model(tmp_path_factory.mktemp(family), family) for family in MODELS}
    return run_ranks(4, gathered, models, [free_port() for _ in MODELS])


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bytes_come(ranks: list[dict[str, dict[str, Any]]], family: str, way: str) -> None:
    first, second, *others = (rank[family][way] for rank in ranks)
    for name, tensor in ranks[0][family]["private"]["weights"].items():
        np.testing.assert_array_equal(first["weights"][name], tensor, err_msg=name)
    assert first["kept"] <= 3, "memory is used again, stream after stream"
    assert (second["mapped"] > 0) == (way in ("near", "two hosts")), "the way that is meant is the one taken"
    assert all((other["mapped"] > 0) == (way == "near") for other in others)
    assert second["mapped"] <= 3, "what the sender has given up is given up here too"


# ---- what runs in the ranks


def gathered(rank: RankInfo, models: dict[str, Path], ports: list[int]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (family, sizes), port in zip(MODELS.items(), ports, strict=True):
        engine = TrainerRank(
            str(models[family]), ParallelConfig(**sizes), None, replace(rank, master_port=port), device="cpu", seed=1
        )
        found[family] = {way: streamed(engine, memory) for way, memory in ways(rank)}
        engine.close()
    return found


def ways(rank: RankInfo) -> Iterator[tuple[str, BucketMemory]]:
    """Each with the memory of a process of its own; the module's functions are as the way wants them until the next."""
    from ctpo_megatron.mcore.hf import buffers, stream

    domain, new_shared, mapped = stream.domain, buffers.new_shared, buffers.Mapped.at
    with pytest.MonkeyPatch.context() as patch:
        for way in WAYS:
            patch.setattr(stream, "domain", {"far": lambda: "", "two hosts": lambda: f"host {rank.rank // 2}"}.get(way, domain))
            patch.setattr(buffers, "new_shared", (lambda _size: None) if way == "no room" else new_shared)
            patch.setattr(buffers.Mapped, "at", refuse if way == "cannot be mapped" else mapped)
            yield way, BucketMemory(torch.device("cpu"), shared=way != "private")


def refuse(*_: Any) -> Any:
    raise WeightSyncError("cannot be mapped")


def streamed(engine: TrainerRank, memory: BucketMemory) -> dict[str, Any]:
    """The weights of a second stream, in the memory of the first one; rank 0 gets them."""
    for _ in engine.stream(BUCKET_BYTES, to=0, memory=memory):
        pass
    for buffer in memory._buffers:
        buffer.memory.zero_()
    stream = engine.stream(BUCKET_BYTES, to=0, memory=memory)
    weights = {name: tensor.float().numpy().copy() for bucket in stream for name, tensor in bucket}
    return {"weights": weights, "kept": len(memory._buffers), "mapped": len(memory._others._kept)}
