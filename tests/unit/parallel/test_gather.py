"""The one collective of the package: under its new name where torch has it, under the old one elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from ctpo_megatron.parallel.gather import all_gather_single


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def gathered(group: dist.ProcessGroup) -> list[int]:
    mine = torch.arange(6)
    found = torch.empty_like(mine)
    all_gather_single(found, mine, group)
    return found.tolist()


def test_it_is_not_deprecated(alone: dist.ProcessGroup) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gathered(alone) == [0, 1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning")
def test_an_older_torch_has_the_old_name_only(alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dist, "all_gather_single", raising=False)
    assert gathered(alone) == [0, 1, 2, 3, 4, 5]
