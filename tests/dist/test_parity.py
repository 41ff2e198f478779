"""No layout changes the numbers: two optimizer steps agree with those of one rank, on gloo with the real megatron-core.

These are the layouts of two ranks and half of the cases, in which every two of objective, packing and number of micro-batches
meet. test_parity_rest.py has the other half, test_parity_four.py all of them at four ranks.

A dense model (qwen3, tied embeddings), a mixture of experts (qwen3_moe: 4 experts, load-balancing loss and z-loss with
coefficients of 0.01) and one with the parts that these lack (deepseek_v3: latent attention, a dense layer, shared experts, groups
of experts, a balancing bias that moves), 4 layers each, float32, from one model directory. Compared are the losses, the gradient
norms, all statistics of both steps and every exported parameter. The bound is 1e-5, relative where a number exceeds 1, and 2e-4
for statistics, which are sums over tokens; `parity.OPTIMIZER` says why the optimizer is not the usual one.

At every layout: ctpo, grpo and gspo with {12 sequences packed, one sequence per micro-batch} x {1, 3 micro-batches per
data-parallel rank}; of the experts one case more, in which they replay a given routing, of the dense model one with truncated
sampling. Interleaving (VPP) takes multiples of its
2 stages, 2 and 4, instead of 1 and 3. Each layout pads its packs as it must, one rank not at all. One rank trains on packs of the
same sequences: the auxiliary losses are means of their values for each pack.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.mcore.rank import RankInfo
from tests.support.engine_faults import ENGINE_FAULTS
from tests.support.families import MODELS
from tests.support.parity import (
    BOTH,
    FAMILIES,
    FOUR_RANKS,
    LAYERS,
    SEQUENCES,
    TOLERANCE,
    TWO_RANKS,
    Alone,
    Layout,
    Results,
    all_cases,
    assert_layout_is_one_rank,
    assert_same,
    cases_of,
    engines_of,
    fault_case,
    train_alone,
    train_layouts,
)
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import write_model

TIMEOUT_S = 900.0  # they take a tenth of it on two idle cores
pytestmark = [pytest.mark.dist, pytest.mark.timeout(TIMEOUT_S)]

# These only move layers between ranks: each rank adds up the same numbers in the same order, for every bit of every weight.
# Tied embeddings are the exception: the first and the last stage each add up a part of their gradient.
SAME_BITS = ("PP2", "VPP", "PP2 of 3+1 layers")
HALF = (0,)


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
    return run_ranks(2, several_ranks, TWO_RANKS, ports, models, samples, ENGINE_FAULTS, HALF, timeout_s=TIMEOUT_S)


def one_rank(rank: RankInfo, *args: Any) -> dict[str, Alone]:
    return train_alone(rank, *args)


def several_ranks(rank: RankInfo, *args: Any) -> Results:
    return train_layouts(rank, *args)


@pytest.mark.parametrize("layout", TWO_RANKS, ids=lambda layout: layout.name)
def test_two_ranks_are_one(two_ranks: list[Results], alone: dict[str, Alone], layout: Layout) -> None:
    assert_layout_is_one_rank(two_ranks, layout, alone, HALF)


@pytest.mark.parametrize("name", SAME_BITS)
def test_moving_layers_between_ranks_changes_no_bit(two_ranks: list[Results], alone: dict[str, Alone], name: str) -> None:
    (layout,) = (layout for layout in TWO_RANKS if layout.name == name)
    for case in cases_of(layout, "qwen3_moe", HALF):
        found = two_ranks[0][name, "qwen3_moe"][case].weights
        for key, value in alone["qwen3_moe"].found[case].weights.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{case}, {key}")


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_a_planted_fault_is_found(two_ranks: list[Results], alone: dict[str, Alone], fault: str) -> None:
    name, family, _ = ENGINE_FAULTS[fault]
    (layout,) = (layout for layout in TWO_RANKS if layout.name == name)
    case, found = fault_case(layout, family), two_ranks[0][name, family]
    expected = alone[family].found[case]
    assert_same(found[case], expected, "without the fault")
    with pytest.raises(AssertionError, match=fault):
        assert_same(found[fault], expected, fault)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_steps_are_worth_comparing(alone: dict[str, Alone], family: str) -> None:
    """Each objective moves every weight by far more than the bound, and many sequences also in the second step."""
    for case, found in alone[family].found.items():
        gradients = [step["grad_norm"] for step in found.steps]
        assert gradients[0] > 1.0, case
        sequences = SEQUENCES if case.packed else case.packs
        assert gradients[1] > 0.1 or sequences <= 2, f"{case}: every token is clipped"
        moved = {name: np.abs(found.weights[name] - value).max() for name, value in alone[family].before.items()}
        assert min(moved.values()) > 10 * TOLERANCE, (case, min(moved, key=moved.get))


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_all_and_each_has_every_pair(layout: Layout, family: str) -> None:
    halves = [cases_of(layout, family, (half,)) for half in BOTH]
    assert sorted(halves[0] + halves[1]) == sorted(cases_of(layout, family))
    if family != "deepseek_v3":
        for pair in combinations(("objective", "packed", "packs"), 2):
            met = [{tuple(getattr(case, name) for name in pair) for case in half} for half in halves]
            assert met[0] == met[1]
            assert len(met[0]) == (4 if "objective" not in pair else 6)


def test_every_axis_takes_part() -> None:
    met = {name for layout in (*TWO_RANKS, *FOUR_RANKS) for name in layout.sizes}
    elsewhere = {  # test_layout.py has the split from the other end, test_overlap.py what goes on beside passes
        "last_stage_layers",
        "overlap_grad_reduce",
        "overlap_param_gather",
    }
    assert met >= set(ParallelConfig.model_fields) - elsewhere
