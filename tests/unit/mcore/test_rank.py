"""How a trainer rank joins the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.mcore import rank
from ctpo_megatron.ports import free_port


def test_the_default_group_is_bound_to_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch splits it for every later group of the process, the one with the servers too."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    rank.meet(rank.RankInfo(0, 1, "127.0.0.1", free_port("127.0.0.1")), torch.device("cuda", 0))
    assert given["backend"] == "nccl"
    assert given.get("device_id") is None


def test_the_prefix_of_the_store_is_not_shown() -> None:
    info = rank.RankInfo(0, 1, "127.0.0.1", free_port("127.0.0.1"), prefix="drawn-for-this-run")
    assert "drawn-for-this-run" not in repr(info)


def test_ranks_of_another_run_meet_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come to the same port, and find none of the first run's keys."""
    stores: list[dist.Store] = []
    monkeypatch.setattr(dist, "init_process_group", lambda _backend, store, **_options: stores.append(store))
    port = free_port("127.0.0.1")
    rank.meet(rank.RankInfo(0, 1, "127.0.0.1", port, prefix="first"), torch.device("cpu"))
    for prefix in ("second", "first"):
        rank.meet(rank.RankInfo(1, 1, "127.0.0.1", port, prefix=prefix), torch.device("cpu"))
    first, second, again = stores
    first.set("rank 0", "here")
    assert not second.check(["rank 0"])
    assert again.check(["rank 0"])
