"""A disk that is full: one error that names the file and the reason, whole records left behind, and nobody who waits."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path

import pytest

from ctpo_megatron.checkpoints.files import begin_checkpoint
from ctpo_megatron.config.record import LogConfig
from ctpo_megatron.errors import CheckpointError, StorageError, out_of_space, reason, storage_words, storing, told
from ctpo_megatron.record import Recorder, write_summary
from ctpo_megatron.record.board import Board
from ctpo_megatron.record.events import EventLog, RunReady
from ctpo_megatron.record.files import GrowingFile, MetricsFile
from ctpo_megatron.record.trajectories import TrajectoryFiles
from tests.support.disks import fill, small_disk
from tests.support.record_writers import group

FULL = Path("/dev/full")


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 256) as disk:
        yield disk


def writers(run: Path):
    """(name, what writes one more record)"""
    metrics, events, board = MetricsFile(run / "metrics.jsonl", 0), EventLog(run / "events.jsonl"), Board(run / "tb", 0)
    rollouts = TrajectoryFiles(run)
    yield "metrics.jsonl", lambda n: metrics.write(n, {"reward/mean": 0.5})
    yield "events.jsonl", lambda n: events(RunReady(float(n)))
    yield "events.out.tfevents", lambda n: board.text("t", "word " * 200, n)
    yield "rollouts", lambda n: rollouts.write("step", n, [group("word " * 200)])
    yield "summary.json", lambda n: write_summary(run, {"n": "word " * 2000})
    yield "step_", lambda n: begin_checkpoint(run / f"step_{n:08d}", {"run.json": "word " * 2000})


def until_it_fails(write) -> None:
    for number in range(1, 10_000):
        write(number)


@pytest.mark.parametrize("number", range(6))
def test_whoever_writes_is_told_that_the_disk_is_full(disk, number):
    name, write = list(writers(disk))[number]
    write(0)
    fill(disk, leave=4096)
    with pytest.raises(StorageError, match=r"no space left on the file system .* MiB free") as caught:
        until_it_fails(write)
    assert f"{disk}/" in str(caught.value)
    assert name in str(caught.value)
    assert caught.value.exit_code == 1


def test_whole_lines_are_left_behind_and_closing_is_quiet(disk):
    recorder = Recorder(disk, LogConfig(tensorboard=True))
    fill(disk, leave=5000)
    with pytest.raises(StorageError):
        until_it_fails(lambda step: recorder.step(step - 1, {"reward/mean": 0.123456789}))
    recorder.close()
    recorder.close()
    lines = (disk / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
    assert all(line.endswith("\n") for line in lines)


def test_readers_of_events_hear_them_although_the_disk_is_full(disk):
    heard = []
    events = EventLog(disk / "events.jsonl", [heard.append])
    fill(disk)
    with pytest.raises(StorageError):
        events(RunReady(1.0))
    events.close()
    assert heard == [RunReady(1.0)]


def test_a_file_that_takes_nothing(tmp_path):
    file = GrowingFile(FULL)
    with pytest.raises(StorageError, match=r"^/dev/full: no space left on the file system"):
        file.append(b"x")
    file.close()


def test_what_the_host_lacks_is_told_from_what_the_user_gave():
    def of(number: int, file: str | None = "a/b.txt") -> OSError:
        return OSError(number, "words of the system", file)

    assert told(of(errno.ENOSPC)) == (storage_words(of(errno.ENOSPC)), 1)
    assert "no space left" in told(of(errno.EDQUOT))[0]
    assert told(of(errno.EACCES)) == ("a/b.txt: no permission. Change its owner or mode, or use another place.", 1)
    assert "read-only" in told(of(errno.EROFS))[0]
    assert told(of(errno.EIO)) == ("a/b.txt: words of the system", 1)
    assert told(MemoryError())[1] == 1
    assert told(ExceptionGroup("several", [of(errno.EROFS)])) == told(of(errno.EROFS))
    message, code = told(KeyError("x"))
    assert (code, "unexpected KeyError: 'x'" in message, "--debug" in message) == (1, True, True)


def test_libraries_say_it_in_words_of_their_own(tmp_path):
    """safetensors keeps the words and loses the number, torch's writer keeps neither but what came before."""
    assert out_of_space(RuntimeError("I/O error: No space left on device (os error 28)"))
    strange = RuntimeError("unexpected pos 704 vs 598")
    strange.__context__ = OSError(errno.ENOSPC, "No space left on device")
    assert out_of_space(strange)
    assert reason(strange, tmp_path).startswith(f"{tmp_path}: no space left")
    assert not out_of_space(RuntimeError("unexpected pos 704 vs 598"), tmp_path)
    assert reason(RuntimeError("unexpected pos"), tmp_path) == "unexpected pos"
    assert reason(CheckpointError("as it is")) == "as it is"


def test_a_full_file_system_is_seen_where_the_error_does_not_say_it(disk):
    lost = RuntimeError("unexpected pos 704 vs 598")  # on its way from another process it has lost its cause
    assert not out_of_space(lost, disk)
    ballast = fill(disk)
    assert out_of_space(lost, disk / "not" / "yet" / "there")
    assert not out_of_space(PermissionError(errno.EACCES, "Permission denied"), disk)
    ballast.unlink()


def test_a_storage_error_survives_the_way_out_of_a_process():
    with pytest.raises(StorageError) as caught, storing("a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.exit_code) == (StorageError, str(caught.value), 1)
    assert told(again) == (str(caught.value), 1)
