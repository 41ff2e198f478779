"""The journal: what was said comes back as it was, while the weights that said it are the run's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ctpo_megatron.record.events import Event, discard
from ctpo_megatron.record.run_events import JournalCut, JournalRead
from ctpo_megatron.record.segments import segments
from ctpo_megatron.record.storage import Storage
from ctpo_megatron.rollout.attempt import Attempt
from ctpo_megatron.rollout.journal import Journal
from ctpo_megatron.types import (
    AttemptId,
    Branch,
    Composition,
    End,
    FailedAttempt,
    Fate,
    Generation,
    GroupId,
    Prompt,
    Status,
    Supports,
    TopK,
    Trajectory,
    Turn,
)

PROMPT = Prompt(3, ({"role": "user", "content": "x"},), "1")
T = TypeVar("T")


def soon(work: Awaitable[T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 5))


def generation(tokens: int, version: int = 0) -> Generation:
    experts = np.arange(tokens * 4, dtype=np.int8).reshape(tokens, 2, 2)
    top = TopK(np.arange(tokens * 2, dtype=np.int32).reshape(tokens, 2), np.full((tokens, 2), -0.1, np.float32))
    supports = Supports(np.arange(tokens * 3, dtype=np.int32), np.full(tokens, 3, np.int32))
    return Generation(list(range(tokens)), [-0.1 * n for n in range(tokens)], [version] * tokens, "stop", top, experts, supports)


def whole(group: int, number: int = 0, version: int = 0, prompt_ids: tuple[int, ...] = (7, 8)) -> Trajectory:
    turns = [Turn("assistant", [1, 2], [-0.25, -0.5], [version] * 2)]
    return Trajectory(3, list(prompt_ids), turns, Status.FINISHED, "text", 1.0, id=AttemptId(GroupId(group), number))


def same(one: Attempt | Trajectory | None, other: Attempt | Trajectory) -> bool:
    return repr(one) == repr(other)  # arrays have no truth


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6), st.integers(0, 3))
def test_an_attempt_comes_back_wherever_it_was_interrupted(
    tmp_path_factory: pytest.TempPathFactory, steps: list, left: int
) -> None:
    """Turns are noted one by one, over several processes; the last of them is in the middle of a turn."""
    directory = tmp_path_factory.mktemp("journal")
    attempt = Attempt(AttemptId(GroupId(5), 1), 3, [7, 8])
    journal = Journal(directory, "r")
    for version in range(3):
        journal.published(version, f"w{version}")
    for tokens, ends, version in steps:
        attempt.close_turn(generation(tokens, version))
        attempt.add_tool_turn([4] * tokens, "said")
        attempt.tool_calls += 1
        journal.note(attempt)
        if ends:
            journal.close()
            journal = Journal(directory, "r", step=3)
            attempt = soon(journal.find(attempt.id, PROMPT, [7, 8]))
    attempt.open = generation(left) if left else None
    journal.note(attempt)
    begun = Attempt(AttemptId(GroupId(6), 0), 3, [7, 8], open=generation(1))  # no turn of it is complete
    journal.note(begun)
    again = Journal(directory, "r", step=3)
    assert same(soon(again.find(attempt.id, PROMPT, [7, 8])), attempt)
    assert again.count() == (0, 2)
    assert same(soon(again.find(begun.id, PROMPT, [7, 8])), begun)
    again.note(replace(whole(5, 1), seconds=3.5))
    assert same(soon(Journal(directory, "r", step=3).find(attempt.id, PROMPT, [7, 8])), replace(whole(5, 1), seconds=3.5))


def test_later_weights_are_waited_for_and_compared(tmp_path: Path) -> None:
    """A run that goes back to version 1 trains version 2 again: what 2 had sampled is good if it is the same 2."""

    async def asked(digest: str) -> list[bool]:
        journal = Journal(tmp_path, "r", step=1)
        journal.published(1, "one")
        assert await journal.find(AttemptId(GroupId(0), 1), PROMPT, [7, 8]) is not None
        waiting = asyncio.ensure_future(journal.find(AttemptId(GroupId(0), 2), PROMPT, [7, 8]))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        journal.published(2, digest)
        return [await waiting is not None]

    journal = Journal(tmp_path, "r")
    for version, digest in enumerate(["zero", "one", "two"]):
        journal.published(version, digest)
        journal.decided(Composition(version, (version,), {version: Fate(version, End.TRAINED, "", "p")}))
    journal.note(whole(0, 1, version=1))
    journal.note(whole(0, 2, version=2))
    journal.close()
    assert soon(asked("two")) == [True]
    assert soon(asked("another two")) == [False]


def test_weights_are_waited_for_no_more_once_a_step_before_them_is_made_otherwise(tmp_path: Path) -> None:
    async def scenario() -> bool:
        journal = Journal(tmp_path, "r", step=1)
        journal.published(1, "one")
        waiting = asyncio.ensure_future(journal.find(AttemptId(GroupId(0), 3), PROMPT, [7, 8]))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        journal.decided(made(1, 9))
        return await asyncio.wait_for(waiting, 5) is None

    def made(step: int, group: int) -> Composition:
        return Composition(step, (group,), {group: Fate(step, End.TRAINED, "", "p")})

    journal = Journal(tmp_path, "r")
    for version in range(4):
        journal.published(version, "one" if version == 1 else f"w{version}")
        journal.decided(made(version, version))
    journal.note(whole(0, 3, version=3))
    journal.close()
    assert soon(scenario())


def test_weights_that_will_not_be_made_again_are_not_waited_for(tmp_path: Path) -> None:
    """The groups of a step are others now: a step must not wait for an attempt that waits for the weights behind it."""

    async def scenario() -> tuple[bool, bool]:
        journal = Journal(tmp_path, "r", step=1)
        journal.published(1, "one")
        unplanned = await journal.find(AttemptId(GroupId(0), 3), PROMPT, [7, 8])
        waiting = asyncio.ensure_future(journal.find(AttemptId(GroupId(0), 2), PROMPT, [7, 8]))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        journal.drop_plans(1)
        return unplanned is None, await waiting is None

    journal = Journal(tmp_path, "r")
    for version in range(4):
        journal.published(version, f"w{version}" if version != 1 else "one")
    journal.decided(Composition(1, (5,), {5: Fate(1, End.TRAINED, "", "p")}))
    journal.note(whole(0, 2, version=2))
    journal.note(whole(0, 3, version=3))
    journal.close()
    assert soon(scenario()) == (True, True)


@pytest.mark.parametrize(
    ("recipe", "index", "ids", "digest"),
    [("other", 3, [7, 8], "w"), ("r", 4, [7, 8], "w"), ("r", 3, [7, 9], "w"), ("r", 3, [7, 8], "other")],
)
def test_what_was_made_otherwise_is_not_used(tmp_path: Path, recipe: str, index: int, ids: list[int], digest: str) -> None:
    journal = Journal(tmp_path, "r")
    journal.published(0, "w")
    journal.note(whole(0))
    again = Journal(tmp_path, recipe)
    again.published(0, digest)
    assert soon(again.find(AttemptId(GroupId(0), 0), replace(PROMPT, index=index), ids)) is None
    right = Journal(tmp_path, "r")
    right.published(0, "w")
    assert soon(right.find(AttemptId(GroupId(0), 0), PROMPT, [7, 8])) is not None


def test_each_benchmark_has_a_recipe_of_its_own(tmp_path: Path) -> None:
    names = {name: AttemptId(GroupId(0, evaluation=0, benchmark=name), 0) for name in ("", "aime", "brumo")}
    names["training"] = AttemptId(GroupId(0), 0)

    def opened(**recipes: str) -> Journal:
        journal = Journal(tmp_path, "r", recipes={"": "h", **recipes})
        journal.published(0, "w")
        return journal

    first = opened(aime="a", brumo="b")
    for each in names.values():
        first.note(replace(whole(0), id=each))
    again = opened(aime="a", brumo="changed")
    found = {name: soon(again.find(each, PROMPT, [7, 8])) is not None for name, each in names.items()}
    assert found == {"": True, "aime": True, "brumo": False, "training": True}


@given(st.integers(1, 200), st.binary(max_size=30))
def test_a_torn_end_costs_the_last_record_only(tmp_path_factory: pytest.TempPathFactory, lost: int, garbage: bytes) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory, "r")
    journal.published(0, "w")
    for number in range(3):
        journal.note(whole(0, number))
    journal.close()
    (path,) = segments(directory)
    data = path.read_bytes()
    size = (len(data) - data.rindex(b"text")) + 100  # more than the last record's end, less than all of it
    torn = data[: -min(lost, size)] + garbage
    assume(not torn.startswith(data))  # the garbage may be what was lost: the record's last byte is its attempt's number
    path.write_bytes(torn)
    events: list[Event] = []
    again = Journal(directory, "r", emit=events.append)
    again.published(0, "w")
    kept = [soon(again.find(AttemptId(GroupId(0), number), PROMPT, [7, 8])) is not None for number in range(3)]
    assert kept == [True, True, False]
    assert [type(event) for event in events] == [JournalCut, JournalRead]
    events.clear()
    Journal(directory, "r", emit=events.append)
    assert [type(event) for event in events] == [JournalRead]  # cut once


def test_a_flipped_bit_ends_what_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r")
    journal.published(0, "w")
    for number in range(3):
        journal.note(whole(0, number))
    (path,) = segments(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert Journal(tmp_path, "r", emit=discard).count()[0] < 3


def test_only_what_a_checkpoint_may_need_stays(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r")
    for step in range(4):
        journal.published(step, f"w{step}")
        journal.note(whole(2 * step, version=step))
        journal.note(whole(2 * step + 1, version=step))
        journal.note(replace(whole(0), id=AttemptId(GroupId(0, evaluation=step), 0)))
        if step:
            journal.forget(2 * step, step)
    assert len(segments(tmp_path)) == 2
    journal.close()
    again = Journal(tmp_path, "r", step=4)
    assert again.count() == (3, 0)
    assert soon(again.find(AttemptId(GroupId(6), 0), PROMPT, [7, 8])) is not None


def test_a_version_that_nothing_is_known_of_is_not_waited_for(tmp_path: Path) -> None:
    """The run is past it: it will not be published again."""
    journal = Journal(tmp_path, "r")
    journal.published(0, "w")
    journal.note(whole(0))
    again = Journal(tmp_path, "r", step=0)
    again.published(5, "five")
    assert soon(again.find(AttemptId(GroupId(0), 0), PROMPT, [7, 8])) is None


def test_a_journal_whose_disk_is_away_for_a_while_forgets_and_keeps_what_it_should(tmp_path: Path) -> None:
    """Meanwhile attempts end and are synced, a checkpoint is kept, so a segment begins, and one is looked for."""
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()

    async def scenario() -> None:
        storage = Storage(run, 5.0, retry_s=0.02)
        async with storage.outlasting(discard):
            journal = Journal(run / "journal", "r", storage=storage)
            journal.published(0, "w")
            journal.note(whole(0))
            run.rename(away)
            journal.note(whole(1))
            await journal.sync()
            journal.forget(1, 1)
            journal.note(whole(2))
            await journal.sync()
            looking = asyncio.ensure_future(journal.find(AttemptId(GroupId(1), 0), PROMPT, [7, 8]))
            await asyncio.sleep(0.1)
            assert not looking.done()
            away.rename(run)
            await storage.clear()
            assert same(await looking, whole(1))
            journal.forget(2, 1)
            journal.close()

    soon(scenario())
    assert [path.name for path in segments(run / "journal")] == ["00000002.journal", "00000003.journal"]
    again = Journal(run / "journal", "r")
    again.published(0, "w")
    assert same(soon(again.find(AttemptId(GroupId(2), 0), PROMPT, [7, 8])), whole(2))
    assert again.count() == (1, 0)


def test_how_steps_were_made_comes_back_while_the_weights_are_the_same(tmp_path: Path) -> None:
    def composition(step: int, *groups: int) -> Composition:
        fates = {each: Fate(step, End.TRAINED, "", "p") for each in groups}
        lost = FailedAttempt(AttemptId(GroupId(9 + step), 0), "gone", response_length=4)
        return Composition(step, groups, fates | {9 + step: Fate(step, End.FAILED, "gone", "p", (lost,))})

    journal = Journal(tmp_path, "r")
    for step, weights in enumerate(["zero", "one", "two"]):
        journal.published(step, weights)
        journal.decided(composition(step, 2 * step, 2 * step + 1))
    journal.close()
    again = Journal(tmp_path, "r", step=1)
    assert [again.planned(step) for step in range(4)] == [*(composition(s, 2 * s, 2 * s + 1) for s in range(3)), None]
    assert again.fate(11) == composition(2, 4, 5).fates[11]
    assert again.fate(3) == Fate(1, End.TRAINED, "", "p")
    again.published(1, "one")
    assert again.planned(2) is not None
    again.published(2, "another two")
    assert (again.planned(1), again.planned(2), again.fate(11)) == (composition(1, 2, 3), None, None)
    again.decided(composition(2, 5, 6))
    again.close()
    newest = Journal(tmp_path, "r", step=1)
    assert newest.planned(2) == composition(2, 5, 6), "the newest counts, the one of other weights does not"
    assert Journal(tmp_path, "other").planned(1) is None, "its attempts are not used either"
    newest.forget(100, 2)
    kept = Journal(tmp_path, "r", step=2)
    assert (kept.planned(2), newest.planned(1)) == (composition(2, 5, 6), None)


def test_branches_come_back_and_their_versions_count(tmp_path: Path) -> None:
    made = whole(0)
    made.branches = [Branch([7], [Turn("assistant", [3], [-1.0], [1])], np.zeros((1, 2, 2), np.int8))]
    journal = Journal(tmp_path, "r")
    for version in range(2):
        journal.published(version, f"w{version}")
    journal.note(made)
    journal.close()
    assert same(soon(Journal(tmp_path, "r", step=2).find(made.id, PROMPT, [7, 8])), made)
    other = Journal(tmp_path, "r", step=1)
    other.published(1, "another")
    assert soon(other.find(made.id, PROMPT, [7, 8])) is None
