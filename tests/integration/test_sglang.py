"""A real SGLang server on CPUs: what it samples, how its weights are replaced, who may ask it, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import requests
import torch
from leftovers import left_in_shared_memory

from ctpo_megatron.engine.answers import Experts
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.fleet import Fleet
from ctpo_megatron.engine.processes import group_members
from ctpo_megatron.errors import EngineError, EngineRefused, WeightSyncError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.context import RESERVED
from ctpo_megatron.record.events import Emit, discard
from ctpo_megatron.toy.model import make_toy_model
from ctpo_megatron.types import WHOLE, Generation, TrainSample, Truncation
from ctpo_megatron.weights.protocol import Sent, Server
from ctpo_megatron.weights.publisher import WeightPublisher
from ctpo_megatron.weights.transports.broadcast import BroadcastSender
from tests.support.engines import (
    HOST,
    TIMEOUT_S,
    RunningServer,
    checkpoint_tensors,
    endless,
    in_flight,
    load_reference,
    reference_logprobs,
    session,
    start_server,
)
from tests.support.ranks import run_ranks
from tests.support.routing import check_crossing, check_record, drift, train_samples
from tests.support.routing import sample as record
from tests.support.truncation import check_supports, whole_logp

AGREEMENT = 1e-4  # largest difference of a token's log-prob between SGLang and transformers, float32
PROMPT = list(b"What is 12 * 12?")
END_OF_TURN = 257

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


class LocalTrainer:
    """A trainer of one process that holds the model to publish."""

    def __init__(self, sender: BroadcastSender, model: torch.nn.Module, *, bucket_size: int = 7) -> None:
        self._sender = sender
        self._model = model
        self._bucket_size = bucket_size

    async def connect(self, servers: list[Server], api_key: str) -> None:
        await asyncio.to_thread(self._sender.connect, servers, api_key)

    async def prepare(self, _version: int) -> None: ...

    async def publish(self, version: int) -> Sent:
        named = checkpoint_tensors(self._model)
        buckets = [named[at : at + self._bucket_size] for at in range(0, len(named), self._bucket_size)]
        return await asyncio.to_thread(self._sender.send, buckets, version)

    async def canary_logp(self, token_ids: list[int], experts: Experts | None = None) -> list[float]:
        return reference_logprobs(self._model, token_ids[:1], Generation(token_ids[1:]), 1.0)


@asynccontextmanager
async def publishing(
    server: RunningServer, model: torch.nn.Module, emit: Emit = discard
) -> AsyncIterator[tuple[EngineClient, WeightPublisher]]:
    sender = await asyncio.to_thread(server.sender)
    try:
        async with server.client(emit) as client:
            trainer, key = LocalTrainer(sender, model), server.api_key
            yield client, WeightPublisher(client.fleet, client.control, trainer, server.proof(), api_key=key, timeout_s=TIMEOUT_S)
    finally:
        await asyncio.to_thread(sender.close)


def perturbed(directory: Path, seed: int) -> torch.nn.Module:
    """The model with every weight a little different."""
    model = load_reference(directory)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def serving(url: str) -> Fleet:
    fleet = Fleet(patience_s=1)
    fleet.serve([fleet.join("server", url)], 0)
    return fleet


async def sample(
    client: EngineClient, temperature: float, *, tokens: int = 48, session: int = 0, stop: tuple[int, ...] = (END_OF_TURN,)
) -> Generation:
    return await client.generate(
        PROMPT, max_new_tokens=tokens, temperature=temperature, stop_token_ids=list(stop), session=session
    )


def check_against(model: torch.nn.Module, generation: Generation, temperature: float) -> None:
    expected = reference_logprobs(model, PROMPT, generation, temperature)
    assert generation.rollout_logp == pytest.approx(expected, abs=AGREEMENT)


def eventually(condition: Callable[[], bool], within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_weights_by_broadcast(server: RunningServer, qwen3: Path) -> None:
    """Version 0 from disk, then new weights: log-probs agree with transformers before and after, and versions are echoed."""

    async def scenario() -> None:
        old, new = load_reference(qwen3), perturbed(qwen3, seed=2)
        async with publishing(server, new) as (client, publisher):
            assert await client.control.version(server.url) == "0"
            before = [await sample(client, temperature) for temperature in (1.0, 0.7, 0.7)]
            for generation, temperature in zip(before, (1.0, 0.7, 0.7), strict=True):
                assert set(generation.versions) == {0}
                check_against(old, generation, temperature)
            assert len({tuple(generation.token_ids) for generation in before}) > 1, "sampling is not random"
            checksums = await client.control.checksums(server.url)
            await publisher.publish(3)
            assert await client.control.version(server.url) == "3"
            assert await client.control.checksums(server.url) != checksums
            after = await sample(client, 0.7)
            assert set(after.versions) == {3}
            check_against(new, after, 0.7)
            with pytest.raises(AssertionError):  # the two models differ by far more than the bound
                check_against(old, after, 0.7)

    asyncio.run(scenario())


def test_greedy_and_stop(server: RunningServer, qwen3: Path) -> None:
    """Temperature 0 takes the likeliest token; the stop token is kept; the limit is the limit."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(4)
            greedy = await client.generate(PROMPT, max_new_tokens=16, temperature=0.0, stop_token_ids=[], session=0)
            assert (len(greedy.token_ids), greedy.finish) == (16, "length")
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT + greedy.token_ids])).logits[0, len(PROMPT) - 1 : -1]
            assert greedy.token_ids == logits.argmax(-1).tolist()
            check_against(model, greedy, 1.0)
            stop = greedy.token_ids[9]
            first = greedy.token_ids.index(stop)
            stopped = await client.generate(PROMPT, max_new_tokens=16, temperature=0.0, stop_token_ids=[stop], session=0)
            assert (stopped.token_ids, stopped.finish) == (greedy.token_ids[: first + 1], "stop")

    asyncio.run(scenario())


def test_batch_of_all_lengths(server: RunningServer, qwen3: Path) -> None:
    """Prompts from 1 to 700 tokens at once, some sharing a prefix: each gets the log-probs it would get alone."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        shared = [(7 * i) % 250 for i in range(300)]
        prompts = [[(3 * i + n) % 250 for i in range(n)] for n in (1, 2, 17, 90, 230, 700)] + [shared + [n] * n for n in range(6)]
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(6)
            generations = await asyncio.gather(
                *(
                    client.generate(prompt, max_new_tokens=30, temperature=1.0, stop_token_ids=[], session=index)
                    for index, prompt in enumerate(prompts)
                )
            )
        for prompt, generation in zip(prompts, generations, strict=True):
            expected = reference_logprobs(model, prompt, generation, 1.0)
            assert generation.rollout_logp == pytest.approx(expected, abs=AGREEMENT)

    asyncio.run(scenario())


def test_update_while_generating(server: RunningServer, qwen3: Path) -> None:
    """Generations in flight lose no token: the later ones come from the new weights, given all tokens before them."""

    async def scenario() -> None:
        old, new = load_reference(qwen3), perturbed(qwen3, seed=5)
        async with publishing(server, old) as (client, publisher):
            await publisher.publish(10)
        async with publishing(server, new) as (client, publisher):
            running = [
                asyncio.create_task(
                    client.generate(PROMPT, max_new_tokens=1000, temperature=1.0, stop_token_ids=[], session=session)
                )
                for session in range(4)
            ]
            await in_flight(server.url, server.api_key, running=4)
            await publisher.publish(11)
            generations = await asyncio.gather(*running)
        for generation in generations:
            boundary = generation.versions.count(10)
            assert generation.versions == [10] * boundary + [11] * (len(generation.versions) - boundary)
            of_old = reference_logprobs(old, PROMPT, generation, 1.0)
            of_new = reference_logprobs(new, PROMPT, generation, 1.0)
            assert generation.rollout_logp == pytest.approx(of_old[:boundary] + of_new[boundary:], abs=AGREEMENT)
            assert 0 < boundary < len(generation.versions) == 1000

    asyncio.run(scenario())


def test_aborted_generation_goes_on(server: RunningServer, qwen3: Path) -> None:
    """SGLang may abort what is in flight; the client asks for the rest."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(12)
            running = [asyncio.create_task(sample(client, 1.0, tokens=1000, session=session)) for session in range(8)]
            await in_flight(server.url, server.api_key, running=4)  # of those that do not end by themselves
            answer = await asyncio.to_thread(
                requests.post,
                f"{server.url}/abort_request",
                json={"abort_all": True, "rid": ""},
                headers={"Authorization": f"Bearer {server.api_key}"},
                timeout=10,
            )
            assert answer.status_code == 200
            generations = await asyncio.gather(*running)
        for generation in generations:
            assert (generation.finish == "stop") == (generation.token_ids[-1] == END_OF_TURN)
            assert generation.finish == "stop" or len(generation.token_ids) == 1000
            check_against(model, generation, 1.0)

    asyncio.run(scenario())


CUTS = [
    Truncation(top_k=5),
    Truncation(top_p=0.7, top_k=60),
    Truncation(top_k=60, min_p=0.1),
    Truncation(top_p=0.9, top_k=20, min_p=0.02),
]


def test_truncated_sampling(server: RunningServer, qwen3: Path) -> None:
    """Supports are what was cut to, log-probs are among them, in one batch with whole distributions and over an abort."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        options = {"temperature": 0.7, "stop_token_ids": [END_OF_TURN]}
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(13)
            running = [
                asyncio.create_task(client.generate(PROMPT, max_new_tokens=300, truncation=cut, session=n, recorded=0, **options))
                for n, cut in enumerate([*CUTS, WHOLE])
            ]
            await in_flight(server.url, server.api_key, running=3)
            await client.interrupt()  # parts are in; the rest is asked for anew
            client.go_on()
            generations = await asyncio.gather(*running)
            for generation, cut in zip(generations, CUTS, strict=False):
                check_supports(model, PROMPT, generation, 0.7, cut)
                assert generation.supports.counts.max() > 1
            assert generations[-1].supports is None
            check_against(model, generations[-1], 0.7)
            evaluated = await client.generate(PROMPT, max_new_tokens=20, truncation=CUTS[0], session=0, **options)
            assert evaluated.supports is None
            check_against(model, evaluated, 0.7)  # of the whole distribution: SGLang does not renormalise
            # should this not fail any more, rollout.top_p and min_p need no top_k
            with pytest.raises(EngineRefused, match="finite 1 < top_k"):
                await client.generate(
                    PROMPT, max_new_tokens=2, truncation=Truncation(top_p=0.9), session=0, recorded=0, **options
                )

    asyncio.run(scenario())


def test_what_the_model_recommends_is_not_applied(server: RunningServer, qwen3: Path) -> None:
    """The model's generation_config.json would make every token the likeliest one, and repetitions rare."""
    recommended = json.loads((qwen3 / "generation_config.json").read_text())
    assert recommended["top_k"] == 1

    async def scenario() -> None:
        model = load_reference(qwen3)
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(14)
            drawn = [await sample(client, 1.0, session=n) for n in range(3)]
        assert len({tuple(each.token_ids) for each in drawn}) == 3
        for each in drawn:
            check_against(model, each, 1.0)
        logp = whole_logp(model, PROMPT, drawn[0], 1.0)
        assert (logp.argmax(-1) != torch.tensor(drawn[0].token_ids)).any()

    asyncio.run(scenario())


def test_samples_that_fill_the_context(server: RunningServer, qwen3: Path) -> None:
    """Up to what the checks before a start allow, every token comes; one more, and the server ends short or refuses."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        limit = read_hf_config(qwen3).max_positions - RESERVED
        options = {"temperature": 1.0, "stop_token_ids": [], "session": 0}
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(15)
            for tokens in (1, 40):
                prompt = [(3 * i) % 250 for i in range(limit - tokens)]
                generation = await client.generate(prompt, max_new_tokens=tokens, **options)
                assert (len(generation.token_ids), generation.finish) == (tokens, "length")
                expected = reference_logprobs(model, prompt, generation, 1.0)
                assert generation.rollout_logp == pytest.approx(expected, abs=AGREEMENT)
            prompt = [(3 * i) % 250 for i in range(limit + RESERVED - 40)]
            short = await client.generate(prompt, max_new_tokens=40, **options)
            assert (len(short.token_ids), short.finish) == (38, "length")
            with pytest.raises(EngineRefused):
                await client.generate(prompt + [1] * 40, max_new_tokens=1, **options)

    asyncio.run(scenario())


def test_a_group_that_is_given_up_ends_at_the_server(server: RunningServer, qwen3: Path) -> None:
    """Its requests are cancelled here; the server stops computing for them."""

    async def scenario() -> None:
        async with publishing(server, load_reference(qwen3)) as (client, publisher):
            await publisher.publish(16)
            group = [asyncio.create_task(sample(client, 1.0, tokens=1900, session=n, stop=())) for n in range(4)]
            await in_flight(server.url, server.api_key, running=4)
            for attempt in group:
                attempt.cancel()
            await asyncio.gather(*group, return_exceptions=True)
            headers = {"Authorization": f"Bearer {server.api_key}"}

            def idle() -> bool:
                (load,) = requests.get(f"{server.url}/v1/loads", headers=headers, timeout=TIMEOUT_S).json()["loads"]
                return load["num_running_reqs"] == 0

            assert await asyncio.to_thread(eventually, idle, 5)
            assert len((await sample(client, 1.0, tokens=8, stop=())).token_ids) == 8

    asyncio.run(scenario())


def test_a_deadline_ends_one_generation(server: RunningServer, qwen3: Path) -> None:
    """It is answered with what it has, log-probs and all; the others beside it go on. A prompt without a token gets one."""

    async def scenario() -> None:
        model = load_reference(qwen3)
        async with publishing(server, model) as (client, publisher):
            await publisher.publish(17)
            options = {"max_new_tokens": 1000, "temperature": 1.0, "stop_token_ids": []}
            beside = asyncio.create_task(client.generate(PROMPT, **options, session=1))
            late = asyncio.create_task(client.generate(PROMPT, **options, session=0, deadline=time.monotonic() + 0.5))
            none = await client.generate(PROMPT, **options, session=0, deadline=time.monotonic() - 1)
            assert (len(none.token_ids), none.finish) == (1, "deadline")
            generations = [none, await late, await beside]
            load = await client.control.load(server.url)
        assert generations[1].finish == "deadline"
        assert 0 < len(generations[1].token_ids) < 1000
        assert len(generations[2].token_ids) == 1000
        assert (load.waiting, load.retracted) == (0, 0)
        assert 0 <= load.cache_use <= 1
        for generation in generations:
            check_against(model, generation, 1.0)

    asyncio.run(scenario())


def test_refused_update_is_reported(server: RunningServer, qwen3: Path) -> None:
    """A tensor the model does not have: WeightSyncError with server and bucket, in seconds."""
    sender = server.sender(digests=False)
    session(server, "begin")
    try:
        begin = time.monotonic()
        with pytest.raises(WeightSyncError, match=rf"bucket 0 \(model\.norm\.weight .*{server.url}"):
            sender.send([[("model.norm.weight", torch.ones(5))]], 20)
        assert time.monotonic() - begin < 20
    finally:
        session(server, "end")
        sender.close()


@pytest.mark.parametrize("key", ["", "wrong"])
def test_key_is_asked_for(server: RunningServer, key: str) -> None:
    async def scenario() -> None:
        async with EngineClient(serving(server.url), key, request_timeout_s=20) as client:
            with pytest.raises(EngineRefused, match="401"):
                await sample(client, 1.0)
            with pytest.raises(EngineRefused, match="401"):
                await client.control.pause(server.url)

    asyncio.run(scenario())


def test_key_is_not_shown(server: RunningServer) -> None:
    """Neither in the log nor in any argument list."""
    assert server.api_key not in server.server.log.read_text(errors="replace")
    for pid in group_members(server.server.pid):
        assert server.api_key not in " ".join(psutil.Process(pid).cmdline())


def test_bad_model_is_explained(tmp_path: Path) -> None:
    """A server that cannot start says why, at once, and leaves nothing."""
    with pytest.raises(EngineError, match=r"exit code") as raised:
        start_server(tmp_path / "missing", tmp_path / "server.log")
    assert str(tmp_path / "server.log") in str(raised.value)
    assert "missing" in str(raised.value)


def test_moe_on_two_ranks_and_end(tmp_path: Path) -> None:
    """Qwen3-MoE, tensor parallel, from disk and by broadcast, with a record of its routing and of the likeliest tokens.

    `stop` leaves no process, no zombie and no shared memory.
    """
    shared_before = set(os.listdir("/dev/shm"))
    directory = endless(make_toy_model(tmp_path / "moe", "qwen3_moe", seed=1, init_std=0.2))
    running = start_server(directory, tmp_path / "server.log", tp=2, routing=read_hf_config(directory).routing, top_k=20)
    children = [psutil.Process(running.server.pid), *psutil.Process(running.server.pid).children(recursive=True)]
    assert len(children) > 2

    samples: list[TrainSample] = []

    async def scenario() -> None:
        new = perturbed(directory, seed=2)
        async with publishing(running, new) as (client, publisher):
            check_against(load_reference(directory), await sample(client, 0.7), 0.7)
            await check_record(client, load_reference(directory), PROMPT)
            samples.extend(await train_samples(client, PROMPT, 8))
            crossing = [asyncio.create_task(record(client, PROMPT, tokens=1000, session=session)) for session in range(3)]
            await in_flight(running.url, running.api_key, running=3)
            await publisher.publish(1)
            check_against(new, await sample(client, 0.7), 0.7)
            await check_record(client, new, PROMPT)
            check_crossing(new, PROMPT, await asyncio.gather(*crossing))

    try:
        asyncio.run(scenario())
        mapped = set(os.listdir("/dev/shm")) - shared_before
        assert mapped, "nothing to clean up: the check below would be void"
    finally:
        running.server.stop()
    (close,), (coarse,) = run_ranks(1, drift, directory, samples, "float32"), run_ranks(1, drift, directory, samples, "bfloat16")
    assert close["max with"] < AGREEMENT
    assert coarse["mean with"] < coarse["mean without"], coarse  # its routers round, and choose otherwise
    assert coarse["max with"] < coarse["max without"], coarse
    assert not any(child.is_running() for child in children)
    assert not left_in_shared_memory(shared_before, 0.0) & {name for name in mapped if name.startswith("sglang")}


def test_server_dies_during_update(qwen3: Path, tmp_path: Path) -> None:
    """The sender waits for nobody who is gone, and can still be closed."""
    running = start_server(qwen3, tmp_path / "server.log")
    try:
        named = checkpoint_tensors(load_reference(qwen3))
        sender = running.sender()
        session(running, "begin")

        def buckets() -> Iterator[list[tuple[str, torch.Tensor]]]:
            yield named[:2]
            running.server.stop()
            yield named[2:]

        begin = time.monotonic()
        with pytest.raises(WeightSyncError, match=running.url):
            sender.send(buckets(), 1)
        sender.close()
        assert time.monotonic() - begin < 20
    finally:
        running.server.stop()


def test_dies_with_its_parent(qwen3: Path, tmp_path: Path) -> None:
    """SIGKILL to the process that started it, while it starts."""
    program = (
        "import sys; from pathlib import Path; from tests.support.engines import start_server\n"
        "running = start_server(Path(sys.argv[1]), Path(sys.argv[2]), wait=False); print(running.server.pid, flush=True)\n"
        "import time; time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(qwen3), str(tmp_path / "server.log")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )
    group = int(parent.stdout.readline())
    time.sleep(3)
    assert group_members(group)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert eventually(lambda: not group_members(group), within_s=10)


def test_unreachable_server_is_an_error() -> None:
    """A closed port: tried again a few times, then an error that names it."""

    async def scenario() -> None:
        async with EngineClient(serving(f"http://{HOST}:9"), "key", request_timeout_s=5) as client:
            with pytest.raises(EngineError, match=rf"http://{HOST}:9/generate"):
                await sample(client, 1.0)

    asyncio.run(scenario())
