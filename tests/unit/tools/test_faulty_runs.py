"""Real runs with a fault: their settings are a run's, what is kept of them is read back, and harm is where it is."""

from __future__ import annotations

import json
from pathlib import Path

import faulty_rewards
import pytest
from faulty_runs import (
    ANSWERS,
    BASE,
    FAULTS,
    GROUPS,
    HEALTHY,
    MEASURE,
    ROOT,
    Fault,
    beyond,
    five_points,
    judge,
    keep,
    lost_time,
    read,
)

from ctpo_megatron.config.alarms import AlarmsConfig
from ctpo_megatron.config.load import load_config
from ctpo_megatron.loop.alarms import measure_of
from ctpo_megatron.record.alarms.watch import Alarms


def rows(values: list[dict[str, float]], first: int = 1) -> list[dict[str, float]]:
    return [{"step": float(first + n), "time": 10.0 * n, "time/step": 9.0, **each} for n, each in enumerate(values)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_run_takes_the_settings_and_the_alarms_it_is_to_raise_are_there(fault: Fault) -> None:
    settings = [each.replace("{work}", "there") for each in (*HEALTHY, *fault.settings, "run_dir=there")]
    config = load_config(ROOT / "configs" / "quickstart.yaml", settings)
    assert measure_of(config) == MEASURE, "alarms judge all of its rows alike"
    assert (config.train.prompts_per_step, config.train.prompts_per_step * config.rollout.group_size) == (GROUPS, ANSWERS)
    assert set(fault.alarms) <= set(AlarmsConfig.model_fields)
    assert fault.settings or fault.hand or fault.name == "none"


def test_harm_is_at_the_step_of_the_fault_where_it_is() -> None:
    accuracies = [{"eval/accuracy": 0.8}] * (BASE + 2) + [{"eval/accuracy": 0.7}] * 4
    assert five_points(rows(accuracies)) == BASE + 4, "the second of three"
    assert five_points(rows(accuracies[: BASE + 2])) is None
    assert beyond("drift/mean", 0.1)(rows([{"drift/mean": 1.0}] * (BASE + 2))) == BASE + 1, "not in the healthy steps"
    assert beyond("drift/mean", 0.1, above=False)(rows([{"drift/mean": 1.0}] * (BASE + 2))) is None
    slow = rows([{}] * (BASE + 12))
    for n in range(12):
        slow[BASE + n]["time"] = 10.0 * BASE + 30.0 * n  # two steps' time is lost with each
    assert lost_time(4)(slow) == BASE + 4
    assert lost_time(4)(rows([{}] * (BASE + 12))) is None


def test_what_alarms_look_at_is_kept(tmp_path: Path) -> None:
    values = [{"reward/mean": 0.123456, "reward/undecided": 64.0 if n > 15 else 0.0, "train/loss": 1.0} for n in range(30)]
    lines = [json.dumps(each) + "\n" for each in rows(values)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    events = [{"time": 5.0, "event": "server lost", "server": "server 1", "reason": "x"}, {"time": 6.0, "event": "step"}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    keep(tmp_path, tmp_path / "base.gz", 1)
    keep(tmp_path, tmp_path / "late.gz", 25)
    kept = read(tmp_path / "base.gz")
    assert kept[0] == {"reward/mean": 0.1235, "reward/undecided": 0.0, "step": 1.0, "time": 0.0, "time/step": 9.0}
    assert kept[1] == {"time": 5.0, "event": "server lost", "server": "server 1"}
    assert len(kept) == 31
    assert [line["step"] for line in read(tmp_path / "late.gz")] == [25.0, 26.0, 27.0, 28.0, 29.0, 30.0]
    assert [each.alarm for each in judge(kept, Alarms(AlarmsConfig(), MEASURE))] == ["undecided"]


def test_rewards_go_wrong_as_they_are_meant_to() -> None:
    assert faulty_rewards.pays_for_length({"response_tokens": 48}) == 0.5
    kept = len(faulty_rewards._kept)
    assert faulty_rewards.leaks({}) == 0.0
    assert len(faulty_rewards._kept) == kept + 1
    raised = 0
    for _ in range(20 * faulty_rewards.CALLS_A_STEP):
        try:
            faulty_rewards.loses_its_way({"text": "an answer"})
        except ValueError:
            raised += 1
    assert 0.03 < raised / (20 * faulty_rewards.CALLS_A_STEP) < 0.09, "6 % in the mean of 20 steps that reach 12 %"
