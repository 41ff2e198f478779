"""Which server a request goes to, which tokens count, and that no generation is lost with its server."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from ctpo_megatron.engine.choice import Place, choose
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet, Lease, State
from ctpo_megatron.errors import EngineError, EngineRefused
from ctpo_megatron.record.events import Event, ServerLost, ServerRestarted, ServerServing, ServerSuspended
from ctpo_megatron.types import Generation
from tests.support.fake_servers import FakeServer, fakes


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.http.BACKOFF_S", 0.01)


def generate(client: EngineClient, session: int = 0, tokens: int = 8) -> asyncio.Task[Generation]:
    work = client.generate([1, 2, 3], max_new_tokens=tokens, temperature=1.0, stop_token_ids=[], session=session)
    return asyncio.ensure_future(work)


async def begun(*servers: FakeServer) -> None:
    while not any(server.generations for server in servers):
        await asyncio.sleep(0.01)


async def waits(*tasks: asyncio.Future) -> bool:
    done, _ = await asyncio.wait(tasks, timeout=0.2)
    return not done


def test_sessions_stay_where_they_are() -> None:
    async def scenario() -> None:
        fleet = Fleet(patience_s=1)
        members = [fleet.join(str(number), f"http://{number}") for number in range(4)]
        fleet.serve(members, 0)

        async def homes() -> list[str]:
            return [(await fleet.acquire(session)).member.name for session in range(48)]

        before = await homes()
        assert set(Counter(before).values()) == {12}
        fleet.suspend(members[1], "test")
        during = await homes()
        assert [home for home in during if home == "1"] == []
        assert [(a, b) for a, b in zip(before, during, strict=True) if a not in (b, "1")] == [], "others do not move"
        orphans = Counter(b for a, b in zip(before, during, strict=True) if a == "1")
        assert set(orphans.values()) == {4}, "and take equal parts of what it had"
        fleet.serve([members[1]], 1)
        assert await homes() == before

    asyncio.run(scenario())


def test_only_serving_servers_are_asked() -> None:
    """Nobody asks a server that joins or is being updated; the wait is bounded, and its error says why nobody serves."""

    async def scenario() -> None:
        async with fakes(1, patience_s=0.5) as ((server,), fleet, client, _):
            (member,) = fleet.members(State.JOINING)
            waiting = generate(client)
            assert await waits(waiting)
            assert server.generations == []
            fleet.serve([member], 0)
            assert (await waiting).versions == [0] * 8
            fleet.update([member])
            begin = time.monotonic()
            with pytest.raises(EngineError, match=rf"within 0 s:\nserver 0 \({server.url}\) is updating"):
                await generate(client)
            assert time.monotonic() - begin < 3
            assert len(server.generations) == 2

    asyncio.run(scenario())


def test_a_generation_goes_on_elsewhere() -> None:
    """Its server dies after the first part: the second server is asked to go on from there. The next one to fail is the last."""

    async def scenario() -> None:
        async with fakes(2) as ((first, second), fleet, client, said):
            fleet.serve(fleet.members(State.JOINING), 0)
            first.faults["/generate"] = lambda: web.Response(status=500) if first.generations else None
            done = await generate(client)
            assert (done.token_ids, done.rollout_logp, done.versions) == ([1] * 8, [-0.5] * 8, [0] * 8)
            assert [body["input_ids"] for body in second.generations] == [[1, 2, 3, 1, 1, 1, 1]]
            assert second.generations[0]["sampling_params"]["max_new_tokens"] == 4
            assert fleet.metrics() == {"servers/serving": 1, "servers/aside": 0, "servers/lost": 0, "servers/rejoined": 0}
            assert f"server 0 is suspended: {first.url}/generate answered 500" in said[0]
            await second.die()
            last = generate(client, tokens=1)
            assert await waits(last)
            fleet.lose(fleet.members(State.SUSPENDED)[0], "gone")
            while fleet.members(State.SERVING):
                await asyncio.sleep(0.05)
            fleet.lose(fleet.members(State.SUSPENDED)[0], "dead")
            with pytest.raises(EngineError, match=r"no inference server is left:\nserver 0 .*: gone\n.*\nserver 1 .*: dead"):
                await last

    asyncio.run(scenario())


def test_a_hanging_server_is_left() -> None:
    """Whoever suspends or loses a server frees the requests that wait for it."""

    async def scenario() -> None:
        async with fakes(2) as ((first, second), fleet, client, _):
            members = fleet.members(State.JOINING)
            fleet.serve(members, 0)
            first.hold = asyncio.Event()
            running = generate(client)
            await begun(first)
            assert await waits(running)
            fleet.suspend(members[0], "hangs")
            assert len((await asyncio.wait_for(running, 2)).token_ids) == 8
            assert len(second.generations) == 2
            fleet.update([members[0]])  # at once repaired: what it was asked before is not waited for all the same
            fleet.serve([members[0]], 0)
            running = generate(client)
            while len(first.generations) < 2:
                await asyncio.sleep(0.01)
            fleet.suspend(members[0], "hangs again")
            fleet.update([members[0]])
            assert len((await asyncio.wait_for(running, 2)).token_ids) == 8

    asyncio.run(scenario())


@pytest.mark.parametrize("version", ["2", "4", "0"])
def test_a_wrong_version_suspends(version: str) -> None:
    """Older than it was given, even if it once served that; newer than what was proven: not a token of it is used."""

    async def scenario() -> None:
        async with fakes(2) as (servers, fleet, client, said):
            for number in (2, 3):
                fleet.serve(fleet.members(State.JOINING, State.SERVING), number)
            servers[0].version, servers[1].version = version, "3"
            assert (await generate(client)).versions == [3] * 8
            assert len(servers[0].generations) == 1
            assert f"{servers[0].url} answered with version {version} of the weights; it was given 3" in said[0]
            assert [member.url for member in fleet.members(State.SUSPENDED)] == [servers[0].url]

    asyncio.run(scenario())


@pytest.mark.parametrize("proven", [True, False])
def test_tokens_wait_for_the_proof(proven: bool) -> None:
    """A server has resumed with new weights that are not proven yet: what it samples counts once they are, or it is repeated."""

    async def scenario() -> None:
        async with fakes(2) as (servers, fleet, client, _):
            member, other = fleet.members(State.JOINING)
            fleet.serve([member, other], 5)
            servers[0].hold = asyncio.Event()
            servers[0].version, servers[1].version = "6", "5"
            running = generate(client, tokens=4)
            await begun(servers[0])
            fleet.update([member])
            servers[0].hold.set()
            assert await waits(running), "sampled, not yet proven"
            if proven:
                fleet.serve([member], 6)
                assert (await running).versions == [6] * 4
                assert servers[1].generations == []
            else:
                fleet.suspend(member, "the canary died")
                assert (await running).versions == [5] * 4
                assert len(servers[1].generations) == 1

    asyncio.run(scenario())


def test_refused_requests_are_errors() -> None:
    """What a server refuses another one would refuse too."""

    async def scenario() -> None:
        async with fakes(2) as (servers, fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            servers[0].faults["/generate"] = lambda: web.Response(status=400, text="too long")
            with pytest.raises(EngineRefused, match=r"/generate answered 400: too long"):
                await generate(client)
            assert len(fleet.members(State.SERVING)) == 2

    asyncio.run(scenario())


def test_restarts_are_counted() -> None:
    """A lost server starts again while it may; who comes back joins, and does not serve before it is proven."""

    async def scenario() -> None:
        said: list[str] = []
        fleet = Fleet(patience_s=0.2, restarts=2, emit=lambda event: said.append(event.sentence))
        member = fleet.join("server 0", "http://a")
        for number in (1, 2):
            lost = asyncio.ensure_future(fleet.lost(member))
            fleet.lose(member, "died")
            await lost
            assert (member.state, fleet.hopeless) == (State.STARTING, False)
            assert f"starting it again, {number} of 2" in said[-1]
            before, member = member, fleet.join("server 0", f"http://{number}")
            assert member.state is State.JOINING
            fleet.lose(before, "nobody cares any more")
            assert member.state is State.JOINING
        assert fleet.metrics() == {"servers/serving": 0, "servers/aside": 0, "servers/lost": 2, "servers/rejoined": 2}
        fleet.lose(member, "died")
        assert (member.gone, fleet.hopeless) == (True, True)
        assert "rollout.engine.restarts = 2" in fleet.report()
        fleet.suspend(member, "late")
        assert member.gone

    asyncio.run(scenario())


def test_events_say_what_happened() -> None:
    """One typed event for each change that matters to a person; none for a server that serves as expected."""
    events: list[Event] = []

    async def scenario() -> None:
        fleet = Fleet(patience_s=0.2, restarts=1, emit=events.append)
        member = fleet.join("server 0", "http://a")
        fleet.serve([member], 1)
        fleet.suspend(member, "hangs")
        fleet.suspend(member, "still hangs")
        fleet.serve([member], 2)
        fleet.lose(member, "died")
        fleet.serve([fleet.join("server 0", "http://b")], 2)
        fleet.lose(fleet.members(State.SERVING)[0], "died again")

    asyncio.run(scenario())
    assert events == [
        ServerSuspended("server 0", "hangs"),
        ServerServing("server 0", 2),
        ServerLost("server 0", "died\n(starting it again, 1 of 1)", again=True),
        ServerRestarted("server 0", "http://b"),
        ServerServing("server 0", 2),
        ServerLost("server 0", "died again\n(rollout.engine.restarts = 1)", again=False),
    ]


def test_without_a_trainer() -> None:
    """Weights never change: who joins serves, who fails is started again."""

    async def scenario() -> None:
        fleet = Fleet(patience_s=0.2, restarts=1, fixed_version=0)
        member = fleet.join("server 0", "http://a")
        assert (await fleet.acquire(0)).version == 0
        fleet.suspend(member, "answered 500")
        assert member.state is State.STARTING
        fleet.join("server 0", "http://b")
        assert (await fleet.acquire(0)).member.url == "http://b"

    asyncio.run(scenario())


def test_a_trainer_that_goes_back_makes_newer_versions_unproven() -> None:
    """What was asked before it went back may be answered by the older version; nothing may carry the newer one any more."""

    async def scenario() -> None:
        fleet = Fleet(patience_s=1)
        member = fleet.join("server 0", "http://a")
        for version in (6, 7):
            fleet.serve([member], version)
        before = await fleet.acquire(0)
        fleet.update([member])
        fleet.serve([member], 5)
        assert await fleet.accept(before, [5])
        after = await fleet.acquire(0)
        assert (after.version, await fleet.accept(after, [5])) == (5, True)
        assert not await fleet.accept(after, [7])
        assert member.state is State.SUSPENDED

    asyncio.run(scenario())


def test_an_interrupted_generation_keeps_what_the_server_had_and_goes_on() -> None:
    """The server answers an abort with two tokens; the client then asks nobody, until it may."""

    async def scenario() -> None:
        async with fakes(1) as ((server,), fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            server.hold = asyncio.Event()
            server.tokens = 2
            done = Generation()
            options = {"max_new_tokens": 6, "temperature": 1.0, "stop_token_ids": [], "session": 0}
            running = asyncio.ensure_future(client.generate([1, 2, 3], done, **options))
            await begun(server)
            asyncio.get_running_loop().call_later(0.05, server.hold.set)
            await client.interrupt()
            assert "/abort_request" in server.calls
            assert len(done.token_ids) == 2
            assert await waits(running)
            asked = len(server.generations)
            client.go_on()
            assert len((await running).token_ids) == 6
            assert running.result() is done
            assert server.generations[asked]["input_ids"] == [1, 2, 3, *done.token_ids[:2]]

    asyncio.run(scenario())


def test_an_interrupt_waits_for_what_is_read_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of experts is read in a thread: what is kept then has tokens and record, or neither."""

    async def read_slowly(_size: int, function: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0.3)
        reads.append(len(done.token_ids))
        return function(*arguments)

    async def scenario() -> None:
        async with fakes(1) as ((server,), fleet, client, _):
            fleet.serve(fleet.members(State.JOINING), 0)
            server.hold, server.tokens = asyncio.Event(), 2
            options = {"max_new_tokens": 6, "temperature": 1.0, "stop_token_ids": [], "session": 0}
            running = asyncio.ensure_future(client.generate([1, 2, 3], done, **options))
            await begun(server)
            server.hold.set()
            await client.interrupt()
            assert reads == [2]
            assert await waits(running)
            client.go_on()
            assert len((await running).token_ids) == 6
            begin = time.monotonic()
            await client.interrupt()
            assert time.monotonic() - begin < 2, "nothing is under way any more"

    done, reads = Generation(), list[int]()
    monkeypatch.setattr("ctpo_megatron.engine.client.beside_loop", read_slowly)
    asyncio.run(scenario())


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.none() | st.integers(1, 3)), min_size=1, max_size=5),
    st.integers(0, 30),
    st.none() | st.integers(0, 4),
)
def test_home_is_found_without_looking_at_all_servers(
    states: list[tuple[bool, int, int | None]], session: int, left: int | None
) -> None:
    """The shortcut of a fleet of a thousand servers gives what the choice over all of them gives."""

    async def chosen() -> int:
        fleet = Fleet(patience_s=1)
        members = [fleet.join(str(number), "url") for number in range(len(states))]
        fleet.serve([member for member, (serves, *_) in zip(members, states, strict=True) if serves], 0)
        for member, (_, in_flight, limit) in zip(members, states, strict=True):
            member.in_flight, member.limit = in_flight, limit
        lease = await fleet.acquire(session, None if left is None else members[left % len(members)])
        return members.index(lease.member)

    leaves = None if left is None else left % len(states)
    places = [Place(serves, busy, limit, number == leaves) for number, (serves, busy, limit) in enumerate(states)]
    if any(place.serves for place in places) and places[choose(places, session)].has_room:  # otherwise it waits
        assert asyncio.run(chosen()) == choose(places, session)


def test_a_publication_wakes_no_request_that_waits_for_a_failure() -> None:
    """A run has thousands of them, and looks at nothing else while they are woken."""

    class Counted(Lease):
        looks = 0

        @property
        def broken(self) -> bool:
            Counted.looks += 1
            return super().broken

    async def scenario() -> None:
        fleet = Fleet(patience_s=1)
        members = [fleet.join(name, "http://nowhere") for name in ("a", "b")]
        fleet.serve(members, 0)
        waiting = [asyncio.ensure_future(fleet.broken(Counted(members[0], 0, 0))) for _ in range(5)]
        for version in range(1, 4):
            await asyncio.sleep(0)
            fleet.update(members)
            await asyncio.sleep(0)
            fleet.serve(members, version)
        fleet.suspend(members[1], "another server")
        assert await waits(*waiting)
        assert Counted.looks == 5
        fleet.lose(members[0], "it died")
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        await asyncio.wait_for(fleet.broken(Counted(members[0], 0, 0)), 1)  # one that comes later need not wait

    asyncio.run(scenario())
