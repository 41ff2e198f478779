"""When the journal writes what it was told: together and soon, and at once where somebody relies on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest

from ctpo_megatron.errors import StorageError
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.files import GrowingFile
from ctpo_megatron.record.segments import read_segment, segments
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.record.storage_events import StorageFault, StorageMended
from ctpo_megatron.rollout import journal as module
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.types import AttemptId, Composition, End, Fate, Generation, GroupId, Status
from tests.support.disks import fill, small_disk
from tests.unit.rollout.test_journal import PROMPT, generation, same, soon, whole

STEP = Composition(0, (0,), {0: Fate(0, End.TRAINED, "", "p")})


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is noted is not written before the test ends, unless somebody asks for it."""
    monkeypatch.setattr(module, "GATHER_S", 60.0)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all that is added to files, one entry a write."""
    sizes: list[int] = []
    append = GrowingFile.append

    def counted(file: GrowingFile, record: bytes) -> None:
        sizes.append(len(record))
        append(file, record)

    monkeypatch.setattr(GrowingFile, "append", counted)
    return sizes


def on_disk(directory: Path) -> list[str]:
    """What the records say, in the order of the files: an attempt's number in its group, `w` of weights, `c` of a composition."""
    found = []
    for path in segments(directory):
        for _, payload in read_segment(path):
            record = msgspec.msgpack.decode(payload)
            kept = record["trajectory"] or record["attempt"]
            found.append("c" if record["composition"] else "w" if kept is None else str(kept["id"]["number"]))
    return found


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def test_what_is_noted_within_a_moment_is_one_write_in_its_order(tmp_path: Path, writes: list[int]) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path, "r")
        journal.published(0, "w")
        for burst in range(2):
            for number in range(5):
                journal.note(whole(0, 5 * burst + number))
            assert on_disk(tmp_path) == ["w", *map(str, range(5 * burst))]
            assert len(writes) == 1 + burst
            await until(lambda: len(writes) == 2 + burst)  # noqa: B023 - nobody asks for it
            assert on_disk(tmp_path) == ["w", *map(str, range(5 * burst + 5))]
        assert sum(writes) == segments(tmp_path)[0].stat().st_size

    soon(scenario())


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("asks", "more"),
    [
        (lambda journal: journal.published(1, "v"), ["w"]),
        (lambda journal: journal.decided(STEP), ["c"]),
        (lambda journal: journal.go_back(0), []),
        (lambda journal: journal.close(), []),
        (lambda journal: journal.sync(), []),
        (lambda journal: journal.find(AttemptId(GroupId(5), 0), PROMPT, [7, 8]), []),  # of which nothing is known
        (lambda journal: journal.forget(0, 0), ["w"]),
    ],
    ids=["published", "decided", "go_back", "close", "sync", "find", "forget"],
)
def test_whoever_relies_on_it_has_it_written_first(
    tmp_path: Path, asks: Callable[[Journal], Awaitable[None] | None], more: list[str]
) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path, "r")
        journal.published(0, "w")
        for number in range(3):
            journal.note(whole(0, number))
        assert on_disk(tmp_path) == ["w"]
        if (work := asks(journal)) is not None:
            await work
        assert on_disk(tmp_path) == ["w", "0", "1", "2", *more]

    soon(scenario())


@pytest.mark.usefixtures("late")
def test_what_is_not_written_yet_is_found_as_it_was_when_it_was_noted(tmp_path: Path) -> None:
    async def scenario() -> None:
        journal = Journal(tmp_path, "r")
        journal.published(0, "w")
        attempt = Attempt(AttemptId(GroupId(0), 0), 3, [7, 8])
        attempt.close_turn(generation(3))
        attempt.add_tool_turn([4], "said")
        journal.note(attempt)
        first = attempt.copy()
        attempt.open = generation(2)
        journal.note(attempt)
        attempt.open.append(generation(2))
        journal.note(whole(0, 1))
        assert same(await journal.find(AttemptId(GroupId(0), 1), PROMPT, [7, 8]), whole(0, 1))
        noted = await journal.find(attempt.id, PROMPT, [7, 8])
        assert isinstance(noted, Attempt)
        assert noted.open is not None
        assert (noted.open.token_ids, noted.open.rollout_logp, noted.open.versions) == ([0, 1], [-0.0, -0.1], [0, 0])
        journal.note(attempt)
        attempt.close_turn(generation(4))
        attempt.add_tool_turn([4], "more")
        attempt.tool_calls += 1
        noted = await journal.find(attempt.id, PROMPT, [7, 8])
        assert isinstance(noted, Attempt)
        assert (len(noted.turns), noted.outputs, noted.tool_calls, len(noted.routed_experts)) == (2, ["said"], 0, 1)
        assert noted.open is not None
        assert noted.open.token_ids == [0, 1, 0, 1]
        assert same(first.turns[0], noted.turns[0])

    soon(scenario())


def test_a_copy_of_an_attempt_has_all_that_it_holds() -> None:
    attempt = Attempt(AttemptId(GroupId(2), 1), 3, [7, 8], finish="length", status=Status.FINISHED, tool_calls=2, tool_errors=1)
    attempt.open_with([7, 8, 9])
    attempt.seconds = 2.5
    attempt.close_turn(generation(3))
    attempt.add_tool_turn([4], "said")
    attempt.finish = "length"
    attempt.open = generation(2, version=1)
    attempt.open.finish = "abort"
    begun = Attempt(attempt.id, 0, [])
    for full, empty in ((attempt, begun), (attempt.open, Generation())):
        alike = [each.name for each in fields(empty) if repr(getattr(full, each.name)) == repr(getattr(empty, each.name))]
        assert set(alike) <= {"id", "working_since"}, "nothing would be seen of a copy without it"
    assert same(attempt.copy(), attempt)


@pytest.mark.usefixtures("late")
def test_an_attempt_has_the_weights_of_its_time_though_it_is_written_later(tmp_path: Path) -> None:
    """Back at step 1, the run makes another version 1: what the former one had sampled is not its own."""

    async def scenario() -> None:
        journal = Journal(tmp_path, "r")
        for version, digest in enumerate(["zero", "one"]):
            journal.published(version, digest)
        journal.note(whole(0, 0, version=0))
        journal.note(whole(0, 1, version=1))
        journal.go_back(1)
        journal.published(1, "another one")
        assert await journal.find(AttemptId(GroupId(0), 0), PROMPT, [7, 8]) is not None
        assert await journal.find(AttemptId(GroupId(0), 1), PROMPT, [7, 8]) is None

    soon(scenario())


@pytest.mark.usefixtures("late")
def test_a_sync_covers_what_was_noted_before_also_in_a_segment_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = GrowingFile.sync

    def seen(file: GrowingFile) -> None:
        synced.append(f"{file._path.name}: {on_disk(tmp_path)}")
        sync(file)

    monkeypatch.setattr(GrowingFile, "sync", seen)

    async def scenario() -> None:
        journal = Journal(tmp_path, "r")
        await journal.sync()
        assert synced == [], "there is nothing yet"
        journal.published(0, "w")
        journal.note(whole(1, 0))
        journal.forget(1, 1)
        journal.note(whole(1, 1))
        await journal.sync()
        after = ["w", "0", "w", "1"]
        assert synced == [f"00000001.journal: {after}", f"00000002.journal: {after}"]
        journal.note(whole(1, 2))
        await journal.sync()
        assert synced[2:] == [f"00000002.journal: {[*after, '2']}"]

    soon(scenario())


def test_a_disk_that_is_full_when_the_moment_is_over_is_waited_for(tmp_path: Path) -> None:
    heard: list[Event] = []

    async def scenario(run: Path) -> None:
        storage = Storage(run, 20.0, retry_s=0.02)
        async with storage.outlasting(heard.append):
            journal = Journal(run / "journal", "r", storage=storage)
            journal.published(0, "w")
            ballast = fill(run)
            for number in range(200):  # more than what is left of the file's last block
                journal.note(whole(0, number))
            assert heard == []
            await until(lambda: storage.held > 0)
            journal.note(whole(0, 200))
            await journal.sync()
            looking = asyncio.ensure_future(journal.find(AttemptId(GroupId(0), 7), PROMPT, [7, 8]))
            await asyncio.sleep(0.1)
            assert not looking.done()
            ballast.unlink()
            assert same(await looking, whole(0, 7))
            journal.note(whole(0, 201))
            journal.close()
            assert on_disk(run / "journal") == ["w", *map(str, range(202))]

    with small_disk(tmp_path / "disk", 256) as disk:
        soon(scenario(disk))
    assert [type(event) for event in heard] == [StorageFault, StorageMended]


@pytest.mark.parametrize("patient", [True, False])
def test_a_fault_that_is_not_waited_for_reaches_whoever_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: bool
) -> None:
    """At the latest the group that waits for its attempts to be on disk; nothing is lost if it is mended by then."""
    run, away, broken = tmp_path / "run", tmp_path / "away", list[bool]()
    run.mkdir()
    append = GrowingFile._append

    def unmendable(file: GrowingFile, record: bytes) -> None:
        if any(broken):
            raise StorageError("file name too long")
        append(file, record)

    monkeypatch.setattr(GrowingFile, "_append", unmendable)

    async def scenario() -> None:
        storage = Storage(run, 5.0 if patient else 0.0, retry_s=0.02)
        async with storage.outlasting(lambda _event: None):
            journal = Journal(run / "journal", "r", storage=storage)
            journal.published(0, "w")
            if not patient:
                run.rename(away)
            broken.append(patient)
            journal.note(whole(0, 0))
            await asyncio.sleep(3 * module.GATHER_S)
            with pytest.raises(StorageError):
                await journal.sync()
            for number in (1, 2):
                with pytest.raises(StorageError):
                    journal.note(whole(0, number))
            with pytest.raises(StorageError):
                journal.close()
            assert storage.held == 0
            broken.clear()
            if not patient:
                away.rename(run)
            journal.note(whole(0, 3))
            assert on_disk(run / "journal") == ["w", "0", "1", "2", "3"]
            assert same(await journal.find(AttemptId(GroupId(0), 1), PROMPT, [7, 8]), whole(0, 1))
            journal.close()

    soon(scenario())


def test_what_cannot_be_encoded_is_told_and_not_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
        journal = Journal(tmp_path, "r")
        journal.note(whole(0, 0))
        journal.note(replace(whole(0, 1), text=object()))
        await asyncio.sleep(3 * module.GATHER_S)
        for _ in range(2):
            with pytest.raises(NotImplementedError, match="object cannot be kept"):
                await journal.sync()

    soon(scenario())
