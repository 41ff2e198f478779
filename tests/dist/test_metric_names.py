"""The names of the trainer's metrics in metrics.jsonl, written down: dashboards and old runs are read by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctpo_megatron.batch import Replay
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

LAYERS = 2
STEP = (
    *("tokens", "loss", "entropy", "grad_norm", "grad_norm_max", "lr", "kl", "kl_old", "log_ratio_sq"),
    *("ratio", "ratio_sq", "ratio_max", "ratio_min", "clip_fraction", "clip_high", "clip_low", "clip_dual"),
    *("correction", "correction_sq", "correction_max", "correction_zero"),
    *("correction_before", "correction_before_max", "correction_log"),
)
POSITIONS = [1, 2, 4, 8, 16]  # where ranges of positions begin; no sequence has more than 31 tokens of the policy
BY_POSITION = ["drift", "health/log_ratio_mean", "health/log_ratio_std", "health/log_ratio_fit"]
NAMES = {
    *(f"train/{name}" for name in STEP),
    *("drift/mean", "drift/max"),
    *(f"{name}/from_token_{first}" for name in BY_POSITION for first in POSITIONS),
    *(f"health/clip_fraction/decile_{k}" for k in range(10)),
    *("health/effective_sample_size", "health/correction_sample_size", "health/log_ratio_growth", "health/log_ratio_sigma"),
    *(f"moe/{name}/layer_{n}" for name in ("load_entropy", "load_max_over_mean") for n in range(LAYERS)),
    "routing/changed",
}


def test_the_names_of_the_trainers_metrics(tmp_path: Path) -> None:
    (found,) = run_ranks(1, names_of_an_update, write_model(tmp_path / "model", "qwen3_moe", layers=LAYERS))
    assert found == NAMES


def names_of_an_update(rank: RankInfo, path: Path) -> set[str]:
    """What an update of two optimizer steps with a correction, a reference policy and a replayed routing reports."""
    engine = TrainerRank(str(path), ParallelConfig(), OptimizerConfig(lr=1e-3), rank, device="cpu", seed=1)
    from ctpo_megatron.mcore.policy import update_policy

    algorithm = AlgorithmConfig(
        reference={"path": str(path), "estimator": "k3", "coeff": 0.1},
        correction={"type": "truncate", "level": "token", "low": 0.5, "high": 2.0},
    )
    routing = [torch.zeros(pack.positions, LAYERS, 2, dtype=torch.int8) for pack in micro_batches()]
    packs = [replace(pack, replay=Replay(ids)) for pack, ids in zip(micro_batches(), routing, strict=True)]
    options = {"algorithm": algorithm, "temperature": 1.0, "drift": DriftBounds(), "version": 0}
    stats = update_policy(engine, [packs[:2], packs[2:]], reference=engine.host_weights(), **options)
    engine.close()
    return set(train_metrics(stats))
