"""Generation by the SGLang servers: token ids in, sampled ids with log-probs and policy versions out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.engine.answers import forget_older, read_experts, read_supports, read_top
from ctpo_megatron.engine.control import ServerControl
from ctpo_megatron.engine.fleet import Fleet, Lease, State
from ctpo_megatron.engine.http import Requests, beside_loop
from ctpo_megatron.engine.sampling import sampling_params
from ctpo_megatron.errors import EngineError, EngineRefused
from ctpo_megatron.types import WHOLE, Generation, RoutingShape, TopK, Truncation

MAX_FAILURES = 20  # of servers, at one generation
INTERRUPT_TIMEOUT_S = 10.0  # for servers to give what they have; it takes one forward
INTERRUPT_POLL_S = 0.02
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
        self._in_flight = 0  # requests for generations that no server has answered

    async def __aenter__(self) -> EngineClient:
        await self._requests.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._requests.__aexit__(*error)

    async def generate(
        self,
        input_ids: list[int],
        done: Generation | None = None,
        *,
        max_new_tokens: int,
        temperature: float,
        truncation: Truncation = WHOLE,
        stop_token_ids: list[int],
        session: int,
        recorded: int | None = None,
        aside: bool = False,
    ) -> Generation:
        """Sample after `input_ids` and `done` until a stop token, or `max_new_tokens` with `done`. Temperature 0 is greedy.

        `done` grows with every part that a server gives, and is returned in the end; None: of a generation that begins. Requests
        with the same `session` go to the same server, whose prefix cache then holds the earlier turns. Weights may
        change while it runs: the tokens before and after the change carry their own versions. Where a server fails, another one
        goes on from the tokens in hand. `recorded`: of so many leading tokens the experts are known already, those of all others
        are returned, [input + sampled - 1 - recorded, ...]; the last token has not been read by the model. None: no record is
        wanted. Where `truncation` cuts, a record has each token's support, and log-probs are those of the truncated distribution;
        without a record they are those of the whole. `aside`: by servers that are set aside. Raises EngineError when no server is
        left, and when every server that was
        tried has failed.
        """
        done = Generation() if done is None else done
        record = _Record(input_ids, done, recorded, self._routing, self._top_k)
        told = truncation.cuts and recorded is not None
        failures = 0
        while True:
            sampling = sampling_params(temperature, truncation) | {
                "max_new_tokens": max_new_tokens - len(done.token_ids),
                "stop_token_ids": stop_token_ids,
            }
            body = {"input_ids": input_ids + done.token_ids, "sampling_params": sampling, "return_logprob": True}
            body |= {"return_sampling_mask": True} if told else {}
            lease = await self.fleet.acquire(session, aside=aside)
            answer = await self._answer(lease, body | record.wish())
            part = None if answer is None else _read(answer, lease.member.url, truncated=told)
            if answer is None or part is None or not await self.fleet.accept(lease, part.versions):
                failures += 1
                if failures == MAX_FAILURES:
                    raise EngineError(f"{failures} attempts at one generation failed, the last one on {lease.member.url}")
                continue
            done.append(part)
            meta = answer["meta_info"]
            await beside_loop(len(meta.get("routed_experts") or ""), record.read, meta, lease.member.url)
            # aborted for a weight update: go on from the tokens so far; a paused server holds the request back until it resumes
            if part.finish != "abort" or len(done.token_ids) >= max_new_tokens:
                done.finish = "length" if part.finish == "abort" else part.finish
                record.close(lease.member.url)
                return done

    async def interrupt(self, timeout_s: float = INTERRUPT_TIMEOUT_S) -> None:
        """Let all servers give what they have of the generations in flight, and send them nothing more until `go_on`.

        Returns once the parts are in the generations' `done`, or after `timeout_s`.
        """
        self.fleet.hold()
        asked = [self.control.abort_all(member.url, timeout_s=timeout_s) for member in self.fleet.members(State.SERVING)]
        await asyncio.gather(*asked, return_exceptions=True)  # one that does not answer is found by its watch
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._in_flight:
                    await asyncio.sleep(INTERRUPT_POLL_S)

    def go_on(self) -> None:
        """Send requests again."""
        self.fleet.release()

    async def _answer(self, lease: Lease, body: dict[str, Any]) -> dict[str, Any] | None:
        """The server's answer; None when it has failed, which suspends it. Raises EngineRefused."""
        self._in_flight += 1
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
            self._in_flight -= 1
            request.cancel()
            broken.cancel()
            await asyncio.gather(request, broken, return_exceptions=True)


class _Record:
    """The routed experts and top-k tokens of the generation `done`, which gathers them over the answers it takes."""

    def __init__(
        self, input_ids: list[int], done: Generation, recorded: int | None, routing: RoutingShape | None, top_k: int
    ) -> None:
        wanted = recorded is not None
        self._done = done
        self._routing, self._top_k = (routing, top_k) if wanted else (None, 0)
        self._inputs = len(input_ids)
        self._next = (recorded or 0) + (0 if done.routed_experts is None else len(done.routed_experts))

    def wish(self) -> dict[str, Any]:
        """The fields of a request that ask for a record of what is not known yet."""
        experts = {"return_routed_experts": True, "routed_experts_start_len": self._next} if self._routing else {}
        return experts | ({"top_logprobs_num": self._top_k} if self._top_k else {})

    def read(self, meta: dict[str, Any], url: str) -> None:
        """Add the record in an answer, whose tokens are in already. Aborted requests that never ran have none."""
        done = self._done
        if self._top_k:
            known = [] if done.top_k is None else [done.top_k]
            fresh = len(done.token_ids) - sum(len(top.ids) for top in known)
            done.top_k = TopK.joined([*known, read_top(meta, self._top_k, fresh, url)])
        if self._routing is None:
            return
        experts = read_experts(meta, self._routing, self._left, url)
        if experts is None:
            return
        after = range(self._next + 1 - self._inputs, len(done.token_ids))  # places of the labels among the sampled tokens
        if done.versions:
            forget_older(experts, [done.versions[i] if i >= 0 else None for i in after], done.versions[-1])
        self._add(experts)

    def close(self, url: str) -> None:
        """Make the record whole. Raises EngineError where a server that was asked to report experts never did."""
        if self._routing is not None:
            if self._done.routed_experts is None:
                raise EngineError(f"{url} reports no experts; was it started with --enable-return-routed-experts?")
            self._add(self._routing.unknown(self._left))

    def _add(self, experts: NDArray[np.signedinteger]) -> None:
        known = self._done.routed_experts
        self._done.routed_experts = experts if known is None else np.concatenate([known, experts])
        self._next += len(experts)

    @property
    def _left(self) -> int:
        """Tokens whose experts are not known, but for the last one."""
        return self._inputs + len(self._done.token_ids) - 1 - self._next


def _read(answer: dict[str, Any], url: str, *, truncated: bool) -> Generation:
    """The tokens of one answer, with their supports and log-probs among these where `truncated`.

    Raises EngineError where its streams differ in length, or its finish reason is unknown.
    """
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
    supports = None
    if truncated:
        supports, logprobs = read_supports(meta, token_ids, url)
    return Generation(token_ids, logprobs, versions, reason, supports=supports)
