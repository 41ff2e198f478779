"""The health panel: sums on the device, what the driver makes of them, and what TensorBoard reads back."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.data_compat import migrate_value
from tensorboard.util.tensor_util import make_ndarray

from ctpo_megatron.algorithms import LocalScan, per_token, policy_loss
from ctpo_megatron.algorithms.health import DECILES, POSITION_BINS, position_bin
from ctpo_megatron.algorithms.per_token import per_token_loss
from ctpo_megatron.algorithms.prepare import Streams, prepare
from ctpo_megatron.algorithms.recipe import make_recipe
from ctpo_megatron.algorithms.statistics import Stats, merge
from ctpo_megatron.algorithms.tokens import Tokens
from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.loop.health import health_histograms, health_metrics
from ctpo_megatron.loop.recording import RunRecord
from ctpo_megatron.loop.statistics import train_metrics
from ctpo_megatron.mcore.reduction import Measured, reduce_stats
from ctpo_megatron.parallel.layout import zigzag_shard
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.values import Mean, Sum, merge_values
from tests.support.numbers import flat, on_host
from tests.support.often import often

SIGMA = 0.0387  # of the size that the paper of CTPO fits (arXiv 2605.07331, figure 1)


def stats_of(log_ratios: list[Any], masks: list[Any] | None = None, advantage: float = 1.0, **options: Any) -> Stats:
    """Statistics of a pack whose sequences have these log-ratios."""
    d = torch.cat([torch.as_tensor(x, dtype=torch.float64) for x in log_ratios])
    lengths = torch.tensor([len(x) for x in log_ratios])
    mask = torch.ones(len(d), dtype=torch.bool) if masks is None else torch.cat([torch.tensor(x).bool() for x in masks])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    given = {"logp": d.requires_grad_(), "old_logp": torch.zeros_like(d), "advantages": torch.full_like(d, advantage)}
    return policy_loss({"type": "ctpo"}, **given, mask=mask, cu_seqlens=cu_seqlens, **options).stats


def panel(log_ratios: list[Any], **options: Any) -> dict[str, float]:
    return health_metrics(on_host(stats_of(log_ratios, **options)))


def paths(count: int, length: int, drift: float = 0.0) -> list[np.ndarray]:
    """Independent normal log-ratios of standard deviation SIGMA."""
    return list(np.random.default_rng(5).normal(drift, SIGMA, (count, length)))


def test_brownian_log_ratios_show_their_sigma_and_the_square_root() -> None:
    found = panel(paths(400, 1024))
    assert found["health/log_ratio_sigma"] == pytest.approx(SIGMA, rel=0.05)  # a seed's standard error is 2 %
    assert found["health/log_ratio_growth"] == pytest.approx(0.5, abs=0.03)
    for b in range(10):
        std, fit = (found[f"health/log_ratio_{kind}/from_token_{2**b}"] for kind in ("std", "fit"))
        middle = (2**b + 2 ** (b + 1) - 1) / 2
        assert fit == pytest.approx(found["health/log_ratio_sigma"] * math.sqrt(middle), rel=1e-12)
        assert std == pytest.approx(fit, rel=0.15)
    assert "health/log_ratio_std/from_token_2048" not in found


def test_a_mean_that_drifts_is_no_growth_of_the_spread() -> None:
    """E[S_t] = -t sigma^2 / 2, as for unbiased ratios; about zero the exponent would be beyond 0.6 at this length."""
    found = panel(paths(200, 4096, drift=-(SIGMA**2) / 2))
    assert found["health/log_ratio_growth"] == pytest.approx(0.5, abs=0.03)
    assert found["health/log_ratio_sigma"] == pytest.approx(SIGMA, rel=0.1)
    assert found["health/log_ratio_mean/from_token_2048"] == pytest.approx(-3071.5 * SIGMA**2 / 2, rel=0.1)


def test_slopes_that_differ_between_trajectories_grow_linearly() -> None:
    slopes = np.random.default_rng(6).normal(0, 0.001, 200)
    found = panel([np.full(512, slope) for slope in slopes])
    assert found["health/log_ratio_growth"] == pytest.approx(1.0, abs=0.02)


def test_an_opening_without_choice_is_no_part_of_the_growth() -> None:
    """Sixteen tokens that hardly vary: with them the exponent would be far beyond 1."""
    found = panel([path * np.where(np.arange(1024) < 16, 1e-4, 1.0) for path in paths(200, 1024)])
    assert found["health/log_ratio_std/from_token_8"] < 1e-4
    assert 0.5 < found["health/log_ratio_growth"] < 0.65
    assert panel([[1e-6, 0.1], [0.0, 0.3]]).get("health/log_ratio_growth") is None  # one range is left


def test_log_ratios_that_never_differ_have_no_growth() -> None:
    found = panel([np.zeros(40)] * 3)
    assert found["health/log_ratio_sigma"] == 0.0
    assert found["health/log_ratio_std/from_token_32"] == 0.0
    assert "health/log_ratio_growth" not in found
    equal = panel([np.full(1, 0.1)] * 3)  # in floating point their variance is not exactly zero
    assert equal["health/log_ratio_std/from_token_1"] == 0.0


def test_bins_by_hand() -> None:
    """Policy tokens are 1, 2, 3 of the first sequence and 1 of the second."""
    stats = stats_of([[1.0, 9.0, 2.0, 4.0], [-3.0]], masks=[[1, 0, 1, 1], [1]])
    expected = {"tokens": [2, 2, 0], "position": [2, 5, 0], "log_ratio": [-2, 10, 0], "log_ratio_sq": [10, 58, 0]}
    assert {name: stats.sums[f"health/{name}"][:3].tolist() for name in expected} == expected
    found = health_metrics(on_host(stats))
    assert found["health/log_ratio_mean/from_token_2"] == 5.0
    assert found["health/log_ratio_std/from_token_1"] == 2.0
    assert found["health/log_ratio_std/from_token_2"] == 2.0
    sigma = math.sqrt((2 * 4 / 1 + 2 * 4 / 2.5) / 4)
    assert found["health/log_ratio_sigma"] == pytest.approx(sigma, rel=1e-12)
    assert found["health/log_ratio_fit/from_token_2"] == pytest.approx(sigma * math.sqrt(2.5), rel=1e-12)


def test_bins_are_powers_of_two() -> None:
    exact = torch.tensor([float(x) for b in range(20) for x in (2**b, 2 ** (b + 1) - 1)])
    expected = [min(b, POSITION_BINS - 1) for b in range(20) for _ in range(2)]
    assert position_bin(exact).tolist() == expected
    assert position_bin(exact.double()).tolist() == expected


def test_clip_fraction_of_deciles_by_hand() -> None:
    """Twenty tokens, two a decile; a jump of 3 at the fifth lies above the band from there on."""
    jump = [0.0] * 4 + [3.0] + [0.0] * 15
    found = panel([jump, [0.0]])
    expected = [0.0, 0.0, *[1.0] * 8]
    assert [found[f"health/clip_fraction/decile_{k}"] for k in range(DECILES)] == expected
    two = panel([jump, [0.0] * 20], advantage=-1.0)  # below the band nothing, above it the dual clip
    assert [two[f"health/clip_fraction/decile_{k}"] for k in range(DECILES)] == [x / 2 for x in expected]
    short = panel([[0.0, 3.0, 0.0]])  # before them lie 0, 1/3 and 2/3 of the trajectory
    assert {k: short.get(f"health/clip_fraction/decile_{k}") for k in range(DECILES)} == dict.fromkeys(range(DECILES)) | {
        0: 0.0,
        3: 1.0,
        6: 1.0,
    }


def test_restarts_begin_the_log_ratio_anew_and_leave_the_deciles() -> None:
    restarts = torch.arange(20) == 10
    stats = stats_of([[0.1] * 20], restarts=restarts)
    assert stats.sums["health/tokens"][:5].tolist() == [2, 4, 8, 6, 0]
    assert stats.sums["health/log_ratio"][3].item() == pytest.approx(2 * (0.8 + 0.9 + 1.0), rel=1e-9)
    assert stats.sums["health/decile_tokens"].tolist() == [2] * DECILES


def test_effective_sample_size_by_hand() -> None:
    ratios = np.array([1.0, 2.0, 0.5])
    found = panel([[x] for x in np.log(ratios)])
    assert found["health/effective_sample_size"] == pytest.approx(3.5**2 / (3 * 5.25), rel=1e-9)
    assert panel([[0.2], [0.2]])["health/effective_sample_size"] == pytest.approx(1.0, rel=1e-12)


@settings(deadline=None, max_examples=often(30))
@given(st.lists(st.integers(1, 70), min_size=2, max_size=6), st.integers(0, 2**32 - 1), st.data())
def test_statistics_of_micro_batches_add_up(lengths: list[int], seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    rows, masks = [rng.normal(0, 0.2, n) for n in lengths], [rng.random(n) < 0.8 for n in lengths]
    cut = data.draw(st.integers(1, len(lengths) - 1))
    whole = stats_of(rows, masks)
    halves = [stats_of(rows[:cut], masks[:cut]), stats_of(rows[cut:], masks[cut:])]
    same(merge(halves), whole)
    assert health_metrics(merge_values([on_host(half) for half in halves])) == pytest.approx(
        health_metrics(on_host(whole)), rel=1e-9
    )


def test_parts_and_shards_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    lengths = [40, 24, 8]
    rows, masks = [rng.normal(0, 0.2, n) for n in lengths], [rng.random(n) < 0.8 for n in lengths]
    whole = stats_of(rows, masks)
    same(merge(shard_stats(rows, masks, rank) for rank in range(2)), whole)
    monkeypatch.setattr(per_token, "PART", 7)
    same(stats_of(rows, masks), whole)


def shard_stats(rows: list[Any], masks: list[Any], rank: int) -> Stats:
    """What one of two context-parallel ranks finds once everything is scanned."""
    d, mask = torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(masks))
    cu_seqlens = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    streams = Streams(d, torch.zeros_like(d), None, torch.zeros_like(d), torch.ones_like(d), mask, cu_seqlens, None, None)
    recipe = make_recipe({"type": "ctpo"}, "sequence-mean", None, has_rollout=False)
    ready = prepare(recipe, streams, LocalScan())

    def shard(value: Any) -> Any:
        return zigzag_shard(value, cu_seqlens, rank, 2) if isinstance(value, torch.Tensor) else value

    tokens = Tokens(*map(shard, ready.tokens))
    return per_token_loss(recipe, ready._replace(tokens=tokens, place=shard(ready.place)))[1]


def same(found: Stats, expected: Stats) -> None:
    names = [name for name in expected.sums if name.startswith("health/")]
    assert len(names) == 8
    for name in names:
        torch.testing.assert_close(found.sums[name], expected.sums[name], rtol=1e-12, atol=1e-12)


def test_vectors_are_reduced_like_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two micro-batches, by the trainer's own reduction on a group of one rank."""
    halves = [stats_of([[0.1, 0.2], [0.3]]), stats_of([[-0.4, 3.0, 0.1]])]
    halves[0] |= Stats(maxima={"x": torch.tensor([1.0, 5.0])}, minima={"y": torch.tensor([[3.0], [2.0]])[:, 0]})
    halves[1] |= Stats(maxima={"x": torch.tensor([2.0, 4.0])}, minima={"y": torch.tensor([-1.0, 9.0])})
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        measured = Measured(["moe/z", "moe/a"], torch.tensor([7.0, 8.0]))
        found = reduce_stats(halves, dist.group.WORLD, measured)
    finally:
        dist.destroy_process_group()
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in (on_host(halves[0]) | {"moe/z": Mean(7.0), "moe/a": Mean(8.0)}).items()
    }
    expected = flat(on_host(merge(halves))) | {"moe/z": 7.0, "moe/a": 8.0, "moe/z weight": 1.0, "moe/a weight": 1.0}
    assert flat(found) == pytest.approx(expected, rel=1e-12)
    assert (flat(found)["x/0"], flat(found)["x/1"], flat(found)["y/0"], flat(found)["y/1"]) == (2.0, 5.0, -1.0, 2.0)


def test_what_is_missing_or_not_finite_is_left_out() -> None:
    assert health_metrics({}) == {}
    stats = on_host(stats_of([[0.1, 0.2, 0.3], [0.4, 0.1, 0.2]]))
    broken = {name: np.array(stats[name].result()) for name in ("health/log_ratio", "health/decile_clipped")}
    for vector in broken.values():
        vector[0] = math.nan
    stats |= {name: Sum(vector) for name, vector in broken.items()} | {"ratio_sq": Mean(math.inf, stats["ratio_sq"].weight)}
    found = health_metrics(stats)
    assert all(math.isfinite(value) for value in found.values())
    assert "health/log_ratio_std/from_token_1" not in found
    assert "health/log_ratio_std/from_token_2" in found
    assert "health/clip_fraction/decile_0" not in found
    assert found["health/log_ratio_sigma"] > 0
    without = health_metrics(stats | {"ratio_sq": Mean(0.0, stats["ratio_sq"].weight)})
    assert without == {k: v for k, v in found.items() if not k.endswith("_size")}


def test_every_step_has_the_panel() -> None:
    found = train_metrics(on_host(stats_of(paths(4, 40))))
    panel_alone = {name: value for name, value in found.items() if name.startswith("health/")}
    assert panel_alone == panel(paths(4, 40))
    assert not [name for name in found if "health" in name and not name.startswith("health/")]
    assert found["train/tokens"] == 160.0


def test_histograms_follow_the_scalars() -> None:
    metrics = {"health/clip_fraction/decile_3": 0.25, "drift/from_token_4": 0.5, "health/log_ratio_std/from_token_1": 2.0}
    found = health_histograms(metrics)
    assert found["health/clip_fraction"][0] == pytest.approx([0.1 * k for k in range(11)])
    assert found["health/clip_fraction"][1] == [0, 0, 0, 0.25, 0, 0, 0, 0, 0, 0]
    assert found["health/drift"] == ([float(b) for b in range(17)], [0, 0, 0.5, *[0] * 13])
    assert found["health/log_ratio_std"][1] == [2.0, *[0] * 15]
    assert found["health/log_ratio_fit"][1] == [0] * 16


def test_tensorboard_reads_the_panel_back(tmp_path: Path) -> None:
    metrics = panel([[0.0] * 4 + [3.0] + [0.0] * 15, *[0.1 * path for path in paths(30, 20)]])
    recorder = Recorder(tmp_path, LogConfig(), console=Console(file=io.StringIO()))
    record = RunRecord(tmp_path, LogConfig(save_rollouts=False), recorder)
    record.step(7, [], metrics)
    record.close()
    read = EventAccumulator(str(tmp_path / "tb"), size_guidance={"histograms": 0}).Reload()
    for name, value in metrics.items():
        assert [(e.step, e.value) for e in read.Scalars(name)] == [(7, pytest.approx(value, rel=1e-6))]
    assert sorted(read.Tags()["histograms"]) == ["health/clip_fraction", "health/log_ratio_fit", "health/log_ratio_std"]
    shown = {name: as_shown(read, name) for name in read.Tags()["histograms"]}
    clipped = [metrics[f"health/clip_fraction/decile_{k}"] for k in range(DECILES)]
    assert clipped[0] == 0 < clipped[-1]  # the first decile is empty: the others must not move into its place
    for left, right, height in shown["health/clip_fraction"]:
        assert right - left == pytest.approx(0.1, abs=1e-6)
        assert height == pytest.approx(clipped[round(10 * left)], rel=1e-6)
    assert sum(height for *_, height in shown["health/clip_fraction"]) == pytest.approx(sum(clipped), rel=1e-6)
    std = [[b, b + 1, metrics[f"health/log_ratio_std/from_token_{2**b}"]] for b in range(5)]
    np.testing.assert_allclose(shown["health/log_ratio_std"], std, rtol=1e-6)


def as_shown(read: EventAccumulator, name: str) -> list[list[float]]:
    """Left, right and height of the buckets that TensorBoard makes of a histogram."""
    histogram = read.Histograms(name)[0].histogram_value
    proto = HistogramProto(
        min=histogram.min,
        max=histogram.max,
        num=histogram.num,
        bucket_limit=histogram.bucket_limit,
        bucket=histogram.bucket,
    )
    migrated = migrate_value(Summary.Value(tag=name, histo=proto))
    return make_ndarray(migrated.tensor).tolist()
