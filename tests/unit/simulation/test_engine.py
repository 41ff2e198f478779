"""A simulated generation goes the way of a real one over the servers: both are `engine.dispatch`."""

from __future__ import annotations

import asyncio

import pytest

from ctpo_megatron.config.traffic import MovingConfig, TrafficConfig
from ctpo_megatron.engine.dispatch import MAX_FAILURES
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.pace import ENOUGH
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.errors import EngineError
from ctpo_megatron.simulation.clock import run_virtually
from ctpo_megatron.simulation.engine import ServerLoads, SimulatedEngine
from ctpo_megatron.simulation.host import Host
from ctpo_megatron.simulation.meter import Meter
from ctpo_megatron.simulation.players import Playing
from ctpo_megatron.simulation.server import SimulatedServer
from ctpo_megatron.simulation.speeds import ServerSpeed
from ctpo_megatron.simulation.tokens import Spans, Written, as_list
from ctpo_megatron.simulation.workload import Said, Script
from ctpo_megatron.types import Generation

TOKEN_S = 0.01
LONG = 1001  # tokens of an answer, which take ten seconds alone


class Parts:
    """Servers with these seconds per token, all at version 0, and an engine over them; all answers are LONG."""

    def __init__(self, *token_s: float, **traffic: object) -> None:
        meter, host = Meter(), Host()
        names = [f"server {number}" for number in range(len(token_s))]
        self.servers = {
            name: SimulatedServer(name, ServerSpeed(each), host, meter) for name, each in zip(names, token_s, strict=True)
        }
        self.fleet = Fleet(patience_s=60.0)
        self.fleet.serve([self.fleet.join(name, name) for name in names], 0)
        config = TrafficConfig.model_validate(traffic)
        self.traffic = Traffic(config, self.fleet, ServerLoads(self.servers), most=100)
        book = {session: Playing(Script((Said(LONG),), 1.0)) for session in range(100)}
        self._engine = SimulatedEngine(self.fleet, self.traffic, self.servers, book)

    async def generate(self, session: int = 0, *, begun: int = 0, deadline: float | None = None, most: int = LONG) -> Generation:
        """`begun`: tokens in hand."""
        done = Generation(as_list(Written(begun)), as_list(Written(begun)), as_list(Spans([(0, begun)] if begun else [])))
        return await self._engine.generate([1] * 20, done, max_new_tokens=most, session=session, deadline=deadline)


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_deadline_holds_while_a_server_is_waited_for() -> None:
    """With tokens in hand it ends there; without any it waits for its turn, and asks for one."""

    async def scenario() -> None:
        parts = Parts(TOKEN_S, per_server=1)
        first = asyncio.ensure_future(parts.generate())
        await asyncio.sleep(1.0)
        fresh = asyncio.ensure_future(parts.generate(1, deadline=3.0))
        begun = await parts.generate(2, begun=7, deadline=3.0)
        assert (len(begun.token_ids), begun.finish, now()) == (7, "deadline", pytest.approx(3.0))
        assert (len((await first).token_ids), first.result().finish) == (LONG, "stop")
        assert (len((await fresh).token_ids), fresh.result().finish) == (1, "deadline")
        assert now() == pytest.approx((LONG - 1) * TOKEN_S, abs=0.1)

    run_virtually(scenario())


def test_a_deadline_keeps_what_a_server_has_by_then() -> None:
    async def scenario() -> None:
        done = await Parts(TOKEN_S).generate(deadline=2.0)
        assert (len(done.token_ids), done.finish, now()) == (pytest.approx(200, abs=2), "deadline", pytest.approx(2.0))

    run_virtually(scenario())


def test_a_request_leaves_a_slow_server_with_what_it_has() -> None:
    async def scenario() -> None:
        parts = Parts(TOKEN_S, 100 * TOKEN_S, moving=MovingConfig(factor=2.0, least_s=0.1))
        for number in range(ENOUGH):
            await parts.generate(2 * number, most=100)
        begun = now()
        done = await parts.generate(1)
        assert len(done.token_ids) == LONG
        assert now() - begun < 4 * LONG * TOKEN_S, "twice what the other takes, and then there"
        assert parts.traffic.metrics()["servers/moved"] == 1

    run_virtually(scenario())


def test_servers_that_fail_again_and_again_end_a_generation() -> None:
    async def scenario() -> None:
        parts = Parts(TOKEN_S)
        generation = asyncio.ensure_future(parts.generate())
        for _ in range(MAX_FAILURES):
            await asyncio.sleep(1.0)
            (member,) = parts.fleet.members("serving")
            parts.servers[member.name].fail()
            parts.fleet.suspend(member, "it failed")
            parts.fleet.serve([member], 0)
        with pytest.raises(EngineError, match=f"{MAX_FAILURES} attempts at one generation failed, the last one on server 0"):
            await generation
        assert parts.fleet.members("serving")[0].in_flight == 0

    run_virtually(scenario())
