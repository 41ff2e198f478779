"""Requests to all inference servers at once, each bounded, and the verdict on which of them failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

import requests

from ctpo_megatron.errors import WeightSyncError

GRACE_S = 1.0  # after one server has failed: for those that failed with it, and for the cause, if it was a consequence


@dataclass(frozen=True, slots=True)
class Server:
    """An inference server, as senders see it."""

    url: str
    tp: int = 1  # its own tensor-parallel ranks


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request failed. A server that is gone makes the others refuse what depends on it, so it counts as the cause."""

    kind: Literal["gone", "refused"]
    message: str


class ServerCalls:
    """Posts to `servers` from a thread each."""

    def __init__(self, servers: list[Server], api_key: str) -> None:
        self.servers = list(servers)
        self._headers = {"Authorization": f"Bearer {api_key}"}
        # two requests of a server may be under way: one that it will never answer, and the one that looks for it
        self._pool = ThreadPoolExecutor(max_workers=max(1, 2 * len(servers)), thread_name_prefix="weights")

    @property
    def urls(self) -> list[str]:
        """Of all servers."""
        return [server.url for server in self.servers]

    def post(self, path: str, body_of: Callable[[int], dict[str, Any]], timeout_s: float, what: str) -> Answers:
        """Post `body_of(number of the server)` to `path` of every server. `what` is for the error: "publishing weights, ..."."""
        timeout_s += 20 * GRACE_S  # who waits for an answer gives up first, and finds out who owes it
        futures = {
            server.url: self._pool.submit(self._request, "POST", server.url + path, body_of(number), timeout_s)
            for number, server in enumerate(self.servers)
        }
        return Answers(futures, what, self.probe)

    def probe(self, timeout_s: float, urls: list[str] | None = None) -> Answers:
        """Ask every server, or those at `urls`, for a sign of life. One answers that even while its ranks are busy."""
        asked = self.urls if urls is None else urls
        get = {url: self._pool.submit(self._request, "GET", url + "/model_info", None, timeout_s) for url in asked}
        return Answers(get, "looking for the servers")

    def close(self) -> None:
        """Wait for nothing: what is still under way ends by its own bound."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _request(self, method: str, url: str, body: dict[str, Any] | None, timeout_s: float) -> Problem | None:
        try:
            answer = requests.request(method, url, json=body, headers=self._headers, timeout=timeout_s)
        except requests.Timeout:
            return Problem("gone", f"{url} did not answer within {timeout_s:.0f} s")
        except requests.RequestException as error:
            return Problem("gone", f"{url}: {type(error).__name__}: {error}")
        if answer.status_code != 200:
            return Problem("refused", f"{url} answered {answer.status_code}: {answer.text[:500]}")
        return None


class Answers:
    """Answers under way, by server."""

    def __init__(
        self,
        futures: dict[str, Future[Problem | None]],
        what: str,
        probe: Callable[[float, list[str]], Answers] | None = None,
    ) -> None:
        self._futures = futures
        self._what = what
        self._probe = probe

    def failed(self) -> bool:
        """Whether any server is known to have failed."""
        return bool(self._problems())

    def wait(self, timeout_s: float) -> None:
        """For all answers, whatever they are."""
        wait(self._futures.values(), timeout=timeout_s)

    def finish(self, deadline: float, abandon: Callable[[], None] = lambda: None) -> None:
        """Wait for all answers. Raises WeightSyncError as soon as one server has failed, or when `deadline` has passed.

        `deadline` counts as `time.monotonic()` does. Where one server has failed, the others may wait for what never comes: they
        are not waited for. See `blame` for `abandon`.
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
        """The error that names the servers at fault.

        A server that is gone makes the others fail, so it comes first; then those that refused. Where none has said anything,
        `abandon` gives up what they do together: those that only waited for this process answer now. Of those that are still
        silent, some may wait for another server that hangs: if any shows no sign of life at all, it is that one.
        """
        self._await(lambda: bool(self._gone()))
        at_fault = self._gone() or self._problems()
        abandon()
        if not at_fault:
            self._await(lambda: not self._silent())
            silent = self._silent()
            named = self._lifeless(silent) or silent
            at_fault = self._gone() or {url: Problem("gone", f"{url} {reason}") for url in named}
        messages = "; ".join(problem.message for problem in at_fault.values()) or reason
        return WeightSyncError(f"publishing weights, {self._what}: {messages}", servers=at_fault)

    def _await(self, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + GRACE_S
        while self._silent() and not condition() and time.monotonic() < limit:
            time.sleep(0.02)

    def _lifeless(self, urls: list[str]) -> list[str]:
        if self._probe is None or len(urls) < 2:
            return []
        signs = self._probe(2 * GRACE_S, urls)
        signs.wait(3 * GRACE_S)
        return [*signs._gone(), *signs._silent()]

    def _problems(self) -> dict[str, Problem]:
        done = {url: future.result() for url, future in self._futures.items() if future.done() and not future.cancelled()}
        return {url: problem for url, problem in done.items() if problem is not None}

    def _gone(self) -> dict[str, Problem]:
        return {url: problem for url, problem in self._problems().items() if problem.kind == "gone"}

    def _silent(self) -> list[str]:
        return [url for url, future in self._futures.items() if not future.done()]
