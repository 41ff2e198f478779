"""What counts as a failure of a request and which failures are tried again, for callers with and without an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ctpo_megatron.engine.http import LARGE_CHARACTERS, RETRIES, Answer, Failure, Requests, beside_loop
from ctpo_megatron.engine.request_thread import RequestThread
from ctpo_megatron.errors import EngineError, EngineRefused

NOWHERE = "http://127.0.0.1:9/x"
POLL_S = 0.02  # in which a server sees that it is to end


class Server:
    """Answers as the path says: /json, /text, /STATUS, /slow, /cut (the connection breaks in mid-answer), /damaged (no JSON)."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []  # paths and keys
        self.ports: set[int] = set()  # of those who asked
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                outer.ports.add(self.client_address[1])
                self.close_connection = self.path == "/cut"
                if self.path == "/slow":
                    outer.release.wait(20)
                status = int(self.path[1:]) if self.path[1:].isdigit() else 200
                body = {"/json": b'{"a": 1}', "/damaged": b'{"a": \xff'}.get(self.path, b"words")
                self.send_response(status)
                self.send_header("Content-Type", "application/json" if self.path in ("/json", "/damaged") else "text/plain")
                self.send_header("Content-Length", str(len(body) + 10 * (self.path == "/cut")))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, args=(POLL_S,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries."""
    monkeypatch.setattr("ctpo_megatron.engine.http.BACKOFF_S", 0.01)


@pytest.fixture
def server() -> Iterator[Server]:
    with contextlib.closing(Server()) as running:
        yield running


def ask(url: str, timeout_s: float = 5.0) -> object:
    """What a caller with an event loop gets."""

    async def scenario() -> object:
        async with Requests("secret", timeout_s) as requests:
            return await requests.post(url, {"b": 2})

    return asyncio.run(scenario())


def test_answers(server: Server) -> None:
    assert (ask(f"{server.url}/json"), ask(f"{server.url}/text")) == ({"a": 1}, "words")
    assert server.asked == [("/json", "Bearer secret"), ("/text", "Bearer secret")]


def test_a_large_answer_is_decoded_beside_the_event_loop() -> None:
    """The loop goes on meanwhile; a small one is not worth a thread."""

    async def scenario(size: int) -> tuple[bool, int]:
        turns, stop = 0, threading.Event()

        async def count() -> None:
            nonlocal turns
            while not stop.is_set():
                turns += 1
                await asyncio.sleep(0)

        def decode(text: str) -> bool:
            stop.wait(0.05)
            return threading.current_thread() is threading.main_thread()

        counting = asyncio.ensure_future(count())
        on_loop = await beside_loop(size, decode, "x")
        reached = turns
        stop.set()
        await counting
        return on_loop, reached

    assert asyncio.run(scenario(LARGE_CHARACTERS - 1)) == (True, 0)
    on_loop, turns = asyncio.run(scenario(LARGE_CHARACTERS))
    assert not on_loop
    assert turns > 1


def test_a_large_answer_is_the_same(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.http.LARGE_CHARACTERS", 1)
    assert (ask(f"{server.url}/json"), ask(f"{server.url}/text")) == ({"a": 1}, "words")


@pytest.mark.parametrize(
    ("path", "error", "message", "tries"),
    [
        ("/500", EngineError, "/500 answered 500: words", RETRIES),
        ("/503", EngineError, "/503 answered 503: words", RETRIES),
        ("/cut", EngineError, "/cut ClientPayloadError", RETRIES),
        ("/damaged", EngineError, "/damaged answered 200 with damaged JSON: JSON is malformed", RETRIES),
        ("/400", EngineRefused, "/400 answered 400: words", 1),
        ("/499", EngineRefused, "/499 answered 499: words", 1),
        ("/slow", EngineError, "/slow did not answer within 0 s", 1),
    ],
)
def test_what_is_tried_again(server: Server, path: str, error: type[EngineError], message: str, tries: int) -> None:
    with pytest.raises(EngineError, match=message) as raised:
        ask(server.url + path, 0.3 if path == "/slow" else 5.0)
    assert type(raised.value) is error
    assert [asked for asked, _ in server.asked] == [path] * tries


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9/x ClientConnectorError"):
        ask(NOWHERE)


def test_an_answer_after_failures(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try is as good as the first."""
    outcomes = [Failure("broken", "no"), Answer(7)]

    async def scripted(*_: object) -> Answer | Failure:
        return outcomes.pop(0)

    monkeypatch.setattr("ctpo_megatron.engine.http.ask", scripted)
    assert ask(server.url) == 7


@pytest.mark.parametrize(
    ("url_of", "kind", "gone"),
    [
        (lambda server: f"{server.url}/500", "broken", False),
        (lambda server: f"{server.url}/400", "refused", False),
        (lambda server: f"{server.url}/slow", "silent", True),
        (lambda server: NOWHERE, "unreachable", True),
    ],
)
def test_a_thread_asks_once(server: Server, url_of: Callable[[Server], str], kind: str, gone: bool) -> None:
    """Senders of weights: nothing is asked twice, and a failure says whether the server is gone."""
    with contextlib.closing(RequestThread("secret")) as requests:
        outcome = requests.submit("POST", url_of(server), {}, 0.5).result(5)
        assert isinstance(outcome, Failure)
        assert (outcome.kind, outcome.gone) == (kind, gone)
        assert len(server.asked) <= 1
        assert requests.submit("GET", f"{server.url}/json", None, 5).result(5) == Answer({"a": 1})


def test_closing_a_thread_gives_up_what_is_under_way(server: Server) -> None:
    requests, begin = RequestThread("secret"), time.monotonic()
    waiting = requests.submit("GET", f"{server.url}/slow", None, 60)
    while not server.asked:
        time.sleep(0.01)
    requests.close()
    requests.close()
    assert waiting.cancelled()
    assert time.monotonic() - begin < 5
    assert "requests" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("reuse", [True, False])
def test_connections(server: Server, reuse: bool) -> None:
    """Requests that are tried again share a connection; those of a thread have one each."""
    if reuse:

        async def scenario() -> None:
            async with Requests("secret", 5) as requests:
                for _ in range(3):
                    await requests.get(f"{server.url}/json")

        asyncio.run(scenario())
    else:
        with contextlib.closing(RequestThread("secret")) as requests:
            for _ in range(3):
                requests.submit("GET", f"{server.url}/json", None, 5).result(5)
    assert len(server.asked) == 3
    assert len(server.ports) == (1 if reuse else 3)
