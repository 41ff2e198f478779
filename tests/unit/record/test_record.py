"""What a run writes down, read back with TensorBoard's own reader."""

from __future__ import annotations

import io
import json
import math
import re
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import PhaseTimer, Recorder, progress, write_summary
from ctpo_megatron.record.catalogue import CATALOGUE, charts
from ctpo_megatron.record.files import jsonable
from ctpo_megatron.record.progress import reading_progress


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def board(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tb"), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return accumulator.Reload()


def points(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(run_dir).Scalars(name)]


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_steps_reach_the_file_and_tensorboard(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        recorder.step(0, {"eval/accuracy": 0.25})
        recorder.step(1, {"reward/mean": 0.5, "train/loss": np.float32(2.0)})
        on_disk_before_closing = rows(tmp_path)
    assert [{k: v for k, v in row.items() if k != "time"} for row in on_disk_before_closing] == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "reward/mean": 0.5, "train/loss": 2.0},
    ]
    assert abs(on_disk_before_closing[0]["time"] - time.time()) < 60
    assert points(tmp_path, "reward/mean") == [(1, 0.5)]
    assert points(tmp_path, "eval/accuracy") == [(0, 0.25)]


def test_what_comes_late_does_not_take_later_points_from_tensorboard(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        for step in (0, 4, 6):
            recorder.step(step, {"eval/accuracy/aime25": step / 8})
        recorder.step(2, {"eval/accuracy/aime25": 0.25}, board=False)
    assert [row["step"] for row in rows(tmp_path)] == [0, 4, 6, 2]
    assert points(tmp_path, "eval/accuracy/aime25") == [(0, 0.0), (4, 0.5), (6, 0.75)]


def test_a_resumed_run_shows_one_curve(tmp_path: Path) -> None:
    """Steps 0..5 were written, the checkpoint was after step 3; the second attempt writes 4 and 5 again, differently."""
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        for step in range(6):
            recorder.step(step, {"reward/mean": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rewa')  # killed in the middle of a line
    with closing(Recorder(tmp_path, LogConfig(), first_step=3, console=silent())) as recorder:
        for step in (4, 5):
            recorder.step(step, {"reward/mean": step + 100.0})
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0)]
    assert [(row["step"], row["reward/mean"]) for row in rows(tmp_path)] == expected
    assert points(tmp_path, "reward/mean") == expected


def test_a_fresh_run_in_an_old_directory_starts_over(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
            recorder.step(0, {"reward/mean": value})
    assert [row["reward/mean"] for row in rows(tmp_path)] == [2.0]
    assert points(tmp_path, "reward/mean") == [(0, 2.0)]


def test_numbers_that_are_not_finite_stay_readable(tmp_path: Path) -> None:
    values = {"train/ratio": math.nan, "train/ratio_max": math.inf, "train/ratio_min": -math.inf, "train/loss": np.float32("nan")}
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        recorder.step(1, values)
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert [strict[key] for key in values] == ["NaN", "Infinity", "-Infinity", "NaN"]
    assert math.isnan(float(strict["train/ratio"]))
    assert float(strict["train/ratio_min"]) == -math.inf


def test_histograms_count_the_finite_values(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        recorder.histogram("len", [1, 2, 2, 4, math.nan, math.inf], 3)
        recorder.histogram("none", [math.nan], 3)
        recorder.histogram("same", [5.0, 5.0], 3)
    read = board(tmp_path)
    (event,) = read.Histograms("len")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.min, value.max) == (3, 4.0, 9.0, 1.0, 4.0)
    assert sum(value.bucket) == 4.0
    assert sum(read.Histograms("same")[0].histogram_value.bucket) == 2.0
    assert sorted(read.Tags()["histograms"]) == ["len", "same"]


def test_text_is_kept_as_given(tmp_path: Path) -> None:
    text = "# Frage\n\n    é \ud800 <b>"
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        recorder.text("rollout/0", text, 2)
    (event,) = board(tmp_path).Tensors("rollout/0/text_summary")
    assert event.tensor_proto.string_val[0].decode() == text.replace("\ud800", "?")


def test_charts_are_those_of_the_catalogue(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, LogConfig(), console=silent())) as recorder:
        recorder.step(1, {"health/clip_fraction/decile_3": 0.5})
    (event,) = board(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    found = {category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart} for category in layout.category}
    bands = {chart.title: chart.margin.series[0] for chart in layout.category[-1].chart}
    del found["windows"]
    assert found == {group: {title: names for title, (_, names) in titles.items()} for group, titles in charts().items()}
    assert {name.partition(",")[0] for name in bands} == {m.name for m in CATALOGUE if m.watched and not m.is_family}
    band = bands["reward/mean, 100 steps each"]
    assert [band.value, band.lower, band.upper] == [f"windows/reward/mean{end}" for end in ("", "/min", "/max")]
    (pattern,) = found["health"]["health: clip_fraction"]
    assert re.fullmatch(pattern, "health/clip_fraction/decile_3")


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    with closing(Recorder(tmp_path, LogConfig(tensorboard=False), console=silent())) as recorder:
        recorder.step(1, {"reward/mean": 1.0})
        recorder.histogram("h", [1.0], 1)
        recorder.text("t", "x", 1)
    assert not (tmp_path / "tb").exists()
    assert len(rows(tmp_path)) == 1


def test_console_lines_follow_the_configured_pace(tmp_path: Path) -> None:
    console = silent()
    with closing(Recorder(tmp_path, LogConfig(every=2), console=console)) as recorder:
        for step in range(1, 5):
            recorder.step(step, {"reward/std": 9.0, "train/loss": 0.123456, "reward/mean": 0.5})
    assert console.file.getvalue().splitlines() == [f"step {n}  reward/mean 0.5  train/loss 0.1235" for n in (2, 4)]


def test_summary_is_replaced_whole(tmp_path: Path) -> None:
    write_summary(tmp_path, {"accuracy": 0.1, "old": True})
    write_summary(tmp_path, {"accuracy": math.nan, "path": Path("a/b"), "phases": {"train": (1, 2)}})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "accuracy": "NaN",
        "path": "a/b",
        "phases": {"train": [1, 2]},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_jsonable_keeps_what_json_knows() -> None:
    value = {"i": 1, "b": True, "n": None, "f": 0.5, "l": [1, "x"], 3: np.int64(4)}
    assert jsonable(value) == {"i": 1, "b": True, "n": None, "f": 0.5, "l": [1, "x"], "3": 4}


def test_phases_add_up_even_when_one_fails() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer("rollout"):
            time.sleep(0.02)
    with pytest.raises(ZeroDivisionError), timer("train"):
        raise ZeroDivisionError
    assert 0.04 <= timer.seconds["rollout"] < 1.0
    assert set(timer.seconds) == {"rollout", "train"}


def test_progress_in_a_pipe_writes_whole_lines_at_its_pace() -> None:
    console = silent()
    with progress("step 3 rollout", 8, console, plain_seconds=0.0) as show:
        show(4)
    with progress("quiet", 8, console) as show:
        show(4)
    assert console.file.getvalue().splitlines() == ["step 3 rollout: 4/8 after 0 s"]


def test_progress_in_a_terminal_is_a_bar_that_goes_away() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress("rollout", 8, console) as show:
        show(8)
    assert "8/8" in console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_quick_reading_shows_nothing_and_slow_reading_does(terminal: bool) -> None:
    for patience, shown in ((60.0, False), (0.0, True)):
        text = io.StringIO()
        console = Console(file=text, width=100, force_terminal=terminal)
        with reading_progress("reading a.parquet", console, patience_s=patience, plain_seconds=60.0) as show:
            for done in (10, 20, 30):
                show(done, 40)
        assert ("reading a.parquet" in text.getvalue()) is shown
        if shown and not terminal:
            assert text.getvalue() == "reading a.parquet: 25% after 0 s\n"


def test_reading_is_shown_beside_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    with reading_progress("reading a.parquet", patience_s=0.0) as show:
        show(1, 2)
    assert capsys.readouterr() == ("", "reading a.parquet: 50% after 0 s\n")
