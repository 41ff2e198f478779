"""Layouts of two ranks are one rank in those cases too that test_parity.py leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.mcore.rank import RankInfo
from tests.support.families import MODELS
from tests.support.parity import (
    FAMILIES,
    LAYERS,
    TWO_RANKS,
    Alone,
    Layout,
    Results,
    all_cases,
    assert_layout_is_one_rank,
    engines_of,
    train_alone,
    train_layouts,
)
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import write_model

TIMEOUT_S = 900.0  # they take a tenth of it on two idle cores
HALF = (1,)
pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(TIMEOUT_S)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), name, LAYERS, MODELS[name]) for name in FAMILIES}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, Alone]:
    return run_ranks(1, one_rank, models, all_cases(TWO_RANKS, HALF), timeout_s=TIMEOUT_S)[0]


@pytest.fixture(scope="module")
def two_ranks(models: dict[str, Path], alone: dict[str, Alone]) -> list[Results]:
    samples = {family: each.samples for family, each in alone.items()}
    ports = [free_port() for _ in engines_of(TWO_RANKS, HALF)]
    return run_ranks(2, several_ranks, TWO_RANKS, ports, models, samples, {}, HALF, timeout_s=TIMEOUT_S)


def one_rank(rank: RankInfo, *args: Any) -> dict[str, Alone]:
    return train_alone(rank, *args)


def several_ranks(rank: RankInfo, *args: Any) -> Results:
    return train_layouts(rank, *args)


@pytest.mark.parametrize("layout", TWO_RANKS, ids=lambda layout: layout.name)
def test_two_ranks_are_one(two_ranks: list[Results], alone: dict[str, Alone], layout: Layout) -> None:
    assert_layout_is_one_rank(two_ranks, layout, alone, HALF)
