"""What tools/kill_driver.py makes of a run directory: it finds what was lost, made twice or different. Nothing is started."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kill_driver_moments import PHASES, Moment, Progress, draw
from run_ledger import Sizes, same_run, sampled_once, trained_once

from ctpo_megatron.record.segments import segments
from ctpo_megatron.record.trajectories import TrajectoryFiles
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.types import AttemptId, GroupId, TrajectoryGroup
from tests.support.trajectories import PROMPT, trajectory

SIZES = Sizes(steps=2, groups=3, attempts=2)


def group(number: int, evaluation: int | None = None) -> TrajectoryGroup:
    name = GroupId(number, evaluation)
    made = [replace(trajectory(1.0, [number + 1, each]), id=AttemptId(name, each)) for each in range(SIZES.attempts)]
    return TrajectoryGroup(PROMPT, made, id=name)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two steps that has come to its end, in two processes."""
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 0, "time": 1.0, "eval/accuracy": 0.5}, {"step": 1, "time": 2.0, "train/loss": 0.25, "time/step": 3.0}]
    rows += [{"step": 1, "time": 2.5, "time/checkpoint": 1.0}, {"step": 2, "time": 3.0, "train/loss": 0.125, "time/step": 4.0}]
    journal, files = Journal(run / "journal", "recipe"), TrajectoryFiles(run)
    journal.published(0, "a")
    for step in range(SIZES.steps + 1):
        numbers = range(max(0, step - 1) * SIZES.groups, step * SIZES.groups) if step else range(1)
        groups = [group(number, None if step else 0) for number in numbers]
        files.write("step" if step else "eval", step, groups)
        for each in (made for one in groups for made in one.trajectories):
            journal.note(each)
        journal.close()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    checkpoint = run / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"step": 2, "groups": 6, "samples": 12}))
    (checkpoint / "shards.json").write_text(json.dumps({"a": [["weight", [0], [2], "float32", "digest", 0, 8]]}))
    return run


def missed(run_dir: Path) -> list[str]:
    return [check.text for check in (*trained_once(run_dir, SIZES), *sampled_once(run_dir)) if not check.holds]


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text()))


def test_a_run_in_which_all_is_well(run_dir: Path) -> None:
    assert missed(run_dir) == []
    assert len(segments(run_dir / "journal")) == 3


def test_a_step_that_is_missing_is_found(run_dir: Path) -> None:
    edit(run_dir / "metrics.jsonl", lambda text: "".join(text.splitlines(keepends=True)[:-1]))
    assert len(missed(run_dir)) == 1


def test_a_group_that_was_trained_on_twice_is_found(run_dir: Path) -> None:
    """The second step has the first one's last group in the place of one of its own."""
    second = run_dir / "rollouts" / "step_00000002.jsonl"
    edit(second, lambda text: text.replace("g00000003", "g00000002"))
    found = missed(run_dir)
    assert any("wrong: [2]" in text for text in found)
    assert any("each once" in text for text in found)
    assert any("not used: ['g00000003.0', 'g00000003.1']" in text for text in found)


def test_an_attempt_that_was_sampled_twice_is_found(run_dir: Path) -> None:
    journal = Journal(run_dir / "journal", "recipe")
    journal.note(group(4).trajectories[1])
    journal.close()
    assert missed(run_dir) == ["14 attempts were finished, sampled again: ['g00000004.1']"]


def test_a_miscount_in_the_checkpoint_is_found(run_dir: Path) -> None:
    edit(run_dir / "checkpoints" / "step_00000002" / "run.json", lambda text: text.replace("12", "14"))
    assert len(missed(run_dir)) == 1


@pytest.mark.parametrize(
    ("file", "old", "new", "at"),
    [
        ("model/model.safetensors", "weights", "weightz", 0),
        ("checkpoints/step_00000002/shards.json", "digest", "gidest", 1),
        ("rollouts/eval_00000000.jsonl", '"reward": 1.0', '"reward": 0.0', 2),
        ("metrics.jsonl", "0.125", "0.126", 3),
    ],
)
def test_two_runs_that_differ(run_dir: Path, file: str, old: str, new: str, at: int) -> None:
    """In nothing but the clock; then in one place."""
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    edit(other / "metrics.jsonl", lambda text: text.replace('"time/step": 3.0', '"time/step": 9.0').replace("2.5", "7.5"))
    edit(other / "checkpoints/step_00000002/shards.json", lambda text: text.replace("0, 8]", "8, 16]"))
    assert all(check.holds for check in same_run(run_dir, other))
    edit(other / file, lambda text: text.replace(old, new))
    assert [check.holds for check in same_run(run_dir, other)] == [place != at for place in range(5)]


def test_a_second_run_that_samples_is_found(run_dir: Path) -> None:
    other = run_dir.with_name("other")
    shutil.copytree(run_dir, other)
    journal = Journal(other / "journal", "recipe")
    journal.note(group(5).trajectories[0])
    journal.close()
    assert [check.holds for check in same_run(run_dir, other)] == [True, True, True, True, False]


@given(st.integers(0, 40), st.integers(0, 9), st.integers(2, 12), st.integers(1, 2))
def test_moments_come_in_order_in_every_phase(kills: int, seed: int, steps: int, every: int) -> None:
    moments = draw(kills, seed, steps, evaluate=every, save=every)
    assert moments == draw(kills, seed, steps, evaluate=every, save=every)
    assert len(moments) == kills
    assert [(each.step, PHASES.index(each.phase)) for each in moments] == sorted(
        (each.step, PHASES.index(each.phase)) for each in moments
    )
    counts = [sum(each.phase == phase for each in moments) for phase in PHASES]
    assert max(counts) - min(counts) <= 1
    assert all(0 <= each.step <= steps and 0 <= each.share < 1 for each in moments)
    assert all(each.step % every == 0 for each in moments if each.phase in ("save", "evaluate"))


def test_what_a_run_directory_shows(tmp_path: Path) -> None:
    """Of the process that works now; the one before it was further."""
    run = tmp_path / "run"
    run.mkdir()
    events, journal = run / "events.jsonl", Journal(run / "journal", "recipe")
    happened = [(1.0, "ready", {"seconds": 30.0}), (2.0, "step", {"step": 1, "phases": {"train": 0.5}})]

    def tell(at: float, name: str, **fields: object) -> None:
        with events.open("a") as file:
            file.write(json.dumps({"time": at, "event": name, **fields}) + "\n")

    for at, name, fields in happened:
        tell(at, name, **fields)
    progress = Progress(run, SIZES, begun=10.0)
    assert progress.shown() == "start"
    assert progress.usual_s("start") == 30.0
    assert not progress.passed(Moment("train", 1, 0.5))
    tell(11.0, "published", version=0)
    tell(11.1, "ready", seconds=32.0)
    progress.look()
    assert progress.shown() == "rollout of step 1"
    assert progress.opened(Moment("evaluate", 0, 0.5))
    assert progress.opened(Moment("rollout", 1, 0.5))
    assert not progress.opened(Moment("train", 1, 0.5))
    for number in range(SIZES.groups):
        for each in group(number).trajectories:
            journal.note(each)
    assert progress.shown() == "training or publishing step 1"
    assert progress.opened(Moment("publish", 1, 0.0))
    assert progress.waits_s(Moment("publish", 1, 0.0)) == pytest.approx(0.4)
    tell(12.0, "published", version=1)
    (run / "checkpoints" / "step_00000001.tmp").mkdir(parents=True)
    (run / "checkpoints" / "step_00000001.tmp" / "run.json").touch()
    progress.look()
    assert progress.shown() == "evaluating or saving step 1, saving 1"
    assert progress.opened(Moment("save", 1, 0.5))
    tell(13.0, "step", step=1)
    with events.open("a") as file:
        file.write('{"time": 14.0, "event": "st')  # is being written
    progress.look()
    assert progress.shown() == "rollout of step 2, saving 1"
    assert progress.passed(Moment("train", 1, 0.9))
    assert not progress.passed(Moment("save", 1, 0.9))
    assert not progress.opened(Moment("end", 2, 0.5))
    journal.close()


def test_a_run_that_goes_on_from_its_last_checkpoint_is_at_its_end(tmp_path: Path) -> None:
    happened = [{"event": "resumed", "step": 2}, {"event": "ready", "seconds": 9.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps({"time": 11.0, **each}) + "\n" for each in happened))
    progress = Progress(tmp_path, SIZES, begun=10.0)
    assert progress.opened(Moment("end", 2, 0.5))
    assert progress.shown() == "end"
