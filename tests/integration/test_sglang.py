"""A real SGLang server on CPUs: what it samples, how its weights are replaced, and who may ask it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import psutil
import pytest
import requests
import torch

from ctpo_megatron.config.distillation import ServedTeacher
from ctpo_megatron.engine.client import EngineClient
from ctpo_megatron.engine.processes import group_members
from ctpo_megatron.engine.teachers import TeacherClient, in_turn
from ctpo_megatron.errors import EngineRefused, TeacherFailed, WeightSyncError
from ctpo_megatron.models.config import read_hf_config
from ctpo_megatron.models.context import READ, RESERVED
from ctpo_megatron.types import Generation
from tests.support.engines import TIMEOUT_S, RunningServer, in_flight, load_reference, reference_logprobs, session
from tests.support.patience import eventually
from tests.support.publishing import (
    AGREEMENT,
    END_OF_TURN,
    PROMPT,
    check_against,
    perturbed,
    publishing,
    sample,
    serving,
)
from tests.support.truncation import whole_logp

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


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


def test_a_prompt_of_many_requests_is_read_once(server: RunningServer) -> None:
    """Of two prompts with eight requests each, which come in one call, each is read by one request; SGLang's own way reads 16."""
    prompts = [[(5 * i + n) % 250 for i in range(60)] for n in (1, 2)] * 8
    asked = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}}
    key = {"Authorization": f"Bearer {server.api_key}"}
    requests.post(f"{server.url}/flush_cache", headers=key, timeout=TIMEOUT_S).raise_for_status()
    answer = requests.post(f"{server.url}/generate", json=asked, headers=key, timeout=TIMEOUT_S)
    answer.raise_for_status()
    cached = [each["meta_info"]["cached_tokens"] for each in answer.json()]
    assert sorted(cached) == [0, 0, *[59] * 14]


def test_a_teacher_tells_the_log_probs_of_the_tokens_that_it_is_given(server: RunningServer, qwen3: Path) -> None:
    """Sequences at once, some with a common beginning, and again from the prefix cache; what it cannot read it refuses."""

    async def scenario() -> None:
        model, shared = load_reference(qwen3), [(7 * i) % 250 for i in range(120)]
        asked = [([(3 * i + n) % 250 for i in range(n)], begin) for n, begin in ((2, 1), (17, 1), (90, 40), (700, 699))]
        asked += [(shared + [n] * n, 100 + n) for n in (1, 5, 40)]
        context, words = read_hf_config(qwen3).max_positions, read_hf_config(qwen3).vocab_size
        asked.append(([1, words - 1, 2, words - 1], 1))
        teacher, urls = ServedTeacher(name="big", path=str(qwen3), urls=(server.url,), timeout_s=TIMEOUT_S), in_turn([server.url])
        asking = TeacherClient(teacher, urls, server.api_key, words)
        async with publishing(server, model) as (_, publisher), asking as client:
            await publisher.publish(7)
            for _ in range(2):
                told = await asyncio.gather(*(client.logp(tokens, begin) for tokens, begin in asked))
                for (tokens, begin), logp in zip(asked, told, strict=True):
                    expected = reference_logprobs(model, tokens[:begin], Generation(tokens[begin:]), 1.0)
                    assert logp == pytest.approx(expected, abs=AGREEMENT)
            with pytest.raises(EngineRefused, match=r"teacher 'big' at .* refused"):
                await client.logp([1] * context, 1)
            with pytest.raises(TeacherFailed, match=f"has {words} tokens, and none with id {words}"):
                await client.logp([1, words], 1)
            longest = context - READ
            assert len(await client.logp([1] * longest, longest - 1)) == 1

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
            now = asyncio.get_running_loop().time()
            late = asyncio.create_task(client.generate(PROMPT, **options, session=0, deadline=now + 0.5))
            none = await client.generate(PROMPT, **options, session=0, deadline=now - 1)
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
