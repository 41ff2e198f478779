"""One request: who asks, what for, and how it is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from ctpo_megatron.agents.http.anthropic_messages import AnthropicMessages
from ctpo_megatron.agents.http.bodies import read_body
from ctpo_megatron.agents.http.dialects import Asked, Dialect
from ctpo_megatron.agents.http.gates import Gates
from ctpo_megatron.agents.http.keys import given_keys, name_of
from ctpo_megatron.agents.http.limits import Limits
from ctpo_megatron.agents.http.openai_chat import OpenAIChat
from ctpo_megatron.agents.http.refusals import Refusal
from ctpo_megatron.agents.http.replies import FIXED, Reply, refused
from ctpo_megatron.agents.protocols import AgentAnswer, Episode, EpisodeOver, Episodes, RequestUnusable
from ctpo_megatron.engine.http import beside_loop

log = logging.getLogger(__name__)

_OPENAI, _ANTHROPIC = OpenAIChat(), AnthropicMessages()
_DIALECTS: Mapping[str, Dialect] = {"chat/completions": _OPENAI, "messages": _ANTHROPIC}
_CHARACTERS_PER_TOKEN = 64  # of lists of tokens in an answer, roughly

_SAYS = "set its base URL to http://HOST:PORT/ATTEMPT/v1 (OpenAI's clients) or http://HOST:PORT/ATTEMPT (Anthropic's)"
_ELSEWHERE = {
    "responses": "this endpoint speaks chat completions, not responses: let the harness use them (openai-agents: "
    "set_default_openai_api('chat_completions'), others: a chat model in place of a responses model)",
    "completions": "this endpoint speaks chat completions: use POST /v1/chat/completions",
    "messages/count_tokens": "tokens are not counted before they are used; `usage` of each answer has them",
}


@dataclass(slots=True)
class Counts:
    """What became of requests since the start. `refused`: all answers of 400 and above; `cut`: answers that did not arrive."""

    answered: int = 0
    refused: int = 0
    cut: int = 0
    retries: int = 0
    kept_alive: int = 0


@dataclass(frozen=True, slots=True)
class Manners:
    """What all answers of a server have in common.

    `sampling`: the values that the run samples with, for the header `x-sampling`; `overlooked`: parameters that are set where
    they would be refused; `model`: the model's name in lists.
    """

    limits: Limits
    sampling: Mapping[str, Any]
    overlooked: Collection[str]
    model: str


class Exchange:
    """Answers requests for the episodes that it is given."""

    def __init__(self, episodes: Episodes, manners: Manners) -> None:
        self._episodes = episodes
        self._manners = manners
        self._limits = manners.limits
        self._gates = Gates(manners.limits)
        self._large = asyncio.Lock()
        self._sampling = ", ".join(f"{name}={value}" for name, value in manners.sampling.items())
        self.counts = Counts()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Returns the answer to any request, refusals too."""
        try:
            return await self._answer(request)
        except (asyncio.CancelledError, ConnectionError):
            self.counts.cut += 1
            raise

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        name, place = _place(request.path)
        dialect = _DIALECTS.get(place, _ANTHROPIC if place.startswith("messages") or _speaks_anthropic(request) else _OPENAI)
        headers: dict[str, str] = {}
        try:
            if not place and request.method in ("GET", "HEAD"):
                return web.Response(text="ok\n", headers=FIXED)
            own, episode = self._episode(request, name)
            headers["X-Session-ID"] = own
            if place == "models" or place.startswith("models/"):
                return self._models(place, request.method, headers)
            if place not in _DIALECTS:
                raise Refusal(_elsewhere(request.path, place), status=404, code="unknown_url")
            if request.method != "POST":
                raise Refusal(f"{place} is asked with POST", status=405, code="method_not_allowed")
            async with self._gates.through(own):
                asked = await self._asked(request, dialect)
                return await self._complete(request, dialect, asked, episode, headers)
        except Refusal as refusal:
            return self._refused(dialect, refusal, headers)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001
            return self._refused(dialect, _failed(error), headers)  # aiohttp would say 500: clients repeat what does not heal

    def _refused(self, dialect: Dialect, refusal: Refusal, headers: Mapping[str, str]) -> web.Response:
        self.counts.refused += 1
        return refused(dialect, refusal, headers)

    def _episode(self, request: web.BaseRequest, name: str | None) -> tuple[str, Episode]:
        """The attempt's public name, and the attempt."""
        for key in given_keys(request.headers):
            episode = self._episodes.find(key)
            own = name_of(key)
            if episode is not None and name in (None, own):
                return own, episode
        raise Refusal(
            "no attempt has this key, or it is not the key of this URL; use the key and the URL that the attempt was given",
            status=401,
            code="invalid_api_key",
        )

    async def _asked(self, request: web.BaseRequest, dialect: Dialect) -> Asked:
        body = await read_body(request, self._limits, self._large)
        said = request.headers.get("x-stainless-retry-count", "0")
        retries = int(said) if said.isascii() and said.isdigit() and len(said) < 6 else 0
        self.counts.retries += retries > 0
        return dialect.read(body, retries=retries, overlooked=self._manners.overlooked)

    async def _complete(
        self, request: web.BaseRequest, dialect: Dialect, asked: Asked, episode: Episode, headers: dict[str, str]
    ) -> web.StreamResponse:
        if self._sampling:
            headers["x-sampling"] = self._sampling
        if asked.not_applied:
            headers["x-not-applied"] = ", ".join(asked.not_applied)
        reply = Reply(request, dialect, self._limits, headers, stream=asked.stream)
        try:
            answer = await self._waited_for(reply, asked, episode)
            write = dialect.stream if asked.stream else dialect.answer
            sent = await reply.finish(await beside_loop(_size(asked, answer), write, asked, answer))
        except ConnectionError:
            raise
        except Exception as error:
            if not reply.begun:
                raise
            self.counts.refused += 1
            return await reply.refuse(error if isinstance(error, Refusal) else _failed(error))
        self.counts.answered += 1
        return sent

    async def _waited_for(self, reply: Reply, asked: Asked, episode: Episode) -> AgentAnswer:
        """The next turn; while it is waited for the client gets signs of life. Raises Refusal when there is none."""
        turn = asyncio.ensure_future(episode.complete(asked.request))
        turn.add_done_callback(_looked_at)
        try:
            while not (await asyncio.wait((turn,), timeout=self._limits.keep_alive_s))[0]:
                self.counts.kept_alive += not reply.begun
                await reply.keep_alive()
        finally:
            turn.cancel()  # nothing where it is done; else the client is gone
        if turn.cancelled():
            raise Refusal("the attempt was ended", status=404, code="episode_over")
        try:
            return turn.result()
        except EpisodeOver as over:
            raise Refusal(f"the attempt is over: {over}", status=404, code="episode_over") from None
        except RequestUnusable as unusable:
            raise Refusal(str(unusable)) from None

    def _models(self, place: str, method: str, headers: dict[str, str]) -> web.Response:
        if method not in ("GET", "HEAD"):
            raise Refusal("models are asked for with GET", status=405, code="method_not_allowed")
        name = place.removeprefix("models").removeprefix("/") or self._manners.model
        one = {"id": name, "object": "model", "created": 0, "owned_by": "ctpo", "type": "model", "display_name": name}
        one["created_at"] = "1970-01-01T00:00:00Z"
        if place != "models":
            return _json(one, headers)
        return _json({"object": "list", "data": [one], "first_id": name, "last_id": name, "has_more": False}, headers)


def _failed(error: Exception) -> Refusal:
    """What a client is told of a fault of the endpoint or the run, which the log has."""
    log.error("an agent's request could not be answered", exc_info=error)
    return Refusal("the endpoint could not answer this request; the log of the run says why", code="failed")


def _looked_at(turn: asyncio.Future[AgentAnswer]) -> None:
    """A turn whose client is gone may fail too; nobody is to be warned that nobody looked."""
    if not turn.cancelled():
        turn.exception()


def _place(path: str) -> tuple[str | None, str]:
    """The attempt that a path names, if it does, and what follows on /v1/; all of another path."""
    first, _, rest = path.lstrip("/").partition("/")
    if first == "v1":
        return None, rest.rstrip("/")
    second, _, place = rest.partition("/")
    return (first, place.rstrip("/")) if second == "v1" else (None, "" if path in ("/", "/health") else path)


def _elsewhere(path: str, place: str) -> str:
    return _ELSEWHERE.get(place) or f"there is no {path[:200]!r} here: {_SAYS}. Served are chat/completions, messages and models"


def _speaks_anthropic(request: web.BaseRequest) -> bool:
    return "anthropic-version" in request.headers


def _size(asked: Asked, answer: AgentAnswer) -> int:
    """About how many characters the answer has."""
    text = len(answer.content or "") + len(answer.reasoning or "")
    lists = len(answer.token_ids) * (asked.logprobs + asked.token_ids) + len(answer.prompt_ids) * asked.token_ids
    return text + lists * _CHARACTERS_PER_TOKEN


def _json(value: dict[str, Any], headers: Mapping[str, str]) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), headers={**FIXED, **headers, "Content-Type": "application/json"})
