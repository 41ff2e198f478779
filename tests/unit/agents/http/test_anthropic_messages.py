"""Anthropic's own client plays an episode against the endpoint, whole and as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import anthropic
import msgspec
import pytest
from scripted_episode import scripted_answer

from ctpo_megatron.agents.http.dialects import PIECE_CHARACTERS
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.protocols import EpisodeOver, RequestUnusable, ToolCall
from tests.support.scripted_episodes import HOUR, WAIT_S, WEATHER, Served, served

TOOLS = [{"name": "weather", "description": "the weather", "input_schema": {"type": "object", "properties": {}}}]
OPTIONS = {"thinking": {"type": "disabled"}, "stop_sequences": ["END"]}
QUESTION = {"role": "user", "content": [{"type": "text", "text": "What is the weather?", "cache_control": {"type": "ephemeral"}}]}


def client(given: Served, **options: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=given.anthropic, api_key=given.key, **options)


async def whole(talk: anthropic.AsyncAnthropic, **given: Any) -> Any:
    return await talk.messages.create(model="any", max_tokens=99, **given)


async def streamed(talk: anthropic.AsyncAnthropic, **given: Any) -> Any:
    async with talk.messages.stream(model="any", max_tokens=99, **given) as stream:
        return await stream.get_final_message()


@pytest.mark.parametrize("ask", [whole, streamed])
def test_an_episode_of_two_turns_with_parallel_calls(ask: Callable[..., Any]) -> None:
    async def play() -> None:
        async with served() as given, client(given) as talk:
            first = await ask(talk, messages=[QUESTION], tools=TOOLS, system="Be brief.", **OPTIONS)
            assert [each.type for each in first.content] == ["thinking", "tool_use", "tool_use"]
            assert first.content[0].thinking == "I look."
            assert first.content[0].signature
            assert [(each.id, each.name, each.input) for each in first.content[1:]] == [
                (call.id, call.name, msgspec.json.decode(call.arguments)) for call in (WEATHER, HOUR)
            ]
            assert first.stop_reason == "tool_use"
            assert (first.usage.input_tokens, first.usage.output_tokens) == (7, len("I look.") + len(_said()) + 1)
            results = [{"type": "tool_result", "tool_use_id": each.id, "content": "rain"} for each in first.content[1:]]
            answer = {"role": "user", "content": [*results, {"type": "text", "text": "Go on."}]}
            second = await ask(talk, messages=[QUESTION, {"role": "assistant", "content": first.content}, answer], tools=TOOLS)
            assert [(each.type, each.text) for each in second.content] == [("text", "It rains: ü€😀.")]
            assert second.stop_reason == "end_turn"
            asked = given.episode.requests
            assert len(asked) == 2
            question = {"role": "user", "content": "What is the weather?"}
            assert asked[0].messages == ({"role": "system", "content": "Be brief."}, question)
            assert (asked[0].max_tokens, asked[0].thinking, asked[1].thinking) == (99, False, None)
            assert (asked[0].stop, asked[1].stop) == (("END",), ())
            assert asked[0].tools[0]["function"]["parameters"] == TOOLS[0]["input_schema"]
            echo = asked[1].messages[1]
            assert (echo["content"], echo["reasoning_content"]) == (None, "I look.")
            assert [each["id"] for each in echo["tool_calls"]] == ["call_1", "call_2"]
            assert [each["role"] for each in asked[1].messages] == ["user", "assistant", "tool", "tool", "user"]

    asyncio.run(play())


def _said() -> str:
    return "".join(f"{each.name}({each.arguments})" for each in (WEATHER, HOUR))


@pytest.mark.parametrize("ask", [whole, streamed])
def test_a_client_that_waits_gets_signs_of_life_and_then_the_whole_answer(ask: Callable[..., Any]) -> None:
    async def play() -> None:
        async with served(limits=Limits(keep_alive_s=0.02)) as given, client(given) as talk:
            given.episode.hold = asyncio.Event()
            turn = asyncio.ensure_future(ask(talk, messages=[QUESTION]))
            async with asyncio.timeout(WAIT_S):
                while not given.server.counts.kept_alive:
                    await asyncio.sleep(0.005)
            given.episode.hold.set()
            assert [each.type for each in (await turn).content] == ["thinking", "tool_use", "tool_use"]

    asyncio.run(play())


def test_long_arguments_and_texts_come_in_pieces() -> None:
    call = ToolCall("c", "f", msgspec.json.encode({"text": "é" * 2 * PIECE_CHARACTERS}).decode())

    async def play() -> None:
        async with served(scripted_answer("x" * 3 * PIECE_CHARACTERS, call)) as given, client(given) as talk:
            message = await streamed(talk, messages=[QUESTION])
            assert message.content[0].text == "x" * 3 * PIECE_CHARACTERS
            assert message.content[1].input == {"text": "é" * 2 * PIECE_CHARACTERS}

    asyncio.run(play())


@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (EpisodeOver("its time is used up"), anthropic.NotFoundError, "the attempt is over: its time is used up"),
        (RequestUnusable("no"), anthropic.BadRequestError, "no"),
    ],
)
def test_what_cannot_heal_is_asked_once_and_told_in_its_own_shape(fault: Exception, expected: Any, words: str) -> None:
    async def play() -> None:
        async with served(fault) as given, client(given) as talk:
            for ask in (whole, streamed):
                given.episode.requests.clear()
                with pytest.raises(expected) as caught:
                    await ask(talk, messages=[QUESTION])
                assert caught.value.body["type"] == "error"
                assert caught.value.body["error"]["message"] == words
                assert len(given.episode.requests) == 1

    asyncio.run(play())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "reads text only"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "known by a type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "grammar"),
        ({"mcp_servers": [{"url": "x"}]}, "calls no servers"),
        ({"max_tokens": 0}, "max_tokens is an integer from 1 on"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(given: dict[str, Any], words: str) -> None:
    async def play() -> None:
        async with served() as place, client(place) as talk:
            with pytest.raises(anthropic.BadRequestError, match=words):
                await talk.post("/v1/messages", body={"messages": [QUESTION]} | given, cast_to=object)

    asyncio.run(play())


def test_tokens_are_not_counted_beforehand() -> None:
    async def play() -> None:
        async with served() as given, client(given) as talk:
            with pytest.raises(anthropic.NotFoundError, match="usage"):
                await talk.messages.count_tokens(model="any", messages=[QUESTION])

    asyncio.run(play())
