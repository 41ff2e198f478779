"""Threads of a trainer rank: how many, and on which cores. tests/processes has ranks that are bound and started with them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ctpo_megatron.cluster.threads import bind_to_cores, check_gpus, cores_near, cores_of_gpu, set_threads, threads_per_rank
from ctpo_megatron.cluster.trainer.actor import TrainerActor
from ctpo_megatron.errors import InputError


def test_the_users_pages_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"THP_MEM_ALLOC_ENABLE": "0"})
    set_threads(torch.get_num_threads())
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_ranks_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [threads_per_rank(ranks) for ranks in (1, 3, 8, 16)] == [8, 2, 1, 1]


def test_ranks_of_a_node_share_its_cores() -> None:
    assert [threads_per_rank(ranks, 128) for ranks in (1, 8, 256)] == [128, 16, 1]


def test_cores_near_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = tmp_path / "0000:1b:00.0"
    gpu.mkdir()
    (gpu / "local_cpulist").write_text("0-3,8,10-11\n")
    assert cores_near("0000:1b:00.0", tmp_path) == {0, 1, 2, 3, 8, 10, 11}
    assert cores_near("0000:2b:00.0", tmp_path) == set(), "a system that does not tell"
    place = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: place)
    assert cores_of_gpu(tmp_path) == {0, 1, 2, 3, 8, 10, 11}


def test_nothing_is_bound_where_the_system_does_not_tell() -> None:
    before = os.sched_getaffinity(0)
    assert bind_to_cores(set()) == set()
    assert os.sched_getaffinity(0) == before


def test_a_rank_that_sees_other_gpus_than_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(InputError, match=r"given the GPUs \['3'\] and sees 8: .*RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"):
        check_gpus(["3"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_gpus(["3"])


@pytest.mark.parametrize(("near", "threads"), [(set(), 8), ({0, 1, 2, 3, 4, 5}, 6), (set(range(64)), 8)])
def test_a_rank_on_a_gpu_has_its_share_of_the_nodes_cores(monkeypatch: pytest.MonkeyPatch, near: set[int], threads: int) -> None:
    """64 cores and 8 ranks; Ray would leave it one thread. Never more than there are cores near its GPU."""
    actor = "ctpo_megatron.cluster.trainer.actor"
    found: dict[str, object] = {}
    monkeypatch.setattr(f"{actor}.node_address", lambda _config: "203.0.113.9")
    monkeypatch.setattr(f"{actor}.node_environment", lambda *_args: {})
    monkeypatch.setattr(f"{actor}.check_gpus", lambda given: found.update(gpus=given))
    monkeypatch.setattr(f"{actor}.cores_of_gpu", lambda: near)
    monkeypatch.setattr(f"{actor}.bind_to_cores", lambda cores: found.setdefault("cores", cores))
    monkeypatch.setattr(f"{actor}.set_threads", lambda count: found.update(threads=count))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    rank = SimpleNamespace(config=SimpleNamespace(cluster=SimpleNamespace(device="cuda")), gpus=lambda: ["3"])
    TrainerActor._use_host(rank, 8)  # type: ignore[arg-type]
    assert found == {"gpus": ["3"], "cores": near, "threads": threads}


@pytest.mark.parametrize(("hidden_size", "threads"), [(128, 1), (1024, 4)])
def test_a_rank_on_a_cpu_has_as_many_as_its_model_is_worth(
    monkeypatch: pytest.MonkeyPatch, hidden_size: int, threads: int
) -> None:
    actor = "ctpo_megatron.cluster.trainer.actor"
    found: list[int] = []
    monkeypatch.setattr(f"{actor}.node_address", lambda _config: "203.0.113.9")
    monkeypatch.setattr(f"{actor}.node_environment", lambda *_args: {})
    kept: list[bool] = []
    monkeypatch.setattr(f"{actor}.set_threads", found.append)
    monkeypatch.setattr(f"{actor}.keep_memory", lambda: kept.append(True))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    config = SimpleNamespace(cluster=SimpleNamespace(device="cpu"))
    rank = SimpleNamespace(config=config, shape=SimpleNamespace(hidden_size=hidden_size))
    TrainerActor._use_host(rank, 2)  # type: ignore[arg-type]
    assert found == [threads]
    assert kept == [True]
