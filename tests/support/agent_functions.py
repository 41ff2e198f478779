"""Agents for tests, called in processes of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

from ctpo_megatron.agents.play.task import AgentTask


async def echo(task: AgentTask) -> str:
    print("printed, which is no answer")
    return f"{task.attempt} {task.question} {os.getpid()}"


def sync(task: AgentTask) -> None:
    assert task.openai_url == f"{task.anthropic_url}/v1"


async def raises(task: AgentTask) -> str:
    raise ValueError(f"no {task.question}")


async def number(_task: AgentTask) -> int:
    return 5


async def dies(_task: AgentTask) -> str:
    os._exit(7)


async def waits(task: AgentTask) -> str:
    await asyncio.Event().wait()
    return task.attempt


def hangs(task: AgentTask) -> str:
    if task.question != "hang":
        return str(os.getpid())
    threading.Event().wait()
    return ""


async def secrets(_task: AgentTask) -> str:
    return " ".join(sorted(os.environ))


async def noisy(_task: AgentTask) -> str:
    sys.stderr.write("x" * 3_000_000)
    return "done"


class Counts:
    """One object plays all attempts of its process."""

    def __init__(self, of: dict[str, int]) -> None:
        self._of, self._played = of, 0

    async def __call__(self, task: AgentTask) -> dict[str, object]:
        self._played += 1
        return {"text": task.question, "reward": self._of["reward"] * self._played}


class Idle:
    """Not to be called."""


def greets(task: AgentTask, name: str) -> str:
    return f"{name}, {task.question}"


no_function = 3
