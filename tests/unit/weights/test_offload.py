"""Servers that give back their memory between two publications: the order of what they are told, and those that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aiohttp import web

from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import MEMORY, Fleet, Member, State
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.weights.publisher import Proof, WeightPublisher
from tests.support.fake_servers import FakeServer, FakeTrainer, blaming, fakes

MODEL = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 75, "max_position_embeddings": 128, "hidden_act": "silu"}
SLEEP = "/release_memory_occupation"
WAKE = "/resume_memory_occupation"
TO_OFFLOAD = ["/pause_generation", f"{SLEEP} cuda_graph kv_cache weights"]
WEIGHTS_ARRIVE = ["/begin_weight_update", "/end_weight_update", "/weights_checker", "/update_weight_version", "/flush_cache"]
TO_PUBLISH = [
    *("/pause_generation", f"{WAKE} weights", *WEIGHTS_ARRIVE, "/model_info"),
    *(f"{WAKE} cuda_graph kv_cache", "/continue_generation", "/generate"),
]


@dataclass
class Site:
    """Servers, and a publisher that lets them give back their memory."""

    servers: list[FakeServer]
    fleet: Fleet
    client: EngineClient
    said: list[str]
    trainer: FakeTrainer
    publisher: WeightPublisher

    def members(self) -> list[Member]:
        return self.fleet.members(*State)

    def states(self) -> list[State]:
        return [member.state for member in self.members()]

    def forget_calls(self) -> None:
        for server in self.servers:
            server.calls.clear()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.http.BACKOFF_S", 0.01)


@asynccontextmanager
async def offloaded(count: int, *, release: bool = True, **options: int) -> AsyncIterator[Site]:
    """Servers that have served version 1, and have given back their memory."""
    shape = parse_config(MODEL)
    proof = Proof(EngineLayout(shape, 1), shape.vocab_size, 1e-3)
    async with fakes(count, **options) as (servers, fleet, client, said):
        trainer = FakeTrainer(servers, list(proof.layout.tensors))
        publisher = WeightPublisher(fleet, client.control, trainer, proof, api_key="key", timeout_s=2.0, release=release)
        site = Site(servers, fleet, client, said, trainer, publisher)
        await publisher.publish(1)
        site.forget_calls()
        await publisher.offload()
        yield site


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 50))


def test_the_order() -> None:
    """Paused before they give memory back; weights have theirs before they come, the cache only when the digests agree."""

    async def scenario() -> None:
        async with offloaded(2) as s:
            assert s.states() == [State.SLEEPING] * 2
            assert [server.calls for server in s.servers] == [TO_OFFLOAD] * 2
            s.forget_calls()
            metrics = await s.publisher.publish(2)
            assert [server.calls for server in s.servers] == [TO_PUBLISH] * 2
            assert s.states() == [State.SERVING] * 2
            assert 0 < metrics["publish/wake"] < metrics["publish/paused"]
            assert "publish/wake" not in await s.publisher.publish(3), "they were awake"

    run(scenario)


def test_none_is_asked_while_they_sleep() -> None:
    """A request waits for the next publication, and gets tokens of its version; `heal` leaves those that sleep alone."""

    async def scenario() -> None:
        async with offloaded(1) as s:
            sample = s.client.generate([1], max_new_tokens=4, temperature=1.0, stop_token_ids=[], session=0)
            waiting = asyncio.ensure_future(sample)
            await s.publisher.heal()
            await asyncio.sleep(0.1)
            assert s.servers[0].generations == []
            assert s.states() == [State.SLEEPING]
            await s.publisher.publish(2)
            assert (await waiting).versions == [2] * 4

    run(scenario)


def test_without_release_they_go_on() -> None:
    async def scenario() -> None:
        async with offloaded(1, release=False) as s:
            assert s.states() == [State.SERVING]
            assert s.servers[0].calls == []
            await asyncio.wait_for(s.fleet.memory_free(), 1)

    run(scenario)


def test_an_answer_that_does_not_come() -> None:
    """One server gives its memory back and never says so: suspended, and woken like the others at the next publication."""

    async def scenario() -> None:
        async with offloaded(2) as s:
            await s.publisher.publish(2)

            def silent() -> web.Response:
                s.servers[0].given_back = set(MEMORY)
                return web.Response(status=500, text="stuck")

            s.servers[0].faults[SLEEP] = silent
            await s.publisher.offload()
            assert s.states() == [State.SUSPENDED, State.SLEEPING]
            assert "stuck" in s.said[-1]
            del s.servers[0].faults[SLEEP]
            await s.publisher.offload()
            assert s.servers[0].calls.count(f"{SLEEP} cuda_graph kv_cache weights") == 1, "nothing is given back twice"
            await s.publisher.publish(3)
            assert s.states() == [State.SERVING] * 2
            assert [server.given_back for server in s.servers] == [set(), set()]

    run(scenario)


def test_a_broken_publication_takes_memory_once() -> None:
    """Sending fails after the weights have their memory: the second attempt does not ask for it again."""

    async def scenario() -> None:
        async with offloaded(2) as s:
            s.forget_calls()
            s.trainer.faults = [blaming()]
            await s.publisher.publish(2)
            assert s.states() == [State.SERVING] * 2
            for server in s.servers:
                taken = [call for call in server.calls if call.startswith(WAKE)]
                assert taken == [f"{WAKE} weights", f"{WAKE} cuda_graph kv_cache"]

    run(scenario)


def test_half_awake_servers_sleep_again() -> None:
    """All that was taken is given back, and nothing else."""

    async def scenario() -> None:
        async with offloaded(1) as s:
            (member,) = s.members()
            await s.client.control.wake(member.url, ["weights"])
            member.given_back -= {"weights"}
            s.forget_calls()
            await s.publisher.offload()
            assert s.servers[0].calls == ["/pause_generation", f"{SLEEP} weights"]

    run(scenario)


def test_death_and_return() -> None:
    """A server that dies asleep is lost, and not started before the trainer is done; its successor is awake, and is not woken."""

    async def scenario() -> None:
        async with offloaded(2, restarts=1) as s, FakeServer().serving() as late:
            await s.servers[1].die()
            s.fleet.lose(s.members()[1], "it died")
            restart = asyncio.ensure_future(s.fleet.memory_free())
            await s.publisher.offload()
            await asyncio.sleep(0.05)
            assert not restart.done()
            await s.publisher.publish(2)
            await asyncio.wait_for(restart, 1)
            assert s.states() == [State.SERVING, State.STARTING]
            s.fleet.join("server 1", late.url)
            s.trainer.fakes = [s.servers[0], late]
            await s.publisher.heal()
            assert s.states() == [State.SERVING] * 2
            assert not any(call.startswith(WAKE) for call in late.calls)

    run(scenario)


def test_a_server_that_dies_at_the_moment() -> None:
    """It gives no sign of life when it is to give back its memory: lost at once; the other one sleeps."""

    async def scenario() -> None:
        async with offloaded(2) as s:
            await s.publisher.publish(2)
            await s.servers[0].die()
            await s.publisher.offload()
            assert s.states() == [State.GONE, State.SLEEPING]

    run(scenario)
