"""An attempt whose turns are written down: what the endpoint's bench and tests play without a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, ToolCall


def scripted_answer(
    text: str | None = None, *calls: ToolCall, reasoning: str | None = None, finish: str = "", turn: int = 0
) -> AgentAnswer:
    """Returns a turn whose tokens are its characters, and an end."""
    said = "".join([reasoning or "", text or "", *(f"{each.name}({each.arguments})" for each in calls)])
    texts = [*said, "<end>"]
    return AgentAnswer(
        id=f"answer-{turn}",
        content=text,
        reasoning=reasoning,
        calls=tuple(calls),
        finish=finish or ("tool_calls" if calls else "stop"),  # type: ignore[arg-type]
        prompt_ids=range(7),
        token_ids=[ord(each[0]) for each in texts],
        logp=[-0.5 - 0.25 * (number % 3) for number in range(len(texts))],
        versions=[1] * len(texts),
        texts=texts,
    )


class ScriptedEpisode:
    """Answers with `turns`, the next one for each turn that the history has; the same request gets what it got before.

    `requests` are those that came, repeats too; `sampled` counts the turns that were made, `left` those that were left.
    """

    def __init__(self, turns: Sequence[AgentAnswer | Exception], *, takes_s: float = 0.0) -> None:
        self.requests: list[AgentRequest] = []
        self.sampled = 0
        self.left = 0
        self.hold: asyncio.Event | None = None
        self.came = asyncio.Event()
        self._turns = turns
        self._takes_s = takes_s
        self._made: dict[str, AgentAnswer] = {}

    async def complete(self, request: AgentRequest) -> AgentAnswer:
        """Returns the scripted turn, or raises it. What was begun is gone on with when the client comes again."""
        self.requests.append(request)
        self.came.set()
        if request.digest in self._made:
            return self._made[request.digest]
        turn = self._turns[sum(each["role"] == "assistant" for each in request.messages)]
        try:
            if self.hold is not None:
                await self.hold.wait()
            if self._takes_s:
                await asyncio.sleep(self._takes_s)
        except asyncio.CancelledError:
            self.left += 1
            raise
        if isinstance(turn, Exception):
            raise turn
        self.sampled += 1
        self._made[request.digest] = turn
        return turn
