"""The endpoint beside clients that are slow, silent, wrong or gone, and when it is started again."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
from typing import Any

import openai
import pytest
from scripted_episode import ScriptedEpisode, scripted_answer

from ctpo_megatron.agents.http.keys import KeyedEpisodes, given_keys, name_of, new_key
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.server import AgentServer
from ctpo_megatron.agents.protocols import EpisodeOver
from ctpo_megatron.errors import InputError
from tests.support.scripted_episodes import WAIT_S, Served, asked, head, received, sent, served

QUESTION = {"role": "user", "content": "x"}
BODY: dict[str, Any] = {"model": "any", "messages": [QUESTION]}
SHORT = 0.05  # seconds, of bounds that a test is to run into


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


# keys


def test_a_wrong_key_is_told_nothing_and_another_attempts_url_is_not_its_own() -> None:
    async def play() -> None:
        async with served() as given:
            other = new_key()
            given.episodes.add(other, ScriptedEpisode([scripted_answer("other")]))
            wrong = [
                await asked(given, BODY, "/v1/chat/completions", header)
                for header in (f"Authorization: Bearer {given.key}x", "x-api-key: y", "x-nothing: z", "Authorization: Basic eA==")
            ]
            wrong.append(await asked(given, BODY, f"/{name_of(other)}/v1/chat/completions"))
            assert {answer.status for answer in wrong} == {401}
            assert len({answer.body for answer in wrong}) == 1
            assert all("x-session-id" not in answer.headers for answer in wrong)
            assert given.episode.requests == []
            both = f"Authorization: Bearer elsewhere\r\nx-api-key: {given.key}"
            assert (await asked(given, BODY, f"/{name_of(given.key)}/v1/chat/completions", both)).status == 200

    asyncio.run(play())


def test_a_key_that_was_taken_back_opens_nothing() -> None:
    episodes, key = KeyedEpisodes(), new_key()
    episodes.add(key, ScriptedEpisode([]))
    assert episodes.find(key) is not None
    assert episodes.find(key[:-1]) is None
    episodes.remove(key)
    assert (episodes.find(key), len(episodes)) == (None, 0)


def test_keys_are_read_as_clients_send_them() -> None:
    assert given_keys({"Authorization": "bearer  a ", "x-api-key": "b"}) == ["a", "b"]
    assert given_keys({"Authorization": "Bearer a", "x-api-key": "a"}) == ["a"]
    assert given_keys({"Authorization": "Bearer"}) == []


def test_no_key_comes_into_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def play(fault: Exception) -> str:
        async with served(fault) as given:
            key = given.key
            assert (await asked(given, BODY)).status == 400
            assert (await sent(given.server.port, f"GET / HTTP/1.1\r\nAuthorization Bearer {key}\r\n\r\n".encode())).status == 400
            long = f"GET / HTTP/1.1\r\nAuthorization: Bearer {key}{'x' * 99_999}\r\n\r\n".encode()
            assert (await sent(given.server.port, long)).status == 400
            return key

    key = asyncio.run(play(RuntimeError("planted")))
    assert "planted" in caplog.text
    assert key not in caplog.text


# places


@pytest.mark.parametrize(
    ("place", "words"),
    [("/chat/completions", "set its base URL"), ("/v1/embeddings", "Served are"), ("/v1/completions", "chat/completions")],
)
def test_other_places_say_what_to_set(place: str, words: str) -> None:
    async def play() -> None:
        async with served() as given:
            answer = await asked(given, BODY, place)
            assert answer.status == 404
            assert words in answer.json["error"]["message"]
            assert answer.headers["x-should-retry"] == "false"

    asyncio.run(play())


def test_whoever_has_no_key_may_see_that_it_serves_and_no_more() -> None:
    async def play() -> None:
        async with served() as given:
            for place, status in (("/health", 200), ("/", 200), ("/v1/models", 401)):
                assert (await sent(given.server.port, f"GET {place} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).status == status

    asyncio.run(play())


# what is waited for


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_waits_gets_signs_of_life_and_then_the_whole_answer(stream: bool) -> None:
    async def play() -> None:
        async with served(limits=Limits(keep_alive_s=SHORT)) as given:
            given.episode.hold = asyncio.Event()
            async with openai.AsyncOpenAI(base_url=given.openai, api_key=given.key) as talk:
                turn = asyncio.ensure_future(_streamed(talk) if stream else _whole(talk))
                await until(lambda: given.server.counts.kept_alive)
                given.episode.hold.set()
                assert (await turn).tool_calls[0].id == "call_1"

    asyncio.run(play())


async def _whole(talk: openai.AsyncOpenAI) -> Any:
    return (await talk.chat.completions.create(model="any", messages=[QUESTION])).choices[0].message


async def _streamed(talk: openai.AsyncOpenAI) -> Any:
    async with talk.chat.completions.stream(model="any", messages=[QUESTION]) as stream:
        return (await stream.get_final_completion()).choices[0].message


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_after_signs_of_life_is_final_too(stream: bool) -> None:
    async def play() -> None:
        async with served(EpisodeOver("late"), limits=Limits(keep_alive_s=SHORT)) as given:
            given.episode.hold = asyncio.Event()
            async with openai.AsyncOpenAI(base_url=given.openai, api_key=given.key) as talk:
                turn = asyncio.ensure_future(_streamed(talk) if stream else _whole(talk))
                await until(lambda: given.server.counts.kept_alive)
                given.episode.hold.set()
                with pytest.raises(openai.APIError, match="the attempt is over: late"):
                    await turn
            assert len(given.episode.requests) == (1 if stream else 2)  # what was cut off is repeated, and told then
            assert [each.retries for each in given.episode.requests] == list(range(len(given.episode.requests)))

    asyncio.run(play())


def test_a_client_that_leaves_ends_its_request_and_its_repeat_goes_on() -> None:
    async def play() -> None:
        async with served(limits=Limits(keep_alive_s=1000)) as given:  # a sign of life would find out too, later
            given.episode.hold = asyncio.Event()
            talk = openai.AsyncOpenAI(base_url=given.openai, api_key=given.key)
            turn = asyncio.ensure_future(_whole(talk))
            await asyncio.wait_for(given.episode.came.wait(), WAIT_S)
            turn.cancel()
            await until(lambda: given.episode.left == 1)
            given.episode.hold.set()
            assert (await _whole(talk)).tool_calls
            first, second = given.episode.requests
            assert first.digest == second.digest
            await talk.close()

    asyncio.run(play())


# started again


def test_no_request_is_lost_when_the_server_is_started_again() -> None:
    async def play() -> None:
        async with served() as given:
            given.episode.hold = asyncio.Event()
            async with openai.AsyncOpenAI(base_url=given.openai, api_key=given.key) as talk:
                turn = asyncio.ensure_future(_whole(talk))
                await asyncio.wait_for(given.episode.came.wait(), WAIT_S)
                await given.server.stop()
                assert given.episode.left == 1
                beside = asyncio.ensure_future(_whole(talk))  # connects while nobody accepts, and waits
                given.episode.hold.set()
                await given.server.start()
                assert (await turn).tool_calls[0].id == (await beside).tool_calls[0].id == "call_1"
            assert given.server.counts.retries >= 1
            assert given.episode.sampled == 1

    asyncio.run(play())


def test_the_address_is_kept_and_given_back() -> None:
    async def play() -> None:
        server = AgentServer(KeyedEpisodes())
        await server.start()
        port = server.port
        await server.restart()
        assert server.port == port
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1 port {port}: address already in use"):
            await AgentServer(KeyedEpisodes(), port=port).start()
        await server.close()
        async with AgentServer(KeyedEpisodes(), port=port) as other:
            assert other.port == port

    asyncio.run(play())


# clients that misbehave


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[" * 40_000, 400),
        (b"[]", 400),
        ({"messages": []}, 400),
        ({"messages": [QUESTION] * 9}, 400),
        ({"messages": ["x"]}, 400),
        ({"messages": [QUESTION], "max_tokens": -1}, 400),
        ({"messages": [QUESTION], "stream": "yes"}, 400),
        ({"messages": [QUESTION], "stop": [""]}, 400),
        ({"messages": [QUESTION], "stop_sequences": [3]}, 400),
        ({"messages": [QUESTION], "stream_options": 3}, 400),
        ({"messages": [QUESTION], "model": 3}, 400),
        ({"messages": [QUESTION], "chat_template_kwargs": {"tools_in_user_message": True}}, 400),
        (b" " * 20_000, 413),
    ],
)
@pytest.mark.parametrize("place", ["/v1/chat/completions", "/v1/messages"])
def test_a_body_that_cannot_be_used_is_refused_in_the_clients_shape(body: Any, status: int, place: str) -> None:
    async def play() -> None:
        async with served(limits=Limits(body_bytes=10_000 if status == 413 else 2**20, messages=8)) as given:
            answer = await asked(given, body, place)
            assert answer.status == status
            assert answer.json["error"]["message"]
            assert answer.json.get("type") == ("error" if place.endswith("messages") else None)
            assert given.episode.requests == []

    asyncio.run(play())


def test_a_body_without_a_stated_length_is_bounded_too() -> None:
    async def play() -> None:
        async with served(limits=Limits(body_bytes=1000)) as given:
            raw = head("/v1/chat/completions", 0, f"x-api-key: {given.key}", "Transfer-Encoding: chunked")
            raw = raw.replace(b"Content-Length: 0\r\n", b"")
            assert (await sent(given.server.port, raw + b"400\r\n" + b" " * 1024 + b"\r\n0\r\n\r\n")).status == 413
            answer = await asked(given, BODY, "/v1/chat/completions", f"x-api-key: {given.key}", "Content-Encoding: gzip")
            assert answer.status == 400

    asyncio.run(play())


def test_silent_and_slow_clients_are_closed() -> None:
    async def play() -> None:
        async with served(limits=Limits(idle_s=SHORT)) as given, asyncio.timeout(WAIT_S):
            for begin in (b"", b"POST /v1/chat/comp", b"GET / HTTP/1.1\r\nHost: x\r\nx-y"):
                reader, writer = await asyncio.open_connection("127.0.0.1", given.server.port)
                writer.write(begin)
                assert await reader.read() == b""
                writer.close()
        async with served(limits=Limits(body_s=SHORT)) as given:
            answer = await sent(given.server.port, head("/v1/chat/completions", 50, f"x-api-key: {given.key}") + b"{")
            assert (answer.status, "did not arrive" in answer.json["error"]["message"]) == (400, True)

    asyncio.run(play())


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def play() -> None:
        endless = dataclasses.replace(scripted_answer("x"), content="x" * 2**24)
        async with served(endless, limits=Limits(write_s=SHORT)) as given:
            loop = asyncio.get_running_loop()
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.setblocking(False)
                await loop.sock_connect(deaf, ("127.0.0.1", given.server.port))
                body = b'{"messages": [{"role": "user"}]}'
                await loop.sock_sendall(deaf, head("/v1/chat/completions", len(body), f"x-api-key: {given.key}") + body)
                await until(lambda: given.server.counts.cut)

    asyncio.run(play())


def test_requests_of_one_key_wait_for_each_other_and_not_without_end() -> None:
    async def play() -> None:
        async with served(limits=Limits(in_flight=1, waiting=1)) as given:
            given.episode.hold = asyncio.Event()
            two = [asyncio.ensure_future(asked(given, BODY | {"seed": seed})) for seed in (1, 2)]
            await asyncio.wait_for(given.episode.came.wait(), WAIT_S)
            refused = await _refused(given)
            assert "wait for their answers" in refused.json["error"]["message"]
            assert len(given.episode.requests) == 1
            given.episode.hold.set()
            assert [(await each).status for each in two] == [200, 200]

    asyncio.run(play())


async def _refused(given: Served) -> Any:
    """The first refusal: until both others have arrived a further request waits, so each is given up after a moment."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await asyncio.wait_for(asked(given, BODY | {"seed": 3}), 0.2)
            except TimeoutError:
                continue


def test_connections_beyond_the_bound_are_closed() -> None:
    async def play() -> None:
        async with served(limits=Limits(connections=1)) as given, asyncio.timeout(WAIT_S):
            _, first = await asyncio.open_connection("127.0.0.1", given.server.port)
            reader, second = await asyncio.open_connection("127.0.0.1", given.server.port)
            assert await reader.read() == b""
            first.close()
            second.close()

    asyncio.run(play())


def test_who_asks_first_whether_a_body_is_wanted_is_told() -> None:
    async def play() -> None:
        async with served() as given, asyncio.timeout(WAIT_S):
            body = b'{"messages": [{"role": "user"}]}'
            reader, writer = await asyncio.open_connection("127.0.0.1", given.server.port)
            writer.write(head("/v1/chat/completions", len(body), f"x-api-key: {given.key}", "Expect: 100-continue"))
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await received(reader)).status == 200
            writer.close()

    asyncio.run(play())
