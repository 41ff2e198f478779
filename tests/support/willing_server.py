"""An HTTP server that answers 200 to everything but what it refuses or never answers, and notes what it was asked for."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

POLL_S = 0.02  # in which it sees that it is to end


@contextmanager
def willing_server(*, refused: Collection[str] = (), unanswered: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the paths so far. The paths in `refused` are answered with 400, those in `unanswered` when all is over."""
    asked: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            asked.append(self.path)
            if self.path in unanswered:
                over.wait(60)
            self.send_response(400 if self.path in refused else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that has gone away is no error of the test."""

    http = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(POLL_S,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        over.set()
        http.shutdown()
        http.server_close()
