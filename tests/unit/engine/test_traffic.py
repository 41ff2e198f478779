"""Requests among servers: which one each goes to, when it leaves a slow one, and bounds that hold whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from ctpo_megatron.config.traffic import MovingConfig, TrafficConfig
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.dispatch import Dispatch
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.load import START, Load, LoadsSeen
from ctpo_megatron.engine.pace import ENOUGH
from ctpo_megatron.errors import AsideLost
from ctpo_megatron.types import Generation
from tests.support.fake_servers import FakeServer, fakes
from tests.support.often import often


async def ask(client: EngineClient, tokens: int = 8, session: int = 0, seconds: float | None = None, **options: Any):
    options["deadline"] = None if seconds is None else asyncio.get_running_loop().time() + seconds
    return await client.generate([1, 2], max_new_tokens=tokens, temperature=1.0, stop_token_ids=[], session=session, **options)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


class Slow(FakeServer):
    """Gives one token when it is asked to end, and else nothing."""

    def __init__(self) -> None:
        super().__init__(tokens=1)
        self.hold = asyncio.Event()
        self.faults["/abort_request"] = lambda: (self.hold and self.hold.set(), web.json_response({}))[1]


def test_a_request_leaves_a_slow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on elsewhere from the token in hand; the slow server was told by name; one that says nothing loses nothing else."""

    async def scenario(*, silent: bool) -> None:
        config = TrafficConfig(look_s=0.05, moving=MovingConfig(factor=2.0, least_s=0.1))
        async with fakes(2, servers=[Slow(), FakeServer()], traffic=config) as ((slow, quick), fleet, client, _):
            if silent:
                slow.faults["/abort_request"] = lambda: web.json_response({})
            fleet.serve(fleet.members(State.JOINING), 0)
            for _ in range(ENOUGH):
                await ask(client, session=1)
            answered = len(quick.generations)
            done = await ask(client)
            assert (len(done.token_ids), done.finish, done.versions) == (8, "length", [0] * 8)
            first = quick.generations[answered]
            assert first["input_ids"] == ([1, 2] if silent else [1, 2, 1])
            assert first["sampling_params"]["max_new_tokens"] == (8 if silent else 7)
            assert slow.calls.count("/abort_request") == 1
            assert len(slow.generations) == 1
            assert fleet.metrics()["servers/moved"] == 1
            assert all(member.in_flight == 0 for member in fleet.members(*State))
            assert fleet.members(State.SUSPENDED) == []

    monkeypatch.setattr("ctpo_megatron.engine.client.END_TIMEOUT_S", 0.2)
    asyncio.run(scenario(silent=False))
    asyncio.run(scenario(silent=True))


def test_a_deadline_keeps_what_there_is() -> None:
    """The server is asked for it; where there is nothing yet, one token is waited for. What ends by itself is not marked."""

    async def scenario() -> None:
        async with fakes(1, servers=[Slow()]) as ((slow,), fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            done = await ask(client, seconds=0.1)
            assert (len(done.token_ids), done.finish) == (1, "deadline")
            assert slow.calls.count("/abort_request") == 1
            late = await ask(client, seconds=-1.0)
            assert (len(late.token_ids), late.finish) == (1, "deadline")
            assert slow.generations[-1]["sampling_params"]["max_new_tokens"] == 1
            assert (await ask(client, tokens=3, seconds=60.0)).finish == "length"

    asyncio.run(scenario())


def test_what_servers_say_bounds_what_they_are_sent() -> None:
    """With one that has a queue the next requests wait here, and go on as others end."""

    async def scenario() -> None:
        load = {"num_running_reqs": 9, "num_waiting_reqs": 4, "token_usage": 0.5}
        server = FakeServer()
        server.hold = asyncio.Event()
        server.faults["/v1/loads"] = lambda: web.json_response({"loads": [load]})
        async with fakes(1, servers=[server], traffic=TrafficConfig(per_server="auto", look_s=60.0), most=100) as (
            _,
            fleet,
            client,
            _,
        ):
            fleet.serve(fleet.members(State.JOINING), 0)
            running = [asyncio.ensure_future(ask(client, tokens=1, session=number)) for number in range(10)]
            while len(server.generations) < 10:
                await asyncio.sleep(0.01)
            await client.traffic.look()
            assert fleet.members(State.SERVING)[0].limit == 8
            late = asyncio.ensure_future(ask(client, tokens=1))
            await asyncio.sleep(0.2)
            assert len(server.generations) == 10
            server.hold.set()
            await asyncio.gather(late, *running)
            assert len(server.generations) == 11
            metrics = fleet.metrics()
            assert (metrics["servers/waiting"], metrics["servers/limit"], metrics["servers/cache_use"]) == (4, 8, 0.5)
            assert "servers/waiting" not in fleet.metrics(), "nothing was seen since"

    asyncio.run(scenario())


def test_a_publication_moves_no_bound() -> None:
    """All that a server had is in its queue once more then; what is there at the next look is too much for it."""

    async def scenario() -> None:
        server = FakeServer()
        rank = {"num_running_reqs": 0, "num_waiting_reqs": 9, "token_usage": 0.1}
        server.faults["/v1/loads"] = lambda: web.json_response({"loads": [rank]})
        traffic = TrafficConfig(per_server="auto", look_s=60.0)
        async with fakes(1, servers=[server], traffic=traffic, most=100) as (_, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            member, limits = fleet.members(State.SERVING)[0], []
            rank["num_waiting_reqs"] = 0
            await client.traffic.look()
            await asyncio.sleep(0.1)  # the look with which it began
            member.in_flight, rank["num_waiting_reqs"] = 10, 9
            fleet.serve([member], 1)
            for _ in range(2):
                await client.traffic.look()
                limits.append(member.limit)
            assert limits == [START, 8]
            for version in (2, 3):
                member.in_flight = 5
                fleet.serve([member], version)
                await client.traffic.look()
                limits.append(member.limit)
            assert limits[2:] == [8, 4], "versions that follow fast"
            member.in_flight = 0

    asyncio.run(scenario())


def test_a_bound_that_grows_is_heard_of() -> None:
    async def scenario() -> None:
        fleet = Fleet(patience_s=1)
        member = fleet.join("0", "http://0")
        fleet.serve([member], 0)
        member.limit = 1
        await fleet.acquire(0)
        waiting = asyncio.ensure_future(fleet.acquire(1))
        await asyncio.sleep(0)
        assert not waiting.done()
        member.limit = 2
        fleet.freed()
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_each_pool_has_its_bounds() -> None:
    """From the first request on, and while no server serves: neither training nor an evaluation beside it sends one too many."""

    async def scenario() -> None:
        servers = [FakeServer(), FakeServer()]
        for each in servers:
            each.hold = asyncio.Event()
        async with fakes(2, servers=servers, traffic=TrafficConfig(per_server=2, look_s=60.0)) as (_, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            assert fleet.set_aside(1) == 1
            running = [asyncio.ensure_future(ask(client, tokens=1, session=each)) for each in range(6)]
            beside = [asyncio.ensure_future(ask(client, tokens=1, session=each, aside=True)) for each in range(3)]
            await until(lambda: [len(each.generations) for each in servers] == [2, 2])
            fleet.update(fleet.publishable(State.SERVING))
            running.append(asyncio.ensure_future(ask(client, tokens=1)))
            await client.traffic.look()
            await asyncio.sleep(0.1)
            fleet.serve(fleet.publishable(State.UPDATING), 0)
            await asyncio.sleep(0.1)
            assert [len(each.generations) for each in servers] == [2, 2]
            assert [each.in_flight for each in fleet.members(State.SERVING)] == [2, 2]
            for each in servers:
                each.hold.set()
            await asyncio.gather(*running, *beside)
            assert [len(each.generations) for each in servers] == [7, 3]

    asyncio.run(scenario())


def test_those_who_wait_hear_that_no_server_is_aside() -> None:
    async def scenario() -> None:
        servers = [FakeServer(), FakeServer()]
        servers[1].hold = asyncio.Event()
        async with fakes(2, servers=servers, traffic=TrafficConfig(per_server=1)) as (_, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            fleet.set_aside(1)
            beside = [asyncio.ensure_future(ask(client, session=each, aside=True)) for each in range(3)]
            await until(lambda: bool(servers[1].generations))
            fleet.suspend(fleet.members(State.SERVING)[1], "it failed")
            async with asyncio.timeout(10):
                for failed in await asyncio.gather(*beside, return_exceptions=True):
                    assert isinstance(failed, AsideLost)

    asyncio.run(scenario())


def test_no_limit_no_bound() -> None:
    """A fleet of which nothing is said lets everything pass."""

    async def scenario() -> None:
        fleet = Fleet(patience_s=1)
        fleet.serve([fleet.join(str(number), f"http://{number}") for number in range(2)], 0)
        leases = [await fleet.acquire(4) for _ in range(100)]
        assert {lease.member.name for lease in leases} == {"0"}
        for lease in leases:
            fleet.done(lease)
        assert [member.in_flight for member in fleet.members(State.SERVING)] == [0, 0]

    asyncio.run(scenario())


def test_a_bound_holds_while_another_server_is_down() -> None:
    """What it would take waits, although the sum of all bounds leaves room, and is heard by the next that has room."""

    async def scenario() -> None:
        servers = [FakeServer() for _ in range(3)]
        for each in servers:
            each.hold = asyncio.Event()
        async with fakes(3, servers=servers, traffic=TrafficConfig(per_server=2, look_s=60.0)) as (_, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            fleet.suspend(fleet.members(State.SERVING)[2], "it failed")
            running = [asyncio.ensure_future(ask(client, tokens=1, session=each)) for each in range(7)]
            await until(lambda: [len(each.generations) for each in servers[:2]] == [2, 2])
            await asyncio.sleep(0.1)
            assert [each.in_flight for each in fleet.members(*State)] == [2, 2, 0]
            assert client.traffic._gates[False].waiting == 3, "each in its turn, and at no cost"
            fleet.serve(fleet.members(State.SUSPENDED), 0)
            await until(lambda: len(servers[2].generations) == 2)
            running.pop().cancel()
            for each in servers:
                each.hold.set()
            await asyncio.gather(*running)
            assert [each.in_flight for each in fleet.members(*State)] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_deadline_holds_while_a_server_is_waited_for() -> None:
    """With tokens in hand it ends there; without any it waits for its turn, and asks for one."""

    async def scenario() -> None:
        server = FakeServer(tokens=99)
        server.hold = asyncio.Event()
        async with fakes(1, servers=[server], traffic=TrafficConfig(per_server=1, look_s=60.0)) as (_, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            first = asyncio.ensure_future(ask(client))
            await until(lambda: bool(server.generations))
            fresh = asyncio.ensure_future(ask(client, seconds=0.1))
            begun = await asyncio.wait_for(ask(client, seconds=0.1, done=Generation([7], [-0.5], [0])), 2)
            assert (begun.token_ids, begun.finish) == ([7], "deadline")
            assert len(server.generations) == 1
            assert not fresh.done()
            server.hold.set()
            assert len((await first).token_ids) == 8
            assert (len((await fresh).token_ids), fresh.result().finish) == (1, "deadline")
            assert [each["sampling_params"]["max_new_tokens"] for each in server.generations] == [8, 1]
            assert fleet.members(State.SERVING)[0].in_flight == 0

    asyncio.run(scenario())


EVENTS = st.tuples(
    st.sampled_from(["ask", "ask", "ask", "aside", "end", "cancel", "fail", "serve", "publish", "split"]), st.integers(0, 9)
)


@settings(deadline=None, max_examples=often(60))
@given(st.integers(1, 3), st.lists(EVENTS, max_size=40))
def test_whatever_happens_leases_come_back_and_bounds_hold(limit: int, events: list[tuple[str, int]]) -> None:
    """Servers fail, are published to and set aside, requests end, fail and are given up: nobody waits for ever."""

    async def scenario() -> None:
        fleet = Fleet(patience_s=60.0)
        client = EngineClient(fleet, "key", request_timeout_s=1.0, traffic=TrafficConfig(per_server=limit))
        fleet.serve([fleet.join(str(number), f"http://{number}") for number in range(3)], 0)
        tasks: list[asyncio.Task[None]] = []
        ends: dict[asyncio.Task[None], asyncio.Event] = {}

        async def one(session: int, aside: bool, end: asyncio.Event) -> None:
            async with Dispatch(fleet, client.traffic, session, aside=aside).leased() as lease:
                assert lease.member.aside == aside
                assert lease.member.in_flight <= limit
                ending = [asyncio.ensure_future(each) for each in (end.wait(), fleet.broken(lease))]
                try:
                    await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for each in ending:
                        each.cancel()

        def begin(session: int, aside: bool) -> None:
            end = asyncio.Event()
            tasks.append(asyncio.create_task(one(session, aside, end)))
            ends[tasks[-1]] = end

        for what, which in events:
            members = fleet.members(*State)
            if what in ("ask", "aside"):
                begin(which, what == "aside")
            elif what == "end" and tasks:
                ends[tasks[which % len(tasks)]].set()
            elif what == "cancel" and tasks:
                tasks[which % len(tasks)].cancel()
            elif what == "fail":
                fleet.suspend(members[which % 3], "it failed")
            elif what == "serve":
                fleet.serve([each for each in members if each.state in (State.UPDATING, State.SUSPENDED)], 0)
            elif what == "publish":
                fleet.update(fleet.publishable(State.SERVING))
            elif what == "split":
                fleet.give_back() if which % 2 else fleet.set_aside(1)
            for _ in range(4):
                await asyncio.sleep(0)
            assert all(0 <= each.in_flight <= limit for each in members), [each.in_flight for each in members]
        fleet.give_back()
        fleet.serve(fleet.members(State.UPDATING, State.SUSPENDED, State.JOINING), 0)
        for end in ends.values():
            end.set()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(each is None or isinstance(each, AsideLost | asyncio.CancelledError) for each in results), results
        assert [each.in_flight for each in fleet.members(*State)] == [0, 0, 0]
        assert [gate.waiting for gate in client.traffic._gates.values()] == [0, 0]

    asyncio.run(scenario())


def test_each_server_has_numbers_of_its_own() -> None:
    seen = LoadsSeen()
    looks = [Load(1, 4, 0, 0.5, throughput=100.0, cache_hits=0.2), Load(1, 2, 0, 0.7, throughput=300.0, cache_hits=0.4)]
    for load in looks:
        seen.saw("inference server 3", load)
    seen.saw("inference server 64", looks[0])  # of a thousand servers nobody looks at each
    seen.saw("elsewhere", looks[0])
    assert seen.metrics() == pytest.approx(
        {
            "servers/throughput/server_3": 200.0,
            "servers/cache_hits/server_3": 0.3,
            "servers/queue/server_3": 4.0,
            "servers/kv_use/server_3": 0.7,
        }
    )
    assert seen.metrics() == {}
