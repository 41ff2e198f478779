"""OpenAI's own client plays an episode against the endpoint, whole and as a stream, and sees what was sampled."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import openai
import pytest
from scripted_episode import scripted_answer

from ctpo_megatron.agents.http.dialects import PIECE_CHARACTERS, PIECE_TOKENS
from ctpo_megatron.agents.protocols import AgentAnswer, EpisodeOver, RequestUnusable, ToolCall
from tests.support.scripted_episodes import HOUR, TOOLS, WEATHER, WEATHER_TOOL, Served, served

QUESTION = {"role": "user", "content": "What is the weather?"}


def client(given: Served, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=given.openai, api_key=given.key, **options)


async def whole(talk: openai.AsyncOpenAI, **given: Any) -> Any:
    return (await talk.chat.completions.create(model="any", **given)).choices[0].message


async def streamed(talk: openai.AsyncOpenAI, **given: Any) -> Any:
    async with talk.chat.completions.stream(model="any", **given) as stream:
        return (await stream.get_final_completion()).choices[0].message


@pytest.mark.parametrize("ask", [whole, streamed])
def test_an_episode_of_two_turns_with_parallel_calls(ask: Callable[..., Any]) -> None:
    async def play() -> None:
        async with served() as given, client(given) as talk:
            first = await ask(talk, messages=[QUESTION], tools=TOOLS)
            assert [(each.id, each.type, each.function.name, each.function.arguments) for each in first.tool_calls] == [
                (call.id, "function", call.name, call.arguments) for call in (WEATHER, HOUR)
            ]
            assert (first.role, first.content or None, first.reasoning_content) == ("assistant", None, "I look.")
            history = [QUESTION, first.model_dump(exclude_none=True)]
            history += [{"role": "tool", "tool_call_id": each.id, "content": "rain"} for each in first.tool_calls]
            second = await ask(talk, messages=history, tools=TOOLS)
            assert (second.content, second.tool_calls or None) == ("It rains: ü€😀.", None)
            asked = given.episode.requests
            assert len(asked) == 2
            assert asked[0].messages == (QUESTION,)
            assert asked[0].tools == ({"type": "function", "function": WEATHER_TOOL},)
            echo = asked[1].messages[1]
            assert echo["reasoning_content"] == "I look."
            assert [each["function"]["arguments"] for each in echo["tool_calls"]] == [WEATHER.arguments, HOUR.arguments]
            assert asked[1].messages[2] == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}

    asyncio.run(play())


LISTS = {"logprobs": True, "extra_body": {"return_token_ids": True, "return_tokens_as_token_ids": True}}
LONG = dataclasses.replace(  # several pieces of each kind; OpenAI's helper takes ten seconds to put 25,000 tokens together
    scripted_answer("x" * 2 * PIECE_TOKENS),
    content="x" * (2 * PIECE_CHARACTERS + 1),
    calls=(ToolCall("c", "f", '"' + "y" * PIECE_CHARACTERS + '"'),),
    finish="tool_calls",
)


@pytest.mark.parametrize("answer", [scripted_answer("Hé"), LONG])
def test_lists_of_tokens_are_the_same_whole_and_streamed(answer: AgentAnswer) -> None:
    async def play() -> None:
        async with served(answer) as given, client(given) as talk:
            done = await talk.chat.completions.create(model="any", messages=[QUESTION], **LISTS)
            choice = done.choices[0]
            assert done.prompt_token_ids == list(answer.prompt_ids)
            assert choice.token_ids == list(answer.token_ids)
            assert [each.token for each in choice.logprobs.content] == [f"token_id:{each}" for each in answer.token_ids]
            assert [each.logprob for each in choice.logprobs.content] == list(answer.logp)
            assert [bytes(each.bytes).decode() for each in choice.logprobs.content] == list(answer.texts)
            assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (7, len(answer.token_ids))
            async with talk.chat.completions.stream(model="any", messages=[QUESTION], **LISTS) as stream:
                final = await stream.get_final_completion()
            assert final.prompt_token_ids == done.prompt_token_ids
            assert final.choices[0].message.token_ids == choice.token_ids
            assert final.choices[0].logprobs.content == choice.logprobs.content
            assert final.choices[0].message.content == choice.message.content
            assert final.choices[0].finish_reason == choice.finish_reason
            assert given.episode.sampled == 1, "how an answer is brought makes no other request of it"

    asyncio.run(play())


def test_in_a_stream_role_id_and_name_come_once_and_no_line_is_long() -> None:
    async def play() -> list[Any]:
        async with served(LONG) as given, client(given) as talk:
            options = {"include_usage": True}
            stream = await talk.chat.completions.create(model="any", messages=[QUESTION], stream=True, stream_options=options)
            return [chunk async for chunk in stream]

    chunks = asyncio.run(play())
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert [call.id for call in calls if call.id] == ["c"]
    assert [call.function.name for call in calls if call.function.name] == ["f"]
    assert max(len(delta.content or "") for delta in deltas) == PIECE_CHARACTERS
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_without_include_usage_no_chunk_is_without_a_choice() -> None:
    async def play() -> None:
        async with served() as given, client(given) as talk:
            stream = await talk.chat.completions.create(model="any", messages=[QUESTION], stream=True)
            chunks = [chunk async for chunk in stream]
            assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks)
            assert {chunk.model for chunk in chunks} == {"any"}

    asyncio.run(play())


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (EpisodeOver("its time is used up"), (openai.NotFoundError, "the attempt is over: its time is used up")),
        (
            RequestUnusable("the prompt is too long: 9 tokens > 8"),
            (openai.BadRequestError, "the prompt is too long: 9 tokens > 8"),
        ),
        (RuntimeError("sk-secret"), (openai.BadRequestError, "the log of the run says why")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_heal_is_asked_once(fault: Exception, expected: tuple[type[Exception], str], stream: bool) -> None:
    async def play() -> None:
        async with served(fault) as given, client(given) as talk:
            with pytest.raises(expected[0]) as caught:
                await talk.chat.completions.create(model="any", messages=[QUESTION], stream=stream)
            assert expected[1] in str(caught.value)
            assert "secret" not in str(caught.value)
            assert len(given.episode.requests) == 1

    asyncio.run(play())


def test_the_run_says_which_values_were_used_and_what_was_not_applied() -> None:
    async def play() -> None:
        async with served(sampling={"temperature": 1.0, "top_p": 1.0}) as given, client(given) as talk:
            asked = {"messages": [QUESTION], "temperature": 0.2, "seed": 3, "stop": ["Observation:"], "tool_choice": "required"}
            raw = await talk.chat.completions.with_raw_response.create(model="any", n=1, max_tokens=5, **asked)
            assert raw.headers["x-sampling"] == "temperature=1.0, top_p=1.0"
            assert set(raw.headers["x-not-applied"].split(", ")) == {"temperature", "seed", "tool_choice"}
            assert given.openai.split("/")[-2] == raw.headers["x-session-id"]
            assert (given.episode.requests[0].max_tokens, given.episode.requests[0].stop) == (5, ("Observation:",))
            with pytest.raises(openai.BadRequestError, match="n = 2 is refused: one answer a request"):
                await talk.chat.completions.create(model="any", messages=[QUESTION], n=2)
            assert len(given.episode.requests) == 1

    asyncio.run(play())


def test_models_are_listed() -> None:
    async def play() -> None:
        async with served(model="tiny") as given, client(given) as talk:
            assert [each.id async for each in talk.models.list()] == ["tiny"]
            assert (await talk.models.retrieve("gpt-x")).id == "gpt-x"

    asyncio.run(play())


def test_the_responses_interface_is_refused_with_what_to_set() -> None:
    async def play() -> None:
        async with served() as given, client(given) as talk:
            with pytest.raises(openai.NotFoundError, match=r"set_default_openai_api\('chat_completions'\)"):
                await talk.responses.create(model="any", input="x")

    asyncio.run(play())
