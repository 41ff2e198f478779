"""The simulated server against a scheduler that goes step by step, and what must hold whatever happens to it."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ctpo_megatron.simulation.clock import run_virtually
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.server import Part, Request, SimulatedServer
from ctpo_megatron.simulation.speeds import ServerSpeed
from tests.support.often import often

SPEED = ServerSpeed(0.02, 3e-3, 1e-4, prefill_s=0.05, prefill_token_s=1e-3, max_running=5)
TOLERANCE_S = 2e-5
Arrival = tuple[float, int, int]  # when, tokens to read, tokens to sample
ARRIVALS = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=12)


def server_of(speed: ServerSpeed, cores: float | None = None) -> SimulatedServer:
    return SimulatedServer("server", speed, Host(cores), Meter())


def request_of(held: int, wanted: int, session: int = 0) -> Request:
    return Request(session, held, wanted, False, asyncio.get_running_loop().create_future())


async def ended(server: SimulatedServer, arrivals: list[Arrival]) -> list[float]:
    """When each of `arrivals` is answered."""

    async def one(at: float, held: int, wanted: int) -> float:
        await asyncio.sleep(at)
        request = request_of(held, wanted)
        server.add(request)
        assert await request.answer == Part([(0, wanted)])
        return asyncio.get_running_loop().time()

    return list(await asyncio.gather(*(one(*arrival) for arrival in arrivals)))


def step_by_step(speed: ServerSpeed, arrivals: list[Arrival]) -> tuple[list[float], float]:
    """The same by a loop over decoding steps, the oracle, and how near to the end of a step something arrived, in seconds."""
    order = sorted(range(len(arrivals)), key=lambda n: arrivals[n][0])
    queue: list[int] = []
    running: dict[int, int] = {}  # tokens that are left
    held, now, done = 0.0, 0.0, [math.nan] * len(arrivals)
    nearest = math.inf
    while order or queue or running:
        while order and arrivals[order[0]][0] <= now:
            queue.append(order.pop(0))
        taken = []
        while queue and len(running) < speed.max_running:
            taken.append(queue.pop(0))
            running[taken[-1]] = arrivals[taken[-1]][2] - 1
            held += arrivals[taken[-1]][1] + 1
        if taken:
            now += speed.prefill_s + speed.prefill_token_s * sum(arrivals[n][1] for n in taken)
        elif running:
            # the cache grows within a step as much as by it: the server integrates
            now += speed.decode_s(1, len(running), held)
            held += len(running)
            running = {n: left - 1 for n, left in running.items()}
        else:
            now = arrivals[order[0]][0]
            continue
        nearest = min([nearest, *(abs(arrivals[n][0] - now) for n in order)])
        for n in [n for n, left in running.items() if left <= 0]:
            done[n] = now
            held -= arrivals[n][1] + arrivals[n][2]
            del running[n]
    return done, nearest


@settings(max_examples=often(60), deadline=None)
@given(ARRIVALS)
def test_it_answers_when_a_scheduler_that_goes_step_by_step_does(arrivals: list[Arrival]) -> None:
    arrivals = [(at + 1e-3 * number, held, wanted) for number, (at, held, wanted) in enumerate(arrivals)]
    expected, nearest = step_by_step(SPEED, arrivals)
    assume(nearest > TOLERANCE_S)  # else rounding says whether it is read before the next step or after it
    found = run_virtually(ended_on_a_new_server(arrivals))
    assert found == pytest.approx(expected, abs=TOLERANCE_S)


async def ended_on_a_new_server(arrivals: list[Arrival]) -> list[float]:
    return await ended(server_of(SPEED), arrivals)


def test_equal_requests_take_one_reading_and_as_many_steps_as_they_have_tokens_less_one() -> None:
    speed = ServerSpeed(0.01, 1e-3, 0.0, prefill_s=0.1, prefill_token_s=1e-3)

    async def main() -> list[float]:
        return await ended(server_of(speed), [(0.0, 10, 101)] * 4)

    assert run_virtually(main()) == pytest.approx([0.1 + 4 * 10 * 1e-3 + 100 * (0.01 + 4e-3)] * 4)


def test_what_is_decoded_in_a_time_is_the_inverse_of_the_time_it_takes() -> None:
    for speed in (SPEED, ServerSpeed(0.01), ServerSpeed(0.001, compute_s=0.1), ServerSpeed(0.01, token_s=1e-6)):
        for steps in (0.5, 1.0, 1000.0):
            assert speed.steps_in(speed.decode_s(steps, 7, 900), 7, 900) == pytest.approx(steps)


Act = tuple[float, str, int]
ACTS = st.lists(st.tuples(st.floats(0, 4), st.sampled_from(["publish", "fail", "leave", "drop"]), st.integers(0, 11)), max_size=8)


@settings(max_examples=often(80), deadline=None)
@given(ARRIVALS, ACTS)
def test_whatever_happens_each_request_ends_once_and_nothing_is_left(arrivals: list[Arrival], acts: list[Act]) -> None:
    run_virtually(_survives(arrivals, acts))


async def _survives(arrivals: list[Arrival], acts: list[Act]) -> None:
    server, version = server_of(SPEED, cores=0.5), 0
    requests = [request_of(held, wanted, number) for number, (_, held, wanted) in enumerate(arrivals)]
    dropped: set[int] = set()

    async def arrive(number: int) -> None:
        await asyncio.sleep(arrivals[number][0])
        server.add(requests[number])

    async def act(at: float, what: str, number: int) -> None:
        nonlocal version
        await asyncio.sleep(at)
        request = requests[number % len(requests)]
        if what == "publish":
            server.pause()
            await asyncio.sleep(0.3)
            version += 1
            server.resume(version)
        elif what == "fail":
            server.fail()
        elif at > arrivals[number % len(requests)][0]:
            server.leave(request) if what == "leave" else server.drop(request)
            dropped.update({number % len(requests)} if what == "drop" and not request.answer.done() else ())

    # publications of one server do not overlap
    acts = [(at if what != "publish" else place * 0.7, what, n) for place, (at, what, n) in enumerate(acts)]
    await asyncio.gather(*map(arrive, range(len(requests))), *(act(*each) for each in acts))
    await asyncio.wait([asyncio.ensure_future(asyncio.sleep(10_000))])
    sampled = 0
    for number, request in enumerate(requests):
        assert request.answer.done() != (number in dropped)
        part = request.answer.result() if request.answer.done() else None
        if part is not None:
            sampled += part.tokens
            assert part.tokens <= request.wanted
            assert all(count > 0 for _, count in part.spans)
            assert [each for each, _ in part.spans] == sorted({each for each, _ in part.spans})
    load = server.load()
    assert (load.running, load.waiting, load.cache_use) == (0, 0, 0.0)
    assert server.used.tokens == sampled


def test_a_publication_gives_the_tokens_after_it_the_new_version_and_costs_a_reading() -> None:
    async def main() -> tuple[Part | None, float]:
        server = server_of(ServerSpeed(0.1, prefill_s=0.5))
        request = request_of(10, 21)
        server.add(request)
        await asyncio.sleep(0.5 + 10 * 0.1)
        server.pause()
        await asyncio.sleep(3)
        server.resume(1)
        return await request.answer, asyncio.get_running_loop().time()

    part, at = run_virtually(main())
    assert part == Part([(0, 11), (1, 10)])
    assert at == pytest.approx(0.5 + 1 + 3 + 0.5 + 1)


def test_the_next_turn_of_a_session_reads_only_what_is_new_until_weights_change() -> None:
    async def turn(server: SimulatedServer, held: int) -> float:
        request = Request(7, held, 1, True, asyncio.get_running_loop().create_future())
        begun = asyncio.get_running_loop().time()
        server.add(request)
        await request.answer
        return asyncio.get_running_loop().time() - begun

    async def main() -> list[float]:
        server = server_of(ServerSpeed(0.1, prefill_token_s=1e-3))
        first, second = await turn(server, 100), await turn(server, 131)
        server.pause()
        server.resume(1)
        return [first, second, await turn(server, 140)]

    assert run_virtually(main()) == pytest.approx([0.1, 0.03, 0.14])


def test_two_that_share_a_core_take_twice_as_long() -> None:
    async def main() -> float:
        host = Host(1.0)
        servers = [SimulatedServer(str(n), ServerSpeed(0.1), host, Meter()) for n in range(2)]
        requests = [request_of(1, 11), request_of(1, 21)]
        for server, request in zip(servers, requests, strict=True):
            server.add(request)
        await asyncio.gather(*(request.answer for request in requests))
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(2 * 10 * 0.1 + 10 * 0.1)
