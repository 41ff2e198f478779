"""A server with OpenAI's chat completions that judges as a language model would: right mostly, and with faults where asked.

It reads the question that `rollout.reward: {type: judge}` asks by default.
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Literal

Fault = Literal["none", "error", "slow", "nonsense"]
_ASKED = re.compile(r"Reference answer:\n(.*?)\n\nAnswer to be graded:\n(.*)\n\nJudge only", re.DOTALL)
_BOX = re.compile(r"\\boxed\{(.*?)\}")
SLOW_S = 30.0  # more than a request of these runs may take


def verdict(asked: str) -> str:
    """Returns the reply to what a judge is asked: a sentence, and 1 where the last box is the reference answer, else 0."""
    found = _ASKED.search(asked)
    boxes = _BOX.findall(found[2]) if found else []
    return f"I compare the answers.\n{int(bool(found and boxes and boxes[-1].strip() == found[1].strip()))}"


def is_faulty(asked: str, share: float) -> bool:
    """Whether a question is among the `share` that is answered faultily: always the same ones."""
    return zlib.crc32(asked.encode()) / 2**32 < share


@contextmanager
def judging(fault: Fault = "none", share: float = 0.0) -> Iterator[str]:
    """A server that answers within the block, `share` of the questions with a fault; yields its base URL."""

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = body["messages"][-1]["content"]
            wrong = fault if is_faulty(asked, share) else "none"
            if wrong == "slow":
                time.sleep(SLOW_S)
            if wrong == "error":
                self._answer(503, {"error": {"message": "the judge has no room"}})
                return
            said = "I would rather not say." if wrong == "nonsense" else verdict(asked)
            usage = {"prompt_tokens": 60, "completion_tokens": 8, "total_tokens": 68}
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self._answer(200, {"id": "j", "object": "chat.completion", "model": "judge", "choices": [choice], "usage": usage})

        def _answer(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # who asked has left

        def log_message(self, *_given: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
