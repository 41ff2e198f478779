"""Requests to all inference servers at once, each bounded, and the verdict on which of them failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from ctpo_megatron.engine.http import Answer, Failure
from ctpo_megatron.engine.request_thread import RequestThread
from ctpo_megatron.errors import WeightSyncError

VERDICT_WAIT_S = 1.0  # after one server has failed: others may have failed with it, and one of them may be the cause
REQUEST_SLACK_S = 20.0  # that a request outlives its caller's bound: the caller gives up first, and finds out who owes an answer
SIGN_OF_LIFE_S = 2.0  # in which a server that lives says what it is


@dataclass(frozen=True, slots=True)
class Server:
    """An inference server, as senders see it."""

    url: str
    tp: int = 1  # its own tensor-parallel ranks


class ServerCalls:
    """Asks all of `servers` at once, from a thread of its own; no request is tried twice."""

    def __init__(self, servers: list[Server], api_key: str) -> None:
        self.servers = list(servers)
        self._requests = RequestThread(api_key)

    @property
    def urls(self) -> list[str]:
        """URLs of all servers."""
        return [server.url for server in self.servers]

    def post(self, path: str, body_of: Callable[[int], dict[str, Any]], timeout_s: float, what: str) -> Answers:
        """Post `body_of(number of the server)` to `path` of every server. `what` is for the error: "publishing weights, ..."."""
        limit = timeout_s + REQUEST_SLACK_S
        futures = {
            server.url: self._requests.submit("POST", server.url + path, body_of(number), limit)
            for number, server in enumerate(self.servers)
        }
        return Answers(futures, what, self.probe)

    def probe(self, timeout_s: float, urls: list[str] | None = None) -> Answers:
        """Ask every server, or those at `urls`, for a sign of life. One answers that even while its ranks are busy."""
        asked = self.urls if urls is None else urls
        get = {url: self._requests.submit("GET", url + "/model_info", None, timeout_s) for url in asked}
        return Answers(get, "looking for the servers")

    def close(self) -> None:
        """Give up what is still under way. Safe to call twice."""
        self._requests.close()


class Answers:
    """Answers under way, by the servers' URLs."""

    def __init__(
        self,
        futures: dict[str, Future[Answer | Failure]],
        what: str,
        probe: Callable[[float, list[str]], Answers] | None = None,
    ) -> None:
        self._futures = futures
        self._what = what
        self._probe = probe

    def failed(self) -> bool:
        """Whether any server is known to have failed."""
        return bool(self._failures())

    def wait(self, timeout_s: float) -> None:
        """Wait until every server has answered or failed, at most `timeout_s`."""
        wait(self._futures.values(), timeout=timeout_s)

    def finish(self, deadline: float, abandon: Callable[[], None] = lambda: None) -> None:
        """Wait for all answers. Raises WeightSyncError as soon as one server has failed, or when `deadline` has passed.

        `deadline` counts as `time.monotonic()` does. Where one server has failed, the others may wait for what never comes: they
        are not waited for. `abandon` is passed on to `blame`.
        """
        pending = set(self._futures.values())
        while pending and not self.failed():
            left = deadline - time.monotonic()
            if left <= 0:
                raise self.blame("did not answer in time", abandon)
            _, pending = wait(pending, timeout=left, return_when=FIRST_COMPLETED)
        if self.failed():
            raise self.blame("failed", abandon)

    def blame(self, reason: str, abandon: Callable[[], None] = lambda: None) -> WeightSyncError:
        """The error that names the servers at fault. The first of these rules that names any decides:

        1. Servers that are gone. They make the others fail, so they count as the cause.
        2. Servers that answered with an error.
        3. `abandon` gives up what the servers do together, a broadcast for example. Servers that only waited for this process
           answer now, and are not at fault. Of those that stay silent, the ones that give no sign of life hang, and the rest
           wait for them.
        4. Where all that are silent give a sign of life, or none does, all of them. `reason` is what the error says of them.
        """
        self._await(lambda: bool(self._gone()))
        at_fault = self._gone() or self._failures()
        abandon()
        if not at_fault:
            self._await(lambda: not self._silent())
            silent = self._silent()
            named = self._lifeless(silent) or silent
            at_fault = self._gone() or {url: Failure("silent", f"{url} {reason}") for url in named}
        messages = "; ".join(failure.message for failure in at_fault.values()) or reason
        return WeightSyncError(f"publishing weights, {self._what}: {messages}", servers=at_fault)

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition` while any server is silent, at most VERDICT_WAIT_S."""
        limit = time.monotonic() + VERDICT_WAIT_S
        while self._silent() and not condition() and time.monotonic() < limit:
            time.sleep(0.02)

    def _lifeless(self, urls: list[str]) -> list[str]:
        """Those at `urls` that give no sign of life; with a single one there is nothing to tell apart."""
        if self._probe is None or len(urls) < 2:
            return []
        signs = self._probe(SIGN_OF_LIFE_S, urls)
        signs.wait(SIGN_OF_LIFE_S + VERDICT_WAIT_S)
        return [*signs._gone(), *signs._silent()]

    def _failures(self) -> dict[str, Failure]:
        done = {url: future.result() for url, future in self._futures.items() if future.done() and not future.cancelled()}
        return {url: outcome for url, outcome in done.items() if isinstance(outcome, Failure)}

    def _gone(self) -> dict[str, Failure]:
        return {url: failure for url, failure in self._failures().items() if failure.gone}

    def _silent(self) -> list[str]:
        return [url for url, future in self._futures.items() if not future.done()]
