"""Where orders come from, and how often a lost trainer is started again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ctpo_megatron.errors import ProcessDied, TrainerLost
from ctpo_megatron.jobs.orders import on_signal, watch_files
from ctpo_megatron.jobs.restarts import LONGEST_WAIT_S, Restarts
from ctpo_megatron.jobs.stop import StopSignal
from ctpo_megatron.loop.orders import Orders, StopRequest
from tests.support.disks import read_only, small_disk


@pytest.mark.parametrize(("name", "within"), [("SIGTERM", 9.0), ("SIGUSR1", None), ("SIGINT", None)])
def test_a_signal_asks_once(name: str, within: float | None) -> None:
    heard: list[StopRequest] = []
    orders = Orders(heard.append)
    on_signal(orders, name, 9.0)
    on_signal(orders, "SIGTERM", 1.0)
    assert heard == [orders.stop_request] == [StopRequest(name, within)]


def test_nobody_listens_before_and_after_the_run() -> None:
    stop, heard = StopSignal(), []
    assert not stop.tell("SIGTERM")
    stop.listen(heard.append)
    assert stop.tell("SIGTERM")
    stop.listen(None)
    assert not stop.tell("SIGINT")
    assert heard == ["SIGTERM"]


def test_files_are_obeyed_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        orders = Orders()
        watching = asyncio.ensure_future(watch_files(orders, tmp_path))
        (tmp_path / "SAVE").touch()
        await asyncio.sleep(0.05)
        assert (orders.take_save(), orders.take_save(), orders.stop_request) == (True, False, None)
        (tmp_path / "STOP").touch()
        await asyncio.sleep(1.1)
        assert "STOP" in orders.stop_request.reason
        assert list(tmp_path.iterdir()) == []
        watching.cancel()

    asyncio.run(scenario())


def test_a_file_that_cannot_be_removed_is_obeyed(tmp_path: Path) -> None:
    async def scenario(disk: Path) -> None:
        orders = Orders()
        watching = asyncio.ensure_future(watch_files(orders, disk))
        await asyncio.sleep(0.1)
        watching.cancel()
        assert "STOP" in orders.stop_request.reason

    with small_disk(tmp_path / "disk", 64) as disk:
        (disk / "STOP").touch()
        with read_only(disk):
            asyncio.run(scenario(disk))
        assert (disk / "STOP").exists()


def test_restarts_are_bounded_while_no_step_is_done() -> None:
    restarts, error = Restarts(3), TrainerLost("rank 1 died\nits log")
    waits = [restarts.next(error, 4) for _ in range(3)]
    assert [(each.restart, each.wait_s) for each in waits] == [(1, 0.0), (2, 2.0), (3, 4.0)]
    assert waits[0].reason == "rank 1 died"
    assert restarts.next(error, 5).restart == 1  # a step was done
    assert restarts.next(error, 3).restart == 2  # back at a checkpoint: no step further than before
    assert restarts.next(error, 5).restart == 3
    with pytest.raises(ProcessDied, match="3 restarts brought no training step"):
        restarts.next(error, 5)
    with pytest.raises(ProcessDied, match="0 restarts"):
        Restarts(0).next(TrainerLost("gone"), 0)
    many = Restarts(20)
    assert max(many.next(error, 0).wait_s for _ in range(20)) == LONGEST_WAIT_S
