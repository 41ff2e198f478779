"""Servers that are set aside keep their weights while others are published to, and come back; nobody else's requests go there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import State
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import AsideLost
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.weights.publisher import Proof, WeightPublisher
from tests.support.fake_servers import FakeTrainer, fakes
from tests.unit.weights.test_publisher import MODEL


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.http.BACKOFF_S", 0.01)


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 50))


async def versions(client: EngineClient, *, aside: bool, sessions: int = 6) -> set[int]:
    made = [
        await client.generate([1], max_new_tokens=4, temperature=1.0, stop_token_ids=[], session=session, aside=aside)
        for session in range(sessions)
    ]
    return {version for each in made for version in each.versions}


def test_they_hold_their_version_and_take_the_newest_afterwards() -> None:
    shape = parse_config(MODEL)
    proof = Proof(EngineLayout(shape, 1), shape.vocab_size, 1e-3)

    async def scenario() -> None:
        async with fakes(3) as (servers, fleet, client, said):
            trainer = FakeTrainer(servers, list(proof.layout.tensors))
            publisher = WeightPublisher(fleet, client.control, trainer, proof, api_key="key", timeout_s=2.0)
            await publisher.publish(1)
            assert fleet.set_aside(1) == 1
            metrics = await publisher.publish(2)
            assert (metrics["servers/serving"], metrics["servers/aside"]) == (2, 1)
            await publisher.heal()
            assert trainer.connections[-1] == [server.url for server in servers[:2]]
            assert await versions(client, aside=False) == {2}
            before = len(servers[2].generations)
            assert await versions(client, aside=True) == {1}
            assert len(servers[2].generations) == before + 6, "all of them, and no others"
            fleet.give_back()
            assert [member.state for member in fleet.members(*State)].count(State.JOINING) == 1
            assert await versions(client, aside=False) == {2}, "not before it has them"
            await publisher.heal()
            assert await versions(client, aside=False, sessions=9) == {2}
            assert len(servers[2].generations) == before + 9
            assert said[-1].startswith("server 2 serves again, with version 2")
            fleet.give_back()
            assert len(fleet.members(State.SERVING)) == 3, "nothing was aside any more"

    run(scenario)


def test_one_that_comes_back_while_others_are_about_to_be_published_to_gets_it_too() -> None:
    """They hold the version that it has kept when it comes back, so it may serve; it must not with that one afterwards."""
    shape = parse_config(MODEL)
    proof = Proof(EngineLayout(shape, 1), shape.vocab_size, 1e-3)

    async def scenario() -> None:
        async with fakes(3) as (servers, fleet, client, _):

            class GivesBack(FakeTrainer):
                async def prepare(self, version: int) -> None:
                    await super().prepare(version)
                    fleet.give_back()

            publisher = WeightPublisher(
                fleet, client.control, GivesBack(servers, list(proof.layout.tensors)), proof, api_key="key", timeout_s=2.0
            )
            await publisher.publish(1)
            assert fleet.set_aside(1) == 1
            metrics = await publisher.publish(2)
            assert (metrics["servers/serving"], metrics["servers/aside"]) == (3, 0)
            assert await versions(client, aside=False) == {2}

    run(scenario)


def test_one_is_always_left_to_train_with() -> None:
    async def scenario() -> None:
        async with fakes(3) as (_, fleet, _, _):
            members = fleet.members(State.JOINING)
            fleet.serve(members[:1], 0)
            assert fleet.set_aside(2) == 0
            fleet.serve(members[1:], 0)
            assert fleet.set_aside(5) == 2
            assert [member.name for member in members if member.aside] == ["server 1", "server 2"]
            fleet.give_back()
            assert len(fleet.members(State.SERVING)) == 3, "with the newest weights, they go on serving"

    run(scenario)


@pytest.mark.parametrize("lost", [True, False])
def test_what_fails_holds_its_version_no_more(lost: bool) -> None:
    async def scenario() -> None:
        async with fakes(3) as (servers, fleet, client, _):
            members = fleet.members(State.JOINING)
            fleet.serve(members, 4)
            for server in servers:
                server.version = "4"
            fleet.set_aside(2)
            (fleet.lose if lost else fleet.suspend)(members[1], "a test")
            assert await versions(client, aside=True) == {4}, "the other one has it still"
            (fleet.lose if lost else fleet.suspend)(members[2], "a test")
            with pytest.raises(AsideLost, match="no inference server is set aside any more:\nserver 1"):
                await versions(client, aside=True)
            assert await versions(client, aside=False) == {4}
            assert fleet.publishable(State.SUSPENDED) == ([] if lost else members[1:]), "a publication may go there again"

    run(scenario)
