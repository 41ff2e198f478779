"""A tool and a reward whose callers are counted while they wait: what a report of a stall says of rollouts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ctpo_megatron.record.heartbeat import Depths
from ctpo_megatron.rollout.protocols import Outcome, PastCall, Reward, Score, ToolResult, ToolRunner
from ctpo_megatron.rollout.tools import opened
from ctpo_megatron.types import Prompt


@dataclass(frozen=True, slots=True)
class CountedTool:
    """`tool`, as before; `depths` counts who waits for it."""

    tool: ToolRunner
    depths: Depths

    async def run(self, code: str) -> ToolResult:
        """What the tool says of `code`."""
        with self.depths("the tool"):
            return await self.tool.run(code)

    @asynccontextmanager
    async def session(self, past: Sequence[PastCall]) -> AsyncIterator[ToolRunner]:
        """The tool of one attempt, its callers counted as well."""
        async with opened(self.tool, past) as tool:
            yield CountedTool(tool, self.depths)


@dataclass(frozen=True, slots=True)
class CountedReward:
    """`reward`, as before; `depths` counts who waits for it."""

    reward: Reward
    depths: Depths

    async def score(self, prompt: Prompt, outcome: Outcome) -> Score:
        """What an attempt is worth."""
        with self.depths("a verdict"):
            return await self.reward.score(prompt, outcome)
