"""TensorBoard of a run, read back with its own reader: axes, windows, comparisons, pictures, and a disk that is slow."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.record import Recorder
from ctpo_megatron.record.board import Board
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.heat import load_picture
from ctpo_megatron.record.hparams import MEASURES, settings_shown
from ctpo_megatron.record.recorder import SAMPLES
from ctpo_megatron.record.run_board import RunBoard
from ctpo_megatron.record.sink_events import PointsLost
from ctpo_megatron.record.windows import WINDOW

PER_STEP = 8  # samples
QUIET = LogConfig(every=10**6)
SESSION = metadata.SESSION_START_INFO_TAG


def recorder(run_dir: Path, first_step: int = 0, **options: object) -> Recorder:
    return Recorder(run_dir, QUIET, first_step=first_step, console=Console(file=io.StringIO()), **options)


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(directory).Scalars(tag)]


def test_windows_and_samples_go_on_over_a_resume(tmp_path: Path) -> None:
    """The first incarnation writes beyond its checkpoint, and another branch follows: each tag has one line, with no hole."""
    with closing(recorder(tmp_path, samples=0)) as first:
        for step in range(1, WINDOW + 30):
            first.step(step, {"reward/mean": float(step), SAMPLES: float(PER_STEP * step)})
    checkpoint = WINDOW - 10
    with closing(recorder(tmp_path, checkpoint, samples=PER_STEP * checkpoint)) as second:
        for step in range(checkpoint + 1, WINDOW + 3):
            second.step(step, {"reward/mean": 1000.0 + step, SAMPLES: float(PER_STEP * step)})
    values = {step: step + (1000.0 if step > checkpoint else 0.0) for step in range(1, WINDOW + 3)}
    window = list(values.values())[:WINDOW]
    assert points(tmp_path / "tb", "reward/mean") == list(values.items())
    assert points(tmp_path / "tb", "windows/reward/mean/min") == [(WINDOW + 1, min(window))]
    assert points(tmp_path / "tb", "windows/reward/mean/max") == [(WINDOW + 1, max(window))]
    ((_, mean),) = points(tmp_path / "tb", "windows/reward/mean")
    assert mean == pytest.approx(sum(window) / WINDOW)
    by_samples = [(PER_STEP * step, value) for step, value in values.items()]
    assert points(tmp_path / "tb" / "by_samples", "samples/reward/mean") == by_samples


def test_where_samples_are_not_known_nothing_is_shown_by_them(tmp_path: Path) -> None:
    board = RunBoard(tmp_path, 5)
    board.step(5, {"reward/mean": 1.0}, None, 0.0)
    board.close()
    assert points(tmp_path / "tb", "reward/mean") == [(5, 1.0)]
    assert not (tmp_path / "tb" / "by_samples").exists()


def test_runs_are_compared_by_the_settings_of_the_last_incarnation(tmp_path: Path) -> None:
    for lr, first_step in ((1e-3, 0), (2e-3, 1), (3e-3, 2)):
        with closing(recorder(tmp_path, first_step, settings={"optimizer.lr": lr, "seed": 1})) as opened:
            opened.step(first_step + 1, {"reward/mean": 0.5})
    read_back = read(tmp_path / "tb")
    content = {tag: read_back.SummaryMetadata(tag).plugin_data.content for tag in (metadata.EXPERIMENT_TAG, SESSION)}
    session = metadata.parse_session_start_info_plugin_data(content[SESSION])
    assert {name: value.number_value for name, value in session.hparams.items()} == {"optimizer.lr": 3e-3, "seed": 1.0}
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [each.name.tag for each in experiment.metric_infos] == list(MEASURES)
    told = [path for path in (tmp_path / "tb").glob("events*") if SESSION.encode() in path.read_bytes()]
    assert len(told) == 1, "TensorBoard shows the settings that it reads first"


def test_settings_that_are_shown_are_numbers_words_and_switches() -> None:
    config = {"seed": 3, "run_dir": "r", "optimizer": {"lr": 1e-3, "x": None}, "algorithm": {"objective": {"type": "ctpo"}}}
    config |= {"train": {"steps": 5, "recompute": "none"}, "rollout": {"tool": None, "stop": [1]}}
    expected = {"seed": 3, "optimizer.lr": 1e-3, "algorithm.objective.type": "ctpo", "train.steps": 5}
    assert settings_shown(config) == expected


def test_experts_are_shown_as_a_picture(tmp_path: Path) -> None:
    load = np.array([[100.0, 100.0, 100.0, 100.0], [400.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    board = RunBoard(tmp_path, 0)
    for step in range(1, 31):
        board.loads("moe/load", load, step)
    board.close()
    events = read(tmp_path / "tb").Images("moe/load")
    assert [event.step for event in events] == [*range(1, 11), 20, 30]
    pixels = load_picture(load)
    side = pixels.shape[0] // 3
    assert (events[0].height, events[0].width) == pixels.shape[:2] == (3 * side, 4 * side)
    cells = pixels[side // 2 :: side, side // 2 :: side].tolist()
    white, hot, cold, grey = [255, 255, 255], [178, 24, 43], [33, 102, 172], [128, 128, 128]
    assert cells == [[white] * 4, [hot, cold, cold, cold], [grey] * 4]


class StuckDisk:
    """A disk that does not answer once it is `stuck`, until it is let go."""

    def __init__(self) -> None:
        self.stuck, self.go_on = threading.Event(), threading.Event()

    def __call__(self, write: Callable[[], None]) -> None:
        if self.stuck.is_set():
            assert self.go_on.wait(60.0)
        write()


def test_a_step_does_not_wait_for_the_disk_and_what_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.record.recorder.RunBoard", partial(RunBoard, most=10))
    disk, told = StuckDisk(), list[Event]()
    opened = recorder(tmp_path, aside=disk, emit=told.append)
    disk.stuck.set()
    for step in range(1, 31):
        opened.step(step, {"reward/mean": 0.5})  # this thread alone could let the disk go on
    disk.go_on.set()
    opened.close()
    lost = [event for event in told if isinstance(event, PointsLost)]
    assert {event.sink for event in lost} == {"TensorBoard"}
    assert len(lost) == 2, "at once, and at the end; in between once a minute"
    kept = [step for step, _ in points(tmp_path / "tb", "reward/mean")]
    assert kept == list(range(1, len(kept) + 1))
    assert 0 < len(kept) < 30
    assert sum(event.pieces for event in lost) == 30 - len(kept)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 30


def test_points_have_the_time_at_which_they_were_made(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.scalars(1, {"a": 1.0, "b": 2.0}, at=1000.0)
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [event.wall_time for tag in ("a", "b") for event in found.Scalars(tag)] == [1000.0, 1000.0]
