"""Gradients that are reduced while the backward pass goes on, and weights that are gathered while the next forward pass does, are
the same to the bit. On gloo with the real megatron-core.

Two optimizer steps of several micro-batches, in several buckets, at every layout of two ranks. The gradient's norm is summed over
other shares of it, so it may differ in rounding; clipping stays idle.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from ctpo_megatron.algorithms import Scan, Stats
from ctpo_megatron.batch import MicroBatch
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import SequenceMean
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.record.values import scalar
from tests.support.parity import OPTIMIZER, draw_samples, exported
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import write_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(400)]

LAYOUTS: dict[str, dict[str, int]] = {
    "DP2": {"dp": 2},
    "CP2": {"cp": 2},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2},
    "VPP": {"pp": 2, "vpp": 2},
}
WAYS = {"behind": (False, False), "reduced": (True, False), "gathered": (True, True)}  # overlap_grad_reduce, overlap_param_gather


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    model = write_model(tmp_path_factory.mktemp("model"), "qwen3", 4)
    ports = [[free_port() for _ in WAYS] for _ in LAYOUTS]
    return run_ranks(2, train, model, ports)[0]


@pytest.mark.parametrize("way", ["reduced", "gathered"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_goes_on_beside_a_pass_gives_the_same_bits(found: dict[str, dict[str, Any]], layout: str, way: str) -> None:
    plain, overlapped = found[layout]["behind"], found[layout][way]
    assert overlapped["numbers"] == plain["numbers"]
    assert overlapped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    for moment in ("updated", "gathered later"):
        for key, weight in plain[moment].items():
            np.testing.assert_array_equal(overlapped[moment][key], weight, err_msg=f"{moment}: {key}")
    assert overlapped["buckets"] > plain["buckets"], "in one bucket nothing would be reduced before the end"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_before_another_one_leaves_the_gathering_to_it(found: dict[str, dict[str, Any]], layout: str) -> None:
    for way in WAYS:
        left, passed, whole = (found[layout][way][moment] for moment in ("left", "left after a pass", "left at the end"))
        assert left == (found[layout][way]["buckets"] if way == "gathered" else 0)
        assert (passed, whole) == (0, 0), "a pass gathers all of them, and so does a step that is the last"


# ---- what runs in the ranks


def train(rank: RankInfo, model: Path, ports: list[list[int]]) -> dict[str, dict[str, Any]]:
    import ctpo_megatron.mcore.model.build as build

    build.OVERLAPPED_BUCKET = 20_000  # several of a tiny model
    found: dict[str, dict[str, Any]] = {}
    for (name, sizes), own in zip(LAYOUTS.items(), ports, strict=True):
        found[name] = {}
        for (way, (reduced, gathered)), port in zip(WAYS.items(), own, strict=True):
            parallel = ParallelConfig(**sizes, overlap_grad_reduce=reduced, overlap_param_gather=gathered)
            engine = TrainerRank(str(model), parallel, OPTIMIZER, replace(rank, master_port=port), device="cpu", seed=1)
            found[name][way] = updated(engine)
            engine.close()
    return found


def updated(engine: TrainerRank) -> dict[str, Any]:
    from ctpo_megatron.mcore.policy import update_policy

    samples = [replace(each, routed_experts=None, supports=None) for each in draw_samples()]
    options = {"aggregation": SequenceMean(), "parallel": engine.parallel, "max_tokens": 48}
    batches = [build_train_batch(samples[first : first + 6], first_id=first, **options) for first in (0, 6)]
    mine = [batch.micro_batches[engine.coords.dp_rank] for batch in batches]
    values = update_policy(engine, mine, algorithm=AlgorithmConfig(), temperature=0.7, drift=DriftBounds(), version=0)
    found = {
        "numbers": {name: scalar(values[name]) for name in ("loss", "entropy")},
        "grad_norm": scalar(values["grad_norm"]),
        "buckets": sum(len(buffer.buckets) for model in engine.models for buffer in model.buffers),
        "left at the end": to_gather(engine),
        "updated": exported(engine),
    }
    placed = engine.place(mine[0])
    engine.train_step(placed, likelihood, 1.0, more=True)
    found["left"] = to_gather(engine)
    engine.logp(placed, 1.0)
    return found | {"left after a pass": to_gather(engine), "gathered later": exported(engine)}


def likelihood(logp: Tensor, shard: MicroBatch, _scan: Scan) -> tuple[Tensor, Stats]:
    return -logp[shard.tokens.mask].sum() / 100, Stats()


def to_gather(engine: TrainerRank) -> int:
    """Buckets whose weights are not whole yet on this rank."""
    groups = [group for model in engine.models for group in model.bucket_groups if group.ddp_config.overlap_param_gather]
    return sum(len(group.buckets) for group in groups if not group.param_gather_dispatched or group.param_gather_handle)
