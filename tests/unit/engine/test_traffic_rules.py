"""The rules of traffic by themselves: which server, how many requests, when one leaves, and what a load says."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.engine.choice import Place, choose
from ctpo_megatron.engine.gate import Gate
from ctpo_megatron.engine.load import START, Load, next_limit, read_load
from ctpo_megatron.engine.pace import ENOUGH, Pace
from ctpo_megatron.errors import EngineError

PLACES = st.lists(
    st.builds(Place, st.booleans(), st.integers(0, 9), st.none() | st.integers(1, 9), st.booleans()), min_size=1, max_size=6
)
LOADS = st.builds(Load, st.integers(0, 99), st.integers(0, 3), st.integers(0, 1), st.floats(0, 1))


@given(PLACES, st.integers(0, 1000))
def test_choice(places: list[Place], session: int) -> None:
    """It serves; it is home where home serves and has room; it has room where any has, and is no server that was left for it."""
    if not any(place.serves for place in places):
        with pytest.raises(ValueError, match="no server serves"):
            choose(places, session)
        return
    chosen, home = places[choose(places, session)], places[session % len(places)]
    assert chosen.serves
    if home.serves and home.has_room and not home.left:
        assert chosen is home
    others = [place for place in places if place.serves and not place.left]
    assert not (chosen.left and others)
    assert chosen.has_room or not any(place.has_room for place in others)


@given(st.none() | st.integers(1, 64), st.integers(0, 64), LOADS, st.integers(1, 64))
def test_limit(limit: int | None, in_flight: int, load: Load, most: int) -> None:
    """Between 1 and the most; it never grows with a crowded server, and grows only where it was reached."""
    found, before = next_limit(limit, in_flight, load, most), min(START if limit is None else limit, most)
    assert 1 <= found <= most
    if load.crowded:
        assert found <= min(before, max(1, 0.8 * in_flight))
    elif in_flight < before:
        assert found == before
    else:
        assert found == min(most, before + max(1, before // 20))


def test_a_limit_settles_near_what_a_server_takes() -> None:
    """A server that has room for 40 and queues the rest, always asked for more."""
    limit, seen = None, []
    for _ in range(200):
        in_flight = limit or START
        limit = next_limit(limit, in_flight, Load(min(40, in_flight), max(0, in_flight - 40), 0, 0.5), 500)
        seen.append(limit)
    assert all(30 <= each <= 43 for each in seen[60:]), seen


@given(st.lists(st.integers(-1, 4), max_size=60))
def test_gate(steps: list[int]) -> None:
    """Nobody comes in above the bound, nobody waits while there is room, and those who gave up are forgotten."""

    async def scenario() -> None:
        gate, limit, inside = Gate(1), 1, 0
        tasks: list[asyncio.Task[None]] = []

        async def one() -> None:
            nonlocal inside
            async with gate.passing():
                inside += 1
                try:
                    await asyncio.sleep(3600)
                finally:
                    inside -= 1

        for step in steps:
            before = inside
            if step > 1:
                limit = step - 1
                gate.set_limit(limit)
            elif step == 1:
                tasks.append(asyncio.create_task(one()))
            elif tasks:
                tasks.pop(0 if step else -1).cancel()
            for _ in range(8):
                await asyncio.sleep(0)
            assert inside <= max(limit, before)
            assert inside == len(tasks) or inside >= limit
            assert gate.waiting == len(tasks) - inside
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (inside, gate.waiting) == (0, 0)

    asyncio.run(scenario())


def test_when_a_request_leaves() -> None:
    """By the others' median: neither one slow answer nor the server's own slowness counts, nor few answers."""
    pace = Pace(factor=4.0, least_s=1.0)
    for server, seconds in (("a", 0.1), ("b", 0.2), ("slow", 5.0)):
        assert pace.leave_after_s("slow", 100, ["a", "b", "slow"]) is None
        for _ in range(ENOUGH - 1):
            pace.answered(server, 10, seconds * 10)
    for server in ("a", "b", "slow"):
        pace.answered(server, 1, 1000.0)
    assert pace.leave_after_s("slow", 100, ["a", "b", "slow"]) == pytest.approx(4 * 0.15 * 100)
    assert pace.leave_after_s("slow", 1, ["a", "slow"]) == 1.0
    assert pace.leave_after_s("a", 10, ["a"]) is None
    pace.answered("a", 0, 1.0)  # aborted before it ran


def test_loads_are_read_with_suspicion() -> None:
    rank = {"num_running_reqs": 3, "num_waiting_reqs": 1, "token_usage": 0.25}
    assert read_load({"loads": [rank, rank | {"queues": {"retracted": 2}}]}, "http://a") == Load(6, 2, 2, 0.25)
    for answer in (
        {},
        [],
        {"loads": [{}]},
        {"loads": []},
        {"loads": [rank | {"token_usage": None}]},
        "no",
        {"loads": [rank | {"queues": [1]}]},
        {"loads": [rank | {"token_usage": float("nan")}]},
    ):
        with pytest.raises(EngineError, match="http://a/v1/loads gave no loads"):
            read_load(answer, "http://a")
