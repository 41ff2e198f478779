"""An engine that says its lines, a reader of Hermes calls, and the pieces of an attempt, for the tests of conversations."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ctpo_megatron.agents.conversation.conversation import Bounds, Conversation
from ctpo_megatron.agents.conversation.trajectory import trajectory_of
from ctpo_megatron.agents.conversation.tree import Tree
from ctpo_megatron.agents.protocols import AgentAnswer, AgentRequest, Message
from ctpo_megatron.rollout.chat import ChatTokenizer
from ctpo_megatron.rollout.protocols import Sampling
from ctpo_megatron.types import Generation, Parsed, ParsedCall, Trajectory
from tests.support.trajectories import ATTEMPT

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
QUESTION: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


def hermes(name: str, arguments: str) -> str:
    """A call as Hermes and Qwen write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Hermes:
    """Reads reasoning and calls; what is no JSON stays content."""

    def parse(self, text: str, tools: Sequence[dict[str, Any]]) -> Parsed:
        thought, found, rest = text.removeprefix("<think>").partition("</think>")
        reasoning, text = (thought.strip("\n"), rest.lstrip("\n")) if found else (None, text)
        calls: list[ParsedCall] = []

        def take(match: re.Match[str]) -> str:
            try:
                said = json.loads(match[1])
            except ValueError:
                return match[0]
            calls.append(ParsedCall(said["name"], match[1].partition('"arguments":')[2].strip()[:-1].strip()))
            return ""

        content = _CALL.sub(take, text) if tools else text
        return Parsed(content.strip("\n") if calls else content, reasoning, tuple(calls))


@dataclass
class Engine:
    """Says its lines in turn; a line's log-probs tell which one it is, and its later half is of a newer version.

    `pause`: what each generation waits for. `log`: prompts, and what was sampled after each.
    """

    chat: ChatTokenizer
    lines: list[str]
    log: list[tuple[list[int], Generation]] = field(default_factory=list)
    pause: asyncio.Event | None = None
    fails: int = 0

    async def generate(self, input_ids: list[int], done: Generation, **options: Any) -> Generation:
        number = len(self.log)
        ids = self.chat.assistant_ids(self.lines[number % len(self.lines)])
        whole = Generation(
            ids, [-(number + place / 4096) for place in range(len(ids))], [number + (2 * p >= len(ids)) for p in range(len(ids))]
        )
        if not done.token_ids:  # a part is there before the rest is waited for
            done.append(_part(whole, 0, 1))
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no server is left")
        if self.pause is not None:
            await self.pause.wait()
        allowed = options["max_new_tokens"]
        done.append(_part(whole, len(done.token_ids), allowed))
        done.finish = "stop" if len(ids) <= allowed else "length"
        self.log.append((list(input_ids), done.copy()))
        return done


def _part(whole: Generation, first: int, last: int) -> Generation:
    return Generation(whole.token_ids[first:last], whole.rollout_logp[first:last], whole.versions[first:last])


class Play:
    """One attempt with an agent that the test is."""

    def __init__(
        self,
        chat: ChatTokenizer,
        *lines: str,
        turns: int = 100,
        tokens: int = 100_000,
        context: int = 1_000_000,
        deadline: float | None = None,
    ) -> None:
        self.chat, self.engine, self.tree = chat, Engine(chat, list(lines)), Tree("g00000000.0")
        self._bounds = Bounds(Sampling(1.0, turns, tokens), context, deadline)
        self.open()

    def open(self) -> None:
        """Begin, or go on after a restart, with what is in the tree."""
        self.conversation = Conversation(self.tree, self.engine, self.chat, Hermes(), self._bounds, session=3)

    def restart(self) -> None:
        self.tree = Tree.parse(self.tree.dump())
        self.open()

    async def ask(self, messages: Sequence[Message], **options: Any) -> AgentAnswer:
        return await self.conversation.complete(AgentRequest(tuple(messages), **{"tools": (ADD,), **options}))

    def trajectory(self, **options: Any) -> Trajectory:
        return trajectory_of(self.tree, self.chat, ATTEMPT, 0, **options)

    def check(self) -> Trajectory:
        """The trajectory, which holds what the engine logged, each token once, and nothing else as sampled."""
        made = self.trajectory()
        check_sampled(made, self.engine.log)
        return made


def check_sampled(made: Trajectory, log: Sequence[tuple[list[int], Generation]]) -> None:
    """Fails unless the samples of `made` hold what is in `log`, each turn once behind its prompt, and nothing else as sampled."""
    samples = [(made.prompt_ids, made.turns), *((each.prompt_ids, each.turns) for each in made.branches)]
    found = []
    for prompt, turns in samples:
        ids = list(prompt)
        for turn in turns:
            if turn.role == "assistant":
                found.append((ids.copy(), turn.token_ids, turn.rollout_logp, turn.versions))
            else:
                assert set(turn.versions) == {-1}
                assert set(turn.rollout_logp) == {0.0}
            ids += turn.token_ids
    logged = [(prompt, g.token_ids, g.rollout_logp, g.versions) for prompt, g in log]
    assert sorted(found) == sorted(logged)


def echo(answer: AgentAnswer) -> Message:
    """An answer as a client that changes nothing sends it back."""
    calls = [{"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in answer.calls]
    message: Message = {"role": "assistant", "content": answer.content}
    if answer.reasoning is not None:
        message["reasoning_content"] = answer.reasoning
    return message | ({"tool_calls": calls} if calls else {})


def results(answer: AgentAnswer, *outputs: str) -> list[Message]:
    """What tools said to the calls of an answer."""
    return [
        {"role": "tool", "tool_call_id": call.id, "content": output} for call, output in zip(answer.calls, outputs, strict=True)
    ]
