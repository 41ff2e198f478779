"""How a trainer rank joins the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.mcore import rank


def test_the_default_group_is_bound_to_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch splits it for every later group of the process, the one with the servers too."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "TCPStore", lambda *_args, **_options: "store")
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    rank._init_distributed(rank.RankInfo(0, 4, "127.0.0.1", 1), torch.device("cuda", 0))
    assert given["backend"] == "nccl"
    assert given.get("device_id") is None
