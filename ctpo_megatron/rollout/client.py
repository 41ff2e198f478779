"""Talks to the SGLang servers: token ids in, sampled ids with log-probs and policy versions out."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from ctpo_megatron.errors import EngineError

RETRIES = 5
BACKOFF_S = 0.2


@dataclass(slots=True)
class Generation:
    """What one request sampled; three streams of equal length. The token that ended it is part of it."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of the distribution at the sampling temperature (greedy: at 1)
    versions: list[int] = field(default_factory=list)  # policy version that sampled each token
    finish: Literal["stop", "length"] = "length"


class EngineClient:
    """All servers of a run behind one object; used as an async context manager.

    Every request is bounded by `request_timeout_s`. Connection errors and answers of 500 and above are tried again with
    growing pauses, then raised as EngineError; answers of 400 to 499 raise it at once.
    """

    def __init__(self, urls: list[str], api_key: str, *, request_timeout_s: float) -> None:
        self.urls = list(urls)
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._timeout_s = request_timeout_s
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EngineClient:
        self._http = aiohttp.ClientSession(
            headers=self._headers,
            connector=aiohttp.TCPConnector(limit=0),  # the caller bounds what is in flight
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._http.close()

    async def generate(
        self, input_ids: list[int], *, max_new_tokens: int, temperature: float, stop_token_ids: list[int], session: int
    ) -> Generation:
        """Sample after `input_ids` until a stop token or `max_new_tokens`. Temperature 0 is greedy.

        Requests with the same `session` go to the same server, whose prefix cache then holds the earlier turns. Weights may
        change while it runs: the tokens before and after the change carry their own versions.
        """
        url = self.urls[session % len(self.urls)]
        done = Generation()
        while True:
            sampling = {
                "max_new_tokens": max_new_tokens - len(done.token_ids),
                "temperature": temperature,
                "stop_token_ids": stop_token_ids,
                **{"top_p": 1.0, "top_k": -1, "min_p": 0.0},
            }
            body = {"input_ids": input_ids + done.token_ids, "sampling_params": sampling, "return_logprob": True}
            answer = await self._request(url, "POST", "/generate", body)
            reason = _append(done, answer, url)
            if reason in ("stop", "length"):
                done.finish = reason
                return done
            if reason != "abort":
                raise EngineError(f"{url}/generate ended a generation for the unknown reason {reason!r}")
            # aborted for a weight update: go on from the tokens so far; a paused server holds the request back until it resumes
            if len(done.token_ids) >= max_new_tokens:
                return done

    async def pause(self) -> None:
        """Stop sampling on all servers. Generations in flight keep their tokens and lose their KV cache, so that it can be
        flushed; they and new requests wait for `resume`."""
        await self._all("POST", "/pause_generation", {"mode": "retract"})

    async def resume(self) -> None:
        """Go on sampling on all servers."""
        await self._all("POST", "/continue_generation", {})

    async def versions(self) -> list[str]:
        """The version of the weights that each server reports."""
        return [answer["weight_version"] for answer in await self._all("GET", "/model_info")]

    async def checksums(self) -> list[dict[str, Any]]:
        """Per server, the hashes of all tensors in its engine's own layout, one entry per rank."""
        return await self._all("POST", "/weights_checker", {"action": "checksum"})

    async def health(self) -> list[bool]:
        """Per server, whether it answers its health check; nothing is tried twice."""

        async def healthy(url: str) -> bool:
            try:
                async with self._http.get(f"{url}/health") as answer:
                    return answer.status == 200
            except (aiohttp.ClientError, TimeoutError):
                return False

        return list(await asyncio.gather(*(healthy(url) for url in self.urls)))

    async def _all(self, method: str, path: str, body: dict[str, Any] | None = None) -> list[Any]:
        return list(await asyncio.gather(*(self._request(url, method, path, body) for url in self.urls)))

    async def _request(self, url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The decoded answer, or EngineError with URL and body."""
        for attempt in range(RETRIES):
            try:
                async with self._http.request(method, url + path, json=body) as answer:
                    text = await answer.text()
                    if answer.status < 400:
                        return json.loads(text) if answer.content_type == "application/json" else text
                    problem = f"answered {answer.status}: {text[:500]}"
                    if answer.status < 500:
                        break
            except TimeoutError:
                raise EngineError(f"{url}{path} did not answer within {self._timeout_s:.0f} s") from None
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < RETRIES - 1:
                await asyncio.sleep(BACKOFF_S * 2**attempt)
        raise EngineError(f"{url}{path} {problem}")


def _append(done: Generation, answer: dict[str, Any], url: str) -> str:
    """Add the answer's tokens to `done`; returns why it ended."""
    meta = answer["meta_info"]
    token_ids = answer["output_ids"]
    logprobs = [entry[0] for entry in meta.get("output_token_logprobs") or []]
    if len(logprobs) != len(token_ids):
        raise EngineError(f"{url}/generate returned {len(token_ids)} tokens but {len(logprobs)} log-probs")
    spans = meta.get("weight_versions") or [{"version": meta["weight_version"], "start": 0, "end": len(token_ids)}]
    try:
        versions = [int(span["version"]) for span in spans for _ in range(span["start"], span["end"])]
    except ValueError:
        raise EngineError(f"{url} reports weight versions that are not numbers: {spans}") from None
    if len(versions) != len(token_ids):
        raise EngineError(f"{url}/generate returned {len(token_ids)} tokens but {len(versions)} weight versions: {spans}")
    done.token_ids += token_ids
    done.logprobs += logprobs
    done.versions += versions
    return meta["finish_reason"]["type"]
