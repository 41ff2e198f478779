"""Layouts of four ranks are one rank, as test_parity.py has it of two, with the same models and cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.mcore.rank import RankInfo
from tests.support.families import MODELS
from tests.support.parity import (
    FAMILIES,
    FOUR_RANKS,
    LAYERS,
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
pytestmark = [pytest.mark.dist, pytest.mark.long, pytest.mark.timeout(TIMEOUT_S)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_model(tmp_path_factory.mktemp(name), name, LAYERS, MODELS[name]) for name in FAMILIES}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, Alone]:
    return run_ranks(1, one_rank, models, all_cases(FOUR_RANKS), timeout_s=TIMEOUT_S)[0]


@pytest.fixture(scope="module")
def four_ranks(models: dict[str, Path], alone: dict[str, Alone]) -> list[Results]:
    samples = {family: each.samples for family, each in alone.items()}
    ports = [free_port() for _ in engines_of(FOUR_RANKS)]
    return run_ranks(4, several_ranks, FOUR_RANKS, ports, models, samples, {}, timeout_s=TIMEOUT_S)


def one_rank(rank: RankInfo, *args: Any) -> dict[str, Alone]:
    return train_alone(rank, *args)


def several_ranks(rank: RankInfo, *args: Any) -> Results:
    return train_layouts(rank, *args)


@pytest.mark.parametrize("layout", FOUR_RANKS, ids=lambda layout: layout.name)
def test_four_ranks_are_one(four_ranks: list[Results], alone: dict[str, Alone], layout: Layout) -> None:
    assert_layout_is_one_rank(four_ranks, layout, alone)
