"""Agents that are counted while they play: what a report of a stall says of them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from ctpo_megatron.agents.play.runner import AgentRunner, Answer
from ctpo_megatron.agents.play.task import AgentTask
from ctpo_megatron.record.heartbeat import Depths


@dataclass(frozen=True, slots=True)
class CountedRunner:
    """`runner`, as before; `depths` counts the attempts that it plays."""

    runner: AgentRunner
    depths: Depths

    @property
    def place(self) -> AbstractAsyncContextManager[object]:
        """Implement AgentRunner.place."""
        return self.runner.place

    async def play(self, task: AgentTask) -> Answer:
        """Implement AgentRunner.play."""
        with self.depths("an agent"):
            return await self.runner.play(task)

    async def close(self) -> None:
        """Implement AgentRunner.close."""
        await self.runner.close()
