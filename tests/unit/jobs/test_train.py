"""How `ctpo train` ends where its trainer has no place any more. The integration tests have the rest, on real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctpo_megatron.config import RunConfig
from ctpo_megatron.errors import NoRoom, StoppedInOrder, TrainerLost
from ctpo_megatron.jobs.train import _Run
from ctpo_megatron.loop.alarms import Hearing
from ctpo_megatron.loop.orders import Orders
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.run_events import RunStopped


class Gone:
    """A runtime whose trainer is lost in training, and then finds no room."""

    async def guard(self, work: Coroutine[Any, Any, Any], rescue: Callable[[], Awaitable[Any]] | None = None) -> Any:
        work.close()
        raise TrainerLost("trainer rank 1 died")

    async def restart_trainer(self) -> None:
        raise NoRoom("no room for the run's processes after 9 s")


class Nothing:
    """A disk at ease, without a checkpoint."""

    async def patiently(self, work: Callable[[], Awaitable[Any]]) -> Any:
        return await work()

    async def clear(self) -> None: ...


def test_a_trainer_without_a_place_ends_the_run_so_that_a_job_is_requeued(tmp_path: Path) -> None:
    async def training() -> None: ...

    closed = SimpleNamespace(close=lambda: None)
    loop = SimpleNamespace(done=7, record=closed, ledger=closed, run=training, orders=None, returns=0)
    config = RunConfig.model_validate(
        {"name": "run", "run_dir": str(tmp_path), "model": {"path": "model"}, "data": {"train": "rows.parquet"}}
    )
    inputs = SimpleNamespace(config=config, run_dir=tmp_path, start=SimpleNamespace(step=0))
    rollouts = SimpleNamespace(rollouter=SimpleNamespace(interrupt=None))
    told: list[Event] = []

    async def scenario() -> None:
        run = _Run(Gone(), rollouts, None, inputs, None, Nothing(), told.append, 0.0, None, Hearing(None))  # type: ignore[arg-type]
        await run._supervised(loop, Orders())  # type: ignore[arg-type]

    with pytest.raises(
        StoppedInOrder, match=r"checkpoint of step 0: no room .* --resume auto goes on where there is room"
    ) as ended:
        asyncio.run(scenario())
    assert ended.value.exit_code == 75
    assert told[-1] == RunStopped("no room for the run's processes after 9 s", 0)
