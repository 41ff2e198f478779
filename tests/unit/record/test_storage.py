"""A storage that is at fault for a while: nothing written meanwhile is lost, doubled or torn, and the wait has an end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from ctpo_megatron.errors import CheckpointUnwritten, StorageError, mendable, storing
from ctpo_megatron.record.events import Event, EventLog, RunReady
from ctpo_megatron.record.files import GrowingFile
from ctpo_megatron.record.storage import MARK, Storage
from ctpo_megatron.record.storage_events import StorageFault, StorageGivenUp, StorageMended
from tests.support.disks import fill, read_only, small_disk
from tests.support.record_writers import board, events, journal, metrics, rollouts

RETRY_S = 0.02


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 256) as disk:
        (disk / MARK).touch()
        yield disk


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MARK).touch()
    return tmp_path / "run"


def patient(run: Path, wait_s: float = 20.0, stop_s: float = 0.1) -> Storage:
    return Storage(run, wait_s, stop_s, retry_s=RETRY_S)


def soon(work: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("make", [metrics, events, board, journal, rollouts])
@pytest.mark.parametrize("room", [4096, 0])
def test_what_a_full_disk_did_not_take_is_written_once_when_there_is_room(disk: Path, make, room: int) -> None:
    async def scenario() -> None:
        heard: list[Event] = []
        storage = patient(disk)
        async with storage.outlasting(heard.append):
            write, read = make(disk, storage.write)
            write(1)
            ballast, last = fill(disk, leave=room), 1
            while storage.held < 5:
                last += 1
                write(last)
            await asyncio.sleep(3 * RETRY_S)
            assert storage.held >= 5
            ballast.unlink()
            write(last + 1)  # comes behind what is held
            await storage.clear()
            assert storage.held == 0
            write(last + 2)
            assert read() == list(range(1, last + 3))
        fault, mended = heard
        assert isinstance(fault, StorageFault)
        assert "no space left on the file system" in fault.sentence
        assert isinstance(mended, StorageMended)
        assert mended.writes >= 5

    soon(scenario())


@pytest.mark.parametrize("make", [metrics, events, board, journal, rollouts])
def test_a_directory_that_is_away_is_waited_for_and_nothing_is_made_in_its_place(run: Path, make) -> None:
    async def scenario() -> None:
        storage, heard, away = patient(run), [], run.with_name("away")
        async with storage.outlasting(heard.append):
            write, read = make(run, storage.write)
            write(1)
            run.rename(away)
            for number in range(2, 40):
                write(number)
            ticks, waiting = 0, asyncio.ensure_future(storage.clear())
            for _ in range(10):
                await asyncio.sleep(RETRY_S)
                ticks += 1
            assert not run.exists()
            run.mkdir()  # as of a file system that is not mounted
            await asyncio.sleep(3 * RETRY_S)
            assert list(run.iterdir()) == []
            assert (ticks, waiting.done()) == (10, False)
            assert storage.held >= 38
            run.rmdir()
            away.rename(run)
            await waiting
            write(40)
            assert read() == list(range(1, 41))
        assert [type(event) for event in heard] == [StorageFault, StorageMended]

    soon(scenario())


def test_a_directory_that_comes_back_as_another_is_the_run_s_own(run: Path) -> None:
    """As from a backup, or from a file server under a new number: open files are those of before, and are opened again."""

    async def scenario() -> None:
        storage, away = patient(run), run.with_name("away")
        async with storage.outlasting(lambda _event: None):
            write, read = metrics(run, storage.write)
            write(1)
            run.rename(away)
            write(2)
            shutil.copytree(away, run)
            await storage.clear()
            write(3)
            assert read() == [1, 2, 3]
        assert len((away / "metrics.jsonl").read_text().splitlines()) == 1

    soon(scenario())


def test_a_read_only_disk_is_waited_for(disk: Path) -> None:
    async def scenario() -> None:
        storage, heard = patient(disk), []
        async with storage.outlasting(heard.append):
            write, read = rollouts(disk, storage.write)
            write(1)
            with read_only(disk):
                write(2)
                await asyncio.sleep(3 * RETRY_S)
                assert storage.held == 1
            await storage.clear()
            assert read() == [1, 2]
        assert "its file system is read-only" in heard[0].sentence

    soon(scenario())


def test_events_of_a_fault_are_written_when_it_is_mended_with_the_time_that_it_had(disk: Path) -> None:
    async def scenario() -> None:
        storage = patient(disk)
        log = EventLog(disk / "events.jsonl", through=storage.write)
        async with storage.outlasting(log):
            log(RunReady(1.0))
            ballast = fill(disk)
            for _ in range(80):
                log(RunReady(2.0))
            await asyncio.sleep(0.3)
            ballast.unlink()
            await until(lambda: storage.held == 0)
            await storage.clear()
            log(RunReady(3.0))
        lines = [json.loads(line) for line in (disk / "events.jsonl").read_text().splitlines()]
        names = [line["event"] for line in lines]
        assert [names.count(name) for name in ("storage fault", "storage mended", "ready")] == [1, 1, 82]
        began, ended = names.index("storage fault"), names.index("storage mended")
        assert lines[ended]["time"] - lines[began]["time"] >= 0.25
        assert lines[ended]["seconds"] >= 0.25
        assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)

    soon(scenario())


@pytest.mark.parametrize("stopped", [True, False])
def test_the_wait_has_an_end_and_says_what_is_lost(run: Path, stopped: bool) -> None:
    """The time that a run waits, or the shorter one after it was asked to stop."""

    async def scenario() -> None:
        storage, heard = patient(run, *((60.0, 0.1) if stopped else (0.1, 60.0))), []
        file = GrowingFile(run / "a.txt", storage.write)
        begun = time.monotonic()

        async def body() -> None:
            async with storage.outlasting(heard.append):
                file.append_line("1")
                run.rename(run.with_name("away"))
                file.append_line("2")
                file.append_line("3")
                asyncio.get_running_loop().call_later(0.05, storage.stop if stopped else lambda: None)
                await storage.clear()

        with pytest.raises(StorageError, match="no such file or directory"):
            await body()
        assert time.monotonic() - begun < 5
        assert [type(event) for event in heard] == [StorageFault, StorageGivenUp]
        assert "2 writes that were held back are lost" in heard[-1].sentence
        assert (run.with_name("away") / "a.txt").read_text() == "1\n"

    soon(scenario())


def test_a_run_that_ends_for_another_reason_keeps_it_and_writes_what_it_can(run: Path) -> None:
    async def scenario(back: bool) -> list[type]:
        storage, heard, away = patient(run), [], run.with_name("away")
        file = GrowingFile(run / "a.txt", storage.write)

        async def body() -> None:
            async with storage.outlasting(heard.append):
                run.rename(away)
                file.append_line("held")
                if back:
                    away.rename(run)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await body()
        if not back:
            with pytest.raises(StorageError, match="no such file"):
                file.append_line("afterwards")
        return [type(event) for event in heard]

    assert asyncio.run(scenario(back=True)) == [StorageFault, StorageMended]
    assert (run / "a.txt").read_text() == "held\n"
    assert asyncio.run(scenario(back=False)) == [StorageFault, StorageGivenUp]
    assert not run.exists()


def test_what_nobody_can_mend_and_a_storage_that_is_not_patient_fail_at_once(run: Path) -> None:
    async def scenario() -> None:
        storage, never = patient(run), patient(run, wait_s=0.0)
        nowhere = run / "not" / "there" / "a.txt"
        async with storage.outlasting(lambda _event: None), never.outlasting(lambda _event: None):
            with pytest.raises(StorageError, match="file name too long"):
                GrowingFile(run / ("n" * 300), storage.write).append_line("x")
            with pytest.raises(StorageError, match="no such file"):
                GrowingFile(nowhere, never.write).append_line("x")
        with pytest.raises(StorageError, match="no such file"):  # it was left
            GrowingFile(nowhere, storage.write).append_line("x")

    soon(scenario())


def test_a_held_write_that_nobody_can_mend_is_not_forgotten(run: Path) -> None:
    async def scenario() -> None:
        storage, away = patient(run), run.with_name("away")
        async with storage.outlasting(lambda _event: None):
            run.rename(away)
            GrowingFile(run / ("n" * 300), storage.write).append_line("x")
            GrowingFile(run / "a.txt", storage.write).append_line("y")
            away.rename(run)
            with pytest.raises(StorageError, match="file name too long"):
                await storage.clear()
            await until(lambda: storage.held == 0)
            assert (run / "a.txt").read_text() == "y\n"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        soon(scenario())


def test_what_has_an_answer_is_tried_until_it_has_one(run: Path) -> None:
    async def scenario() -> None:
        storage, heard, tries = patient(run), [], 0

        async def work() -> str:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise CheckpointUnwritten("no space left")
            return "done"

        async with storage.outlasting(heard.append):
            working = asyncio.ensure_future(storage.patiently(work))
            await until(lambda: tries == 2)
            GrowingFile(run / "a.txt", storage.write).append_line("small things fit")
            assert (run / "a.txt").exists()
            assert await working == "done"
            assert [type(event) for event in heard] == [StorageFault, StorageMended]
            tries = -1000
            storage.stop()
            with pytest.raises(CheckpointUnwritten):
                await storage.patiently(work)
            await storage.clear()  # nothing is held, and the directory is there
        assert [type(event) for event in heard] == [StorageFault, StorageMended, StorageFault]

    soon(scenario())


def test_what_pauses_for_long_goes_on_when_small_records_are_taken_again(disk: Path) -> None:
    async def scenario() -> float:
        storage, tries, file = patient(disk), 0, GrowingFile(disk / "a.txt")

        async def work() -> float:
            nonlocal tries
            tries += 1
            file.append(bytes(8192))
            return time.monotonic()

        async with storage.outlasting(lambda _event: None):
            ballast = fill(disk)
            GrowingFile(disk / "b.txt", storage.write).append_line("held")
            working = asyncio.ensure_future(storage.patiently(work))
            await until(lambda: tries == 7)  # the next pause is 1.3 s
            freed = time.monotonic()
            ballast.unlink()
            return await working - freed

    assert asyncio.run(asyncio.wait_for(scenario(), 20)) < 1.0


def test_a_half_record_that_cannot_be_taken_back_at_once_is_taken_back_first(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills in the middle of a record, and then does not even answer; the file is opened again for the rest."""

    def dead(_descriptor: int, _size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = GrowingFile(disk / "a.txt")
    file.append_line("whole")
    ballast = fill(disk, leave=4096)
    with pytest.raises(StorageError):
        file.append_line("x" * 20_000)
    assert (disk / "a.txt").read_text() == "whole\n"
    with monkeypatch.context() as broken:
        broken.setattr(os, "ftruncate", dead)
        with pytest.raises(StorageError):
            file.append_line("x" * 20_000)
    assert (disk / "a.txt").stat().st_size > len("whole\n"), "nothing was torn"
    ballast.unlink()
    file.close()
    file.append_line("next")
    assert (disk / "a.txt").read_text() == "whole\nnext\n"


MENDABLE = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.ESTALE, errno.EIO, errno.EACCES, errno.EKEYEXPIRED]


@pytest.mark.parametrize("number", MENDABLE)
def test_faults_that_somebody_can_mend(number: int) -> None:
    with pytest.raises(StorageError) as caught, storing("a.txt"):
        raise OSError(number, os.strerror(number))
    assert caught.value.mendable
    assert mendable(RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"))
    assert not mendable(RuntimeError("stale: its weights are those of step 3"))
    assert not mendable(OSError(errno.ENAMETOOLONG, "File name too long"))
