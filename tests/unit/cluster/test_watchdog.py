"""What the watchdog makes of one look after the other. Nobody is asked and nothing is ended: what was seen is given."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ctpo_megatron.cluster.watch import watchdog
from ctpo_megatron.cluster.watch.watchdog import Watchdog
from ctpo_megatron.config.cluster import WatchConfig
from ctpo_megatron.record.events import Event
from ctpo_megatron.record.heartbeat import Depths, Stage, Stages
from ctpo_megatron.record.stalls import Collective, Seen
from ctpo_megatron.record.watch_events import StallFound

GROUP = ("TENSOR_MODEL_PARALLEL_GROUP", (0, 1))


def ranks(waits_s: float, spins_s: float) -> list[Seen]:
    """Rank 0 has waited so long in a call that rank 1 has not entered, which was last heard of `spins_s` ago."""
    found = []
    for number, (silent, entered) in enumerate([(waits_s, 5), (spins_s, 4)]):
        stage = Stage("update", 3, "", silent, silent, 1.0, "", 0, 0)
        call = Collective(*GROUP, entered, "all_reduce", silent, number == 0)
        found.append(Seen(f"trainer rank {number}", f"trainer rank {number}", number + 1, number, (stage,), collectives=(call,)))
    return found


@pytest.mark.parametrize("late_s", [30.0, 300.0])
def test_one_that_was_slow_and_then_hangs_is_acted_upon_at_once(
    late_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a slow process keeps further ones of its kind away for a minute, and nothing else."""
    monkeypatch.setattr(watchdog, "JUDGE_S", 0.0)
    told: list[Event] = []
    acted: list[str] = []

    async def scenario() -> None:
        config = WatchConfig(floor_s=10.0)
        looks = iter([ranks(1.0, 0.5), ranks(late_s, 1.0), ranks(late_s, 2.0), ranks(2 * late_s, late_s)])
        watch = Watchdog(config, "node", tmp_path, told.append, stages=Stages(), depths=Depths(), lag=lambda: 0.0)

        async def look(_watched: object) -> list[Seen]:
            return next(looks)

        async def evidence(_watched: object, _seen: object) -> dict[str, object]:
            return {}

        async def act(verdict: object, *_rest: object) -> None:
            acted.append(verdict.kind)  # type: ignore[attr-defined]

        monkeypatch.setattr(watch, "_look", look)
        monkeypatch.setattr(watch, "_evidence", evidence)
        monkeypatch.setattr(watch, "_act", act)
        for _ in range(4):
            await watch._round()
        watch.close()

    asyncio.run(scenario())
    assert [event.kind for event in told if isinstance(event, StallFound)] == ["slow", "hung"]
    assert acted == ["hung"]
