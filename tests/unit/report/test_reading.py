"""A run directory as values: what is right comes out right, and what is missing or damaged is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ctpo_megatron.errors import InputError
from ctpo_megatron.report.parts.standing import standing
from ctpo_megatron.report.reading.happenings import sentence
from ctpo_megatron.report.reading.ledgers import read_groups
from ctpo_megatron.report.reading.metrics import read_rows, thinned
from ctpo_megatron.report.reading.run import read_run, read_runs, same_but_for_the_seed
from tests.support import run_dirs


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(run_dirs.write_run(tmp_path / "run"))
    assert run.complaints == ()
    assert run.metrics.last_step == 12
    assert run.metrics.last("reward/mean") == 0.6
    assert run.metrics.series("eval/accuracy") == [(0, 0.2), (12, 0.6)]
    assert run.groups.tally.groups == 48
    assert standing(run).word == "done"
    assert run.goodput is not None
    # 20 s of start, then each step of 10 s has 5 s rollout, 1 s tail, 3 s train, 1 s publication
    assert run.goodput.total.goodput == pytest.approx(12 * 9 / (20 + 12 * 10))


def test_the_band_is_that_of_the_mean_over_groups(tmp_path: Path) -> None:
    """Step 10: groups of 1, 1, 0, 0; their standard deviation is sqrt(1/3), the standard error half of it."""
    run = read_run(run_dirs.write_run(tmp_path / "run"))
    band = run.groups.band(10)
    assert band is not None
    assert band.mean == 0.5
    assert band.high - band.mean == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)
    assert band.mean - band.low == pytest.approx(band.high - band.mean)


def test_lines_that_a_run_took_back_do_not_count() -> None:
    lines = [run_dirs.group(1, 0, 1.0), run_dirs.group(2, 1, 1.0), {"back": 1}, run_dirs.group(2, 2, 0.0, end="filtered")]
    groups = read_groups(lines)
    assert groups.rewards == {1: [1.0]}
    assert groups.tally.summary()["groups"] == {"trained": 1, "filtered": 1, "failed": 0, "aborted": 0}


def test_a_run_in_the_middle_of_a_line_and_a_run_that_is_damaged(tmp_path: Path) -> None:
    run_dir = run_dirs.write_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('no json\n[1]\n{"step": 13, "reward/mean"')
    (run_dir / "config.yaml").write_text("a: [1\n")
    (run_dir / "ledger.jsonl").write_text('{"step": 1}\n')
    (run_dir / "environment.json").unlink()
    run = read_run(run_dir)
    assert run.metrics.last_step == 12
    assert list(run.complaints) == [
        "metrics.jsonl: 2 lines hold no JSON object and were left out",
        "ledger.jsonl: 1 lines tell of no group and were left out",
        "config.yaml is damaged: the configuration is not known",
        "environment.json is not there: variables of the processes are not known",
    ]


def test_a_run_whose_end_is_not_written_is_open(tmp_path: Path) -> None:
    run = read_run(run_dirs.write_run(tmp_path / "run", told=run_dirs.events()[:-1]))
    stands = standing(run)
    assert (stands.word, stands.step, stands.of) == ("open", 12, 12)
    assert stands.last_sign == run_dirs.T0 + 20 + 120


@pytest.mark.parametrize("how", ["failed", "killed", "stopped", "cancelled"])
def test_other_ends_are_said(tmp_path: Path, how: str) -> None:
    told = run_dirs.events()
    told[-1] |= {"how": how, "reason": "no room"}
    stands = standing(read_run(run_dirs.write_run(tmp_path / "run", told=told)))
    assert stands.word == how
    assert ("no room" in stands.sentence) == (how != "killed")


def test_incarnations_that_are_not_counted_cost_goodput_and_no_more(tmp_path: Path) -> None:
    run = read_run(
        run_dirs.write_run(tmp_path / "run", told=[run_dirs.began(2, run_dirs.T0), run_dirs.step_event(1, run_dirs.T0 + 9)])
    )
    assert run.goodput is None
    assert len(run.events) == 2
    assert "incarnations are not counted" in run.complaints[0]


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"give the run_dir of a run"):
        read_run(tmp_path / what)


def test_equal_names_get_labels_of_their_own(tmp_path: Path) -> None:
    runs = read_runs([run_dirs.write_run(tmp_path / "a" / "run"), run_dirs.write_run(tmp_path / "b" / "run")])
    assert [run.label for run in runs] == ["run (1)", "run (2)"]


def test_numbers_that_are_none_and_times() -> None:
    metrics = read_rows(
        [{"step": 1, "time": 5.0, "a": "NaN", "b": "text", "c": True, "d": 2}, {"step": 1, "time": 7.0, "e": 3.0}, {"x": 1}]
    )
    assert metrics.series("a") == []
    assert set(metrics.rows[1]) == {"a", "d", "e"}
    assert metrics.times == {1: 7.0}


def test_a_spike_among_many_points_is_not_lost() -> None:
    points = [(step, 100.0 if step == 777 else 1.0) for step in range(10_000)]
    stretches = thinned(points, limit=100)
    assert len(stretches) == 100
    assert [each.high for each in stretches].count(100.0) == 1
    assert stretches[7].low == 1.0


def test_an_event_of_another_release_is_told_by_its_fields(tmp_path: Path) -> None:
    told = [
        *run_dirs.events()[:2],
        {"time": run_dirs.T0 + 21, "event": "moon rose", "colour": "red"},
        {"time": run_dirs.T0 + 22, "event": "step"},
    ]
    run = read_run(run_dirs.write_run(tmp_path / "run", told=told))
    assert [sentence(each) for each in run.events[1:]] == ["ready after 20 s", "colour red", "step"]


def test_seeds_of_one_configuration_are_told_from_others(tmp_path: Path) -> None:
    first = read_run(run_dirs.write_run(tmp_path / "a"))
    seed = read_run(
        run_dirs.write_run(
            tmp_path / "b", settings=run_dirs.config(seed=2, run_dir="elsewhere", data={"train": "s2/train.parquet"})
        )
    )
    other = read_run(run_dirs.write_run(tmp_path / "c", settings=run_dirs.config(optimizer={"lr": 2e-4})))
    assert same_but_for_the_seed(first) == same_but_for_the_seed(seed)
    assert same_but_for_the_seed(first) != same_but_for_the_seed(other)
