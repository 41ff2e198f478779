"""Which copy in memory a run goes on from, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from ctpo_megatron.batch import TrainBatch
from ctpo_megatron.config.load import dump_config
from ctpo_megatron.errors import CheckpointError, CopyLost, TrainerLost
from ctpo_megatron.loop.memory import MemoryCopies
from ctpo_megatron.loop.train import TrainLoop
from ctpo_megatron.record.events import Event, discard
from ctpo_megatron.record.memory_events import CopyGone, CopyKept, CopyLeftOut
from tests.support.checkpoints import state_after, write_checkpoint
from tests.support.loops import Ranks, Straggling, config, train


@dataclass(frozen=True)
class Kept:
    step: int
    size: int = 10
    stood_s: float = 0.5

    @property
    def scheduler_steps(self) -> int:
        return 2 * self.step


@dataclass
class Holding:
    """Holds copies that are numbers. `fails`: what the next call raises; `gone`: which copies are not whole any more."""

    fails: list[Exception] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    calls: list[tuple[str, int, int | None]] = field(default_factory=list)
    wait: asyncio.Event | None = None
    unheard: set[int] = field(default_factory=set)  # after which copies a keeper does not hear that the one before may go

    async def copy(self, step: int, stays: Kept | None) -> Kept:
        self.calls.append(("copy", step, None if stays is None else stays.step))
        if self.wait is not None:
            await self.wait.wait()
        if self.fails:
            raise self.fails.pop(0)
        return Kept(step)

    async def retain(self, copy: Kept) -> None:
        self.calls.append(("retain", copy.step, None))
        if copy.step in self.unheard:
            raise CopyLost("a keeper does not answer")

    def holds(self, copy: Kept) -> bool:
        return copy.step not in self.gone

    async def recall(self, copy: Kept) -> None:
        self.calls.append(("recall", copy.step, None))
        if self.fails:
            raise self.fails.pop(0)


def made(every: int = 1) -> tuple[MemoryCopies, Holding, list[Event]]:
    keepers, events = Holding(), []
    return MemoryCopies(keepers, every, {"seed": 1}, events.append), keepers, events


async def turn() -> None:
    """Let what is under way come to its end."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_newest_whole_copy_is_gone_on_from(tmp_path: Path) -> None:
    async def run() -> None:
        copies, keepers, events = made(every=2)
        for step in range(1, 6):
            copies.keep(state_after(step))
            await turn()
        assert keepers.calls == [("copy", 2, None), ("retain", 2, None), ("copy", 4, 2), ("retain", 4, None)]
        assert [(event.step, event.bytes, event.stood) for event in events if isinstance(event, CopyKept)] == [
            (2, 10, 0.5),
            (4, 10, 0.5),
        ]
        write_checkpoint(tmp_path, 3)
        for _ in range(2):  # it is there for another fault, too
            found = await copies.recall(tmp_path)
            assert found is not None
            assert (found.state, found.in_memory, found.where) == (state_after(4), True, "memory")
            assert (found.manifest, found.config) == ({"scheduler_steps": 8}, {"seed": 1})
        write_checkpoint(tmp_path, 4)
        assert await copies.recall(tmp_path) is not None, "it is as new, and nothing has to be read"

    asyncio.run(run())


def test_a_newer_checkpoint_is_read_instead(tmp_path: Path) -> None:
    async def run() -> None:
        copies, keepers, events = made()
        copies.keep(state_after(4))
        await turn()
        write_checkpoint(tmp_path, 5)
        assert await copies.recall(tmp_path) is None
        assert ("recall", 4, None) not in keepers.calls
        assert not [event for event in events if isinstance(event, CopyGone)]

    asyncio.run(run())


def test_a_copy_that_is_not_whole_is_not_used(tmp_path: Path) -> None:
    """It is broken off by the loss of the trainer; the one before is used."""

    async def run() -> None:
        copies, keepers, _ = made()
        copies.keep(state_after(1))
        await turn()
        keepers.wait = asyncio.Event()
        copies.keep(state_after(2))
        await turn()
        found = await copies.recall(tmp_path)
        assert found is not None
        assert found.state.step == 1

    asyncio.run(run())


def test_a_copy_that_is_wrong_is_told_and_not_tried_again(tmp_path: Path) -> None:
    async def run() -> None:
        copies, keepers, events = made()
        copies.keep(state_after(1))
        await turn()
        keepers.fails = [CopyLost("trainer rank 0: embeddings in the part of rank 1 is not what was handed over\nlog: somewhere")]
        assert await copies.recall(tmp_path) is None
        (told,) = [event for event in events if isinstance(event, CopyGone)]
        assert (told.step, told.left) == (1, None)
        assert told.reason.endswith("is not what was handed over")
        assert await copies.recall(tmp_path) is None
        assert keepers.calls.count(("recall", 1, None)) == 1

    asyncio.run(run())


def test_a_rank_that_is_lost_while_it_takes_the_copy_leads_to_the_checkpoint(tmp_path: Path) -> None:
    async def run() -> None:
        copies, keepers, _ = made()
        copies.keep(state_after(1))
        await turn()
        keepers.fails = [TrainerLost("a rank")]
        with pytest.raises(TrainerLost):
            await copies.recall(tmp_path)
        assert await copies.recall(tmp_path) is None

    asyncio.run(run())


@pytest.mark.parametrize(("gone", "left"), [(set(), 1), ({1}, None)])
def test_a_copy_that_does_not_come_about_leaves_the_one_before_where_that_is_whole(
    tmp_path: Path, gone: set[int], left: int | None
) -> None:
    async def run() -> None:
        copies, keepers, events = made()
        copies.keep(state_after(1))
        await turn()
        keepers.fails, keepers.gone = [CopyLost("a keeper is gone")], gone
        copies.keep(state_after(2))
        await turn()
        assert events[1:] == [CopyGone(2, "a keeper is gone", left)]
        copies.keep(state_after(3))
        await turn()
        assert ("copy", 3, left) in keepers.calls
        assert isinstance(events[-1], CopyKept)

    asyncio.run(run())


@pytest.mark.parametrize("gone", [set(), {1}])
def test_a_keeper_that_does_not_answer_in_the_end_takes_the_copy_with_it_only_where_it_is_lost(
    tmp_path: Path, gone: set[int]
) -> None:
    async def run() -> None:
        copies, keepers, events = made()
        keepers.unheard, keepers.gone = {1}, gone
        copies.keep(state_after(1))
        await turn()
        assert events == [CopyGone(1, "a keeper does not answer", None if gone else 1)]
        assert (await copies.recall(tmp_path) is None) == bool(gone)

    asyncio.run(run())


def test_a_copy_is_left_out_while_another_is_handed_over() -> None:
    async def run() -> None:
        copies, keepers, events = made()
        keepers.wait = asyncio.Event()
        for step in (1, 2, 3):
            copies.keep(state_after(step))
            await turn()
        assert events == [CopyLeftOut(2, 1), CopyLeftOut(3, 1)]
        keepers.wait.set()
        await turn()
        copies.keep(state_after(4))
        await turn()
        assert [step for name, step, _ in keepers.calls if name == "copy"] == [1, 4]

    asyncio.run(run())


def test_the_loss_of_the_trainer_is_left_to_others_and_faults_of_our_own_are_not() -> None:
    async def run() -> None:
        copies, keepers, events = made()
        keepers.fails = [TrainerLost("a rank")]
        copies.keep(state_after(1))
        await turn()
        assert events == []
        keepers.fails = [CheckpointError("cannot be taken from the model")]
        copies.keep(state_after(2))
        await turn()
        with pytest.raises(CheckpointError, match="cannot be taken"):
            copies.keep(state_after(3))

    asyncio.run(run())


def test_the_copy_knows_the_groups_that_are_open_and_the_ledger_balances_behind_it(tmp_path: Path) -> None:
    """The trainer is lost in the second step, which the first group had gone on into: it is trained on there, once."""
    sizes = config("train.prompts_per_step=2", "train.oversample=1", "train.steps=2", "eval.every=0", "checkpoint.every=0")

    class Lost(Ranks):
        async def update(self, batches: list[TrainBatch], version: int) -> dict[str, float]:
            await turn()
            if version == 1:
                raise TrainerLost("rank 0 died")
            return {}

    async def run() -> tuple[list[tuple[int, str]], TrainLoop]:
        copies = MemoryCopies(Holding(), 1, yaml.safe_load(dump_config(sizes)), discard)
        with pytest.raises(TrainerLost):
            await train(sizes, tmp_path, resume=False, rollouts=Straggling(), ranks=Lost(), memory=copies)
        found = await copies.recall(tmp_path / "checkpoints")
        assert found is not None
        assert (found.state.step, found.state.groups, [group.number for group in found.state.open]) == (1, 3, [0])
        seen, loop, _ = await train(sizes, tmp_path, resume=True, recalled=found, rollouts=Straggling(), unsaved=found.state)
        return seen, loop

    again, loop = asyncio.run(run())
    assert [group for _, group in again] == ["g00000000", "g00000003"]
    sums = loop.ledger.summary()
    assert (sums["admitted"], sums["open"], sums["unknown"]) == (4, 0, 0)
    assert sums["groups"] == {"trained": 4, "filtered": 0, "failed": 0, "aborted": 0}


def test_what_is_forgotten_is_not_gone_on_from(tmp_path: Path) -> None:
    async def run() -> None:
        copies, _, _ = made()
        copies.keep(state_after(1))
        await turn()
        copies.forget()
        assert await copies.recall(tmp_path) is None

    asyncio.run(run())


def test_nothing_is_left_under_way_when_the_run_ends() -> None:
    async def run() -> None:
        copies, keepers, _ = made()
        keepers.wait = asyncio.Event()

        async def work() -> int:
            copies.keep(state_after(1))
            await turn()
            return 5

        assert await copies.guarding(work()) == 5
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
