"""Adapters: every layout is one rank, and nothing but A and B moves. Real megatron-core on gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.models.adapters import target_names
from tests.support.adapters import ADAPTERS, TOLERANCE, Found, adapters_of, merged_of, start, stir, write_models
from tests.support.numbers import flat
from tests.support.parity import Case, draw_samples, packs_of
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import micro_batches

pytestmark = pytest.mark.dist

TWO_RANKS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "TP2": ({"tp": 2}, ("qwen3", "qwen2 DoRA")),
    "TP2 ETP2": ({"tp": 2, "etp": 2}, ("qwen3_moe",)),
    "VPP": ({"pp": 2, "vpp": 2}, ("qwen2",)),
    "CP2": ({"cp": 2}, ("qwen2",)),
    "CP2 EP2": ({"cp": 2, "ep": 2}, ("qwen3_moe",)),
    "EP2": ({"dp": 2, "ep": 2}, ("mixtral",)),
}
FOUR_RANKS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "TP2 CP2": ({"tp": 2, "cp": 2}, ("qwen3",)),
    "TP2 PP2": ({"tp": 2, "pp": 2}, ("qwen3_moe",)),
    "DP4 EP2 ETP2": ({"dp": 4, "ep": 2, "etp": 2}, ("qwen3_moe",)),
}


def unmark(engine: TrainerRank) -> None:
    from ctpo_megatron.mcore.model.lora import adapter_pairs

    for pair in adapter_pairs(engine.models):
        pair.a.sequence_parallel = False


def ungroup(engine: TrainerRank) -> None:
    from ctpo_megatron.mcore.model.lora import linear_adapters

    for adapter in linear_adapters(engine.models):
        adapter.groups = 0


def part(engine: TrainerRank) -> None:
    from ctpo_megatron.mcore.model.lora import ExpertAdapter, linear_adapters

    for adapter in linear_adapters(engine.models):
        if isinstance(adapter, ExpertAdapter):
            adapter.whole = lambda parameter: parameter  # type: ignore[method-assign]


def count_copies(engine: TrainerRank) -> None:
    for part in engine.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.shared = False


def shorten(engine: TrainerRank) -> None:
    from megatron.core import parallel_state

    from ctpo_megatron.mcore.model.lora import adapter_pairs

    for pair in adapter_pairs(engine.models):
        pair.group = parallel_state.get_context_parallel_group()  # of one rank


FAULTS: list[tuple[str, str, str, Callable[[TrainerRank], None]]] = [
    ("TP2", "qwen3", "parts of a gradient are not added up", unmark),
    ("TP2", "qwen2 DoRA", "lengths of rows of which a rank has a part", shorten),
    ("CP2", "qwen2", "queries not grouped with their keys", ungroup),
    ("TP2 ETP2", "qwen3_moe", "parts of an expert's gradient are not added up", part),
    ("TP2 ETP2", "qwen3_moe", "copies count in the norm", count_copies),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory)


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> dict[str, Found]:
    return run_ranks(1, one_rank, models)[0]


@pytest.fixture(scope="module")
def two(models: dict[str, Path]) -> list[dict[tuple[str, str], Found]]:
    return run_ranks(2, layouts, TWO_RANKS, models, [free_port() for _ in range(12)])


@pytest.fixture(scope="module")
def four(models: dict[str, Path]) -> list[dict[tuple[str, str], Found]]:
    return run_ranks(4, layouts, FOUR_RANKS, models, [free_port() for _ in range(12)])


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, (_, some) in TWO_RANKS.items() for family in some])
def test_two_ranks_are_one(two: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    assert_same(two, alone, name, family)


@pytest.mark.parametrize(("name", "family"), [(name, family) for name, (_, some) in FOUR_RANKS.items() for family in some])
def test_four_ranks_are_one(four: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    assert_same(four, alone, name, family)


def assert_same(ranks: list[dict], alone: dict[str, Found], name: str, family: str) -> None:
    found, expected = ranks[0][name, family], alone[family]
    assert all(rank[name, family]["steps"] == found["steps"] for rank in ranks)
    for key, value in expected["drawn"].items():  # drawn alike, bit for bit; lengths are sums
        np.testing.assert_allclose(found["drawn"][key], value, rtol=1e-6 if "magnitude" in key else 0.0, atol=0.0, err_msg=key)
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=TOLERANCE), key
    for kind in ("adapters", "merged"):
        for key, value in expected[kind].items():
            np.testing.assert_allclose(found[kind][key], value, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize(("name", "family", "fault"), [fault[:3] for fault in FAULTS])
def test_a_planted_fault_is_found(two: list[dict], alone: dict[str, Found], name: str, family: str, fault: str) -> None:
    planted = [{(name, family): rank[name, fault]} for rank in two]
    with pytest.raises(AssertionError):
        assert_same(planted, alone, name, family)


@pytest.mark.parametrize("family", ADAPTERS)
def test_only_adapters_move(alone: dict[str, Found], family: str) -> None:
    found = alone[family]
    assert found["base moved"] == 0.0
    assert found["optimizer"] == found["trainable"] == sum(value.size for value in found["adapters"].values())
    moved = {key: np.abs(found["adapters"][key] - value).max() for key, value in found["before"].items()}
    assert min(moved.values()) > 10 * TOLERANCE, min(moved, key=lambda key: moved[key])
    targets = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in moved}
    assert targets == set(found["targets"])


@pytest.mark.parametrize("family", ADAPTERS)
def test_the_reference_policy_is_the_model_without_its_adapters(alone: dict[str, Found], family: str) -> None:
    found = alone[family]
    np.testing.assert_array_equal(found["reference"], found["base"])
    assert np.abs(found["policy"] - found["base"]).max() > 1e-3
    np.testing.assert_array_equal(found["policy again"], found["policy"])


# ---- what runs in the ranks


def train(engine: TrainerRank, family: str) -> Found:
    """Two optimizer steps, and what they began with."""
    from ctpo_megatron.mcore.policy import update_policy

    found: Found = {"drawn": adapters_of(engine)}
    stir(engine)
    found["before"] = adapters_of(engine)
    case = Case("grpo", True, 4, replay=False)
    packs = packs_of(case, draw_samples(), engine.parallel)[engine.coords.dp_rank :: engine.parallel.dp]
    options = {"algorithm": AlgorithmConfig(anchor="old"), "temperature": 0.7, "drift": DriftBounds(), "version": 0}
    found["steps"] = [flat(update_policy(engine, [packs], **options)) for _ in range(2)]
    return found | {"adapters": adapters_of(engine), "merged": merged_of(engine)}


def layouts(
    rank: RankInfo, some: dict[str, tuple[dict[str, int], tuple[str, ...]]], models: dict[str, Path], ports: list[int]
) -> dict[tuple[str, str], Found]:
    ports, found = list(ports), {}

    def run(name: str, family: str, key: str, change: Callable[[TrainerRank], Any] = lambda _engine: None) -> None:
        parallel = ParallelConfig(**some[name][0])
        engine = start(replace(rank, master_port=ports.pop()), models[family], parallel, ADAPTERS[family])
        change(engine)
        found[name, key] = train(engine, family)
        engine.close()

    for name, (_, families) in some.items():
        for family in families:
            run(name, family, family)
    for name, family, fault, plant in FAULTS:
        if name in some:
            run(name, family, fault, plant)
    return found


def one_rank(rank: RankInfo, models: dict[str, Path]) -> dict[str, Found]:
    return {family: one_family(rank, path, family) for family, path in models.items()}


def one_family(rank: RankInfo, path: Path, family: str) -> Found:
    from ctpo_megatron.mcore.hf.load import keyed_tensors

    def base(engine: TrainerRank) -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in keyed_tensors(engine.models[0], engine.shape, engine.coords)}

    def logp(engine: TrainerRank) -> NDArray[np.float32]:
        return torch.cat(engine.logp(engine.place(micro_batches()), 1.0)).numpy()

    engine = start(rank, path, ParallelConfig(), ADAPTERS[family])
    before, untouched = base(engine), logp(engine)  # B is 0
    found = train(engine, family)
    found["base moved"] = max(float((p - before[key]).abs().max()) for key, p in base(engine).items())
    states = [s for part in engine.optimizer.chained_optimizers if part.optimizer for s in part.optimizer.state.values()]
    found["optimizer"] = sum(state["exp_avg"].numel() for state in states)
    found["targets"] = [target_names(engine.shape)[target] for target in ADAPTERS[family].targets]
    found["trainable"] = sum(p.numel() for p in engine.models[0].parameters() if p.requires_grad)
    found |= {"base": untouched, "policy": logp(engine)}
    with engine.using(engine.reference()):
        found["reference"] = logp(engine)
    found["policy again"] = logp(engine)
    engine.close()
    return found
