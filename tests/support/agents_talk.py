"""Episodes of an agent that calls a tool, as requests."""

from __future__ import annotations

import asyncio

from tests.support.agents import QUESTION, Play, echo, hermes, results

CALL = "I add.\n" + hermes("add", '{"a": 1, "b": 1}')
TWO = CALL + "\n" + hermes("add", '{"a": 2, "b": 2}')


def roles(turns) -> list[str]:
    return [turn.role for turn in turns]


def run(coroutine):
    return asyncio.run(coroutine)


async def two_turns(play: Play):
    """An episode of a call and an answer, sent back as it came."""
    first = await play.ask(QUESTION)
    history = [*QUESTION, echo(first), *results(first, *["2"] * len(first.calls))]
    return first, await play.ask(history), history
