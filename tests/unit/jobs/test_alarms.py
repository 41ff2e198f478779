"""`ctpo alarms` shows what a run's rows say, by the same code as the run, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.errors import ConfigError, InputError
from ctpo_megatron.jobs.alarms import alarms_job
from ctpo_megatron.loop.alarms import measure_of, open_hearing

MATH, LENGTH = {"type": "math"}, {"type": "length", "max_tokens": 64, "buffer": 8}


def config(**sections: object) -> RunConfig:
    needed = {"name": "mine", "run_dir": "away", "model": {"path": "m"}, "data": {"train": "t"}}
    return RunConfig.model_validate(needed | sections)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 128 answers a step, without a verdict on 1 % of them, then on 10 %."""
    train = {"prompts_per_step": 16, "optimizer_steps": 4}
    (tmp_path / "config.yaml").write_text(dump_config(config(train=train, rollout={"group_size": 8})))
    lines = [{"step": n, "time": float(n), "reward/undecided": 1 if n < 30 else 13} for n in range(1, 60)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_alarms_of_a_run_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarms_job(run_dir, [], as_json=False)
    shown = capsys.readouterr().out
    assert "undecided" in shown
    assert "mine: 1 alarms; standing at the end: undecided" in shown
    assert "docs/rewards.md" in shown


def test_other_thresholds_are_tried_and_nothing_is_written(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    alarms_job(run_dir, ["alarms.undecided.share=0.2"], as_json=True)
    assert json.loads(capsys.readouterr().out) == {"run": "mine", "alarms": [], "standing": []}
    alarms_job(run_dir, ["alarms.undecided.patience=10"], as_json=True)
    (late,) = json.loads(capsys.readouterr().out)["alarms"]
    assert (late["event"], late["alarm"], late["step"], late["since"]) == ("alarm raised", "undecided", 41, 32)
    alarms_job(run_dir, ["alarms.undecided=null"], as_json=True)
    assert json.loads(capsys.readouterr().out)["alarms"] == []
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before


def test_what_cannot_be_tried_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="only settings of `alarms`"):
        alarms_job(run_dir, ["train.steps=4"], as_json=False)
    with pytest.raises(ConfigError, match="Did you mean 'train/entropy'"):
        alarms_job(run_dir, ["alarms.bounds={x: {metric: train/entrop, above: 1}}"], as_json=False)
    with pytest.raises(InputError, match="give the directory of a run"):
        alarms_job(tmp_path / "away", [], as_json=False)


def test_answers_are_as_good_as_the_first_term_that_judges_them() -> None:
    terms = [{"name": "short", "reward": LENGTH}, {"name": "right", "reward": MATH}]
    of_terms = config(rollout={"reward": {"type": "combination", "terms": terms}})
    assert measure_of(of_terms).quality == "reward/term/right"
    assert measure_of(config()).quality == "reward/mean"
    assert (measure_of(config()).groups, measure_of(config()).answers) == (32, 32 * config().rollout.group_size)


def test_a_bound_on_an_unknown_metric_ends_a_run_before_it_begins() -> None:
    with pytest.raises(ConfigError, match="is not a metric"):
        open_hearing(config(alarms={"bounds": {"x": {"metric": "no/such", "above": 1.0}}}))
