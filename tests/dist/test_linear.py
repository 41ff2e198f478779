"""Linear layers whose products are oneDNN's are those whose products are torch's own. Real megatron-core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.kernels.cpu import linear as products
from ctpo_megatron.mcore.model import linear as layers
from ctpo_megatron.mcore.rank import RankInfo
from tests.dist.test_engine import compare, exercise, join
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import FAMILIES, write_model

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module")
def by_torch(models: dict[str, Path]) -> dict[str, Any]:
    return run_ranks(1, trained, models, False)[0]


def test_one_rank(models: dict[str, Path], by_torch: dict[str, Any]) -> None:
    found = run_ranks(1, trained, models, True)[0]
    assert found.pop("products") > 0 == by_torch["products"]
    for family, mine in found.items():
        compare(mine, by_torch[family], family)


def test_two_ranks(models: dict[str, Path], by_torch: dict[str, Any]) -> None:
    ports = {family: free_port() for family in models}
    answers = run_ranks(2, trained, models, True, ports)
    assert answers[0]["products"] > 0
    for family in models:
        compare(join([answer[family] for answer in answers]), by_torch[family], family)


# ---- what runs in the ranks


def trained(rank: RankInfo, models: dict[str, Path], by_onednn: bool, ports: dict[str, int] | None = None) -> dict[str, Any]:
    """What each family's engine finds, on two ranks where there are `ports`; and how many `products` of layers were oneDNN's."""
    counted: list[torch.Size] = []

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        counted.append(weight.shape)
        return products.linear(x, weight)

    def found(family: str) -> dict[str, Any]:
        if ports is None:
            return exercise(rank, models[family], ParallelConfig())
        return exercise(replace(rank, master_port=ports[family]), models[family], ParallelConfig(tp=2))

    with (
        patch.object(products, "pays", lambda: by_onednn),
        patch.object(products, "FEWEST", 1),
        patch.object(layers, "linear", linear),
    ):
        return {family: found(family) for family in models} | {"products": len(counted)}
