"""The plan of micro-batches: the invariants that balance.py states, for any lengths, and the bounds at scale."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.objectives import TokenMean
from ctpo_megatron.data.balance import plan_micro_batches
from ctpo_megatron.data.packing import build_train_batch, pack
from ctpo_megatron.models.shape import HeadAttention, ModelShape, Rope
from ctpo_megatron.planning.flops import attention_weight
from ctpo_megatron.types import TrainSample
from tests.support.often import often


def cost(lengths: list[int], members: list[int], weight: float) -> float:
    return sum(lengths[i] + weight * lengths[i] ** 2 for i in members)


def imbalance(lengths: list[int], plan: list[list[list[int]]], weight: float = 0.0) -> float:
    totals = [sum(cost(lengths, members, weight) for members in rank) for rank in plan]
    return max(totals) / (sum(totals) / len(totals)) - 1


def lognormal(count: int, seed: int = 3) -> list[int]:
    """Lengths with a long tail, mean about 2,500, cut at 16,384."""
    drawn = np.random.default_rng(seed).lognormal(7.3, 1.1, count)
    return drawn.clip(16, 16384).astype(int).tolist()


@settings(max_examples=often(200), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=120),
    dp=st.integers(1, 5),
    room=st.integers(0, 150),
    multiple=st.sampled_from([1, 2, 3, 4]),
    weight=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_invariants(lengths, dp, room, multiple, weight):
    capacity = max(lengths, default=1) + room
    plan = plan_micro_batches(lengths, capacity=capacity, dp=dp, multiple=multiple, attention_weight=weight)
    assert len(plan) == dp
    (count,) = {len(rank) for rank in plan}
    assert count % multiple == 0
    assert count >= 1
    packs = [members for rank in plan for members in rank]
    assert sorted(i for members in packs for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= capacity for members in packs)
    # with `multiple` fewer, every pack of some plan was more than half full
    assert count <= max(multiple, 2 * sum(lengths) / (capacity * dp) + multiple + 1)
    again = plan_micro_batches(lengths, capacity=capacity, dp=dp, multiple=multiple, attention_weight=weight)
    assert again == plan


@settings(max_examples=often(200), deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120), dp=st.integers(1, 5), room=st.integers(0, 150))
def test_ranks_differ_by_the_longest_sample_at_most(lengths, dp, room):
    plan = plan_micro_batches(lengths, capacity=max(lengths) + room, dp=dp)
    totals = [sum(lengths[i] for members in rank for i in members) for rank in plan]
    assert max(totals) - min(totals) <= max(lengths)


@settings(max_examples=often(100), deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=120), dp=st.integers(2, 5), weight=st.sampled_from([0.0, 0.1]))
def test_neighbours_run_beside_each_other(lengths, dp, weight):
    """No rank's n-th micro-batch is cheaper than any rank's next one."""
    plan = plan_micro_batches(lengths, capacity=150, dp=dp, attention_weight=weight)
    rounds = [[cost(lengths, rank[n], weight) for rank in plan] for n in range(len(plan[0]))]
    for this, following in itertools.pairwise(rounds):
        assert min(this) >= max(following) - 1e-9 * max(this)


def test_bounds_at_scale():
    lengths = lognormal(4096)
    begun = time.process_time()  # other work on the machine does not count
    plan = plan_micro_batches(lengths, capacity=16384, dp=64)
    seconds = time.process_time() - begun
    assert imbalance(lengths, plan) <= 0.02
    assert seconds < 1.0
    filled = sum(lengths) / (64 * len(plan[0]) * 16384)
    assert filled > 0.9


@pytest.mark.thorough
def test_padding_at_scale():
    """Of all positions under CP 2 and TP 4, those without a sample's token."""
    lengths = lognormal(1024)
    samples = [TrainSample([1] * n, [1] * n, [True] * n, [0.0] * n, [0] * n, [0.0] * n) for n in lengths]
    packed = pack(samples, dp=16, max_tokens=16384, cp=2, tp=4)
    positions = sum(micro_batch.positions for rank in packed for micro_batch in rank)
    assert 1 - sum(lengths) / positions <= 0.03


def test_flops_are_balanced_where_they_are_asked_for():
    lengths, weight = lognormal(2048), 1 / 4096
    plans = {w: plan_micro_batches(lengths, capacity=16384, dp=32, attention_weight=w) for w in (0.0, weight)}
    assert imbalance(lengths, plans[0.0], weight) > 0.15
    assert imbalance(lengths, plans[weight], weight) < 0.05


def test_interleaving_asks_for_a_multiple_of_the_stages():
    samples = [TrainSample([1] * 9, [1] * 9, [True] * 9, [0.0] * 9, [0] * 9, [1.0] * 9) for _ in range(7)]
    for vpp, expected in ((1, 4), (2, 6)):
        parallel = ParallelConfig(pp=3, vpp=vpp, dp=2)
        batch = build_train_batch(samples, aggregation=TokenMean(), parallel=parallel, max_tokens=9)
        assert {len(rank) for rank in batch.micro_batches} == {expected}


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a sample of 12 tokens; a micro-batch holds 10"):
        plan_micro_batches([3, 12], capacity=10, dp=1)


def test_attention_weight_by_hand():
    shape = ModelShape(
        family="qwen3",
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=16,
        num_heads=4,
        attention=HeadAttention(num_kv_heads=2, head_dim=5),
        vocab_size=50,
        max_positions=64,
        rope=Rope(theta=1e4),
        rms_eps=1e-6,
        tie_embeddings=True,
    )
    matrices = 3 * (8 * (4 + 2 + 2) * 5 + 4 * 5 * 8 + 3 * 8 * 16) + 50 * 8
    # per token of context, causal: (query * key and weight * value) of every head, half of the square
    assert attention_weight(shape) == pytest.approx(3 * 4 * (5 + 5) / 2 / matrices, rel=0.05)
