"""The drift alarm: what is measured, when it rings, and how statistics of several steps merge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from ctpo_megatron.algorithms import LocalScan, raise_if_nonfinite
from ctpo_megatron.config.model import ParallelConfig
from ctpo_megatron.config.record import DriftBounds, DriftConfig
from ctpo_megatron.data.packing import pack
from ctpo_megatron.errors import MismatchError, NonFiniteError
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.mcore.old_policy import anchor_logp, check_drift, drift_stats
from ctpo_megatron.record.values import Max, Mean, Min, Sum, merge_values
from ctpo_megatron.types import TrainSample
from tests.support.numbers import on_host


def micro_batch():
    """One sequence: three tokens of version 4, one of version 3, one of the tool."""
    sample = TrainSample(
        input_ids=[1, 2, 3, 4, 5],
        labels=[2, 3, 4, 5, 6],
        mask=[True, True, False, True, True],
        rollout_logp=[-1.0, -2.0, 0.0, -3.0, -4.0],
        versions=[4, 4, -1, 3, 4],
        advantages=[1.0, 1.0, 0.0, 1.0, 1.0],
    )
    return pack([sample], dp=ParallelConfig().dp, max_tokens=16)[0][0]


def test_only_tokens_of_this_version_count_by_position():
    trainer = torch.tensor([-1.5, -2.0, -9.0, -30.0, -4.25])
    stats = on_host(drift_stats(micro_batch(), trainer, LocalScan(), version=4))
    assert (stats["drift/mean"], stats["drift/max"]) == (Mean(0.75, 3), Max(0.5))
    # positions among the policy's tokens are 1, 2, -, 3, 4: bins 0, 1, 1, 2
    assert stats["drift/from_token"].total.tolist()[:4] == [0.5, 0.0, 0.25, 0.0]
    assert stats["drift/from_token"].weight.tolist()[:4] == [1, 1, 1, 0]
    named = train_metrics(stats)
    assert "drift/from_token_8" not in named
    assert named["drift/mean"] == 0.25
    assert named["drift/max"] == 0.5
    assert (named["drift/from_token_1"], named["drift/from_token_2"], named["drift/from_token_4"]) == (0.5, 0.0, 0.25)


@pytest.mark.parametrize(
    ("bound", "measured"),
    [
        (DriftBounds(max=0.4), {"drift/max": Max(0.5), "drift/mean": Mean(0.5, 10.0)}),
        (DriftBounds(mean=0.04), {"drift/max": Max(0.5), "drift/mean": Mean(0.5, 10.0)}),
        (DriftBounds(max=0.4), {"drift/max": Max(math.nan), "drift/mean": Mean(0.0, 10.0)}),
    ],
)
def test_the_alarm_rings_and_says_which_bound(bound, measured):
    with pytest.raises(MismatchError, match=r"policy version 7: (max|mean) .* drift\.(max|mean) allows"):
        check_drift(measured, bound, 7)


def test_the_alarm_is_silent_within_bounds():
    measured = {"drift/max": Max(0.5), "drift/mean": Mean(0.5, 10.0)}
    check_drift(measured, DriftBounds(max=0.5, mean=0.05), 7)
    check_drift(measured, DriftBounds(), 7)


def test_the_default_ends_a_run_with_stale_weights_and_lets_a_healthy_one_pass():
    """Means as published for healthy runs in bfloat16 (docs/gpu.md), and what servers that fell behind differ by."""
    config = DriftConfig()
    dense, mixture = config.bounds("bfloat16", mixture=False), config.bounds("bfloat16", mixture=True)
    single = config.bounds("float32", mixture=False)
    for bound, healthy, stale in ((dense, 0.036, 0.06), (mixture, 0.064, 0.2), (single, 2e-5, 0.01)):
        check_drift({"drift/max": Max(5.0), "drift/mean": Mean(healthy * 5000, 5000.0)}, bound, 7)
        check_drift({"drift/max": Max(5.0), "drift/mean": Mean(stale * 20, 20.0)}, bound, 7)  # too few to say
        with pytest.raises(MismatchError, match=r"mean .* drift\.mean allows"):
            check_drift({"drift/max": Max(5.0), "drift/mean": Mean(stale * 5000, 5000.0)}, bound, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixture", [False, True])
def test_explicit_bounds_win(dtype, mixture):
    assert DriftConfig(max=0.5, mean=0.01).bounds(dtype, mixture=mixture) == DriftBounds(0.5, 0.01)
    assert DriftConfig(mean=None).bounds(dtype, mixture=mixture) == DriftBounds(), "null: nothing ends the run"
    with pytest.raises(ValidationError):
        DriftConfig(mean="none")


def test_merging_steps():
    steps = [
        {"tokens": Sum(3.0), "ratio_max": Max(2.0), "ratio_min": Min(0.5), "lr": Mean(1.0)},
        {"tokens": Sum(4.0), "ratio_max": Max(1.0), "ratio_min": Min(0.1), "lr": Mean(3.0)},
    ]
    merged = {name: value.result() for name, value in merge_values(steps).items()}
    assert merged == {"tokens": 7.0, "ratio_max": 2.0, "ratio_min": 0.1, "lr": 2.0}


def test_old_logp_is_sharded_with_the_rest():
    mb = micro_batch()
    whole = replace(mb, sequences=replace(mb.sequences, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)))
    assert whole.with_streams(anchor_logp=torch.arange(5.0)).shard(1, 2).tokens.anchor_logp.tolist() == [1.0, 2.0]


def test_a_token_is_compared_with_the_version_that_sampled_it():
    mb, old = micro_batch(), torch.tensor([-1.5, -2.5, -9.0, -3.5, -4.5])
    present = anchor_logp(mb, old, "version", version=4)
    assert present[mb.tokens.mask].tolist() == [-1.5, -2.5, -3.0, -4.5]  # the third policy token is of version 3: the engine's
    assert torch.equal(anchor_logp(mb, old, "old", version=4), old)
    assert torch.equal(anchor_logp(mb, old, "rollout", version=4), mb.tokens.rollout_logp)


def test_a_log_prob_that_is_not_finite_is_named_before_drift_is_judged():
    found = drift_stats(micro_batch(), torch.tensor([-1.5, -2.0, -9.0, math.nan, -4.25]), LocalScan(), version=4)
    with pytest.raises(NonFiniteError, match="sequence 0, policy token 3 "):
        raise_if_nonfinite(found)
    masked = drift_stats(micro_batch(), torch.tensor([-1.5, -2.0, math.nan, -3.0, -4.25]), LocalScan(), version=4)
    raise_if_nonfinite(masked)
