"""Generation by the SGLang servers: token ids in, sampled ids with log-probs and policy versions out."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.engine.answers import forget_older, read_experts, read_top
from ctpo_megatron.engine.control import ServerControl
from ctpo_megatron.engine.fleet import Fleet, Lease
from ctpo_megatron.engine.http import Requests, beside_loop
from ctpo_megatron.errors import EngineError, EngineRefused
from ctpo_megatron.types import Generation, RoutingShape, TopK

MAX_FAILURES = 20  # of servers, at one generation
REASONS = ("stop", "length", "abort")


class EngineClient:
    """All servers of a run behind one object; used as an async context manager.

    `fleet` knows which servers serve; `control` is for everything but generation. `routing`: how the model routes, where the
    servers report it (`--enable-return-routed-experts`). `top_k`: of how many most probable tokens the servers report log-probs
    at each place. Both hold only for requests that say what is `recorded`. Every request is bounded by `request_timeout_s`.
    """

    def __init__(
        self,
        fleet: Fleet,
        api_key: str,
        *,
        request_timeout_s: float,
        routing: RoutingShape | None = None,
        top_k: int = 0,
    ) -> None:
        self.fleet = fleet
        self._routing, self._top_k = routing, top_k
        self._requests = Requests(api_key, request_timeout_s)
        self.control = ServerControl(self._requests)

    async def __aenter__(self) -> EngineClient:
        await self._requests.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._requests.__aexit__(*error)

    async def generate(
        self,
        input_ids: list[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: list[int],
        session: int,
        recorded: int | None = None,
    ) -> Generation:
        """Sample after `input_ids` until a stop token or `max_new_tokens`. Temperature 0 is greedy.

        Requests with the same `session` go to the same server, whose prefix cache then holds the earlier turns. Weights may
        change while it runs: the tokens before and after the change carry their own versions. Where a server fails, another one
        goes on from the tokens in hand. `recorded`: of so many leading tokens the experts are known already, those of all others
        are returned, [input + sampled - 1 - recorded, ...]; the last token has not been read by the model. None: no record is
        wanted. Raises EngineError when no server is left, and when every server that was tried has failed.
        """
        done, record = Generation(), _Record(input_ids, recorded, self._routing, self._top_k)
        failures = 0
        while True:
            sampling = {
                "max_new_tokens": max_new_tokens - len(done.token_ids),
                "temperature": temperature,
                "stop_token_ids": stop_token_ids,
                **{"top_p": 1.0, "top_k": -1, "min_p": 0.0},
            }
            body = {"input_ids": input_ids + done.token_ids, "sampling_params": sampling, "return_logprob": True}
            lease = await self.fleet.acquire(session)
            answer = await self._answer(lease, body | record.wish())
            part = None if answer is None else _read(answer, lease.member.url)
            if answer is None or part is None or not await self.fleet.accept(lease, part.versions):
                failures += 1
                if failures == MAX_FAILURES:
                    raise EngineError(f"{failures} attempts at one generation failed, the last one on {lease.member.url}")
                continue
            done.append(part)
            meta = answer["meta_info"]
            await beside_loop(len(meta.get("routed_experts") or ""), record.read, done, meta, lease.member.url)
            # aborted for a weight update: go on from the tokens so far; a paused server holds the request back until it resumes
            if part.finish != "abort" or len(done.token_ids) >= max_new_tokens:
                done.finish = "length" if part.finish == "abort" else part.finish
                record.close(done, lease.member.url)
                return done

    async def _answer(self, lease: Lease, body: dict[str, Any]) -> dict[str, Any] | None:
        """The server's answer; None when it has failed, which suspends it. Raises EngineRefused."""
        request = asyncio.ensure_future(self._requests.post(f"{lease.member.url}/generate", body))
        broken = asyncio.ensure_future(self.fleet.broken(lease))
        try:
            await asyncio.wait([request, broken], return_when=asyncio.FIRST_COMPLETED)
            return None if broken.done() else request.result()
        except EngineRefused:
            raise
        except EngineError as error:
            if not lease.broken:
                self.fleet.suspend(lease.member, str(error))
            return None
        finally:
            request.cancel()
            broken.cancel()
            await asyncio.gather(request, broken, return_exceptions=True)


class _Record:
    """The routed experts and top-k tokens of one generation, gathered over the answers it took."""

    def __init__(self, input_ids: list[int], recorded: int | None, routing: RoutingShape | None, top_k: int) -> None:
        wanted = recorded is not None
        self._routing, self._top_k = (routing, top_k) if wanted else (None, 0)
        self._inputs, self._next = len(input_ids), recorded or 0
        self._experts: list[NDArray[np.signedinteger]] = []
        self._top: list[TopK] = []

    def wish(self) -> dict[str, Any]:
        """The fields of a request that ask for a record of what is not known yet."""
        experts = {"return_routed_experts": True, "routed_experts_start_len": self._next} if self._routing else {}
        return experts | ({"top_logprobs_num": self._top_k} if self._top_k else {})

    def read(self, done: Generation, meta: dict[str, Any], url: str) -> None:
        """Add the record in an answer, whose tokens `done` holds already. Aborted requests that never ran have none."""
        if self._top_k:
            fresh = len(done.token_ids) - sum(len(top.ids) for top in self._top)
            self._top.append(read_top(meta, self._top_k, fresh, url))
        if self._routing is None:
            return
        experts = read_experts(meta, self._routing, self._left(done), url)
        if experts is None:
            return
        after = range(self._next + 1 - self._inputs, len(done.token_ids))  # places of the labels among the sampled tokens
        if done.versions:
            forget_older(experts, [done.versions[i] if i >= 0 else None for i in after], done.versions[-1])
        self._experts.append(experts)
        self._next += len(experts)

    def close(self, done: Generation, url: str) -> None:
        """Put the whole record into `done`. Raises EngineError where a server that was asked to report experts never did."""
        if self._top_k:
            done.top_k = TopK.joined(self._top)
        if self._routing is not None:
            if not self._experts:
                raise EngineError(f"{url} reports no experts; was it started with --enable-return-routed-experts?")
            done.routed_experts = np.concatenate([*self._experts, self._routing.unknown(self._left(done))])

    def _left(self, done: Generation) -> int:
        return self._inputs + len(done.token_ids) - 1 - self._next


def _read(answer: dict[str, Any], url: str) -> Generation:
    """The tokens of one answer. Raises EngineError where its streams differ in length, or its finish reason is unknown."""
    meta = answer["meta_info"]
    token_ids, reason = answer["output_ids"], meta["finish_reason"]["type"]
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
    if reason not in REASONS:
        raise EngineError(f"{url}/generate ended a generation for the unknown reason {reason!r}")
    return Generation(token_ids, logprobs, versions, reason)
