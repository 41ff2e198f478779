"""Several runs on one page: seeds are pooled, what differs is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctpo_megatron.report.comparison import comparison, pools
from ctpo_megatron.report.reading.run import Run, read_run
from ctpo_megatron.report.report import make_report
from tests.support import run_dirs
from tests.support.html_pages import elements


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two seeds, of which the second has half the reward and one step more, and a run with another learning rate."""
    half = [run_dirs.metrics(step, **{"reward/mean": step / 40}) for step in range(1, 14)]
    return [
        read_run(run_dirs.write_run(tmp_path / "one")),
        read_run(run_dirs.write_run(tmp_path / "two", rows=half, settings=run_dirs.config(seed=2))),
        read_run(run_dirs.write_run(tmp_path / "other", settings=run_dirs.config(optimizer={"lr": 2e-4}, seed=3))),
    ]


def test_seeds_are_pooled_at_the_steps_that_all_have(runs: list[Run]) -> None:
    seeds, other = pools(runs)
    assert (seeds.label, len(seeds.runs), other.label) == ("made (2 seeds)", 2, "other")
    series = dict(seeds.series("reward/mean"))
    assert max(series) == 12
    assert (series[8].mean, series[8].low, series[8].high, series[8].count) == (pytest.approx(0.3), 0.2, 0.4, 2)


def test_what_differs_is_named_and_the_seed_is_not(runs: list[Run]) -> None:
    numbers = comparison(runs).numbers
    (difference,) = numbers["differences"]
    assert difference == {"key": "optimizer.lr", "values": {"made (2 seeds)": "0.0001", "other": "0.0002"}}
    assert [row["seed"] for row in numbers["runs"]] == [1, 2, 3]
    assert numbers["pools"]["made (2 seeds)"]["reward/mean"] == {
        "step": 12,
        "mean": pytest.approx(0.45),
        "low": pytest.approx(0.3),
        "high": pytest.approx(0.6),
        "runs": 2,
    }


def test_a_run_without_a_configuration_stands_alone(tmp_path: Path, runs: list[Run]) -> None:
    for name in ("x", "y"):
        (run_dirs.write_run(tmp_path / name) / "config.yaml").unlink()
    pooled = pools([*runs[:1], read_run(tmp_path / "x"), read_run(tmp_path / "y")])
    assert [each.label for each in pooled] == ["one", "x", "y"]


@pytest.mark.thorough
def test_ids_of_several_runs_do_not_meet(tmp_path: Path) -> None:
    report = make_report([run_dirs.write_run(tmp_path / name) for name in ("a", "b")])
    assert {"reward", "run1--reward", "run2--reward"} <= report.figures().keys()
    ids = [attributes["id"] for _, attributes in elements(report.html()) if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(report.numbers()) == {"version", "runs", "comparison"}
