"""One attempt as its agent's requests make it: each request gets one sampled turn, put where its history says it belongs.

    request -> the same one again?  its turn          -> answer
               otherwise a new turn: the last turn that the history repeats, then what is new -> sampled, parsed -> answer

A body is the same request again where its client says so (a retry count), where the first one is still being sampled, or where
nobody has had its answer. Otherwise the client asks twice on purpose, and gets another sample.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ctpo_megatron.agents.conversation.cutting import Texts, cut_at
from ctpo_megatron.agents.conversation.messages import fitted, readable
from ctpo_megatron.agents.conversation.tree import SampledTurn, Tree, tokens
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, EpisodeOver, Message, RequestUnusable, ToolCall
from ctpo_megatron.errors import RenderError, RolloutError
from ctpo_megatron.rollout.assistant import check_generation
from ctpo_megatron.rollout.protocols import CallParser, Generator, Sampling, TalkChat
from ctpo_megatron.types import Generation, Status

_OPENED = re.compile(r"<(\w*think\w*|reasoning)>\s*$")  # a turn that begins with reasoning
_LOOKED_AT = 8  # tokens at the end of a prompt that may open it


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an attempt may use. Every sampled turn counts for `sampling.max_turns`, branches' too.

    `sampling.max_response_tokens` is what may follow the first prompt of each branch, `context` what a branch may have with it.
    """

    sampling: Sampling
    context: int
    deadline: float | None = None  # on the clock of the event loop


class Conversation:
    """An `agents.protocols.Episode`. `tree` is what was sampled before; its requests belong to `session`.

    `changed` is called when a turn is whole.
    """

    def __init__(
        self,
        tree: Tree,
        generator: Generator,
        chat: TalkChat,
        parser: CallParser,
        bounds: Bounds,
        *,
        session: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.tree = tree
        self._generator, self._chat, self._parser = generator, chat, parser
        self._bounds, self._session, self._changed = bounds, session, changed
        self._running: dict[int, asyncio.Task[None]] = {}
        self._closed = False

    async def complete(self, request: AgentRequest) -> AgentAnswer:
        """Returns the assistant's next turn (`agents.protocols.Episode.complete`).

        A turn that nobody waits for any more is sampled to its end all the same. What the engine raises comes out, and the same
        request goes on from what was sampled by then.
        """
        if self._closed:
            raise EpisodeOver("this attempt has ended")
        turn = self._again(request) or self._begin(request)
        if not turn.whole:
            task = self._running.get(turn.number)
            if task is None:
                task = self._running[turn.number] = asyncio.ensure_future(self._sample(turn))
                task.add_done_callback(partial(self._ended, turn.number))
            await self._wait(task)
        turn.delivered = True
        return self._answer(turn)

    async def close(self) -> None:
        """Take no more requests. A turn that is being sampled is left off; it is no part of the trajectory."""
        self._closed = True
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _wait(self, task: asyncio.Task[None]) -> None:
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # not whoever waits
                raise EpisodeOver("this attempt has ended") from None
            raise

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._running[number]
        if not task.cancelled():
            task.exception()  # whoever waits has it; where nobody does, the next same request tries again

    def _again(self, request: AgentRequest) -> SampledTurn | None:
        turn = self.tree.newest(_digest(request))
        if turn is None or (turn.delivered and not request.retries):
            return None
        return turn

    def _begin(self, request: AgentRequest) -> SampledTurn:
        """Returns a new turn at the place that the history of `request` has. Raises EpisodeOver, RequestUnusable."""
        if request.max_tokens is not None and request.max_tokens < 1:
            raise RequestUnusable(f"max_tokens is {request.max_tokens}; allowed: 1 or more")
        bounds, sampling, tree = self._bounds, self._bounds.sampling, self.tree
        if bounds.deadline is not None and asyncio.get_running_loop().time() >= bounds.deadline:
            raise self._over(Status.DEADLINE, "its time is over")
        if len(tree.turns) >= sampling.max_turns:
            raise self._over(Status.MAX_TURNS, f"all of its {sampling.max_turns} turns were sampled")
        way, said, tools, rendered = self._place(request)
        length = len(tokens(way)) + len(rendered)
        prompt = len(way[0].rendered if way else rendered)
        left = min(sampling.max_response_tokens + prompt, bounds.context) - length
        if left < 1:
            raise self._over(
                Status.LENGTH,
                f"its history has {length} tokens, {prompt} of them before the first turn; allowed: fewer than "
                f"{sampling.max_response_tokens} after these, and fewer than {bounds.context} in all",
            )
        turn = SampledTurn(
            number=len(tree.turns),
            after=way[-1].number if way else None,
            said=said,
            tools=[] if way else tools,
            rendered=rendered,
            digest=_digest(request),
            allowed=left if request.max_tokens is None else min(left, request.max_tokens),
            stop=[text for text in request.stop if text],
        )
        tree.refused = None
        tree.turns.append(turn)
        return turn

    def _place(self, request: AgentRequest) -> tuple[list[SampledTurn], list[Message], list[dict[str, Any]], list[int]]:
        """Returns the turns that a request repeats, what is said after them, its tools, and the ids of what is said."""
        messages, tools = fitted(request.messages, self.tree.call_ids()), readable(list(request.tools))
        try:
            self._parser.parse("", tools)
        except ValueError as error:
            raise RequestUnusable(f"tools: {error}") from error
        after, start = self.tree.find(messages, tools)
        way, said = self.tree.way(after), messages[start:]
        try:
            if way:
                end = way[-1].sampled.token_ids[-1]
                rendered = self._chat.tail_ids(messages[: start - 1], said, end=end, tools=tools, thinking=request.thinking)
            else:
                rendered = self._chat.talk_ids(said, tools=tools, thinking=request.thinking)
        except (RenderError, RecursionError) as error:
            raise RequestUnusable(f"these messages and tools cannot be written: {error}") from error
        return way, said, tools, rendered

    def _over(self, status: Status, why: str) -> EpisodeOver:
        self.tree.refused = status
        return EpisodeOver(f"this attempt takes no more: {why}")

    async def _sample(self, turn: SampledTurn) -> None:
        """Let the engine write `turn`, or the rest of it, and read what it says."""
        way, sampling = self.tree.way(turn.after), self._bounds.sampling
        recorded = sum(0 if each.sampled.routed_experts is None else len(each.sampled.routed_experts) for each in way)
        stop_ids = self._chat.stop_token_ids
        made = await self._generator.generate(
            [*tokens(way), *turn.rendered],
            turn.sampled,
            max_new_tokens=turn.allowed,
            temperature=sampling.temperature,
            truncation=sampling.truncation,
            stop_token_ids=stop_ids,
            session=self._session,
            recorded=recorded if sampling.record else None,
            deadline=self._bounds.deadline,
        )
        try:
            check_generation(made, turn.allowed, stop_ids)
        except RolloutError:
            turn.sampled = Generation()  # what the engine gave is what is wrong
            raise
        turn.sampled, text = cut_at(made, turn.stop, partial(self._chat.decode, special=True), set(stop_ids))
        turn.content, turn.whole = text, True  # whatever comes of reading it
        self._read(turn, text, (way[0] if way else turn).tools)
        self._changed()

    def _read(self, turn: SampledTurn, text: str, tools: Sequence[dict[str, Any]]) -> None:
        opened = _OPENED.search(self._chat.decode(turn.rendered[-_LOOKED_AT:], special=True))
        parsed = self._parser.parse(f"<{opened[1]}>{text}" if opened else text, tools)
        turn.content, turn.reasoning = parsed.content, parsed.reasoning or ""
        name = f"{self.tree.name}/{turn.number}"
        turn.calls = [
            ToolCall(f"call_{_short(f'{name}/{place}')}", call.name, call.arguments) for place, call in enumerate(parsed.calls)
        ]

    def _answer(self, turn: SampledTurn) -> AgentAnswer:
        sampled = turn.sampled
        finish = "length" if sampled.finish != "stop" else "tool_calls" if turn.calls else "stop"
        return AgentAnswer(
            id=_short(f"{self.tree.name}/{turn.number}"),
            content=turn.content or None,
            reasoning=turn.reasoning or None,
            calls=tuple(turn.calls),
            finish=finish,  # type: ignore[arg-type]
            prompt_ids=[*tokens(self.tree.way(turn.after)), *turn.rendered],
            token_ids=sampled.token_ids,
            logp=sampled.rollout_logp,
            versions=sampled.versions,
            texts=Texts(sampled.token_ids, partial(self._chat.decode, special=True)),
        )


def _digest(request: AgentRequest) -> str:
    """The request's own, or one of what it says."""
    if request.digest:
        return request.digest
    said = [request.messages, request.tools, request.max_tokens, request.stop, request.thinking]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()


def _short(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
