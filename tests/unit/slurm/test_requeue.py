"""Whether a run goes on by itself: what an exit code means, and how many starts were in vain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.cluster.watch import loop_watch
from ctpo_megatron.record.events import EventLog, RunReady
from ctpo_megatron.record.run_events import RunStopped
from ctpo_megatron.record.story_events import IncarnationEnded
from ctpo_megatron.slurm.requeue import (
    NO_STEP,
    STARTS_FILE,
    Start,
    fruitless,
    newest_step,
    record_start,
    starts,
    stopped_for_good,
    what_next,
)


def start(step: int, restarts: int = 0) -> Start:
    return Start(job_id=7, restarts=restarts, time=1.0, step=step)


@given(st.lists(st.integers(-1, 4), max_size=8), st.integers(-1, 4))
def test_starts_in_vain_are_those_since_the_newest_checkpoint_came(steps: list[int], now: int) -> None:
    known = [start(step) for step in steps]
    count = fruitless(known, now)
    assert all(each.step == now for each in known[len(known) - count :])
    assert count == len(known) or known[len(known) - count - 1].step != now


def test_starts_are_kept_over_processes_and_a_torn_line_is_not_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert starts(run_dir) == []
    record_start(run_dir, start(NO_STEP))
    with (run_dir / STARTS_FILE).open("a") as file:
        file.write('{"job_id": 7, "restar')  # the node lost power
    record_start(run_dir, start(12, restarts=1))
    assert starts(run_dir) == [start(NO_STEP), start(12, restarts=1)]
    assert all(json.loads(line) for line in (run_dir / STARTS_FILE).read_text().splitlines())


def test_a_stop_by_file_or_alarm_is_an_end(tmp_path: Path) -> None:
    assert not stopped_for_good(tmp_path)
    events = EventLog(tmp_path / "events.jsonl")
    events(RunStopped("the file /r/STOP", 3))
    events(IncarnationEnded(1, "stopped", "the file /r/STOP", 1.0))
    assert stopped_for_good(tmp_path)
    events(RunStopped("SIGUSR1", 4))
    events(RunReady(1.0))
    assert not stopped_for_good(tmp_path)
    events(RunStopped("alarm drift: trainer and engine agree less and less", 5))
    events.close()
    assert stopped_for_good(tmp_path)


def test_a_checkpoint_that_does_not_count_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)  # without a manifest
    assert newest_step(tmp_path) == NO_STEP


@pytest.mark.parametrize(
    ("code", "told", "ray_lost", "wanted"),
    [
        (0, False, False, "done"),
        (0, False, True, "done"),
        (75, False, False, "stopped"),
        (-9, False, False, "again"),
        (137, False, False, "again"),
        (loop_watch.FROZEN, False, False, "again"),
        (139, True, False, "again"),
        (1, False, False, "again"),  # Ray ends a driver that has lost its GCS with 1 and without a word of ours
        (1, True, False, "failed"),
        (1, True, True, "again"),
        (2, False, False, "failed"),
        (2, False, True, "again"),  # the driver began anew, and found no Ray
        (130, False, False, "failed"),
        (143, False, False, "failed"),
    ],
)
def test_what_an_exit_code_means(code: int, told: bool, ray_lost: bool, wanted: str) -> None:
    assert what_next(code, told=told, ray_lost=ray_lost) == wanted
