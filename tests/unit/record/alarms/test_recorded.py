"""Alarms on recorded rows: of runs of `ctpo train`, and of small policies that were really trained (tools/small_runs.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from alarms_real import found_in
from alarms_small import FAULTS, MEASURE, harm
from alarms_table import raised_in
from faulty_runs import BASE
from faulty_runs import FAULTS as REAL

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.record.alarms.kinds import Measure
from ctpo_megatron.record.alarms.replay import read_rows

DATA = Path(__file__).resolve().parents[3] / "data" / "alarms"
SHORT = AlarmsConfig(warmup=2, baseline=8)


@pytest.mark.parametrize("config", [AlarmsConfig(), SHORT], ids=["defaults", "short"])
def test_a_run_that_learns_raises_none_though_one_of_its_steps_was_wild(config: AlarmsConfig) -> None:
    """40 steps of 512 attempts; at step 15 the effective sample size was 0.46, and entropy up by 30 %."""
    rows = list(read_rows(DATA / "learns.jsonl"))
    assert min(row["health/effective_sample_size"] for row in rows) < 0.5
    assert raised_in(rows, config, Measure(32, 512)) == []


def test_a_run_without_any_reward_is_told_of() -> None:
    """30 steps, none of whose answers were right; a node was lost on the way, and what was lost with it was made again."""
    rows = list(read_rows(DATA / "no_reward.jsonl"))
    assert [(each.alarm, each.step) for each in raised_in(rows, AlarmsConfig(), Measure(4, 8))] == [("equal_groups", 22)]
    assert {each.alarm for each in raised_in(rows, SHORT, Measure(4, 8))} == {"equal_groups", "goodput"}


@pytest.mark.parametrize(("setting", "alarms"), FAULTS, ids=lambda each: each[0] if isinstance(each, tuple) else "")
def test_a_policy_that_goes_wrong_is_told_of_before_the_harm(setting, alarms: tuple[str, ...]) -> None:
    rows = [dict(row) for row in read_rows(DATA / f"small_{alarms[0]}.jsonl")]
    at = harm(setting, rows)
    first = next(each.step for each in raised_in(rows, AlarmsConfig(), MEASURE) if each.alarm in alarms)
    assert at is not None or alarms == ("entropy",), "a learning rate that takes entropy away does no harm to so small a task"
    assert setting.begin < first < (at or len(rows))


UNHEARD = ("bounds",)  # docs/alarms.md says why


@pytest.mark.parametrize("fault", REAL, ids=lambda fault: fault.name)
def test_a_real_run_is_told_of_where_it_goes_wrong_and_not_before(fault) -> None:
    raised, _ = found_in(fault)
    assert all(each.step > BASE for each in raised), "the healthy run that it goes on from"
    assert any(each.alarm in fault.alarms for each in raised) == bool(fault.alarms and fault.name not in UNHEARD)


def test_a_real_run_that_goes_on_as_it_was_raises_none() -> None:
    assert found_in(next(fault for fault in REAL if fault.name == "none"))[0] == []
