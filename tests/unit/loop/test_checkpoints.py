"""When a run saves and waits for what it saved, and which checkpoint it goes on from."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from ctpo_megatron.checkpoints.files import begin_checkpoint, commit_checkpoint, set_aside, work_directory
from ctpo_megatron.config.train import CheckpointConfig
from ctpo_megatron.errors import CheckpointError, DamagedCheckpoint, InputError, StorageError
from ctpo_megatron.loop.checkpoints import Checkpoints, newest, read_resumable, refuse_earlier, restore
from ctpo_megatron.loop.state import RunState
from ctpo_megatron.record.events import CheckpointDamaged, CheckpointLost, CheckpointVerified, Emit, Event, discard
from tests.support.checkpoints import state_after, write_checkpoint


class Disk:
    """A trainer whose saves are settled, or fail, when `done` is set."""

    def __init__(self, failure: str | None = None) -> None:
        self.done, self.failure, self.calls = asyncio.Event(), failure, []

    async def save(self, directory: Path, *, background: bool) -> None:
        state = json.loads((work_directory(directory) / "run.json").read_text())
        self.calls.append((directory.name, RunState.parse(state, "").step, background))

    async def settle(self) -> None:
        await self.done.wait()
        self.calls.append("settled")
        if self.failure:
            raise CheckpointError(self.failure)


def checkpoints(disk: Disk, root: Path, emit: Emit = discard) -> Checkpoints:
    return Checkpoints(disk, root, CheckpointConfig(), emit)


def test_one_save_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        saves = checkpoints(disk, tmp_path)
        await saves.save(state_after(1))
        saves.check()  # still being written: training goes on
        second = asyncio.ensure_future(saves.save(state_after(2)))
        await asyncio.sleep(0.01)
        assert disk.calls == [("step_00000001", 1, True)]
        disk.done.set()
        await second
        assert disk.calls[1:3] == ["settled", ("step_00000002", 2, True)]
        await saves.settle()
        await saves.settle()
        assert disk.calls.count("settled") == 2

    asyncio.run(scenario())


def test_the_configuration_is_part_of_what_is_begun(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        disk.done.set()
        saves = Checkpoints(disk, tmp_path, CheckpointConfig(), discard, resolved="seed: 3\n")
        await saves.save(state_after(1))
        assert (tmp_path / "step_00000001.tmp" / "config.yaml").read_text() == "seed: 3\n"
        await saves.settle()

    asyncio.run(scenario())
    assert read_resumable(write_checkpoint(tmp_path, 2, resolved="seed: 3\n")).config == {"seed": 3}
    assert read_resumable(write_checkpoint(tmp_path, 3)).config is None


def test_a_failure_in_the_background_is_raised_before_the_next_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Disk("disk full")
        saves = checkpoints(disk, tmp_path)
        await saves.save(state_after(1))
        saves.check()
        disk.done.set()
        await asyncio.sleep(0.01)
        with pytest.raises(CheckpointError, match="disk full"):
            saves.check()
        with pytest.raises(CheckpointError, match="disk full"):
            await saves.save(state_after(2))

    asyncio.run(scenario())


def test_a_cancelled_run_waits_for_what_it_accepted(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk, events = Disk(), []
        saves = checkpoints(disk, tmp_path, events.append)
        await saves.save(state_after(1))
        waiting = asyncio.ensure_future(saves.save(state_after(2)))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        disk.done.set()
        await saves.abandon()
        assert disk.calls[-1] == "settled"
        (verified,) = events
        assert "checkpoint of step 1 verified" in verified.sentence
        disk.failure = "no space"
        await saves.save(state_after(3))
        await saves.abandon()
        assert "no space" in events[-1].sentence
        assert isinstance(events[-1], CheckpointLost)

    asyncio.run(scenario())


def test_old_ones_that_cannot_be_removed_do_not_hide_why_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("held by somebody else")

    async def scenario() -> None:
        disk, events = Disk(), []
        saves = checkpoints(disk, tmp_path, events.append)
        disk.done.set()
        await saves.save(state_after(1))
        await saves.abandon()
        assert [type(each) for each in events] == [CheckpointVerified, CheckpointLost]
        assert "held by somebody else" in events[-1].sentence

    monkeypatch.setattr("ctpo_megatron.loop.checkpoints.prune", refuse)
    asyncio.run(scenario())


class Reader(Disk):
    """A trainer whose ranks find some checkpoints damaged."""

    def __init__(self, damaged: set[str]) -> None:
        super().__init__()
        self.damaged = damaged

    async def load(self, directory: Path) -> None:
        if directory.name in self.damaged:
            raise DamagedCheckpoint(f"{directory}/__0_0.distcp: a flipped bit.")
        self.calls.append(directory.name)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_gone_on_from_and_damaged_ones_are_set_aside(tmp_path: Path) -> None:
    events: list[Event] = []
    first, second, third = (write_checkpoint(tmp_path, step) for step in (1, 2, 3))
    (second / "run.json").write_bytes((second / "run.json").read_bytes().replace(b"0.5", b"0.6"))
    (third / "checkpoint.json").unlink()
    found = newest(tmp_path, 9, events.append)
    assert (found.checkpoint, found.state) == (first, state_after(1))
    assert all(isinstance(event, CheckpointDamaged) for event in events)
    told = "".join(event.sentence for event in events)
    assert "checkpoint.json is missing" in told
    assert "run.json: its content does not have the hash that was written" in told
    assert f"going on from {second}" in events[0].sentence
    assert f"going on from {first}" in events[1].sentence
    assert names(tmp_path) == ["step_00000001", "step_00000002.damaged", "step_00000003.damaged"]
    assert set_aside(write_checkpoint(tmp_path, 2)).name == "step_00000002.damaged2"
    first.rename(tmp_path / "other")
    with pytest.raises(InputError, match="no checkpoint in"):
        newest(tmp_path, 9, events.append)


def test_what_the_ranks_find_damaged_is_replaced_by_the_one_before(tmp_path: Path) -> None:
    first, _, _ = (write_checkpoint(tmp_path, step) for step in (1, 2, 3))
    events: list[Event] = []
    reader = Reader({"step_00000002", "step_00000003"})
    found = asyncio.run(restore(reader, newest(tmp_path, 9, discard), events.append))
    assert (found.checkpoint, found.state.step, reader.calls) == (first, 1, ["step_00000001"])
    assert len(events) == 2
    reader.damaged.add("step_00000001")
    with pytest.raises(CheckpointError, match="the damaged ones were set aside"):
        asyncio.run(restore(reader, newest(tmp_path, 9, discard), events.append))
    assert "there is none before it" in events[-1].sentence


def test_what_no_run_can_go_on_from_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 4)
    write_checkpoint(tmp_path / "run" / "checkpoints", 4)
    with pytest.raises(InputError, match=r"already has 4 of train\.steps=4"):
        newest(tmp_path, 4, discard)
    with pytest.raises(InputError, match="up to step_00000004"):
        refuse_earlier(tmp_path / "run")
    metrics = tmp_path / "unsaved" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.touch()
    refuse_earlier(metrics.parent)  # it came to no number
    metrics.write_text("{}\n")
    with pytest.raises(InputError, match="holds the metrics of an earlier run: go on from it with --resume auto"):
        refuse_earlier(metrics.parent)
    refuse_earlier(tmp_path / "absent")
    write_checkpoint(tmp_path, 6, replace(state_after(6), step=5))
    with pytest.raises(CheckpointError, match=r"run\.json is the state after step 5"):
        newest(tmp_path, 9, discard)
    weights = tmp_path / "step_00000007"
    commit_checkpoint(begin_checkpoint(weights, {}), weights, {"version": 3, "files": {}})
    with pytest.raises(CheckpointError, match=r"no run\.json"):
        read_resumable(weights)
    assert names(tmp_path) == ["run", "step_00000004", "step_00000006", "step_00000007", "unsaved"]  # none is damaged


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_a_checkpoint_that_is_out_of_reach_is_not_taken_for_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(file: Path) -> str:
        raise OSError(number, os.strerror(number), str(file))

    newer = [write_checkpoint(tmp_path, step) for step in (1, 2)][-1]
    monkeypatch.setattr("ctpo_megatron.checkpoints.verify.file_hash", refuse)
    with pytest.raises(StorageError, match=r"run\.json"):
        newest(tmp_path, 9, discard)
    assert newer.is_dir()
    number = errno.EIO  # the disk itself cannot read it: that is damage
    with pytest.raises(InputError, match="no checkpoint in"):
        newest(tmp_path, 9, discard)
    assert names(tmp_path) == ["step_00000001.damaged", "step_00000002.damaged"]
