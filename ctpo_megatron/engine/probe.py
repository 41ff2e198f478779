"""Asks a server again and again whether its scheduler takes its turns, one question at a time, however long the answer takes.

The scheduler itself answers /server_info, between two steps of its loop, and also while it is paused; /health then answers 503
after 20 s, and /model_info is the HTTP process's own.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

from ctpo_megatron.engine.http import Answer, Failure
from ctpo_megatron.engine.request_thread import RequestThread

EVERY_S = 5.0
PATIENCE_S = 86_400.0  # the age of the question is what is watched; a question that is given up would stay with the server


class Probe:
    """Counts the answers of the server at `url`."""

    def __init__(self, requests: RequestThread, url: str) -> None:
        self._requests, self._url = requests, url
        self._question: Future[Answer | Failure] | None = None
        self._asked = 0.0
        self.answers = 0

    def turn(self) -> int:
        """Returns how many answers have come; asks again where the last one is there and old enough."""
        now = time.monotonic()
        if self._question is not None and self._question.done():
            self.answers += isinstance(self._question.result(), Answer)
            self._question = None
        if self._question is None and now - self._asked >= EVERY_S:
            self._asked = now
            self._question = self._requests.submit("GET", f"{self._url}/server_info", None, PATIENCE_S)
        return self.answers

    def close(self) -> None:
        """Ask no more. Safe to call twice."""
        self._requests.close()
