"""Staleness as admission slots: which groups may start when, and what a step takes."""

from __future__ import annotations

import asyncio

import pytest

from ctpo_megatron.loop.buffer import GroupBuffer
from ctpo_megatron.types import GroupId, Prompt, TrajectoryGroup


def group(index: int, step: int) -> TrajectoryGroup:
    return TrajectoryGroup(Prompt(index, ({"role": "user", "content": "x"},), "1"), [], step, id=GroupId(index))


async def admitted_now(buffer: GroupBuffer) -> list[int]:
    steps = []
    while True:
        try:
            step = await asyncio.wait_for(buffer.admit(), 0.01)
        except TimeoutError:
            return steps
        if step is None:
            return steps
        steps.append(step)


@pytest.mark.parametrize(
    ("staleness", "at_start", "after_first"), [(0, [0, 0], [1, 1]), (1, [0, 0, 1, 1], [2, 2]), (5, [0, 0, 1, 1, 2, 2], [])]
)
def test_admission_follows_versions(staleness, at_start, after_first):
    async def scenario():
        buffer = GroupBuffer(groups_per_step=2, staleness=staleness, first_step=0, last_step=3)
        assert await admitted_now(buffer) == at_start
        await buffer.published(1)
        assert await admitted_now(buffer) == after_first

    asyncio.run(scenario())


def test_resume_starts_at_its_step():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=1, staleness=0, first_step=7, last_step=9)
        assert await admitted_now(buffer) == [7]
        await buffer.published(8)
        assert await admitted_now(buffer) == [8]

    asyncio.run(scenario())


def test_take_waits_for_its_own_groups_in_prompt_order():
    async def scenario():
        buffer = GroupBuffer(groups_per_step=2, staleness=1, first_step=0, last_step=2)
        taking = asyncio.ensure_future(buffer.take(0))
        await buffer.put(group(9, 1))  # a later step's group is quick
        await buffer.put(group(5, 0))
        await asyncio.sleep(0.01)
        assert not taking.done()
        assert buffer.finished(0) == 1
        await buffer.put(group(2, 0))
        assert [g.prompt.index for g in await asyncio.wait_for(taking, 1)] == [2, 5]

    asyncio.run(scenario())
