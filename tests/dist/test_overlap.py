"""Gradients that are reduced while the backward pass goes on are the same to the bit. On gloo with the real megatron-core.

Two optimizer steps of several micro-batches, in several buckets, at every layout of two ranks. The gradient's norm is summed over
other shares of it, so it may differ in rounding; clipping stays idle.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

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


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[bool, Any]]:
    model = write_model(tmp_path_factory.mktemp("model"), "qwen3", 4)
    ports = [(free_port(), free_port()) for _ in LAYOUTS]
    return run_ranks(2, train, model, ports)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overlapped_reduction_gives_the_same_bits(found: dict[str, dict[bool, Any]], layout: str) -> None:
    plain, overlapped = found[layout][False], found[layout][True]
    assert overlapped["numbers"] == plain["numbers"]
    assert overlapped["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-6)
    for key, weight in plain["weights"].items():
        np.testing.assert_array_equal(overlapped["weights"][key], weight, err_msg=key)
    assert overlapped["buckets"] > plain["buckets"], "in one bucket nothing would be reduced before the end"


# ---- what runs in the ranks


def train(rank: RankInfo, model: Path, ports: list[tuple[int, int]]) -> dict[str, dict[bool, Any]]:
    import ctpo_megatron.mcore.model.build as build

    build.OVERLAPPED_BUCKET = 20_000  # several of a tiny model
    found: dict[str, dict[bool, Any]] = {}
    for (name, sizes), own in zip(LAYOUTS.items(), ports, strict=True):
        found[name] = {}
        for overlapped in (False, True):
            parallel = ParallelConfig(**sizes, overlap_grad_reduce=overlapped)
            place = replace(rank, master_port=own[overlapped])
            engine = TrainerRank(str(model), parallel, OPTIMIZER, place, device="cpu", seed=1)
            found[name][overlapped] = updated(engine)
            engine.close()
    return found


def updated(engine: TrainerRank) -> dict[str, Any]:
    from ctpo_megatron.mcore.policy import update_policy

    samples = [replace(each, routed_experts=None, supports=None) for each in draw_samples()]
    options = {"aggregation": SequenceMean(), "parallel": engine.parallel, "max_tokens": 48}
    batches = [build_train_batch(samples[first : first + 6], first_id=first, **options) for first in (0, 6)]
    mine = [batch.micro_batches[engine.coords.dp_rank] for batch in batches]
    values = update_policy(engine, mine, algorithm=AlgorithmConfig(), temperature=0.7, drift=DriftBounds(), version=0)
    return {
        "numbers": {name: scalar(values[name]) for name in ("loss", "entropy")},
        "grad_norm": scalar(values["grad_norm"]),
        "weights": exported(engine),
        "buckets": sum(len(buffer.buckets) for model in engine.models for buffer in model.buffers),
    }
