"""What deserves a look: each rule speaks of what is planted, and none of a run that is well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.report.findings.rules import findings
from ctpo_megatron.report.reading.run import read_run
from tests.support import run_dirs

Row = dict[str, Any]
STEPS = 30


def found(tmp_path: Path, change: Callable[[int], Row] = lambda _step: {}, **given: Any) -> list[tuple[str, str]]:
    """The findings that are more than a word of praise, as (title, evidence), of a run whose rows are changed."""
    rows = [run_dirs.metrics(step) | change(step) for step in range(1, STEPS + 1)]
    run = read_run(run_dirs.write_run(tmp_path / "run", rows=rows, **{"told": run_dirs.events(STEPS), **given}))
    return [(each.title, each.evidence) for each in findings(run) if each.weight >= 10]


def test_a_run_that_is_well_is_told_so(tmp_path: Path) -> None:
    assert found(tmp_path) == []
    titles = [each.title for each in findings(read_run(tmp_path / "run"))]
    assert titles == [
        "Accuracy on held_out rose from 20.0% to 60.0%",
        "The reward rose from 0.175 to 1.38",
        "Goodput is 84%",
    ]


def test_equal_groups_teach_a_critic(tmp_path: Path) -> None:
    assert found(tmp_path, lambda step: {"reward/mixed_groups": 0.0, "critic/loss": 0.1}) == []


@pytest.mark.parametrize(
    ("change", "title", "evidence"),
    [
        (lambda step: {"reward/mean": 1.0 if step < 15 else 0.2}, "The reward fell from 1 to 0.2", "reward"),
        (lambda step: {"reward/mean": 0.3 + 0.01 * (step % 2)}, "The reward stays at 0.305", "reward"),
        (lambda step: {"train/entropy": 1 / step, "reward/mean": step / 60}, "Entropy fell from", "entropy"),
        (lambda step: {"reward/mixed_groups": 0.1}, "Only 10% of the groups have rewards that differ", "mixed_groups"),
        (lambda step: {"rollout/truncated": 0.5}, "50% of the trajectories are cut off", "lengths"),
        (lambda step: {"tool/error_rate": 0.5}, "50% of the tool calls fail", "tool"),
        (lambda step: {"reward/undecided": 2.0}, "60 answers had no verdict", "ledger"),
        (lambda step: {"rollout/sampled_tokens": 10.0 * step}, "Trajectories became longer", "lengths"),
        (lambda step: {f"health/clip_fraction/decile_{k}": 0.05 * k for k in range(10)}, "Late tokens are clipped more", "clip"),
        (lambda step: {f"health/clip_fraction/decile_{k}": 0.6 for k in range(10)}, "60% of the tokens are clipped", "clip"),
        (lambda step: {"health/log_ratio_growth": 0.9}, "The spread grows like t^0.90", "spread"),
        (lambda step: {"drift/from_token_16": 0.01}, "Drift rises with t", "drift"),
        (lambda step: {"health/effective_sample_size": 0.2}, "The effective sample size of ratios is 20%", "sample_size"),
        (lambda step: {"health/log_ratio_sigma": 2.0 if step == 9 else 0.1}, "Step 9 moved the policy 20 times", "sigma"),
        (lambda step: {"train/skipped_steps": float(step == 3)}, "1 optimizer steps were left out", "events"),
        (lambda step: {"ledger/kept_length": 0.8}, "Short attempts are favoured", "by_length"),
        (lambda step: {"ledger/kept_reward": 0.3}, "Easy prompts are favoured", "by_difficulty"),
    ],
)
def test_what_is_planted_is_found(tmp_path: Path, change: Callable[[int], Row], title: str, evidence: str) -> None:
    ((got, where),) = found(tmp_path, change)
    assert got.startswith(title)
    assert where == evidence


def test_an_end_that_was_no_good_comes_first(tmp_path: Path) -> None:
    told = run_dirs.events(STEPS)
    told[-1] |= {"how": "failed", "reason": "drift"}
    assert found(tmp_path, told=told)[0] == ("The run failed", "events")


def test_an_accuracy_that_fell_and_one_that_did_not_move(tmp_path: Path) -> None:
    assert found(tmp_path, accuracies={0: 0.6, 12: 0.2}) == [("Accuracy on held_out fell from 60.0% to 20.0%", "accuracy")]
    assert found(tmp_path, accuracies={0: 0.6, 12: 0.55}) == [("Accuracy on held_out has not moved beyond chance", "accuracy")]


def test_alarms_count_until_they_clear(tmp_path: Path) -> None:
    fired = {"time": run_dirs.T0 + 30, "event": "alarm raised", "alarm": "entropy", "where": "train/entropy"}
    unsent = {"time": run_dirs.T0 + 30, "event": "alarms unsent", "reason": "refused", "lost": 1}
    told = run_dirs.events(STEPS)
    assert found(tmp_path, told=[*told[:-1], fired, unsent, told[-1]]) == [("Alarm: entropy", "events")]
    other, cleared = fired | {"event": "alarm cleared", "where": "another"}, fired | {"event": "alarm cleared"}
    assert found(tmp_path, told=[*told[:-1], fired, other, told[-1]]) == [("Alarm: entropy", "events")]
    assert found(tmp_path, told=[*told[:-1], fired, cleared, told[-1]]) == []


def test_work_that_is_not_saved(tmp_path: Path) -> None:
    told = [each for each in run_dirs.events(STEPS)[:-1] if each["event"] != "checkpoint verified"]
    assert found(tmp_path, told=told) == [("The last verified checkpoint is 30 steps back", "proofs")]


def test_time_that_went_elsewhere(tmp_path: Path) -> None:
    told = run_dirs.events(STEPS)
    for each in told[2:]:
        each["time"] += 500.0  # the first incarnation took so long to begin
    told[1]["time"] += 500.0
    told[-1]["at"] += 500.0
    ((title, where),) = found(tmp_path, told=told)
    assert title == "Goodput is 33%: 63% of the time went into start"
    assert where == "goodput"
