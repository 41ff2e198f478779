"""The long ablation's statistics against slow readings, and its tables on lines that were made up."""

from __future__ import annotations

import math
import statistics
from typing import Any

import ablate_long_report as tables
import gradient_variance as gv
import pytest
import torch


def student_tail(x: float, freedom: int) -> float:
    """P(T > x) by Simpson's rule."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    steps = 2000
    heights = [scale * (1 + (x * k / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for k in range(steps + 1)]
    area = sum(h * (1 if k in (0, steps) else 4 if k % 2 else 2) for k, h in enumerate(heights)) * x / steps / 3
    return 0.5 - area


def test_the_paired_test_against_an_integral() -> None:
    values = [0.05, 0.02, -0.01, 0.04, 0.06, 0.01]
    mean = sum(values) / 6
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 5 / 6)
    found = tables.paired(values)
    assert found["mean"] == pytest.approx(mean)
    assert found["p"] == pytest.approx(2 * student_tail(mean / error, 5), abs=1e-6)
    assert found["half_width"] == pytest.approx(2.571 * error, rel=1e-3)
    assert tables.paired([-value for value in values])["p"] == pytest.approx(found["p"])
    assert tables.paired([0.1])["p"] is None


def test_the_detectable_difference_is_found_four_times_of_five() -> None:
    """By drawing: 6 pairs whose mean is the one that is said to be detectable."""
    draws = torch.randn(40_000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shifted = draws + tables.detectable(6) / math.sqrt(6)
    ratio = shifted.mean(1) / (shifted.std(1) / math.sqrt(6))
    assert float((ratio.abs() > 2.5706).double().mean()) == pytest.approx(0.8, abs=0.01)
    values = [0.05, 0.02, -0.01, 0.04, 0.06, 0.01]
    assert tables.paired(values)["detectable"] == pytest.approx(tables.detectable(6) * statistics.stdev(values) / math.sqrt(6))


def test_holms_values_are_the_levels_at_which_his_procedure_rejects() -> None:
    chances = [0.04, 0.001, 0.3, 0.012, 0.012]

    def rejected(level: float) -> set[int]:
        found: set[int] = set()
        for step, place in enumerate(sorted(range(5), key=lambda each: chances[each])):
            if chances[place] > level / (5 - step):
                break
            found.add(place)
        return found

    for place, value in enumerate(tables.holm(chances)):
        assert place in rejected(value + 1e-9)
        assert place not in rejected(value - 1e-9)


def test_the_threshold_has_to_be_held() -> None:
    assert tables.steps_to_threshold([0.1, 0.9, 0.1, 0.4, 0.5, 0.6, 0.9], 16) == 48
    assert tables.steps_to_threshold([0.1, 0.9, 0.1, 0.4], 16) is None


def made_line(method: str, seed: int, final: float, purpose: str = "test") -> dict[str, Any]:
    step = {"clip_fraction": 0.25, "kl": 0.001, "log_ratio_rms": 0.5, "grad_norm": 2.0}
    bins = [{"first": 1, "last": 1, "log_ratio_std": 0.1, "relative": dict.fromkeys(gv.ESTIMATORS, 2.0)}]
    found = {"batch": 1, "bins": bins, "relative": dict.fromkeys(gv.ESTIMATORS, 4.0), "signal": dict.fromkeys(gv.ESTIMATORS, 0.1)}
    line = {"method": method, "rate": 0.01, "seed": seed, "purpose": purpose, "error": None, "before": 0.1, "final": final}
    return line | {"rewards": [0.1, 0.6, 0.3], "steps": [step] * 3, "probes": [found], "batches": 3, "optimizer_steps": 16}


def test_tables_pair_runs_by_seed() -> None:
    lines = [made_line(method, 1001, 0.5, "tune") for method in ("ctpo", "grpo")]
    lines += [made_line("ctpo", seed, 0.1 * seed) for seed in (1, 2, 3)]
    lines += [made_line("grpo", seed, 0.1 * seed + 0.05 + 0.01 * seed) for seed in (3, 2, 1, 4)]
    shown = tables.report(lines, ["ctpo", "grpo"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line[:6] == "| grpo"]
    assert rows[1][:5] == ["grpo", "1.0e-02", "4", "10.0 ± 0.0", "32.5 ± 22.6"]
    assert rows[2][:3] == ["grpo", "3", "+7.0 ± 2.5"]
    assert rows[3] == ["grpo", "0", "25.0", "1.0e-03", "0.5", "2", "30"]
    assert rows[4][:3] == ["grpo", "4", "4.00 (4.00 to 4.00)"]
