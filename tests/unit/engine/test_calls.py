"""Requests to all servers at once: the verdict on which of them is at fault."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ctpo_megatron.engine.calls import Server, ServerCalls
from ctpo_megatron.errors import WeightSyncError

POLL_S = 0.02  # in which a server sees that it is to end


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctpo_megatron.engine.calls.VERDICT_WAIT_S", 0.5)
    monkeypatch.setattr("ctpo_megatron.engine.calls.SIGN_OF_LIFE_S", 1.0)


class Servers:
    """Small HTTP servers: one answers well, one refuses, one never answers until it is let go."""

    def __init__(self) -> None:
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if self.path.startswith(("/hang", "/busy")):
                    outer.release.wait(20)
                code = 400 if self.path.startswith("/refuse") or (self.path == "/hang/freed" and outer.release.is_set()) else 200
                self.send_response(code)
                self.send_header("Content-Length", "2")
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # who asked has given up
                    self.wfile.write(b"no")

            def do_GET(self) -> None:
                self.path = self.path.replace("/busy", "/alive")
                self.do_POST()

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(POLL_S,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


def ask(paths: list[str], deadline_s: float, abandon=lambda: None) -> WeightSyncError:
    """The verdict on servers whose URLs end with `paths`."""
    calls = ServerCalls([Server(path) for path in paths], "key")
    with pytest.raises(WeightSyncError) as raised:
        calls.post("", lambda _: {}, 20, "testing").finish(time.monotonic() + deadline_s, abandon)
    calls.close()
    return raised.value


def test_the_server_at_fault_is_named() -> None:
    with Servers() as servers, ThreadPoolExecutor() as asking:
        good, refusing, hanging = (f"{servers.url}/{path}" for path in ("good", "refuse", "hang"))
        gone = "http://127.0.0.1:9/x"
        begin = time.monotonic()
        assert ask([good, refusing, hanging], 10).servers == (refusing,)
        assert ask([good, refusing, gone, hanging], 10).servers == (gone,), "others refuse because it is gone"
        assert time.monotonic() - begin < 8, "a server that cannot answer any more was waited for"
        slow = [[good, hanging], [f"{servers.url}/busy", hanging], [f"{hanging}/1", f"{hanging}/2"]]
        alone, lively, neither = asking.map(ask, slow, (0.3, 0.2, 0.2))
        assert alone.servers == (hanging,)
        assert lively.servers == (hanging,), "the other one shows that it lives"
        assert len(neither.servers) == 2


def test_freed_servers_are_not_to_blame() -> None:
    with Servers() as servers, Servers() as other:
        freed, silent = f"{servers.url}/hang/freed", f"{other.url}/hang"
        assert ask([freed, silent], 0.3, servers.release.set).servers == (silent,)
