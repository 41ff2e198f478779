"""Generation by the SGLang servers: token ids in, sampled ids with log-probs and policy versions out."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctpo_megatron.config.traffic import TrafficConfig
from ctpo_megatron.engine.answers import forget_older, read_experts, read_supports, read_top
from ctpo_megatron.engine.control import ServerControl
from ctpo_megatron.engine.dispatch import Dispatch
from ctpo_megatron.engine.fleet import Fleet, Lease, State
from ctpo_megatron.engine.http import Requests, beside_loop
from ctpo_megatron.engine.sampling import sampling_params
from ctpo_megatron.engine.traffic import Traffic
from ctpo_megatron.errors import EngineError, EngineRefused
from ctpo_megatron.types import WHOLE, Generation, RoutingShape, TopK, Truncation

INTERRUPT_TIMEOUT_S = 10.0  # for servers to give what they have; it takes one forward
INTERRUPT_POLL_S = 0.02
END_TIMEOUT_S = 5.0  # for a server to give what it has of one generation, when its time there is over
REASONS = ("stop", "length", "abort")


class EngineClient:
    """All servers of a run behind one object; used as an async context manager.

    `fleet` knows which servers serve; `control` is for everything but generation. `routing`: how the model routes, where the
    servers report it (`--enable-return-routed-experts`). `top_k`: of how many most probable tokens the servers report log-probs
    at each place. Both hold only for requests that say what is `recorded`. Every request is bounded by `request_timeout_s`.
    `traffic`: how requests are bounded and led away from slow servers, `most` of them at one server; None: they are not.
    """

    def __init__(
        self,
        fleet: Fleet,
        api_key: str,
        *,
        request_timeout_s: float,
        routing: RoutingShape | None = None,
        top_k: int = 0,
        traffic: TrafficConfig | None = None,
        most: int = 1,
    ) -> None:
        self.fleet = fleet
        self._routing, self._top_k = routing, top_k
        self.requests = Requests(api_key, request_timeout_s)
        self.control = ServerControl(self.requests)
        self.traffic = Traffic(traffic or TrafficConfig(), fleet, self.control, most=most)
        self._watches = traffic is not None
        self._open = contextlib.AsyncExitStack()
        self._under_way: set[Dispatch] = set()  # generations that were asked for, and whose answer is not in them yet

    async def __aenter__(self) -> EngineClient:
        await self._open.enter_async_context(self.requests)
        if self._watches:
            await self._open.enter_async_context(self.traffic.watched())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._open.aclose()

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
        deadline: float | None = None,
        aside: bool = False,
    ) -> Generation:
        """Sample after `input_ids` and `done` until a stop token, or `max_new_tokens` with `done`. Temperature 0 is greedy.

        `done` grows with every part that a server gives, and is returned in the end; None: of a generation that begins. Requests
        with the same `session` go to the same server, whose prefix cache then holds the earlier turns. Weights may
        change while it runs: the tokens before and after the change carry their own versions. Where a server fails, or is far
        slower than the others, another one goes on from the tokens in hand. `recorded`: of so many leading tokens the experts are
        known already, those of all others are returned, [input + sampled - 1 - recorded, ...]; the model has not read the last
        token. None: no record is wanted. Where `truncation` cuts, a record has each token's support, and log-probs are those of
        the truncated distribution; without a record they are those of the whole. `deadline`, on the clock of the event loop: when
        it ends with the tokens that there are, one at least. `aside`: by servers that are set aside. Raises EngineError when no
        server is left, and when every server that was tried has failed.
        """
        done = Generation() if done is None else done
        record = _Record(input_ids, done, recorded, self._routing, self._top_k)
        dispatch = Dispatch(self.fleet, self.traffic, session, aside=aside, deadline=deadline)
        sampling = sampling_params(temperature, truncation) | {"stop_token_ids": stop_token_ids}
        told = truncation.cuts and recorded is not None
        more = {"return_logprob": True} | ({"return_sampling_mask": True} if told else {})
        try:
            while not (dispatch.late and done.token_ids):
                self._under_way.discard(dispatch)
                body = {"input_ids": input_ids + done.token_ids, **more, **record.wish()}
                send, left = partial(self._answer, dispatch, body, sampling), max_new_tokens - len(done.token_ids)
                asked = await dispatch.ask(send, left, _sampled, begun=bool(done.token_ids))
                if asked is None:  # it waited for a server until its deadline
                    continue
                part = await self._take_in(*asked, record, done, truncated=told)
                if part is None:
                    dispatch.failed(asked[0].member.url)
                    continue
                # aborted for a weight update: go on from the tokens so far; a paused server holds the request back meanwhile
                if part.finish == "stop" or len(done.token_ids) >= max_new_tokens:
                    done.finish = "length" if part.finish == "abort" else part.finish
                    break
                if part.finish == "length" and not dispatch.late:  # SGLang's context ends here: a run's bounds leave room for it
                    done.finish = "length"
                    break
            else:
                done.finish = "deadline"
        finally:
            self._under_way.discard(dispatch)
        record.close()
        return done

    async def _take_in(
        self, lease: Lease, answer: dict[str, Any] | None, record: _Record, done: Generation, *, truncated: bool
    ) -> Generation | None:
        """Add an answer to `done`, with what it has for the `record`; returns its tokens, None where they may not be used."""
        if answer is None:
            return None
        url = lease.member.url
        part = _read(answer, url, truncated=truncated)
        if not await self.fleet.accept(lease, part.versions):
            return None
        done.append(part)
        meta = answer["meta_info"]
        await beside_loop(len(meta.get("routed_experts") or ""), record.read, meta, url)
        return part

    async def interrupt(self, timeout_s: float = INTERRUPT_TIMEOUT_S) -> None:
        """Let all servers give what they have of the generations in flight, and send them nothing more until `go_on`.

        Returns once the parts are in the generations' `done`, or after `timeout_s`.
        """
        self.fleet.hold()
        asked = [self.control.abort_all(member.url, timeout_s=timeout_s) for member in self.fleet.members(State.SERVING)]
        await asyncio.gather(*asked, return_exceptions=True)  # one that does not answer is found by its watch
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._under_way:
                    await asyncio.sleep(INTERRUPT_POLL_S)

    def go_on(self) -> None:
        """Send requests again."""
        self.fleet.release()

    async def _answer(
        self,
        dispatch: Dispatch,
        body: dict[str, Any],
        sampling: dict[str, Any],
        lease: Lease,
        tokens: int,
        limit_s: float | None,
    ) -> dict[str, Any] | None:
        """Returns the answer to `body`, at most `tokens`; None when the server has failed: it is suspended. Raises EngineRefused.

        After `limit_s` the server is asked for what it has. It is None, too, where the server does not even give that; what it
        may still sample is dropped, and a server that hangs is found by its watch.
        """
        self._under_way.add(dispatch)
        name = _Name()
        body = body | {"sampling_params": sampling | {"max_new_tokens": tokens}}
        named = body if limit_s is None else lambda: body | {"rid": name.fresh()}
        request = asyncio.ensure_future(self.requests.post(f"{lease.member.url}/generate", named))
        broken = asyncio.ensure_future(self.fleet.broken(lease))
        try:
            await asyncio.wait([request, broken], timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not request.done() and not broken.done():
                with contextlib.suppress(EngineError):
                    await self.control.abort(lease.member.url, name.last, timeout_s=END_TIMEOUT_S)
                await asyncio.wait([request, broken], timeout=END_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            return request.result() if request.done() and not broken.done() else None
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


class _Name:
    """The name of a request at a server, another one for each try. All are equally long: SGLang aborts by the beginning."""

    last = ""

    def fresh(self) -> str:
        """Returns the next name."""
        self.last = uuid.uuid4().hex
        return self.last


class _Record:
    """The routed experts and top-k tokens of the generation `done`, which gathers them over the answers it takes."""

    def __init__(
        self, input_ids: list[int], done: Generation, recorded: int | None, routing: RoutingShape | None, top_k: int
    ) -> None:
        wanted = recorded is not None
        self._done = done
        self._routing, self._top_k = (routing, top_k) if wanted else (None, 0)
        self._inputs = len(input_ids)
        self._url = ""  # of the last server that answered
        self._next = (recorded or 0) + (0 if done.routed_experts is None else len(done.routed_experts))

    def wish(self) -> dict[str, Any]:
        """Returns the fields of a request that ask for a record of what is not known yet."""
        experts = {"return_routed_experts": True, "routed_experts_start_len": self._next} if self._routing else {}
        return experts | ({"top_logprobs_num": self._top_k} if self._top_k else {})

    def read(self, meta: dict[str, Any], url: str) -> None:
        """Add the record in an answer, whose tokens are in already. Aborted requests that never ran have none."""
        done, self._url = self._done, url
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

    def close(self) -> None:
        """Make the record whole. Raises EngineError where a server that was asked to report experts never did."""
        if self._routing is not None:
            if self._done.routed_experts is None:
                raise EngineError(f"{self._url} reports no experts; was it started with --enable-return-routed-experts?")
            self._add(self._routing.unknown(self._left))

    def _add(self, experts: NDArray[np.signedinteger]) -> None:
        known = self._done.routed_experts
        self._done.routed_experts = experts if known is None else np.concatenate([known, experts])
        self._next += len(experts)

    @property
    def _left(self) -> int:
        """Returns how many tokens there are whose experts are not known, but for the last one."""
        return self._inputs + len(self._done.token_ids) - 1 - self._next


def _sampled(answer: dict[str, Any]) -> int:
    return len(answer["output_ids"])


def _read(answer: dict[str, Any], url: str, *, truncated: bool) -> Generation:
    """Returns the tokens of one answer, with their supports and log-probs among these where `truncated`.

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
