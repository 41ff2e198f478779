"""When a run saves and waits for what it saved."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from ctpo_megatron.config.train import CheckpointConfig
from ctpo_megatron.errors import CheckpointError
from ctpo_megatron.loop.checkpoints import Checkpoints


class Disk:
    """A trainer whose saves are settled, or fail, when `done` is set."""

    def __init__(self, failure: str | None = None) -> None:
        self.done, self.failure, self.calls = asyncio.Event(), failure, []

    async def save(self, directory: Path, state: dict[str, Any], *, background: bool) -> None:
        self.calls.append((directory.name, state, background))

    async def settle(self) -> None:
        await self.done.wait()
        self.calls.append("settled")
        if self.failure:
            raise CheckpointError(self.failure)


def checkpoints(disk: Disk, root: Path) -> Checkpoints:
    return Checkpoints(disk, root, CheckpointConfig(), lambda step: {"step": step})


def test_one_save_at_a_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Disk()
        saves = checkpoints(disk, tmp_path)
        await saves.save(1)
        saves.check()  # still being written: training goes on
        second = asyncio.ensure_future(saves.save(2))
        await asyncio.sleep(0.01)
        assert disk.calls == [("step_00000001", {"step": 1}, True)]
        disk.done.set()
        await second
        assert disk.calls[1:3] == ["settled", ("step_00000002", {"step": 2}, True)]
        await saves.settle()
        await saves.settle()
        assert disk.calls.count("settled") == 2

    asyncio.run(scenario())


def test_a_failure_in_the_background_is_raised_before_the_next_step(tmp_path: Path) -> None:
    async def scenario() -> None:
        disk = Disk("disk full")
        saves = checkpoints(disk, tmp_path)
        await saves.save(1)
        saves.check()
        disk.done.set()
        await asyncio.sleep(0.01)
        with pytest.raises(CheckpointError, match="disk full"):
            saves.check()
        with pytest.raises(CheckpointError, match="disk full"):
            await saves.save(2)

    asyncio.run(scenario())


def test_a_cancelled_run_waits_for_what_it_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        disk = Disk()
        saves = checkpoints(disk, tmp_path)
        await saves.save(1)
        waiting = asyncio.ensure_future(saves.save(2))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        disk.done.set()
        await saves.abandon()
        assert disk.calls[-1] == "settled"
        assert "checkpoint of step 1 verified" in capsys.readouterr().out
        disk.failure = "no space"
        await saves.save(3)
        await saves.abandon()
        assert "no space" in capsys.readouterr().out

    asyncio.run(scenario())
