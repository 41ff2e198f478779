"""Demonstrations with several taught turns, packed: their loss and gradient at every axis against transformers, one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.config.train import OptimizerConfig
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.data.samples import build_sample
from ctpo_megatron.mcore.rank import RankInfo, TrainerRank
from ctpo_megatron.types import TrainSample, Turn
from tests.support.ranks import free_port, run_ranks
from tests.support.tiny import VOCAB, write_model

pytestmark = pytest.mark.dist

LAYOUTS: list[dict[str, int]] = [{"cp": 2}, {"tp": 2}, {"pp": 2}, {"dp": 2}]
MAX_TOKENS = 48
AGREEMENT = 1e-5


def demonstrations() -> list[TrainSample]:
    """Of uneven lengths, with one to three answers, of which some have a tool's output between."""
    rng = np.random.default_rng(3)

    def ids(most: int) -> list[int]:
        return rng.integers(0, VOCAB, int(rng.integers(1, most))).tolist()

    def turn(role: Any) -> Turn:
        own = ids(9)
        return Turn(role, own, [0.0] * len(own), [-1] * len(own))

    return [
        build_sample(ids(12), [turn(role) for role in ("assistant", "tool") * 3][: 1 + 2 * (n % 3)], 1.0, n) for n in range(9)
    ]


def by_transformers(path: Path) -> tuple[float, int, float]:
    """Mean loss over taught tokens, how many these are, and the norm of its gradient; one demonstration at a time."""
    from transformers import AutoModelForCausalLM

    model, total, count = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), torch.zeros(()), 0
    for each in demonstrations():
        logp = model(torch.tensor([each.input_ids])).logits[0].log_softmax(-1)
        taught = torch.tensor(each.mask)
        total = total - logp.gather(-1, torch.tensor(each.labels)[:, None]).squeeze(-1)[taught].sum()
        count += int(taught.sum())
    (total / count).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return total.item() / count, count, norm.item()


def test_packed_demonstrations_are_taught_as_they_are_one_by_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "qwen3", "qwen3")
    loss, count, norm = by_transformers(path)
    ranks = run_ranks(2, teach, path, [free_port() for _ in LAYOUTS])
    for found in ranks:
        for layout, values in zip(LAYOUTS, found, strict=True):
            assert values["packs"] > 1, layout
            for when in ("before", "taught"):
                assert values[when]["tokens"] == count, (layout, when)
                assert values[when]["nll"] == pytest.approx(loss, abs=AGREEMENT), (layout, when)
            assert values["taught"]["grad_norm"] == pytest.approx(norm, rel=AGREEMENT), layout
            assert values["after"]["nll"] == pytest.approx(found[0]["after"]["nll"], abs=AGREEMENT), layout
            assert values["after"]["nll"] < loss - 0.01, layout


# ---- what runs in the ranks


def teach(rank: RankInfo, path: Path, ports: list[int]) -> list[dict[str, Any]]:
    """Measure, teach one step, measure again, at each layout."""
    from ctpo_megatron.mcore.policy import assess, supervise
    from ctpo_megatron.record.values import scalar

    found = []
    for layout, port in zip(LAYOUTS, ports, strict=True):
        parallel = ParallelConfig(**layout)
        optimizer = OptimizerConfig(lr=1e-2)
        own = replace(rank, master_port=port)
        engine = TrainerRank(str(path), parallel, optimizer, own, device="cpu", dtype="float32", seed=1)
        batch = build_train_batch(demonstrations(), aggregation=TokenMean(), parallel=parallel, max_tokens=MAX_TOKENS)
        share = batch.micro_batches[engine.coords.dp_rank]
        steps = {"before": assess(engine, share), "taught": supervise(engine, share), "after": assess(engine, share)}
        numbers = {name: {key: scalar(value) for key, value in values.items()} for name, values in steps.items()}
        found.append({**numbers, "packs": len(share)})
        engine.close()
    return found
