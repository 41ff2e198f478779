"""The names of the trainer's metrics in metrics.jsonl, written down: dashboards and old runs are read by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ctpo_megatron.batch import Replay
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.cluster import DriftConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from tests.support.ranks import run_ranks
from tests.support.tiny import micro_batches, write_model

pytestmark = pytest.mark.dist

BINS = range(1, 5)  # positions up to 31 are there


def test_names(tmp_path: Path) -> None:
    (found,) = run_ranks(1, names_of_an_update, write_model(tmp_path / "model", "qwen3_moe"))
    import json; json.dump(found, open("/tmp/math_values.json", "w"))


def names_of_an_update(rank: RankInfo, path: Path) -> list[str]:
    """What an update of two optimizer steps with a correction, a reference and a replayed routing reports."""
    engine = TrainerRank(str(path), ParallelConfig(), OptimizerConfig(lr=1e-3), rank, device="cpu", seed=1)
    from ctpo_megatron.mcore.policy import update_policy

    algorithm = AlgorithmConfig(
        reference={"path": str(path), "estimator": "k3", "coeff": 0.1},
        correction={"type": "truncate", "level": "token", "low": 0.5, "high": 2.0},
    )
    packs = [replace(pack, replay=Replay(torch.zeros(pack.positions, 2, 2, dtype=torch.int8))) for pack in micro_batches()]
    options = {"algorithm": algorithm, "temperature": 1.0, "drift": DriftConfig(), "version": 0}
    stats = update_policy(engine, [packs[:2], packs[2:]], reference=engine.host_weights(), **options)
    engine.close()
    return train_metrics(stats)
