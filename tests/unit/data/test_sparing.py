"""Which samples need no pass, and that the others are in the batch as if nothing had been left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ctpo_megatron.algorithms import policy_loss
from ctpo_megatron.algorithms.objectives import OBJECTIVES
from ctpo_megatron.config.algorithm import AlgorithmConfig
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import Balanced, SequenceMean, TokenMean
from ctpo_megatron.data.packing import build_train_batch
from ctpo_megatron.data.sparing import spared
from ctpo_megatron.types import TrainSample


def sample(tokens: int, advantage: float, version: int = 3, group: int = 0) -> TrainSample:
    """One token of a prompt, then `tokens` of the policy."""
    mask = [False] + [True] * tokens
    streams: dict[str, Any] = {
        "rollout_logp": [-1.0 * wrote for wrote in mask],
        "versions": [version if wrote else -1 for wrote in mask],
        "advantages": [advantage * wrote for wrote in mask],
    }
    return TrainSample([7] * len(mask), [8] * len(mask), mask, **streams, group=group)


def test_samples_without_an_advantage_are_spared() -> None:
    samples = [sample(5, 0.0), sample(5, 1.0), sample(5, -0.0), sample(5, math.nan), sample(5, -1e-30)]
    assert spared(samples, 0) == [0, 2]
    assert spared(samples[1:2], 0) == []


def test_the_first_are_kept_until_the_drift_has_its_tokens() -> None:
    samples = [sample(5, 0.0), sample(5, 1.0), sample(5, 0.0), sample(5, 0.0)]
    assert [spared(samples, fewest) for fewest in (5, 6, 10, 11, 16, 99)] == [[0, 2, 3], [2, 3], [2, 3], [3], [], []]


def test_tokens_of_older_versions_say_nothing_of_the_drift() -> None:
    samples = [sample(5, 0.0, version=2), sample(5, 1.0, version=2), sample(5, 0.0, version=3)]
    assert spared(samples, 1) == [0], "the only sample of the newest version"


def test_where_nothing_has_an_advantage_something_is_left() -> None:
    assert spared([sample(2, 0.0), sample(2, 0.0)], 1) == [1]


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), Balanced()])
def test_weights_and_numbers_are_those_of_the_whole_batch(aggregation: Any) -> None:
    samples = [sample(4, 0.0, group=0), sample(9, 1.0, group=1), sample(2, -1.0, group=1), sample(5, 0.0, group=0)]
    options = {"aggregation": aggregation, "parallel": ParallelConfig(dp=2), "max_tokens": 32, "first_id": 10}
    whole, less = build_train_batch(samples, **options), build_train_batch(samples, **options, spare_beyond=0)

    def weights(batch: Any) -> dict[int, float]:
        rows = [(mb.sequences.ids.tolist(), mb.sequences.weights.tolist()) for row in batch.micro_batches for mb in row]
        return {number: weight for ids, found in rows for number, weight in zip(ids, found, strict=True) if number >= 0}

    assert less.ids() == [11, 12]
    assert less.spared == {10: 4, 13: 5}
    assert whole.spared == {}
    assert weights(less) == {number: weights(whole)[number] for number in (11, 12)}


@pytest.mark.parametrize("objective", [*({"type": name} for name in OBJECTIVES), {"type": "kpop", "penalty": 0.1}], ids=str)
def test_an_objective_that_has_a_gradient_without_an_advantage_says_so(objective: dict[str, Any]) -> None:
    """What `sparing` rests on: `loop.sparing` asks for every sample then."""
    generator = torch.Generator().manual_seed(2)
    logp, old, rollout = (-torch.rand(12, generator=generator) * 3 for _ in range(3))
    advantages = torch.zeros(12)
    advantages[:6] = 0.7
    found = {}
    for which, given in {"none": torch.zeros(12), "half": advantages}.items():
        leaf = logp.clone().requires_grad_()
        out = policy_loss(
            objective,
            logp=leaf,
            old_logp=old,
            advantages=given,
            mask=torch.ones(12, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, 6, 12]),
            rollout_logp=rollout,
            weights=torch.ones(2),
        )
        out.loss.backward()
        found[which] = (out.loss.item(), leaf.grad)
    loss, gradient = found["none"]
    acts = AlgorithmConfig.model_validate({"objective": objective}).objective.acts_without_advantage
    assert (loss != 0.0) is acts
    assert bool(gradient.any()) is acts
    assert bool(found["half"][1][6:].any()) is acts
