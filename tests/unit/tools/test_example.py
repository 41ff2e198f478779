"""`make example` goes on where it was interrupted, ends what takes too long, and reports what follows from the run's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from example import Stages
from example_results import WANTED_RISE, Results, Rise, Share, as_markdown, collect, rewards, write
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.often import often

SETTINGS: dict[str, object] = {"seed": 1, "overrides": []}
PROMPTS = 40


# stages


def test_an_interrupted_run_goes_on_with_the_stage_that_failed(tmp_path: Path) -> None:
    ran: list[str] = []

    def failing() -> None:
        ran.append("second")
        raise typer.Exit(7)

    stages = Stages(tmp_path / "run", SETTINGS)
    stages.run("first", lambda: ran.append("first"))
    with pytest.raises(typer.Exit):
        stages.run("second", failing)
    again = Stages(tmp_path / "run", SETTINGS)
    again.run("first", lambda: ran.append("first again"))
    again.run("second", lambda: ran.append("second again"))
    assert ran == ["first", "second", "second again"]
    assert again.done == ["first", "second"]
    assert again.seconds["second"] >= stages.seconds["second"] > 0.0


@pytest.mark.parametrize("other", [{"seed": 2, "overrides": []}, {"seed": 1, "overrides": ["train.steps=3"]}])
def test_other_settings_are_refused_in_the_same_directory(
    tmp_path: Path, other: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    Stages(tmp_path / "run", SETTINGS)
    with pytest.raises(typer.Exit) as refused:
        Stages(tmp_path / "run", other)
    assert refused.value.exit_code == 2
    assert f"was made with {SETTINGS}, and this is {other}" in capsys.readouterr().err


def test_a_directory_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as refused:
        Stages(tmp_path, SETTINGS)
    assert refused.value.exit_code == 2
    assert "is not of an earlier example; give another --run-dir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# figures


def run_directory(directory: Path, before: list[float], after: list[float]) -> Path:
    """The files of a run of two steps, as far as the figures follow from them."""
    (directory / "rollouts").mkdir(parents=True)
    (directory / "data").mkdir()
    sources = [f"word-problems/{'odd' if index % 2 else 'even'}" for index in range(PROMPTS)]
    pq.write_table(pa.table({"data_source": sources}), directory / "data" / "eval.parquet")
    for step, outcomes in ((0, before), (2, after)):
        lines(
            directory / "rollouts" / f"eval_{step:08d}.jsonl",
            [{"prompt_index": i, "reward": reward} for i, reward in reversed(list(enumerate(outcomes)))],
        )
    for step in (1, 2):
        lines(directory / "rollouts" / f"step_{step:08d}.jsonl", [{}] * 12)
    seconds = {f"time/{phase}": 1.0 for phase in ("rollout", "train", "publish", "step")}
    steps = [{"reward/mean": 0.25 * n, "drift/mean": n * 1e-6, "drift/max": 1e-4 / n, **seconds} for n in (1, 2)]
    lines(directory / "metrics.jsonl", [{"eval/accuracy": 0.3}, *steps, {"eval/accuracy": 0.6}])
    (directory / "summary.json").write_text(json.dumps({"steps": 2}))
    (directory / "same_answers.json").write_text(json.dumps({"answers": 8, "same": 8}))
    return directory


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def results(tmp_path: Path) -> Results:
    before = [float(index % 4 == 0) for index in range(PROMPTS)]  # 10 of the 20 even ones
    after = [float(index % 2 == 0 or index % 4 == 1) for index in range(PROMPTS)]  # 20 and 10
    return collect(run_directory(tmp_path / "run", before, after), 1, {"model": 60.0, "train": 1500.0})


def test_figures_follow_from_the_files(results: Results) -> None:
    assert (results.prompts, results.steps, results.samples) == (PROMPTS, 2, 24)
    assert (results.before.value, results.after.value, results.rise.value) == (0.25, 0.75, 0.5)
    assert [(each.kind, each.prompts, each.before, each.after) for each in results.kinds] == [
        ("even", 20, 0.5, 1.0),
        ("odd", 20, 0.0, 0.5),
    ]
    assert (results.reward_first, results.reward_last) == (0.25, 0.5)
    assert (results.drift_mean, results.drift_max) == (2e-6, 1e-4)
    assert results.reached


def test_what_is_wanted_is_more_than_the_interval(results: Results) -> None:
    assert not replace(results, rise=Rise(0.5, WANTED_RISE - 0.001, 0.9)).reached
    assert replace(results, rise=Rise(0.5, WANTED_RISE, 0.9)).reached
    assert not replace(results, same_answers=7).reached


def test_the_tables_are_written_with_every_kind(results: Results, tmp_path: Path) -> None:
    write(tmp_path, results)
    text = (tmp_path / "results.md").read_text()
    assert text == as_markdown(results)
    assert "| even | 20 | 50% | 100% |" in text
    assert "| accuracy after reinforcement learning (95 %) | 75.0% (59.8% to 85.8%) |" in text
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (stored["rise"]["value"], stored["reached"], stored["seed"]) == (0.5, True, 1)


def test_rewards_belong_to_prompts_whatever_their_order(results: Results, tmp_path: Path) -> None:
    assert rewards(tmp_path / "run", 0) == {index: float(index % 4 == 0) for index in range(PROMPTS)}


def test_an_evaluation_of_other_prompts_is_not_compared(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", [0.0] * PROMPTS, [1.0] * (PROMPTS - 1))
    with pytest.raises(ValueError, match="40 held-out prompts before training, 39 after it"):
        collect(run, 1, {})


def test_the_interval_of_a_share_is_wilsons() -> None:
    """Against the textbook's formula."""
    right, count, z = 12, 40, 1.959964
    share = Share.of([1.0] * right + [0.0] * (count - right))
    middle = (right + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * np.sqrt(right * (count - right) / count + z * z / 4)
    assert (share.low, share.high) == pytest.approx((middle - half, middle + half), abs=1e-6)


@settings(deadline=None, max_examples=often(30))
@given(seed=st.integers(0, 2**32), count=st.integers(30, 60))
def test_the_interval_of_a_rise_is_that_of_paired_differences(seed: int, count: int) -> None:
    before, after = np.random.default_rng(seed).integers(0, 2, (2, count)).astype(float)
    differences = after - before
    rise = Rise.of(before.tolist(), after.tolist())
    assert rise.value == pytest.approx(differences.mean())
    spread = 2.0 * differences.std(ddof=1) / np.sqrt(count)  # t is 2.0 to 2.05 for so many
    assert spread * 0.99 <= rise.value - rise.low <= spread * 1.03
    assert rise.high - rise.value == pytest.approx(rise.value - rise.low)
