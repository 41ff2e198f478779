"""A publication against servers and a trainer that misbehave: who is named, tried again, lost; and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from aiohttp import web

from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet, State
from ctpo_megatron.engine.layout import EngineLayout
from ctpo_megatron.errors import ProcessDied, WeightSyncError
from ctpo_megatron.models.config import parse_config
from ctpo_megatron.types import RoutingShape
from ctpo_megatron.weights.proof.canary import canary_tokens
from ctpo_megatron.weights.protocol import Sent
from ctpo_megatron.weights.publisher import Proof, WeightPublisher
from tests.support.fake_servers import FakeServer, FakeTrainer, blaming, fakes

ORDER = [
    "/pause_generation",
    "/begin_weight_update",
    "/end_weight_update",
    "/weights_checker",
    "/update_weight_version",
    "/flush_cache",
    "/model_info",
    "/continue_generation",
    "/generate",  # the canary
]
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 75,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
NORM = "model.layers.0.input_layernorm.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


class Site:
    """Servers, trainer and publisher of a test."""

    def __init__(self, servers: list[FakeServer], fleet: Fleet, client: EngineClient, said: list[str], proof: Proof) -> None:
        self.servers, self.fleet, self.client, self.said = servers, fleet, client, said
        self.trainer = FakeTrainer(servers, list(proof.layout.tensors))
        self.publisher = WeightPublisher(fleet, client.control, self.trainer, proof, api_key="key", timeout_s=2.0)

    def states(self) -> list[State]:
        found = {member.name: member.state for state in State for member in self.fleet.members(state)}
        return [found[f"server {number}"] for number in range(len(found))]

    def urls(self, *numbers: int) -> list[str]:
        return [self.servers[number].url for number in numbers]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.http.BACKOFF_S", 0.01)


@pytest.fixture(scope="module")
def proof() -> Proof:
    shape = parse_config(MODEL)
    return Proof(EngineLayout(shape, 1), shape.vocab_size, 1e-3)


@asynccontextmanager
async def site(count: int, proof: Proof, **options: int) -> AsyncIterator[Site]:
    async with fakes(count, **options) as (servers, fleet, client, said):
        yield Site(servers, fleet, client, said, proof)


def run(scenario: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 50))


def test_a_publication(proof: Proof) -> None:
    """Its steps in order at every server; connected once, while the servers stay the same."""

    async def scenario() -> None:
        async with site(2, proof) as s:
            metrics = await s.publisher.publish(1)
            assert s.trainer.prepared == [(1, 0)], "before anything is asked of a server"
            assert s.trainer.asked == [0], "connected before generation is paused"
            assert [server.calls for server in s.servers] == [ORDER, ORDER]
            assert s.states() == [State.SERVING] * 2
            done = await s.client.generate([1], max_new_tokens=4, temperature=1.0, stop_token_ids=[], session=0)
            assert done.versions == [1] * 4
            phases = {"total", "prepare", "paused", "pause", "connect", "transfer", "attest", "canary"}
            phases |= {"gather", "send", "digest", "wait", "canary_gap_mean", "canary_gap_max"}
            assert metrics.keys() == {f"publish/{phase}" for phase in phases} | {
                f"servers/{name}" for name in ("serving", "aside", "lost", "rejoined")
            }
            assert (metrics["publish/send"], metrics["servers/serving"]) == (0.2, 2)
            again = await s.publisher.publish(2)
            assert "publish/connect" not in again
            assert again["publish/changed"] == 1
            s.trainer.stuck = 2
            assert (await s.publisher.publish(3))["publish/changed"] == 0
            await s.publisher.heal()
            assert s.trainer.published == [1, 2, 3]
            assert s.trainer.connections == [s.urls(0, 1)]

    run(scenario)


def test_a_late_server(proof: Proof) -> None:
    """It gets the current version before it serves, and only it; with the next publication all are one group again."""

    async def scenario() -> None:
        async with site(2, proof) as s, FakeServer().serving() as late:
            await s.publisher.publish(3)
            member = s.fleet.join("server 2", late.url)
            s.servers.append(late)
            s.trainer.fakes = s.servers
            assert s.states() == [State.SERVING, State.SERVING, State.JOINING]
            await s.publisher.heal()
            assert (member.state, late.version) == (State.SERVING, "3")
            assert (s.trainer.connections, s.trainer.published) == ([s.urls(0, 1), s.urls(2)], [3, 3])
            assert s.servers[0].calls == ORDER, "the others were left alone"
            await s.publisher.publish(4)
            assert s.trainer.connections[-1] == s.urls(0, 1, 2)

    run(scenario)


def test_a_server_that_cannot_be_connected(proof: Proof) -> None:
    """Found out while all serve: it is suspended and tried again from scratch, and the other one gets the version as ever."""

    async def scenario() -> None:
        async with site(2, proof) as s, FakeServer().serving() as late:
            await s.publisher.publish(1)
            s.servers.append(late)
            s.fleet.join("server 2", late.url)
            before = len(s.servers[0].calls)
            s.trainer.unreachable = s.urls(2)
            await s.publisher.publish(2)
            assert s.trainer.connections == [s.urls(0, 1), *[s.urls(0, 1, 2)] * 2]
            assert [server.version for server in s.servers] == ["2"] * 3
            assert s.states() == [State.SERVING] * 3
            assert s.trainer.published == [1, 2]
            assert s.servers[0].calls[before:] == ORDER, "it was paused once"
            assert s.said[0].startswith("server 2 is suspended: it did not come into the group")

    run(scenario)


def test_a_server_that_fails_between_connecting_and_sending(proof: Proof) -> None:
    """It does not pause: the senders are connected anew without it, as they would wait for it."""

    async def scenario() -> None:
        async with site(2, proof) as s:
            s.servers[1].faults["/pause_generation"] = lambda: web.Response(status=500)
            await s.publisher.publish(1)
            assert s.trainer.connections[:2] == [s.urls(0, 1), s.urls(0)]
            assert s.states() == [State.SERVING, State.GONE]

    run(scenario)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda weights: {name: 0 if name == QKV else value for name, value in weights.items()}, rf"1 of .*\n.*{QKV} holds"),
        (lambda weights: {name: value for name, value in weights.items() if name != NORM}, f"{NORM} is not in the engine"),
    ],
)
def test_a_mismatch_is_mended(proof: Proof, fault: Callable[[dict[str, int]], dict[str, int]], named: str) -> None:
    """The server is named with what differs and gets everything once more through a new group; the other one serves meanwhile."""

    async def scenario() -> None:
        async with site(2, proof) as s:
            s.trainer.faults = [lambda fake, weights: fault(weights) if fake is s.servers[1] else weights]
            await s.publisher.publish(1)
            assert s.states() == [State.SERVING] * 2
            assert s.trainer.connections == [s.urls(0, 1), s.urls(1)]
            (suspended, healed) = s.said
            assert suspended.startswith("server 1 is suspended")
            assert re.search(named, suspended)
            assert healed == "server 1 serves again, with version 1"
            assert s.servers[0].calls == ORDER

    run(scenario)


def test_one_token_that_differs_widely_is_reported(proof: Proof) -> None:
    """The mean decides. A token that a router sent elsewhere, as in healthy mixtures, ends nothing."""

    async def scenario() -> None:
        async with site(2, replace(proof, tolerance=0.1)) as s:
            s.servers[1].outlier = 5.0
            metrics = await s.publisher.publish(1)
            assert s.states() == [State.SERVING] * 2
            assert metrics["publish/canary_gap_max"] == 5
            assert metrics["publish/canary_gap_mean"] == pytest.approx(5 / 63)

    run(scenario)


def test_the_trainer_follows_each_servers_experts(proof: Proof) -> None:
    """One pass of the trainer for each server, as each of them has routed by itself."""
    routing = RoutingShape(num_layers=2, expert_layers=(1,), experts=8, top_k=2)
    texts = [list(range(20, 60))]

    async def scenario() -> None:
        async with site(2, replace(proof, routing=routing, texts=texts)) as s:
            for number, server in enumerate(s.servers):
                server.experts = np.full((64, 2, 2), number)
            await s.publisher.publish(1)
            assert s.states() == [State.SERVING] * 2
            assert [tokens for tokens, _ in s.trainer.canaries] == [canary_tokens(75, 1, texts)] * 2
            assert [(experts.shape, set(experts.flatten())) for _, experts in s.trainer.canaries] == [
                ((64, 1, 2), {0}),
                ((64, 1, 2), {1}),
            ]
            s.servers[0].experts = None
            assert (await s.publisher.publish(2))["servers/lost"] == 1
            assert "reports no experts; was it started with --enable-return-routed-experts?" in s.said[0]

    run(scenario)


def test_twice_wrong_is_lost(proof: Proof) -> None:
    """Old weights after both attempts: it is given up, the run goes on; when the last one goes, nothing is left to do."""

    async def scenario() -> None:
        async with site(2, proof) as s:

            def stale(fake: FakeServer, weights: dict[str, int]) -> dict[str, int]:
                return fake.digests if fake is s.servers[0] else weights

            s.trainer.faults = [stale, stale]
            assert (await s.publisher.publish(1))["servers/lost"] == 1
            assert s.states() == [State.GONE, State.SERVING]
            s.servers[1].logprob = -1.01
            with pytest.raises(WeightSyncError, match=rf"{s.servers[1].url} computes other log-probs .* by up to 0\.01"):
                await s.publisher.publish(2)

    run(scenario)


@pytest.mark.parametrize("count", [1, 2])
def test_what_no_attempt_can_heal_is_tried_twice(proof: Proof, count: int) -> None:
    """The same weights, the same difference, at every server: restarts that are left are not spent on it."""

    async def scenario() -> None:
        async with site(count, proof, restarts=3) as s:
            for server in s.servers:
                server.logprob = -3.31
            with pytest.raises(WeightSyncError, match=r"differ by 2\.31 .*\n.*sent twice, led to the same difference") as caught:
                await s.publisher.publish(0)
            assert "would not help" in str(caught.value)
            assert s.trainer.published == [0, 0]
            assert [server.calls.count("/generate") for server in s.servers] == [2] * count
            assert not s.fleet.members(State.STARTING, State.GONE)

    run(scenario)


def test_a_difference_of_one_server_is_its_own(proof: Proof) -> None:
    """Where another one agrees with the trainer, the one that does not is lost, and may be started again."""

    async def scenario() -> None:
        async with site(2, proof, restarts=3) as s:
            s.servers[1].logprob = -3.31
            assert (await s.publisher.publish(1))["servers/lost"] == 1
            assert s.states() == [State.SERVING, State.STARTING]
            replaced = s.fleet.join("server 1", s.servers[1].url)
            await s.publisher.heal()
            assert replaced.state is State.STARTING
            assert s.fleet.metrics()["servers/lost"] == 2

    run(scenario)


def test_a_difference_that_changes_is_tried_again(proof: Proof) -> None:
    """Other differences from the same weights are no proof that nothing helps: the server is started again."""

    async def scenario() -> None:
        async with site(1, proof, restarts=1) as s:
            server, shown = s.servers[0], iter([-3.0, -4.0])

            def other() -> None:
                server.logprob = next(shown, -1.0)

            server.faults["/generate"] = other
            await s.publisher.publish(1)
            assert s.states() == [State.STARTING]
            member = s.fleet.join("server 0", server.url)
            await s.publisher.heal()
            assert member.state is State.SERVING

    run(scenario)


def test_the_group_is_rebuilt(proof: Proof) -> None:
    """A server dies while weights are on their way: the others are connected anew and get them. One that may restart is left."""

    async def scenario() -> None:
        async with site(3, proof, restarts=1) as s:
            await s.publisher.publish(1)

            def dies(_fake: FakeServer, _weights: dict[str, int]) -> dict[str, int]:
                s.servers[2].faults = dict.fromkeys(ORDER, lambda: web.Response(status=500))
                raise WeightSyncError("the broadcast broke", servers=[s.servers[2].url])

            s.trainer.faults = [dies]
            await s.publisher.publish(2)
            assert s.states() == [State.SERVING, State.SERVING, State.STARTING]
            assert s.trainer.connections == [s.urls(0, 1, 2), s.urls(0, 1)]
            assert [server.version for server in s.servers[:2]] == ["2", "2"]
            assert s.servers[0].session is False, "the session that the broken update left open was closed"

    run(scenario)


def test_nobody_is_blamed(proof: Proof) -> None:
    """Where the transport cannot say who failed, all are tried once more, and then it is over."""

    async def scenario() -> None:
        async with site(2, proof) as s:
            s.trainer.faults = [blaming(), blaming()]
            with pytest.raises(WeightSyncError, match="reached no inference server") as raised:
                await s.publisher.publish(1)
            assert str(raised.value).count("the broadcast broke") == 2
            assert s.trainer.published == [1, 1]

    run(scenario)


@pytest.mark.parametrize("path", ["/pause_generation", "/weights_checker", "/generate"])
def test_a_silent_server(proof: Proof, path: str) -> None:
    """It answers one request never: found out within the bound, twice, while the others serve."""

    async def scenario() -> None:
        async with site(2, proof) as s:
            s.servers[0].faults[path] = lambda: web.Response(status=500, text="stuck")
            begin = time.monotonic()
            await s.publisher.publish(1)
            assert time.monotonic() - begin < 12
            assert s.states() == [State.GONE, State.SERVING]
            assert path in s.said[0]

    run(scenario)


def test_the_trainer_fails(proof: Proof) -> None:
    """That is nobody else's fault: it comes out as it is."""

    async def scenario() -> None:
        async with site(1, proof) as s:

            def died(_fake: FakeServer, _weights: dict[str, int]) -> dict[str, int]:
                raise ProcessDied("trainer rank 1 died")

            s.trainer.faults = [died]
            with pytest.raises(ProcessDied, match="trainer rank 1"):
                await s.publisher.publish(1)

    run(scenario)


def test_no_digests_prove_nothing(proof: Proof) -> None:
    async def scenario() -> None:
        async with site(1, proof) as s:

            async def publish(version: int) -> Sent:
                return Sent(version)

            s.trainer.publish = publish
            with pytest.raises(WeightSyncError, match="the trainer gave digests for 0 engine ranks"):
                await s.publisher.publish(1)

    run(scenario)
