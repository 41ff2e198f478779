"""Passes that are not made change nothing: that of the old policy for the first optimizer step, and samples without an advantage.

On gloo with the real megatron-core, two optimizer steps in an update, at one rank and at DP2, TP2, PP2 and CP2.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.errors import MismatchError
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.record.values import scalar
from tests.support.parity import OPTIMIZER, begin_again, draw_samples, exported
from tests.support.ranks import at_own_port, free_port, run_ranks
from tests.support.tiny import write_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

LAYOUTS: dict[str, dict[str, int]] = {"DP2": {"dp": 2}, "TP2": {"tp": 2}, "PP2": {"pp": 2}, "CP2": {"cp": 2}}
ALGORITHMS: dict[str, dict[str, Any]] = {name: {"objective": {"type": name}} for name in OBJECTIVES} | {
    "corrected": {"correction": {"type": "truncate", "level": "token", "low": 0.5, "high": 2.0}, "anchor": "old"},
    "rollout": {"anchor": "rollout"},
}
AT_LAYOUTS = ("ctpo", "corrected")
TEMPERATURE, IDLE = 0.7, (1, 4, 5, 9)  # samples without an advantage


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    model = write_model(tmp_path_factory.mktemp("model"), "qwen3", 2)
    ports = [free_port() for _ in LAYOUTS]
    (alone,) = run_ranks(1, at_one_rank, model)
    return {"one rank": alone, **run_ranks(2, at_two_ranks, model, ports)[0]}


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_the_first_step_against_its_own_log_probs_is_the_same_to_the_bit(found: dict[str, Any], layout: str) -> None:
    for name, case in found[layout]["cases"].items():
        passed, own = case["passed"], case["own"]
        for key, weight in passed["weights"].items():
            np.testing.assert_array_equal(own["weights"][key], weight, err_msg=f"{name}, {key}")
        assert own["loss"] == passed["loss"], name
        assert own["drift"] == pytest.approx(passed["drift"], rel=1e-12), name


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_samples_without_an_advantage_change_nothing(found: dict[str, Any], layout: str) -> None:
    for name, case in found[layout]["cases"].items():
        own, spared = case["own"], case["spared"]
        assert spared["loss"] == pytest.approx(own["loss"], abs=1e-6), name
        assert spared["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-5), name
        for key, weight in own["weights"].items():
            np.testing.assert_allclose(spared["weights"][key], weight, rtol=0, atol=1e-6, err_msg=f"{name}, {key}")
        assert spared["tokens"] < own["tokens"], "a case without a spared sample compares nothing"


@pytest.mark.parametrize("layout", ["one rank", *LAYOUTS])
def test_drift_beyond_its_bound_changes_nothing(found: dict[str, Any], layout: str) -> None:
    assert "drift.max allows" in found[layout]["refused"]
    assert found[layout]["unchanged"]


# ---- what runs in the ranks


def at_one_rank(rank: RankInfo, model: Path) -> dict[str, Any]:
    return at(at_own_port(rank), model, ParallelConfig(), tuple(ALGORITHMS))


def at_two_ranks(rank: RankInfo, model: Path, ports: list[int]) -> dict[str, dict[str, Any]]:
    places = zip(LAYOUTS.items(), ports, strict=True)
    return {
        name: at(replace(rank, master_port=port), model, ParallelConfig(**sizes), AT_LAYOUTS) for (name, sizes), port in places
    }


def at(rank: RankInfo, model: Path, parallel: ParallelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    engine = TrainerRank(str(model), parallel, OPTIMIZER, rank, device="cpu", seed=1)
    ways = {"passed": (with_a_pass, None), "own": (updated, None), "spared": (updated, 0)}
    cases = {name: {way: trained(engine, ALGORITHMS[name], *how) for way, how in ways.items()} for name in names}
    before, error = exported(engine), ""
    try:
        updated(engine, AlgorithmConfig(), batches_of(engine, None), DriftBounds(max=1e-9))
    except MismatchError as refused:
        error = str(refused)
    after = exported(engine)
    engine.close()
    unchanged = all(np.array_equal(after[key], weight) for key, weight in before.items())
    return {"cases": cases, "refused": error, "unchanged": unchanged}


def batches_of(engine: TrainerRank, spare_beyond: int | None) -> list[Any]:
    samples = [replace(each, routed_experts=None, supports=None) for each in draw_samples()]
    for number in IDLE:
        samples[number] = replace(samples[number], advantages=[0.0] * len(samples[number]))
    options = {"aggregation": SequenceMean(), "parallel": engine.parallel, "max_tokens": 64, "spare_beyond": spare_beyond}
    made = [build_train_batch(samples[first : first + 6], first_id=first, **options) for first in (0, 6)]
    return [batch.micro_batches[engine.coords.dp_rank] for batch in made]


def trained(engine: TrainerRank, algorithm: dict[str, Any], update: Any, spare_beyond: int | None) -> dict[str, Any]:
    begin_again(engine)
    values = update(engine, AlgorithmConfig(**algorithm), batches_of(engine, spare_beyond), DriftBounds())
    numbers = {name: scalar(values[name]) for name in ("loss", "grad_norm", "tokens")}
    return numbers | {"drift": scalar(values["drift/mean"]), "weights": exported(engine)}


def updated(engine: TrainerRank, algorithm: AlgorithmConfig, batches: list[Any], drift: DriftBounds) -> Any:
    from ctpo_megatron.mcore.policy import update_policy

    return update_policy(engine, batches, algorithm=algorithm, temperature=TEMPERATURE, drift=drift, version=0)


def with_a_pass(engine: TrainerRank, algorithm: AlgorithmConfig, batches: list[Any], _drift: DriftBounds) -> Any:
    """The same, the old policy's log-probs of every optimizer step found in a pass of their own."""
    from ctpo_megatron.algorithms import make_recipe
    from ctpo_megatron.mcore.old_policy import OldPolicy
    from ctpo_megatron.mcore.policy_terms import policy_share
    from ctpo_megatron.record.values import merge_values

    old, sharded, gaps = OldPolicy(engine.scan, algorithm.anchor, 0, None), [], []
    for number, batch in enumerate(batches):
        placed = engine.place(batch)
        shards, differences = old.anchored(number, placed, placed, engine.logp(placed, TEMPERATURE))
        sharded.append(shards)
        gaps += differences
    measured = engine.reduce(gaps)
    recipe = make_recipe(algorithm.objective, algorithm.aggregation, algorithm.correction, has_rollout=True)
    loss = partial(policy_share, recipe=recipe, algorithm=algorithm)
    return merge_values(engine.train_step(shards, loss, TEMPERATURE) for shards in sharded) | measured
