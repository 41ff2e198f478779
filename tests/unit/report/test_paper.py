"""The paper's figures: what windows clip, from what a run's loss counts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctpo_megatron.algorithms import policy_loss
from ctpo_megatron.errors import InputError
from ctpo_megatron.loop.ratios import RatioFile, ratio_line
from ctpo_megatron.record.values import Sum
from ctpo_megatron.report.paper.figures import FIXED, paper_figures
from ctpo_megatron.report.paper.windows import BY_ROOT, TOTAL, Window, clip_rate, density, read_counts
from ctpo_megatron.report.reading.run import read_run
from ctpo_megatron.report.report import write_figures
from tests.support import run_dirs

SIGMA = 0.0387  # of the size that the paper fits
COUNT, LENGTH = 200, 512
ADAPTIVE = Window(0.025, 0.05, 0.05)


@pytest.fixture(scope="module")
def stats() -> dict[str, Sum]:
    """Of independent log-ratios, half of the trajectories with a negative advantage."""
    paths = torch.tensor(np.random.default_rng(3).normal(0, SIGMA, COUNT * LENGTH))
    found = policy_loss(
        {"type": "ctpo"},
        logp=paths.requires_grad_(),
        old_logp=torch.zeros_like(paths),
        advantages=torch.tensor([1.0, -1.0]).repeat_interleave(LENGTH).repeat(COUNT // 2).double(),
        mask=torch.ones(COUNT * LENGTH, dtype=torch.bool),
        cu_seqlens=torch.arange(0, COUNT * LENGTH + 1, LENGTH),
    ).stats
    return {name: Sum(value.numpy()) for name, value in found.sums.items()}


def test_the_adaptive_window_clips_what_the_loss_clipped(stats: dict[str, Sum]) -> None:
    """The loss counted its own clipped tokens exactly; from buckets it follows to two points of a hundred."""
    line = ratio_line(10, stats)
    assert line is not None
    counts = read_counts([json.loads(json.dumps(line))])
    assert counts.positions() == [2**b for b in range(9)] + [512]
    for position in counts.positions()[3:9]:
        exact = counts.clipped[position] / counts.tokens[position]
        assert clip_rate(counts, BY_ROOT, ADAPTIVE, position) == pytest.approx(exact, abs=0.02)


def test_a_fixed_window_clips_later_tokens_more(stats: dict[str, Sum]) -> None:
    """S_t is normal with variance t SIGMA²: at t about 384, 1.609 is 2.1 of its deviations, and -0.693 is 0.9."""
    counts = read_counts([ratio_line(10, stats) or {}])
    rates = [clip_rate(counts, TOTAL, FIXED, position) or 0.0 for position in counts.positions()]
    assert max(rates[:5]) < 0.01
    deviation = SIGMA * math.sqrt(384)
    above, below = (0.5 * math.erfc(bound / deviation / math.sqrt(2)) for bound in (FIXED.high, FIXED.low))
    assert rates[8] == pytest.approx(above + below / 2, abs=0.04)


def test_a_clip_rate_by_hand() -> None:
    """Borders at -2, -1, 1, 2 in S_t; bounds in the middle of a bucket take half of it."""
    reach = math.asinh(2.0)
    row = {"1": [4, 10, 6]}
    line = {"finest": [1.0, 1.0], "reach": reach, "tokens": {"1": 40}, "clipped": {"1": 0}}
    counts = read_counts([line | {"counts": [[row, {}, row], [row, {}, row]]}])
    borders = counts.borders[TOTAL]
    window = Window(low=-borders[0] / 2 - borders[1] / 2, high=(borders[2] + borders[3]) / 2)
    # half of the 6 above with a positive advantage, half of the 4 below with a negative one, of 40
    assert clip_rate(counts, TOTAL, window, 1) == pytest.approx((3 + 2) / 40)
    assert clip_rate(counts, TOTAL, window, 2) is None


def test_a_density_is_one_in_all(stats: dict[str, Sum]) -> None:
    counts = read_counts([ratio_line(10, stats) or {}])
    for position in counts.positions()[:9]:
        bars = density(counts, position)
        assert sum(height * (high - low) for low, high, height in bars) == pytest.approx(1.0, abs=0.005)
        assert len(bars) > 8
        variance = sum(height * (high - low) * ((low + high) / 2) ** 2 for low, high, height in bars)
        assert variance == pytest.approx(SIGMA**2 * 1.5 * position, rel=0.3)


def test_the_figures_of_a_run(tmp_path: Path, stats: dict[str, Sum]) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    file = RatioFile(run_dir, 1)
    file.write(1, stats)
    file.close()
    figures = paper_figures([read_run(run_dir)])
    assert list(figures) == ["clip_by_position", "spread_with_sigma", "density_by_position"]
    for figure in figures.values():
        figure.spec(validate=True)
    assert "adaptive: −0.025 √t to 0.05 √t" in figures["clip_by_position"].says
    assert "σ = 0.1" in figures["spread_with_sigma"].says
    (path,) = write_figures({"clip_by_position": figures["clip_by_position"]}, tmp_path / "png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_a_run_that_recorded_nothing_is_told_what_to_do(tmp_path: Path) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    (run_dir / "ratios.jsonl").write_text('{"counts": 1}\n{"finest": []}\n')
    with pytest.raises(InputError, match=r"log\.ratios_every"):
        paper_figures([read_run(run_dir)])
